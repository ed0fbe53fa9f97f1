"""One MindRecord file, opened, checked and read row by row; the layout is :mod:`research.core.data.mindrecord.format`'s."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from research.core.data.mindrecord.columns import Note
from research.core.data.mindrecord.format import BLOB, READABLE, WIDTHS, packed_length, unpack
from research.core.errors import DataError

_MAGIC = re.compile(rb'\{\s*"(header_size|compression_size|index_fields|page|page_size|schema)"')
_LARGEST_HEADER = 1 << 27
_DAMAGED = "copy it again, or make it again from its source"


class Row(NamedTuple):
    """Where one row lies in its file: bytes ``start .. stop - 1``, its length field included."""

    start: int
    stop: int


def opened(path: str | Path) -> MindRecord:
    """The file at ``path``, opened once in a process as long as nobody changes it: the workers read many rows of it."""
    try:
        state = os.stat(path)
    except FileNotFoundError:
        raise DataError("file not found", where=path) from None
    return _opened(str(path), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=16)
def _opened(path: str, _written: int, _size: int) -> MindRecord:
    return MindRecord(Path(path))


def is_mindrecord(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is MindRecord."""
    return int.from_bytes(head[:8], "little") < _LARGEST_HEADER and _MAGIC.match(head[8:]) is not None


def holds_mindrecord(path: Path) -> bool:
    """:func:`is_mindrecord` of a file."""
    with open(path, "rb") as file:
        return is_mindrecord(file.read(64))


class MindRecord:
    """One file, open for reading. ``columns`` maps each array's name to its dtype, ``shards`` names the files of its set.

    Raises :class:`DataError` for what is no MindRecord file, is cut off, or has no index of its own beside it.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._map: np.ndarray | None = None
        header = self._read_header()
        try:
            schema = header["schema"][0]
            self.columns = {name: _dtype(schema["schema"][name]) for name in schema["blob_fields"]}
            self.shards = [str(name) for name in header["shard_addresses"]]
            self._header_size, self._page_size = int(header["header_size"]), int(header["page_size"])
            self._packed = header["version"] != "2.0"
            self.note = Note.from_text(schema.get("desc", ""))
            pages = header["page"] or []
            self.rows = sum(page["end_row_id"] - page["start_row_id"] for page in pages if page["page_type"] == BLOB)
            needed = max((self._start(page["page_id"]) + page["page_size"] for page in pages), default=0)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"the header is damaged: {error!r}", where=self.path, hint=_DAMAGED) from None
        if header["version"] not in READABLE:
            raise DataError(
                f"MindRecord version {header['version']!r}; {' and '.join(READABLE)} are known", where=self.path
            )
        found = os.path.getsize(self.path)
        if found < needed:
            raise DataError(
                f"the file is cut off: {found:,} bytes, its header says {needed:,}", where=self.path, hint=_DAMAGED
            )
        self._order = sorted(self.columns)

    def index(self) -> Iterator[Row]:
        """Where each row lies, in order. Raises :class:`DataError` for an index that is missing or another file's."""
        import sqlite3

        path = Path(f"{self.path}.db")
        if not path.is_file():
            raise DataError(
                f"its index {path.name} is not beside it",
                where=self.path,
                hint=f"copy {path.name} from where {self.path.name} came from: the two belong together",
            )
        try:
            with closing(sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode=ro", uri=True)) as index:
                count = index.execute("SELECT COUNT(*) FROM INDEXES").fetchone()[0]
                if count != self.rows:
                    raise DataError(
                        f"{count:,} rows, {self.path.name} has {self.rows:,}: this is not its index",
                        where=path,
                        hint=f"copy {path.name} from where {self.path.name} came from",
                    )
                query = "SELECT PAGE_ID_BLOB, PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END FROM INDEXES ORDER BY ROW_ID"
                for page, start, stop in index.execute(query):
                    yield Row(self._start(page) + start, self._start(page) + stop)
        except sqlite3.DatabaseError as error:
            raise DataError(f"the index is damaged: {error}", where=path, hint=_DAMAGED) from None

    def blobs(self, row: Row, where: object) -> dict[str, np.ndarray]:
        """The stored bytes of each column of a row, uint8; :meth:`array` and :meth:`length` read them."""
        if self._map is None:
            self._map = np.asarray(np.memmap(self.path, np.uint8, mode="r"))  # slices of a plain array cost less
        bytes_ = self._map[row.start : row.stop]
        size = int.from_bytes(bytes_[:8].tobytes(), "little")
        if len(bytes_) != row.stop - row.start or size != len(bytes_) - 8:
            raise DataError(
                "no record where the index says one is: the index is another file's, or the file is damaged",
                where=where,
                hint=_DAMAGED,
            )
        if len(self._order) == 1:
            return {self._order[0]: bytes_[8:]}
        found, at = {}, 8
        for name in self._order:
            size = int.from_bytes(bytes_[at : at + 8].tobytes(), "big")
            found[name] = bytes_[at + 8 : at + 8 + size]
            at += 8 + size
        if at != len(bytes_):
            raise DataError("the record is damaged", where=where, hint=_DAMAGED)
        return found

    def length(self, name: str, blob: np.ndarray) -> int:
        """Elements of a column's array."""
        return packed_length(blob) if self._is_packed(name) else len(blob) // WIDTHS[self.columns[name]]

    def array(self, name: str, blob: np.ndarray, limit: int | None = None) -> np.ndarray:
        """The first ``limit`` elements of a column's array, int64. Raises ValueError when it is damaged."""
        if self._is_packed(name):
            return unpack(blob, limit)
        return blob.view("<i4" if self.columns[name] == "int32" else "<i8")[:limit].astype(np.int64)

    def _is_packed(self, name: str) -> bool:
        if self.columns[name] not in WIDTHS:
            raise DataError(
                f"the column {name} is {self.columns[name]}, token ids are int32 or int64",
                where=self.path,
                hint="a file of the documents' preprocess scripts, or of `make data` with data.mindrecord",
            )
        return self._packed

    def _start(self, page: int) -> int:
        return self._header_size + page * self._page_size

    def _read_header(self) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            head = file.read(1 << 12)
            if not is_mindrecord(head):
                raise DataError("this is no MindRecord file, or an encrypted one", where=self.path)
            size = int.from_bytes(head[:8], "little")
            file.seek(8)
            text = file.read(size)
        try:
            return json.loads(text)
        except ValueError as error:
            raise DataError(f"the header is damaged: {error}", where=self.path, hint=_DAMAGED) from None


def _dtype(field: dict[str, Any]) -> str:
    return str(field["type"]) if "shape" in field else f"single {field['type']}"
