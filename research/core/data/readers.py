"""Readers: every accepted file becomes a stream of records. Nothing holds more than a chunk and a record.

The shape of a file is decided by its content (its first record), or by ``data.format``:
    alpaca      {"instruction", "input"?, "output"}              .json .jsonl .parquet
    messages    {"messages": [{"role", "content"}]}              .json .jsonl .parquet
    sharegpt    {"conversations": [{"from", "value"}]}           .json .jsonl .parquet
    text        {"text"}, or plain text                          .json .jsonl .parquet .txt
    wikitext    WikiText lines, as plain text, as CSV-quoted lines (wiki.*.tokens), or as {"text"} rows
    mindrecord  rows of token ids                              .mindrecord, .mindrecord0, ...
All of them may be gzipped, but for the last.
"""

from __future__ import annotations

import csv
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from research.core.config.names import did_you_mean
from research.core.data.json_stream import Record, json_records
from research.core.data.mindrecord.read import is_mindrecord
from research.core.data.mindrecord.source import mindrecord_records
from research.core.data.sources import OnBytes, Where, open_bytes, text_lines
from research.core.data.wikitext import cleaned_paragraphs
from research.core.errors import ConfigError, DataError

KEYS = {"alpaca": "instruction", "messages": "messages", "sharegpt": "conversations", "text": "text"}
FORMATS = ("auto", *KEYS, "wikitext", "skills", "mindrecord")
SEPARATORS = ("blank", "line", "file")
PART = 1 << 16  # characters of a long text that are tokenised at a time

_BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark and white space
_JSON_SUFFIXES = (".json", ".jsonl")
_LOOK_AHEAD = 1000  # empty rows read to find out whether a file of {"text"} rows is WikiText
_TITLE = re.compile(r"\s*= [^=\s](?:.*[^=\s])? =\s*")  # " = Title = ": level 1; deeper headings repeat the sign


class TextPart(NamedTuple):
    """A stretch of one plain-text document; ``last`` on the one that ends it."""

    text: str
    last: bool


def read_file(
    path: Path,
    fmt: str = "auto",
    documents: str = "blank",
    on_bytes: OnBytes | None = None,
    mindformers: bool = False,
) -> tuple[str, Iterator[Record]]:
    """``(format, records)`` of one file. A record's ``raw`` is a dict, a :class:`TextPart` for text and wikitext, or a
    place in the file for mindrecord.

    ``documents`` says what separates the documents of plain text: ``blank`` lines, every ``line``, or the ``file``.
    ``on_bytes`` is told how much of the file has been read. With ``mindformers`` WikiText comes as its scripts cleaned it,
    paragraph by paragraph. Raises :class:`DataError` for an empty file, a shape that is not known, or (while reading) a
    damaged record.
    """
    for name, value, known in (("data.format", fmt, FORMATS), ("data.documents", documents, SEPARATORS)):
        if value not in known:
            raise ConfigError(f"{value!r} is not known", where=name, hint=did_you_mean(value, known))
    head = _head(path)
    if is_mindrecord(head):
        if fmt not in ("auto", "mindrecord"):
            raise DataError(f"this is MindRecord, data.format={fmt} is not", where=path, hint="data.format=auto")
        return "mindrecord", mindrecord_records(path, on_bytes)
    if fmt == "mindrecord":
        raise DataError("this is no MindRecord file", where=path, hint="data.format=auto")
    if head[:4] == b"PAR1":
        read = _parquet_rows
    elif _looks_like_json(path, head):
        read = json_records
    else:
        return _plain(path, fmt, documents, head, on_bytes, mindformers)
    records = read(path, on_bytes)
    first = next(records, None)
    if first is None:
        raise DataError("the file holds no records", where=path)
    fmt, seen = _shape(first, records, fmt)
    records = chain(seen, records)
    if fmt == "wikitext" and mindformers:
        return fmt, _wikitext_stream(str(path), lambda counted: _text_rows(read(path, on_bytes if counted else None)))
    if fmt == "wikitext":
        return fmt, _wikitext_documents(str(path), _text_rows(records))
    if fmt == "text":
        return fmt, _text_records(records)
    return fmt, records


def _head(path: Path) -> bytes:
    """The first bytes of the file that say something."""
    try:
        with open_bytes(path) as stream:
            head = stream.read(4096)
            while head and not head.strip(_BLANK):
                head = stream.read(4096)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", where=path) from None
    if not head:
        raise DataError("the file is empty", where=path)
    return head


def _looks_like_json(path: Path, head: bytes) -> bool:
    name = path.name.removesuffix(".gz")
    if name.endswith(_JSON_SUFFIXES):
        return True
    start = head.lstrip(_BLANK)
    return not name.endswith((".txt", ".tokens", ".raw")) and re.match(rb'(\[\s*)?\{\s*"', start) is not None


def _shape(first: Record, records: Iterator[Record], fmt: str) -> tuple[str, list[Record]]:
    """The file's format and the records read to find it."""
    _require_object(first)
    if fmt == "skills":  # data.format of the built-in set; a file of it has messages
        fmt = "messages"
    if fmt == "auto":
        fmt = next((name for name, key in KEYS.items() if first.raw.get(key) is not None), "")
        if not fmt:
            raise DataError(
                f"a record with the keys {', '.join(map(repr, first.raw)) or '(none)'} is of no known format",
                where=first.where,
                hint="records need one of: " + ", ".join(f"{key!r} ({name})" for name, key in KEYS.items()),
            )
        if fmt == "text":
            seen = [first]
            while (
                len(seen) < _LOOK_AHEAD
                and isinstance(seen[-1].raw, dict)
                and not str(seen[-1].raw.get("text") or "").strip()
            ):
                following = next(records, None)
                if following is None:
                    break
                seen.append(following)
            text = seen[-1].raw.get("text") if isinstance(seen[-1].raw, dict) else None
            return ("wikitext" if isinstance(text, str) and _TITLE.fullmatch(text) else "text"), seen
    return fmt, [first]


def _require_object(record: Record) -> None:
    if not isinstance(record.raw, dict):
        raise DataError(
            f"a record must be a JSON object, this is {_json_name(record.raw)}",
            where=record.where,
            hint='for example {"messages": [{"role": "user", "content": "..."}, ...]}',
        )


def _json_name(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _parquet_rows(path: Path, on_bytes: OnBytes | None) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=False, buffer_size=1 << 20, pre_buffer=False) as file:
            number = 0
            bytes_per_row = sum(
                file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)
            ) // max(1, file.metadata.num_rows)
            rows = max(1, min(1024, (1 << 20) // max(1, bytes_per_row)))
            for batch in file.iter_batches(batch_size=rows, use_threads=False):
                size = batch.nbytes // max(1, batch.num_rows)
                for row in batch.to_pylist():
                    number += 1
                    yield Record(Where(str(path), None, number), row, size)
                if on_bytes is not None:
                    on_bytes(path.stat().st_size * number // max(1, file.metadata.num_rows))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"damaged parquet file: {error}", where=path) from None


# --- Text -------------------------------------------------------------------------------------------------------


def _plain(
    path: Path, fmt: str, documents: str, head: bytes, on_bytes: OnBytes | None, mindformers: bool
) -> tuple[str, Iterator[Record]]:
    if fmt not in ("auto", "text", "wikitext"):
        raise DataError(
            f"this is plain text, data.format={fmt} needs JSON or parquet", where=path, hint="data.format=text"
        )
    quoted = re.match(rb'("\s*"\s*)*"\s*= [^=]', head.lstrip(_BLANK)) is not None
    titled = quoted or any(_TITLE.fullmatch(line) for line in head.decode("utf-8-sig", "replace").splitlines()[:3])
    if fmt == "wikitext" or (fmt == "auto" and titled):

        def lines(counted: bool) -> Iterator[tuple[int, str]]:
            found = text_lines(path, on_bytes if counted else None)
            return _unquoted(path, found) if head.lstrip(_BLANK).startswith(b'"') else found

        file = str(path)
        return "wikitext", _wikitext_stream(file, lines) if mindformers else _wikitext_documents(file, lines(True))
    return "text", _plain_documents(path, documents, on_bytes)


def _plain_documents(path: Path, documents: str, on_bytes: OnBytes | None) -> Iterator[Record]:
    def closes(line: str) -> bool:
        return (documents == "line" and line.endswith("\n")) or (documents == "blank" and not line.strip())

    yield from _gather(str(path), ((number, line, closes(line), False) for number, line in text_lines(path, on_bytes)))


def _wikitext_documents(file: str, lines: Iterator[tuple[int, str]]) -> Iterator[Record]:
    """Documents that start at a level-1 heading: `` = Title = `` after an empty line."""

    def marked() -> Iterator[tuple[int, str, bool, bool]]:
        blank = True
        for number, line in lines:
            yield number, line, False, blank and _TITLE.fullmatch(line) is not None
            blank = not line.strip()

    yield from _gather(file, marked())


def _wikitext_stream(file: str, lines: Callable[[bool], Iterator[tuple[int, str]]]) -> Iterator[Record]:
    """Paragraphs as the MindFormers scripts cleaned them. ``lines`` opens the file, and says whether progress counts."""

    def pieces(counted: bool) -> Iterator[str]:
        held, size = [], 0
        for _, line in lines(counted):
            held.append(line or "\n")  # an empty line that was quoted
            size += len(line)
            if size > PART:
                yield "".join(held)
                held, size = [], 0
        yield "".join(held)

    passes = iter((False, True))  # the file is gone over twice
    number = 1
    for paragraph in cleaned_paragraphs(lambda: pieces(next(passes)), PART, cut_text):
        yield Record(Where(file, None, number), TextPart(*paragraph), len(paragraph.text))
        number += paragraph.last


def _gather(file: str, lines: Iterator[tuple[int, str, bool, bool]]) -> Iterator[Record]:
    """Put ``(number, line, closes after, opens before)`` together into documents, long ones in parts of about PART.

    White space around a document is not part of it.
    """
    held: list[str] = []
    size, start, number, part_of = 0, 1, 0, False

    def finish(last: bool) -> Iterator[Record]:
        nonlocal held, size, part_of, number
        text = "".join(held)
        text = text.rstrip() if last else text
        text = text if part_of else text.lstrip()
        held, size = [], 0
        if text or (last and part_of):
            number += 1
            yield Record(Where(file, start, number), TextPart(text, last), len(text))
            part_of = not last

    for at, line, closes, opens in lines:
        if opens:
            yield from finish(True)
        # No token reaches across a line end into a line that does not start with white space, nor across the places
        # where an overlong line comes in pieces.
        if size > PART and (line[:1].strip() or not held[-1].endswith("\n")):
            yield from finish(False)
        if not held:
            start = at
        held.append(line)
        size += len(line)
        if closes:
            yield from finish(True)
    yield from finish(True)


def _unquoted(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """The lines of a wiki.*.tokens file in which every line is one CSV field with its line end inside."""
    reader = csv.reader(line for _, line in lines)
    start = 1
    try:
        for row in reader:
            yield start, "".join(row)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"damaged quoting: {error}", where=f"{path}:{start}") from None


def _text_of(record: Record) -> str:
    _require_object(record)
    text = record.raw.get("text")
    if not isinstance(text, str):
        raise DataError(f"'text' must be a string, this is {_json_name(text)}", where=record.where)
    return text


def _text_rows(records: Iterator[Record]) -> Iterator[tuple[int, str]]:
    for record in records:
        for line in _text_of(record).removesuffix("\n").split("\n"):
            yield record.where.line or record.where.record, line + "\n"


def _text_records(records: Iterator[Record]) -> Iterator[Record]:
    for record in records:
        text = _text_of(record)
        parts = list(cut_text(text))
        for i, part in enumerate(parts):
            yield Record(record.where, TextPart(part, i == len(parts) - 1), len(part))


def cut_text(text: str, limit: int = PART) -> Iterator[str]:
    """The text in parts of about ``limit`` characters, cut where tokens never reach across.

    Qwen's pre-tokenizer joins white space to what precedes or follows it but never crosses from a line end to a
    letter, nor from a letter to a space before a letter; without such a place the cut is at ``4 * limit``.
    """
    start = 0
    while len(text) - start > limit:
        found = _CUT.search(text, start + limit, min(len(text), start + 4 * limit))
        cut = found.start() if found else min(len(text), start + 4 * limit)
        yield text[start:cut]
        start = cut
    if start < len(text) or not text:
        yield text[start:]


_CUT = re.compile(r"(?<=\n)(?=\w)|(?<=\w)(?= \w)")
