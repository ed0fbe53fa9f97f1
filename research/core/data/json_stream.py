"""JSON arrays, JSON Lines and indented JSON objects read record by record, with line numbers.

``json.load`` of a file holds all of it; this reader holds one chunk and one record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from research.core.data.sources import CHUNK, RECORD_LIMIT, OnBytes, Where, text_chunks
from research.core.errors import DataError

_SPACE = re.compile(r"[ \t\n\r]*")
_NEAR_END = 16  # a literal or an escape cut off by the end of the buffer is at most this long


class Record(NamedTuple):
    """One record as read: ``raw`` is the JSON object (or row), ``size`` its characters in the file."""

    where: Where
    raw: Any
    size: int


def json_records(path: Path, on_bytes: OnBytes | None = None) -> Iterator[Record]:
    """Every record of a JSON array, of JSON Lines, or of JSON objects one after the other.

    Raises :class:`DataError` with file and line for malformed JSON, and for a record above RECORD_LIMIT.
    """
    return _Stream(path, on_bytes).records()


class _Stream:
    def __init__(self, path: Path, on_bytes: OnBytes | None):
        self.path = path
        self.chunks = text_chunks(path, on_bytes)
        self.buffer, self.at = "", 0
        self.line = 1  # of self.at
        self.ended = False
        self.decode = json.JSONDecoder().raw_decode

    def records(self) -> Iterator[Record]:
        self._skip_space()
        array = self._peek() == "["
        if array:
            self._advance(self.at + 1)
            self._skip_space()
        number = 0
        while self._peek() not in ("", "]") or (self._peek() == "]" and not array):
            number += 1
            start, line = self.at, self.line
            raw, start, end = self._value(start, line)
            where = Where(str(self.path), line, number)
            self._advance(end)
            yield Record(where, raw, end - start)
            self._skip_space()
            if array:
                self._separator()
        if array:
            if self._peek() != "]":
                self._fail("the array does not end with ]: the file is cut off")
            self._advance(self.at + 1)
            self._skip_space()
            if self._peek():
                self._fail("text after the end of the array")

    def _value(self, start: int, line: int) -> tuple[Any, int, int]:
        """Decode the value at ``start``; returns it with its start and end in the (possibly refilled) buffer."""
        while True:
            try:
                value, end = self.decode(self.buffer, start)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos >= len(self.buffer) - _NEAR_END
                if cut_off and not self.ended:
                    if len(self.buffer) - start > RECORD_LIMIT:
                        self._too_large(line)
                    self._fill(len(self.buffer) - start)
                    start = self.at
                    continue
                at_line = line + self.buffer.count("\n", start, error.pos)
                begun = "" if at_line == line else f" (in the record that starts on line {line})"
                self._fail(f"malformed JSON: {error.msg}{begun}", at_line)
            except RecursionError:
                self._fail("JSON nested too deeply", line)
            else:
                if end - start > RECORD_LIMIT:
                    self._too_large(line)
                return value, start, end

    def _separator(self) -> None:
        mark = self._peek()
        if mark == ",":
            self._advance(self.at + 1)
            self._skip_space()
            if self._peek() == "]":
                self._fail("malformed JSON: a comma before the closing ]")
        elif mark not in ("]", ""):
            self._fail(f"malformed JSON: expected , or ] after a record, found {mark!r}")

    def _peek(self) -> str:
        return self.buffer[self.at : self.at + 1]

    def _skip_space(self) -> None:
        while True:
            end = _SPACE.match(self.buffer, self.at).end()
            self._advance(end)
            if end < len(self.buffer) or not self._fill(CHUNK):
                return

    def _advance(self, to: int) -> None:
        self.line += self.buffer.count("\n", self.at, to)
        self.at = to

    def _fill(self, wanted: int) -> bool:
        """Drop what was read and append at least ``wanted`` characters (doubling keeps large records linear)."""
        parts, got = [self.buffer[self.at :]], 0
        self.at = 0
        while got < wanted and not self.ended:
            chunk = next(self.chunks, None)
            if chunk is None:
                self.ended = True
            else:
                parts.append(chunk)
                got += len(chunk)
        self.buffer = "".join(parts)
        return got > 0

    def _too_large(self, line: int) -> None:
        self._fail(f"a record of more than {RECORD_LIMIT:,} characters, or a string that is never closed", line)

    def _fail(self, what: str, line: int | None = None) -> None:
        raise DataError(what, where=f"{self.path}:{self.line if line is None else line}")
