"""Writing a set of MindRecord files: aside, in one pass, one page in memory at most; then renamed, the index last."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from research.core.data.folder import close_synced
from research.core.data.mindrecord.format import (
    BLOB,
    HEADER_SIZE,
    INDEX_TABLES,
    LARGEST_PAGE,
    MOST_SHARDS,
    PAGE_SIZE,
    RAW,
    RAW_ENTRY,
    Page,
    header_bytes,
)
from research.core.errors import ConfigError, DataError

_BUFFER = 1 << 20


class Written(NamedTuple):
    """What was written: the data files, rows in all of them, bytes on the disk with their indices."""

    files: list[Path]
    rows: int
    bytes: int


def shard_names(name: str, shards: int) -> list[str]:
    """``name``, or ``name0``, ``name1``, ... for several shards."""
    return [name] if shards == 1 else [f"{name}{shard}" for shard in range(shards)]


def existing_files(output: Path) -> list[Path]:
    """Every file that is, or belongs to, a MindRecord set called ``output``: shards of any number and their indices."""
    name = re.compile(re.escape(output.name) + r"\d*(\.db)?")
    return (
        sorted(path for path in output.parent.glob("*") if name.fullmatch(path.name)) if output.parent.is_dir() else []
    )


def check_output(output: Path, shards: int, overwrite: bool, option: str) -> None:
    """Refuse what cannot be written, before any work. ``option`` names how to ask for overwriting."""
    if not 1 <= shards <= MOST_SHARDS:
        raise ConfigError(f"{shards} is not between 1 and {MOST_SHARDS}", where="file_partition", hint="1")
    if output.name.endswith(".db"):
        raise ConfigError("this is the name of an index", where=output, hint=f"{output.name.removesuffix('.db')}")
    found = existing_files(output)
    folders = [path for path in found if path.is_dir()]
    if folders:
        raise DataError("is a folder", where=folders[0], hint="another output file")
    if found and not overwrite:
        raise DataError("exists already", where=found[0], hint=f"{option} to replace it, or another output file")


class MindRecordWriter:
    """``rows`` rows of packed arrays of ``width`` int32 -> ``output`` in ``shards`` files with as many rows each, in order.

    A context: when it ends without an exception the files have their names, and what ``overwrite`` replaces is gone; else
    nothing is left. Exactly ``rows`` are to be added. Raises :class:`DataError` when ``output`` exists or a row is larger
    than a page can be.
    """

    def __init__(
        self,
        output: Path,
        columns: Sequence[str],
        rows: int,
        width: int,
        *,
        shards: int = 1,
        note: str = "",
        overwrite: bool = False,
        option: str = "--overwrite",
    ):
        self.output = Path(os.path.abspath(output))
        check_output(self.output, shards, overwrite, option)
        if shards > rows:
            raise ConfigError(
                f"{rows} records cannot fill {shards} files", where="file_partition", hint=str(max(rows, 1))
            )
        self.columns, self.rows, self.width, self.note, self._option = sorted(columns), rows, width, note, option
        self.names = shard_names(self.output.name, shards)
        self.aside = self.output.parent / f".{self.output.name}.{os.getpid()}.partial"
        self.overwrite = overwrite
        self.added = self._saved = 0
        self._shards: list[_Shard] = []
        self._page_size = PAGE_SIZE
        while self._page_size < self._row_bytes(4):
            self._page_size *= 2
        if self._page_size > LARGEST_PAGE:
            raise ConfigError(
                f"a record of {width:,} tokens does not fit a MindRecord page of {LARGEST_PAGE:,} bytes",
                where="seq_length",
                hint="a shorter sequence length",
            )

    def _row_bytes(self, per_value: int) -> int:
        return 8 + len(self.columns) * (8 + 4 + -(-self.width // 4) + per_value * self.width)

    def __enter__(self) -> MindRecordWriter:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.aside.mkdir()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                assert self.added == self.rows, f"{self.added} rows were added, {self.rows} announced"
                self._finish()
        finally:
            for shard in self._shards:
                shard.abandon()
            shutil.rmtree(self.aside, ignore_errors=True)

    def add(self, row: Sequence[bytes]) -> None:
        """One row: the packed array of each column, in the order of ``columns``."""
        number = self.added * len(self.names) // self.rows
        if number == len(self._shards):
            if self._shards:
                self._shards[-1].close()
            most = self._page_size // (
                self._row_bytes(1) - 8
            )  # rows in a page: a single column has no length before it
            self._shards.append(_Shard(self.aside / self.names[number], self._page_size, most))
        blob = (
            row[0] if len(row) == 1 else b"".join([part for one in row for part in (struct.pack(">Q", len(one)), one)])
        )
        self._shards[-1].add(blob)
        self._saved += 4 * self.width * len(row) - sum(map(len, row))
        self.added += 1

    def _finish(self) -> None:
        self._shards[-1].close()
        for number, shard in enumerate(self._shards):
            header = header_bytes(
                self.columns, self.note, self.names, number, shard.pages, self._page_size, self._saved
            )
            if len(header) > HEADER_SIZE:
                raise DataError("too many pages for one file", where=self.output, hint="a larger file_partition")
            shard.write_header(header)
        self.written = Written(
            [self.output.parent / name for name in self.names],
            self.added,
            sum(path.stat().st_blocks * 512 for path in self.aside.iterdir()),
        )
        check_output(self.output, len(self.names), self.overwrite, self._option)  # somebody else's, written meanwhile
        self._exchange()

    def _exchange(self) -> None:
        """Put the new files in the place of the old ones. An index is what makes a file readable: it goes first and comes
        last, so that no reader finds half a set. What fails on the way is undone."""
        old = self.aside / "old"
        old.mkdir()
        moves = [
            (path, old / path.name) for path in sorted(existing_files(self.output), key=lambda p: p.suffix != ".db")
        ]
        for suffix in ("", ".db"):
            moves += [(self.aside / (name + suffix), self.output.parent / (name + suffix)) for name in self.names]
        done = []
        try:
            for source, target in moves:
                os.rename(source, target)
                done.append((source, target))
        except BaseException:
            for source, target in reversed(done):
                os.rename(target, source)
            raise


class _Shard:
    """One file with its index, under the name it will have, in another folder: the index and the header repeat the name."""

    def __init__(self, path: Path, page_size: int, most_rows: int):
        import sqlite3

        self.path, self.page_size = path, page_size
        self.pages: list[Page] = []
        self.rows = 0
        self._most_entries = most_rows * len(RAW_ENTRY)
        self._file = open(path, "wb", buffering=_BUFFER)  # noqa: SIM115
        self._index = sqlite3.connect(f"{path}.db", isolation_level=None)
        for statement in ("PRAGMA journal_mode=OFF", "PRAGMA synchronous=OFF", *INDEX_TABLES, "BEGIN"):
            self._index.execute(statement)
        self._entries: list[tuple[int, ...]] = []  # of the open blob page
        self._blob: Page | None = None
        self._raw: Page | None = None

    def add(self, blob: bytes) -> None:
        size = 8 + len(blob)
        if self._blob is None or self._blob.used + size > self.page_size:
            self._open_page()
        start = self._blob.used
        self._file.write(struct.pack("<Q", len(blob)))
        self._file.write(blob)
        self._blob.used += size
        entry = self._raw.used
        self._raw.used += len(RAW_ENTRY)
        self._entries.append(
            (self.rows, self._raw.id, entry, self._raw.used, self._blob.number, self._blob.id, start, self._blob.used)
        )
        self.rows += 1
        self._blob.last = self.rows

    def close(self) -> None:
        """All rows are there: complete the pages of single values and the index."""
        self._insert()
        for page in self.pages:
            if page.kind == RAW:
                self._file.seek(HEADER_SIZE + page.id * self.page_size)
                for _ in range(0, page.used, len(RAW_ENTRY) << 16):
                    left = page.used - (self._file.tell() - HEADER_SIZE - page.id * self.page_size)
                    self._file.write(RAW_ENTRY * min(left // len(RAW_ENTRY), 1 << 16))
        close_synced(self._file)
        self._index.execute("INSERT INTO SHARD_NAME (NAME) VALUES (?)", (self.path.name,))
        self._index.execute("COMMIT")
        self._index.close()
        with open(f"{self.path}.db", "rb+") as file:
            close_synced(file)

    def write_header(self, header: bytes) -> None:
        with open(self.path, "rb+") as file:
            file.write(header)
            close_synced(file)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._index.close()

    def _open_page(self) -> None:
        self._insert()
        number = -1 if self._blob is None else self._blob.number
        self._blob = Page(len(self.pages), BLOB, number + 1, [(0, 0)], self.rows, self.rows)
        self.pages.append(self._blob)
        # The entries of the rows of one blob page lie in one raw page.
        if self._raw is None or self._raw.used + self._most_entries > self.page_size:
            self._raw = Page(len(self.pages), RAW, 0 if self._raw is None else self._raw.number + 1, [])
            self.pages.append(self._raw)
        self._raw.groups.append((self._blob.number, self._raw.used))
        self._file.seek(HEADER_SIZE + self._blob.id * self.page_size)

    def _insert(self) -> None:
        self._index.executemany("INSERT INTO INDEXES VALUES (?,?,?,?,?,?,?,?)", self._entries)
        self._entries = []


@contextlib.contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` for what is needed on the way to it; it is removed at the end."""
    folder = Path(os.path.abspath(output)).parent / f".{output.name}.{os.getpid()}.scratch"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
