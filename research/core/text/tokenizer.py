"""The common interface of the tokenizers, and the choice of one by the files in a folder."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal

from research.core.errors import DataError, UserError, require_file
from research.core.text.specials import END_OF_TEXT, FAMILY_SPECIALS, IM_END, IM_START
from research.core.text.vocabulary import (
    CONFIG_FILE,
    JINJA_FILE,
    MERGES_FILE,
    TIKTOKEN_FILE,
    TOKENIZER_FILE,
    VOCAB_FILE,
    Added,
    read_json,
    read_tiktoken,
    read_tokenizer_json,
    read_vocab_merges,
)

Allowed = Literal["all"] | Collection[str]


class Tokenizer(ABC):
    """Text to ids and back. Control tokens written inside a text stay text unless ``allowed_special`` names them.

    ``special_tokens`` maps every added token to its id, those that decoding shows (``<tool_call>``) included;
    ``vocab_size`` counts ids in use (the embedding matrix may be larger); ``eos_id`` and ``pad_id`` are
    ``<|endoftext|>``. Can be pickled, and used in forked worker processes.
    """

    family: str
    vocab_size: int
    special_tokens: dict[str, int]
    fingerprint: str
    source: str
    chat_template: str | None  # the Jinja text that stood beside the vocabulary

    def _set_specials(self, added: dict[str, Added], where: str) -> None:
        self.special_tokens = {name: token.id for name, token in sorted(added.items(), key=lambda item: item[1].id)}
        self.hidden_ids = frozenset(token.id for token in added.values() if token.special)
        missing = [name for name in (END_OF_TEXT, IM_START, IM_END) if name not in added]
        if missing:
            raise DataError(
                f"control tokens {', '.join(missing)} are not in this vocabulary: not one of Qwen's",
                where=where,
                hint="the right MODEL for this folder, or the folder of a Qwen vocabulary",
            )
        self.eos_id = self.pad_id = self.special_tokens[END_OF_TEXT]
        self.im_start_id = self.special_tokens[IM_START]
        self.im_end_id = self.special_tokens[IM_END]
        self._patterns: dict[frozenset[str], re.Pattern] = {}
        self._own: dict[str, tuple[int | str, ...]] = {}

    def _allowed(self, allowed_special: Allowed) -> frozenset[str]:
        if isinstance(allowed_special, str):
            if allowed_special != "all":
                raise UserError(f"allowed_special is 'all' or a list of control tokens, not {allowed_special!r}")
            return frozenset(self.special_tokens)
        return frozenset(name for name in allowed_special if name in self.special_tokens)

    def control_pattern(self, allowed: frozenset[str]) -> re.Pattern:
        """Matches any of ``allowed`` (one group), the longest first, as both libraries do."""
        pattern = self._patterns.get(allowed)
        if pattern is None:
            names = sorted(allowed, key=len, reverse=True)
            pattern = self._patterns[allowed] = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        return pattern

    def cut(self, text: str) -> list[int | str]:
        """``text`` cut at every control token: their ids, and the plain text between."""
        parts = self.control_pattern(frozenset(self.special_tokens)).split(text)
        return [self.special_tokens[part] if at % 2 else part for at, part in enumerate(parts) if part]

    def cut_own(self, text: str) -> list[int | str]:
        """:meth:`cut` of a template's own text, of which there are few: kept for the next time."""
        pieces = self._own.get(text)
        if pieces is None:
            pieces = self._own[text] = self.cut(text)
        return pieces

    def encode(self, text: str, allowed_special: Allowed = ()) -> list[int]:
        """Ids of ``text``. Control tokens in ``allowed_special`` become their id, all others are plain text."""
        return self.encode_batch([text], allowed_special)[0]

    def encode_batch(self, texts: Sequence[str], allowed_special: Allowed = ()) -> list[list[int]]:
        """Ids of each text, as :meth:`encode` of it."""
        allowed = self._allowed(allowed_special)
        if not allowed:
            return self._encode_plain(texts)
        return self._encode_with(texts, allowed)

    def _encode_with(self, texts: Sequence[str], allowed: frozenset[str]) -> list[list[int]]:
        """Cut at the allowed control tokens and encode what lies between as plain text."""
        pattern, rows, plain = self.control_pattern(allowed), [], []
        for text in texts:
            parts = pattern.split(self._before_cutting(text))
            rows.append(parts)
            plain += parts[::2]
        encoded = iter(self._encode_plain(plain))
        result = []
        for parts in rows:
            ids = list(next(encoded))
            for name in parts[1::2]:
                ids.append(self.special_tokens[name])
                ids += next(encoded)
            result.append(ids)
        return result

    def _before_cutting(self, text: str) -> str:
        return text

    @abstractmethod
    def _encode_plain(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text with every control token taken as text."""

    @abstractmethod
    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ``ids``; broken UTF-8 becomes U+FFFD, ids without a token (padding rows) become nothing.

        ``skip_special`` leaves control tokens out, but not the visible ones (``<tool_call>``), as transformers does.
        """

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which may be part of a character; of an id without a token none."""
        return self.decode([token_id]).encode()

    @abstractmethod
    def prefix_tokens(self, ids: Sequence[int], text: str, chars: int) -> int:
        """How many of ``ids`` (plain encoding of ``text``) lie wholly in its first ``chars`` characters."""

    @abstractmethod
    def stream(self, skip_special: bool = False) -> Stream:
        """A decoder that takes ids one by one."""

    @abstractmethod
    def save(self, folder: str | os.PathLike, template: str | None = None) -> None:
        """Write the files transformers' ``AutoTokenizer`` loads; ``template`` is the Jinja text of the chat template."""

    def eos_ids(self, chat: bool = True) -> list[int]:
        """Ids that end an answer: chat ``[<|im_end|>, <|endoftext|>]``, base ``[<|endoftext|>]``."""
        return [self.im_end_id, self.eos_id] if chat else [self.eos_id]

    def __len__(self) -> int:
        return self.vocab_size


class Stream(ABC):
    """Text of ids that arrive one by one; what is returned joins to ``decode`` of them all, never a broken character."""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes, perhaps none yet."""

    @abstractmethod
    def flush(self) -> str:
        """What is left at the end: U+FFFD for bytes that never became a character."""


def has_tokenizer(folder: str | os.PathLike) -> bool:
    """Whether ``folder`` holds a vocabulary of a form :func:`load_tokenizer` reads."""
    return _kind(Path(folder), "auto") is not None


def load_tokenizer(folder: str | os.PathLike, family: str = "auto") -> Tokenizer:
    """The tokenizer of a folder: ``qwen.tiktoken`` for Qwen v1, else ``tokenizer.json``, else ``vocab.json`` + ``merges.txt``.

    ``family`` is ``qwen``, ``qwen1_5``, ``qwen2``, ``qwen2_5`` or ``auto`` (by the files; Qwen2 where they fit several).
    Raises :class:`DataError` when there is no vocabulary, it is damaged, or it is another family's.
    """
    from research.core.text.bytelevel import ByteLevelTokenizer
    from research.core.text.library import LibraryTokenizer

    folder = Path(folder).expanduser()
    if family != "auto" and family not in FAMILY_SPECIALS:
        raise UserError(f"unknown family {family!r}", hint="one of " + ", ".join(FAMILY_SPECIALS))
    if not folder.is_dir():
        raise DataError("vocabulary folder not found", where=folder, hint="TOKENIZER=<folder with the vocabulary>")
    kind = _kind(folder, family)
    if kind is None:
        raise _nothing(folder, family)
    name = ("qwen" if kind == TIKTOKEN_FILE else "qwen2") if family == "auto" else family
    fields = _config_fields(folder)
    if kind == TIKTOKEN_FILE:
        vocabulary = read_tiktoken(folder / TIKTOKEN_FILE)
    elif kind == TOKENIZER_FILE:
        vocabulary = read_tokenizer_json(folder / TOKENIZER_FILE)
    else:
        vocabulary = read_vocab_merges(folder / VOCAB_FILE, folder / MERGES_FILE, name)
    template = _template_text(folder, fields)
    if isinstance(vocabulary, dict):
        return LibraryTokenizer(vocabulary, name, source=str(folder / kind), fields=fields, chat_template=template)
    vocabulary.fields = fields
    if family == "auto" and "<tool_call>" in vocabulary.added:
        name = "qwen2_5"
    return ByteLevelTokenizer(vocabulary, name, chat_template=template)


def tokenizer_of_files(
    family: str, vocabulary: str | os.PathLike, merges: str | os.PathLike | None = None
) -> Tokenizer:
    """The tokenizer of files given one by one, whatever their names: of Qwen v1 its ``qwen.tiktoken``, of the later
    families ``vocab.json`` and ``merges.txt``. A folder in place of the first is :func:`load_tokenizer`'s.
    """
    from research.core.text.bytelevel import ByteLevelTokenizer

    if Path(vocabulary).expanduser().is_dir():
        return load_tokenizer(vocabulary, family)
    path = require_file(vocabulary, "vocabulary file")
    if family == "qwen":
        return ByteLevelTokenizer(read_tiktoken(path), family)
    return ByteLevelTokenizer(read_vocab_merges(path, require_file(merges, "merges file"), family), family)


def _kind(folder: Path, family: str) -> str | None:
    """The file that decides. Qwen v1 reads only its own file, except for a vocabulary this repository has built."""
    tiktoken = (folder / TIKTOKEN_FILE).is_file()
    own = _config_fields(folder).get("vocabulary") == "builtin" if (folder / TOKENIZER_FILE).is_file() else False
    if family == "qwen" and not own:
        return TIKTOKEN_FILE if tiktoken else None
    if (folder / TOKENIZER_FILE).is_file():
        return TOKENIZER_FILE
    if (folder / VOCAB_FILE).is_file() and (folder / MERGES_FILE).is_file():
        return VOCAB_FILE
    return TIKTOKEN_FILE if tiktoken and family == "auto" else None


def _nothing(folder: Path, family: str) -> DataError:
    if family == "qwen" and any((folder / name).is_file() for name in (TOKENIZER_FILE, VOCAB_FILE)):
        return DataError(
            f"this is the vocabulary of Qwen1.5 or later; Qwen v1 reads {TIKTOKEN_FILE}",
            where=folder,
            hint="another MODEL or --family, or the folder of a Qwen v1 checkpoint",
        )
    if family not in ("qwen", "auto") and (folder / TIKTOKEN_FILE).is_file():
        return DataError(
            f"this is the vocabulary of Qwen v1 ({TIKTOKEN_FILE}); {family} reads {TOKENIZER_FILE} or "
            f"{VOCAB_FILE} + {MERGES_FILE}",
            where=folder,
            hint="MODEL of the family qwen, or --family qwen",
        )
    for name, other in ((VOCAB_FILE, MERGES_FILE), (MERGES_FILE, VOCAB_FILE)):
        if (folder / name).is_file():
            return DataError(f"{name} is here, {other} is not", where=folder, hint=f"put {other} beside it")
    files = TIKTOKEN_FILE if family == "qwen" else f"{TOKENIZER_FILE}, {VOCAB_FILE} + {MERGES_FILE}"
    return DataError(f"no vocabulary here ({files})", where=folder, hint="TOKENIZER=<folder with the vocabulary>")


def _config_fields(folder: Path) -> dict:
    path = folder / CONFIG_FILE
    fields = read_json(path) if path.is_file() else {}
    if not isinstance(fields, dict):
        raise DataError("not a JSON object", where=path)
    return fields


def _template_text(folder: Path, fields: dict) -> str | None:
    """The Jinja text beside the vocabulary: ``chat_template.jinja``, else ``chat_template`` of the configuration."""
    path = folder / JINJA_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    text = fields.get("chat_template")
    return text if isinstance(text, str) else None
