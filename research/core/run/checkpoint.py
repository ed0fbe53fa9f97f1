"""Checkpoints: written aside, synced, checksummed and renamed, in a thread; the former one is kept until then.

``checkpoints/step-00000100/`` holds ``model.safetensors`` (the trained weights in their master precision),
``optimizer.safetensors``, ``random.safetensors`` (random state of every card) and ``meta.json``, which says in plain
words where the training stands and what it was made with. No pickles. The tensors are a framework's own; a
:class:`Tables` reads and writes them, so that both backends share one format.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from research.core.errors import UserError

FORMAT = 1
META = "meta.json"
PARTS = ("model", "optimizer", "random")
_PREFIX = "step-"


@dataclass
class Checkpoint:
    """One state of a training: ``meta`` (JSON values) and three tables of the framework's CPU tensors by name."""

    meta: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Any] = field(default_factory=dict)


class Tables(Protocol):
    """How a framework writes a table of its tensors as safetensors, and reads one."""

    def write(self, table: dict[str, Any], path: Path) -> None: ...

    def read(self, path: Path) -> dict[str, Any]: ...


class Checkpoints:
    """The checkpoints of one run. ``save`` returns at once when ``background``; errors surface at the next call.

    Only the main rank owns one; ``say`` gets warnings.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        tables: Tables,
        *,
        keep_last: int = 2,
        background: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.folder, self.tables = Path(folder), tables
        self.keep_last, self.background, self.say = keep_last, background, say
        self.last_step: int | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if self.folder.is_dir():  # what a killed process left
            for path in self.folder.glob(".*"):
                shutil.rmtree(path, ignore_errors=True)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write ``checkpoint``, whose tensors the caller must not change any more. Waits for the former save."""
        self.wait()
        self.last_step = checkpoint.meta["step"]
        if not self.background:
            self._write(checkpoint)
            return

        def work() -> None:
            try:
                self._write(checkpoint)
            except BaseException as error:  # raised again in the training thread
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when the last save is on the disk; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; damaged ones are named, set aside and passed over."""
        for path in reversed(self.paths()):
            try:
                return load_checkpoint(path, self.tables)
            except UserError as damage:
                self.say(f"warning: {damage}; trying the one before")
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(path, aside)
        return None

    def paths(self) -> list[Path]:
        """Folders of the complete checkpoints, oldest first."""
        return checkpoint_paths(self.folder)

    def _write(self, checkpoint: Checkpoint) -> None:
        name = f"{_PREFIX}{checkpoint.meta['step']:08d}"
        aside, final = self.folder / f".{name}.partial", self.folder / name
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            files = {}
            for part in PARTS:
                path = aside / f"{part}.safetensors"
                self.tables.write(getattr(checkpoint, part), path)
                _sync(path)
                files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            meta = {"format": FORMAT, **checkpoint.meta, "files": files}
            (aside / META).write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            _sync(aside / META)
            _sync(aside)
            os.rename(aside, final)
            _sync(self.folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        for path in self.paths()[: -self.keep_last]:
            if path != final:
                shutil.rmtree(path, ignore_errors=True)


def checkpoint_paths(folder: str | os.PathLike) -> list[Path]:
    """Folders ``step-*`` under ``folder`` that have a meta.json, oldest first."""
    return sorted(path.parent for path in Path(folder).glob(f"{_PREFIX}*/{META}"))


def load_checkpoint(path: str | os.PathLike, tables: Tables) -> Checkpoint:
    """Read one checkpoint folder, checking sizes and checksums. Raises :class:`UserError` naming what is damaged."""
    path = Path(path)
    meta = read_meta(path)
    parts = {}
    for part in PARTS:
        file = path / f"{part}.safetensors"
        expected = meta["files"].get(file.name)
        if expected is None or not file.is_file():
            raise UserError("the checkpoint is incomplete", where=file)
        if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
            raise UserError("the checkpoint is damaged: its checksum is not the one in meta.json", where=file)
        parts[part] = tables.read(file)
    return Checkpoint(meta, **parts)


def read_meta(path: str | os.PathLike) -> dict[str, Any]:
    """``meta.json`` of one checkpoint folder."""
    file = Path(path) / META
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise UserError(f"checkpoint format {meta['format']}, expected {FORMAT}", where=file)
        return meta
    except (OSError, ValueError, KeyError, TypeError) as bad:
        raise UserError(f"the checkpoint cannot be read: {bad}", where=file) from None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
        return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
