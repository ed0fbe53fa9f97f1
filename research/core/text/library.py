"""A ``tokenizer.json`` of another kind, run by the ``tokenizers`` library (CodeQwen1.5: converted SentencePiece)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from research.core.errors import DataError
from research.core.text.save import write_text
from research.core.text.tokenizer import Stream, Tokenizer
from research.core.text.vocabulary import CONFIG_FILE, TOKENIZER_FILE, Added, token_bytes


class LibraryTokenizer(Tokenizer):
    """See :class:`Tokenizer`. Keeps one instance of the library's tokenizer per set of control tokens it may see,
    because its own switch (``encode_special_tokens``) leaves added tokens that are not marked special active.
    """

    def __init__(self, data: dict, family: str, source: str, fields: dict, chat_template: str | None = None):
        self.family, self.source, self.fields, self.chat_template = family, source, fields, chat_template
        added = {}
        for token in data.get("added_tokens") or []:
            added[token["content"]] = Added(token["id"], token.get("special", False))
        self._data = data | {"truncation": None, "padding": None, "post_processor": None}
        self._set_specials(added, source)
        self._instances: dict[frozenset[str], object] = {}
        self._token_bytes: dict[int, bytes] | None = None
        full = self._instance(frozenset(added))
        self.vocab_size = max([*full.get_vocab(with_added_tokens=True).values()]) + 1
        self.fingerprint = hashlib.sha256(json.dumps(self._data, sort_keys=True).encode()).hexdigest()
        self._check_plain()

    def _check_plain(self) -> None:
        """A control token that plain text can produce would let a user write one."""
        for name, ids in zip(self.special_tokens, self._encode_plain(self.special_tokens)):
            if self.special_tokens[name] in ids:
                raise DataError(f"plain text {name} becomes the control token itself", where=self.source)

    def _instance(self, allowed: frozenset[str]):
        from tokenizers import Tokenizer as Library

        if allowed not in self._instances:
            kept = [token for token in self._data.get("added_tokens") or [] if token["content"] in allowed]
            try:
                instance = Library.from_str(json.dumps(self._data | {"added_tokens": kept}))
            except Exception as error:  # the library raises a bare Exception
                raise DataError(f"tokenizer.json cannot be read: {error}", where=self.source) from None
            self._instances[allowed] = instance
        return self._instances[allowed]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_instances": {}, "_patterns": {}, "_token_bytes": None}

    def _encode_plain(self, texts: Iterable[str]) -> list[list[int]]:
        return self._encode_with(list(texts), frozenset())

    def _encode_with(self, texts: Sequence[str], allowed: frozenset[str]) -> list[list[int]]:
        texts = [_whole(text) for text in texts]
        rows = self._instance(allowed).encode_batch_fast(texts, add_special_tokens=False)
        return [row.ids for row in rows]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        full = self._instance(frozenset(self.special_tokens))
        return full.decode(list(ids), skip_special_tokens=skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        if self._token_bytes is None:
            named = self._instance(frozenset(self.special_tokens)).get_vocab(with_added_tokens=True)
            byte_level = '"ByteLevel"' in json.dumps(self._data.get("decoder"))
            self._token_bytes = {
                index: text.encode() if text in self.special_tokens else _spelled(text, byte_level)
                for text, index in named.items()
            }
        return self._token_bytes.get(token_id, b"")

    def prefix_tokens(self, ids: Sequence[int], text: str, chars: int) -> int:
        row = self._instance(frozenset()).encode(_whole(text), add_special_tokens=False)
        return sum(end <= chars for _, end in row.offsets)

    def stream(self, skip_special: bool = False) -> LibraryStream:
        return LibraryStream(self, skip_special)

    def save(self, folder: str | os.PathLike, template: str | None = None) -> None:
        folder = Path(folder)
        template = self.chat_template if template is None else template
        fields = dict(self.fields) or {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
        if template is not None:
            fields["chat_template"] = template
        write_text(folder / TOKENIZER_FILE, json.dumps(self._data, ensure_ascii=False))
        write_text(folder / CONFIG_FILE, json.dumps(fields, ensure_ascii=False, indent=2) + "\n")


class LibraryStream(Stream):
    """Decodes a short window again with each id and gives out what has become certain."""

    def __init__(self, tokenizer: LibraryTokenizer, skip_special: bool):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special)
        self._ids: list[int] = []
        self._done = ""  # text of the window that was given out

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._done) :]
        if len(self._ids) >= 16:
            # The last ids are context enough for a leading space, unless they begin inside a character.
            tail = self._decode(self._ids[-4:])
            if text.endswith(tail) and "\ufffd" not in tail:
                self._ids, text = self._ids[-4:], tail
        self._done = text
        return new

    def flush(self) -> str:
        new = self._decode(self._ids)[len(self._done) :]
        self._ids, self._done = [], ""
        return new


def _spelled(text: str, byte_level: bool) -> bytes:
    """Bytes of a vocabulary entry: of the byte-level alphabet, or of SentencePiece's spelling."""
    if byte_level:
        return token_bytes(text)
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace("\u2581", " ").encode()


def _whole(text: str) -> str:
    """``text`` with lone surrogates, which UTF-8 cannot carry, replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
