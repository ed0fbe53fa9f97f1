"""Writing a dataset folder: under a lock, aside, renamed into place when it is complete."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from research.core.data.dataset import DOCUMENTS, META, ROWS, TOKENS
from research.core.data.packing import Packer
from research.core.errors import DataError

_BUFFER = 1 << 20


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``folder`` that takes its name when the block ends without an exception.

    Raises :class:`DataError` when another process is writing it, or when ``folder`` holds something that is no dataset.
    """
    folder = Path(os.path.abspath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside, old = folder.parent / f".{folder.name}.partial", folder.parent / f".{folder.name}.old"
    with _lock(folder.parent / f".{folder.name}.lock", folder):
        if old.exists() and not folder.exists():  # stopped between the two renames below
            os.rename(old, folder)
        if folder.exists() and not (folder.is_dir() and ((folder / META).exists() or not any(folder.iterdir()))):
            raise DataError("exists and is not a dataset folder", where=folder, hint="another data.output")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
            _sync(aside)
            if folder.exists():
                os.rename(folder, old)
            os.rename(aside, folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path, folder: Path) -> Iterator[None]:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(handle, 32).decode("ascii", "replace").strip()
            os.close(handle)
            raise DataError(
                f"in use: process {owner or '(unknown)'} is writing this dataset",
                where=folder,
                hint="wait for it, or another data.output",
            ) from None
        try:
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(handle)  # its owner removed it between our open and our lock
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.unlink(path)
        os.close(handle)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def close_synced(file: BinaryIO) -> None:
    """Flush to the disk and close: a full disk shows here, before anything gets its final name."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def write_json(path: Path, value: Any) -> None:
    with open(path, "wb") as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n")
        close_synced(file)


class SplitWriter:
    """Packs documents into rows and appends them to the arrays of one split."""

    def __init__(self, folder: Path, seq_length: int, packing: bool):
        folder.mkdir()
        self._files = [open(folder / name, "wb", buffering=_BUFFER) for name in (TOKENS, DOCUMENTS, ROWS)]  # noqa: SIM115
        self._packer = Packer(seq_length) if packing else None
        self.seq_length = seq_length
        self.tokens = self.documents = self.rows = self.supervised = 0
        for file in self._files[1:]:
            file.write(bytes(8))

    def add(self, document: np.ndarray) -> None:
        """One document, int32 [1 .. seq_length], ``~id`` where it is not supervised."""
        row = self._packer.add(document) if self._packer else [document]
        if row is not None:
            self._write(row)

    def close(self) -> None:
        """Write what still waits, and sync the files."""
        for row in self._packer.flush() if self._packer else ():
            self._write(row)
        for file in self._files:
            close_synced(file)

    def abandon(self) -> None:
        """Close without finishing; a full disk may refuse even that."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()

    def counts(self) -> dict[str, int | float]:
        """``density`` is the share of a row's positions that hold a token."""
        return {
            "rows": self.rows,
            "documents": self.documents,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "density": self.tokens / (self.rows * self.seq_length) if self.rows else 0.0,
        }

    def _write(self, row: list[np.ndarray]) -> None:
        tokens = np.concatenate(row) if len(row) > 1 else row[0]
        ends = np.cumsum([len(document) for document in row], dtype="<i8") + self.tokens
        self.tokens += len(tokens)
        self.documents += len(row)
        self.rows += 1
        self.supervised += int(np.count_nonzero(tokens >= 0))
        for file, values in zip(
            self._files, (tokens.astype("<i4", copy=False), ends, np.array([self.documents], "<i8"))
        ):
            file.write(values.data)
