"""Byte-level BPE on tiktoken's core: Qwen v1's own tokenizer, and five times as fast as ``tokenizers`` for the others.

tiktoken merges the neighbours whose joined bytes have the lowest id; ``tokenizers`` follows ``merges.txt`` line by line.
Both give the same ids when every token's bytes, merged by the lower ids alone, end in exactly the pair its line names.
Qwen's files fulfil that (``merges.txt`` was derived from ``qwen.tiktoken``); :func:`merges_follow_ids` checks others.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from research.core.text.save import save_bytelevel, tokenizer_json
from research.core.text.tokenizer import Stream, Tokenizer
from research.core.text.vocabulary import Vocabulary

# sha256 over the published merges: the check below takes a second, and its result for this list is known.
QWEN_MERGES = "40e8e91663539bae3dfbf9ce44d82f542a3bcae22d931827b1ec32f091582140"

_LONG_BLANK = re.compile(r"\s{200000}")  # tiktoken's matcher overflows its stack on longer runs of white space


class ByteLevelTokenizer(Tokenizer):
    """All four families' tokenizer; see :class:`Tokenizer`."""

    def __init__(self, vocabulary: Vocabulary, family: str, chat_template: str | None = None):
        self.vocabulary, self.family, self.source = vocabulary, family, vocabulary.source
        self.chat_template = chat_template
        self._set_specials(vocabulary.added, vocabulary.source)
        self.vocab_size = max([len(vocabulary.tokens) - 1, *self.special_tokens.values()]) + 1
        self.fingerprint = vocabulary.fingerprint()
        self._complete = sum(len(token) == 1 for token in vocabulary.tokens) == 256  # else some bytes have no token
        self._exact = self._complete and (vocabulary.merges is None or merges_follow_ids(vocabulary))
        self._start()

    def _start(self) -> None:
        """What is rebuilt, not pickled: the merging core and the bytes of each id."""
        import tiktoken

        tokens = self.vocabulary.tokens
        self._bytes = dict(enumerate(tokens)) | {index: name.encode() for name, index in self.special_tokens.items()}
        self._lengths = {index: len(token) for index, token in self._bytes.items()}
        if self._exact:
            ranks = {token: index for index, token in enumerate(tokens)}
            core = tiktoken.Encoding("qwen", pat_str=self.vocabulary.pattern, mergeable_ranks=ranks, special_tokens={})
            self._merge = core.encode_ordinary
        else:
            self._merge = self._merge_slowly

    def __getstate__(self) -> dict:
        dropped = ("_bytes", "_lengths", "_merge", "_library", "_patterns")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._patterns = {}
        self._start()

    @cached_property
    def _library(self):
        """The same vocabulary in ``tokenizers``, without control tokens: for what tiktoken cannot do."""
        from tokenizers import Tokenizer as Library

        return Library.from_str(tokenizer_json(self.vocabulary, with_added=False))

    def _merge_slowly(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def _normal(self, text: str) -> str:
        if text.isascii() or not self.vocabulary.nfc:
            return text
        try:
            if unicodedata.is_normalized("NFC", text):
                text.encode()
                return text
            if self.vocabulary.nfc == "text":
                return unicodedata.normalize("NFC", text)
            # The library's tables are older than Python's and differ for a few recent combining marks.
            return self._library.normalizer.normalize_str(text)
        except UnicodeEncodeError:  # a lone surrogate, which JSON can carry and UTF-8 cannot
            return self._normal(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def _before_cutting(self, text: str) -> str:
        return self._normal(text) if self.vocabulary.nfc == "text" else text

    def _encode_plain(self, texts: Iterable[str]) -> list[list[int]]:
        merge, result = self._merge, []
        for text in texts:
            if not text.isascii():
                text = self._normal(text)
            if len(text) > 200_000 and _LONG_BLANK.search(text):
                result.append(self._merge_slowly(text))
            else:
                result.append(merge(text))
        return result

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        table, hidden = self._bytes, self.hidden_ids if skip_special else ()
        return b"".join([table.get(index, b"") for index in ids if index not in hidden]).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes.get(token_id, b"")

    def prefix_tokens(self, ids: Sequence[int], text: str, chars: int) -> int:
        if not self._complete:
            return sum(end <= chars for _, end in self._library.encode(text, add_special_tokens=False).offsets)
        left, count = len(text[:chars].encode("utf-8", "replace")), 0
        for index in ids:
            left -= self._lengths[index]
            if left < 0:
                break
            count += 1
        return count

    def stream(self, skip_special: bool = False) -> ByteStream:
        return ByteStream(self._bytes, self.hidden_ids if skip_special else frozenset())

    def save(self, folder: str | os.PathLike, template: str | None = None) -> None:
        save_bytelevel(self, Path(folder), template)


class ByteStream(Stream):
    """Streaming over an incremental UTF-8 decoder, which holds back unfinished characters."""

    def __init__(self, table: dict[int, bytes], hidden: frozenset[int]):
        self._table, self._hidden = table, hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "" if token_id in self._hidden else self._decoder.decode(self._table.get(token_id, b""))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def merges_follow_ids(vocabulary: Vocabulary) -> bool:
    """Whether merging by lowest id equals merging by the list: one line per token, in id order, reached from below."""
    ranks = {token: index for index, token in enumerate(vocabulary.tokens)}
    joined = [ranks[left + right] for left, right in vocabulary.merges]
    if joined != sorted(set(joined)):
        return False
    if merges_digest(vocabulary.merges) == QWEN_MERGES:
        return True
    return all(
        split_below(left + right, ranks, rank) == [left, right]
        for (left, right), rank in zip(vocabulary.merges, joined)
    )


def merges_digest(merges: list[tuple[bytes, bytes]]) -> str:
    digest = hashlib.sha256()
    for left, right in merges:
        digest.update(b"%d %d " % (len(left), len(right)) + left + right)
    return digest.hexdigest()


def split_below(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """The parts of ``token`` after merging, lowest id first, with ids below ``limit`` only."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda at: ranks.get(parts[at] + parts[at + 1], limit))
        if ranks.get(parts[best] + parts[best + 1], limit) >= limit:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts
