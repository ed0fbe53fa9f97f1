"""Reading vocabulary files: ``qwen.tiktoken``, ``vocab.json`` + ``merges.txt``, ``tokenizer.json``.

Each reader returns a :class:`Vocabulary` or raises :class:`DataError` naming file and line.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from research.core.errors import DataError
from research.core.text.specials import BASE_VOCAB, FAMILY_SPECIALS, PATTERN, VISIBLE

TIKTOKEN_FILE, VOCAB_FILE, MERGES_FILE = "qwen.tiktoken", "vocab.json", "merges.txt"
TOKENIZER_FILE, CONFIG_FILE, ADDED_FILE = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
JINJA_FILE = "chat_template.jinja"


@dataclass
class Added:
    """A token added after the base vocabulary. ``special``: hidden when decoding skips control tokens."""

    id: int
    special: bool = True
    plain: bool = True  # matches its exact text wherever it stands, before normalisation


@dataclass
class Vocabulary:
    """A byte-level BPE vocabulary. ``tokens[i]`` are the bytes of id ``i``; merges are tried in the order of ``merges``."""

    tokens: list[bytes]
    added: dict[str, Added]
    merges: list[tuple[bytes, bytes]] | None = None  # None: merge by the lowest id of the joined bytes (tiktoken)
    pattern: str = PATTERN
    nfc: str = "pieces"  # NFC each piece between control tokens (transformers) | "text" before cutting (Qwen v1) | ""
    source: str = ""
    fields: dict = field(default_factory=dict)  # tokenizer_config.json as read

    def fingerprint(self) -> str:
        """sha256 over the tokens in id order, the pattern, the normalisation and the control tokens."""
        digest = hashlib.sha256()
        for token in self.tokens:
            digest.update(len(token).to_bytes(4, "little"))
            digest.update(token)
        rest = [self.pattern, self.nfc, sorted((name, token.id) for name, token in self.added.items())]
        digest.update(json.dumps(rest).encode())
        return digest.hexdigest()


@lru_cache(maxsize=1)
def byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in ``vocab.json`` (GPT-2's byte-level alphabet).

    Printable Latin-1 letters stand for themselves; the other 68 bytes get the code points from 256 on, in order.
    """
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return {byte: chr(byte) if byte in own else chr(next(spare)) for byte in range(256)}


@lru_cache(maxsize=1)
def letter_table() -> dict[int, int]:
    """``str.translate`` table from the byte-level alphabet to Latin-1, whose encoding gives the bytes back.

    Latin-1 characters that are not letters of the alphabet go to one that Latin-1 cannot encode.
    """
    return dict.fromkeys(range(256), 0x2603) | {ord(letter): byte for byte, letter in byte_letters().items()}


def token_bytes(text: str) -> bytes:
    """Bytes of a token written in the byte-level alphabet; raises ``ValueError`` for another letter."""
    return text.translate(letter_table()).encode("latin-1")


def token_text(token: bytes) -> str:
    """The byte-level alphabet's spelling of a token."""
    letters = byte_letters()
    return "".join([letters[byte] for byte in token])


def read_json(path: Path) -> object:
    """Parsed JSON, or :class:`DataError` naming the line and column."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError("file not found", where=path) from None
    except json.JSONDecodeError as bad:
        raise DataError(
            f"not valid JSON: {bad.msg} (column {bad.colno})", where=f"{path}:{bad.lineno}", hint=_DAMAGED
        ) from None
    except UnicodeDecodeError as bad:
        raise DataError(f"not UTF-8 text: {bad.reason} at byte {bad.start}", where=path, hint=_DAMAGED) from None


_DAMAGED = "the file is damaged or cut off; download it again"


def read_tiktoken(path: Path, family: str = "qwen") -> Vocabulary:
    """``qwen.tiktoken``: one ``base64(token) id`` a line, ids 0 .. 151642 in order."""
    tokens: list[bytes] = []
    seen: dict[bytes, int] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text, rank = line.split()
                token = base64.b64decode(text, validate=True)
                if int(rank) != len(tokens):
                    raise DataError(
                        f"id {int(rank)} where {len(tokens)} should follow", where=f"{path}:{number}", hint=_DAMAGED
                    )
            except (ValueError, binascii.Error):
                raise DataError(
                    "not a line of `base64 id`",
                    where=f"{path}:{number}",
                    hint=_DAMAGED + "; or it is not a tiktoken file",
                ) from None
            if token in seen:
                raise DataError(f"same token as line {seen[token]}", where=f"{path}:{number}", hint=_DAMAGED)
            seen[token] = number
            tokens.append(token)
    if len(tokens) != BASE_VOCAB:
        raise DataError(
            f"{len(tokens):,} tokens, Qwen's vocabulary has {BASE_VOCAB:,}",
            where=f"{path}:{len(tokens)}",
            hint=_DAMAGED,
        )
    added = {name: Added(BASE_VOCAB + index) for index, name in enumerate(FAMILY_SPECIALS[family])}
    return Vocabulary(tokens, added, nfc="text", source=str(path))


def read_vocab_merges(path: Path, merges_path: Path, family: str) -> Vocabulary:
    """``vocab.json`` + ``merges.txt``, control tokens from the files beside the first or, without such, the family's own."""
    ids = read_json(path)
    if not isinstance(ids, dict) or not all(type(index) is int for index in ids.values()):
        raise DataError("not a JSON object of token: id", where=path, hint=_DAMAGED)
    added = _listed_added(path.parent)
    if not added:
        if len(ids) != BASE_VOCAB:
            raise DataError(
                f"{len(ids):,} tokens, the vocabulary of {family} has {BASE_VOCAB:,}; "
                "and no file here names the control tokens",
                where=path,
                hint=f"the right MODEL, a complete {VOCAB_FILE}, or {CONFIG_FILE} / {ADDED_FILE} beside it",
            )
        names = FAMILY_SPECIALS[family]
        added = {name: Added(BASE_VOCAB + index, name not in VISIBLE) for index, name in enumerate(names)}
    return assemble(ids, _read_merges(merges_path), added, path, merges_path)


def _read_merges(path: Path) -> list[tuple[str, str]]:
    pairs = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError("file not found", where=path, hint=f"{VOCAB_FILE} needs it") from None
    except UnicodeDecodeError as bad:
        raise DataError(f"not UTF-8 text: {bad.reason} at byte {bad.start}", where=path, hint=_DAMAGED) from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, blank, right = line.rstrip("\r").partition(" ")
        if not blank or not left or not right or " " in right:
            raise DataError("not a line of two tokens", where=f"{path}:{number}", hint=_DAMAGED)
        pairs.append((left, right))
    return pairs


def _listed_added(folder: Path) -> dict[str, Added]:
    """Added tokens named by ``tokenizer_config.json`` (``added_tokens_decoder``) and ``added_tokens.json``."""
    added: dict[str, Added] = {}
    config = folder / CONFIG_FILE
    if config.is_file():
        fields = read_json(config)
        listed = fields.get("added_tokens_decoder") if isinstance(fields, dict) else None
        for index, token in (listed or {}).items():
            try:
                added[token["content"]] = _added(int(index), token)
            except (TypeError, KeyError, ValueError):
                raise DataError(f"added_tokens_decoder: {index} is not a token", where=config) from None
    path = folder / ADDED_FILE
    if path.is_file():
        listed = read_json(path)
        if not isinstance(listed, dict) or not all(type(index) is int for index in listed.values()):
            raise DataError("not a JSON object of token: id", where=path)
        for name, index in listed.items():
            if added.setdefault(name, Added(index, name not in VISIBLE)).id != index:
                raise DataError(f"{name} is {index} here and {added[name].id} in {CONFIG_FILE}", where=path)
    return added


def _added(index: int, token: dict) -> Added:
    plain = not any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word", "normalized"))
    return Added(index, bool(token.get("special", False)), plain)


def read_tokenizer_json(path: Path) -> Vocabulary | dict:
    """``tokenizer.json``: a :class:`Vocabulary` when it is Qwen's kind (NFC, Qwen's pattern, byte-level BPE), else the
    parsed file, for the library to interpret (CodeQwen1.5 carries a converted SentencePiece model).
    """
    data = read_json(path)
    model = data.get("model") if isinstance(data, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise DataError("no vocabulary in it (model.vocab)", where=path, hint=_DAMAGED)
    if not _is_qwen_kind(data):
        return data
    try:
        added = {token["content"]: _added(token["id"], token) for token in data.get("added_tokens") or []}
        pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    except (TypeError, KeyError):
        raise DataError("added_tokens or model.merges is not of the known form", where=path, hint=_DAMAGED) from None
    if not all(token.plain for token in added.values()):
        return data
    return assemble(model["vocab"], pairs, added, path, path)


def _is_qwen_kind(data: dict) -> bool:
    model, steps = data["model"], (data.get("pre_tokenizer") or {}).get("pretokenizers") or []
    odd = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    return (
        model.get("type", "BPE") == "BPE"
        and not any(model.get(name) for name in odd)
        and (data.get("normalizer") or {}).get("type") == "NFC"
        and len(steps) == 2
        and steps[0].get("type") == "Split"
        and steps[0].get("pattern") == {"Regex": PATTERN}
        and str(steps[0].get("behavior")).lower() == "isolated"
        and not steps[0].get("invert")
        and steps[1].get("type") == "ByteLevel"
        and not steps[1].get("use_regex", True)
        and not steps[1].get("add_prefix_space", True)
    )


def assemble(
    ids: dict[str, int], pairs: list[tuple[str, str]], added: dict[str, Added], path: Path, merges_path: Path
) -> Vocabulary:
    """Check ids and merges against each other and turn both into bytes."""
    base = {name: index for name, index in ids.items() if name not in added or added[name].id != index}
    tokens: list[bytes | None] = [None] * len(base)
    for name, index in base.items():
        if not 0 <= index < len(base) or tokens[index] is not None:
            raise DataError(
                f"ids are not 0 .. {len(base) - 1:,} without a gap ({name!r} has {index})", where=path, hint=_DAMAGED
            )
        try:
            tokens[index] = token_bytes(name)
        except ValueError:
            raise DataError(
                f"token {name!r} is not of a byte-level vocabulary",
                where=path,
                hint="the right MODEL for this vocabulary",
            ) from None
    for name, token in added.items():
        if token.id < len(base):
            raise DataError(f"control token {name} has id {token.id}, which is a word's", where=path)
    first = 2 if merges_path != path else None  # merges.txt: line 1 is the version
    merges = []
    for number, pair in enumerate(pairs):
        where = f"{merges_path}:{number + first}" if first else path
        joined = "".join(pair)
        if joined not in base or len(pair) != 2 or pair[0] not in base or pair[1] not in base:
            raise DataError(f"merge {' '.join(pair)!r} is not of this vocabulary", where=where, hint=_DAMAGED)
        merges.append((tokens[base[pair[0]]], tokens[base[pair[1]]]))
    single = sum(len(token) == 1 for token in tokens)
    if len(merges) < len(base) - single:
        raise DataError(
            f"{len(merges):,} merges; the {len(base):,} tokens of the vocabulary need {len(base) - single:,}",
            where=merges_path,
            hint=_DAMAGED,
        )
    return Vocabulary(tokens, added, merges, source=str(path))
