"""Where a target grows until it is whole: checks before, the staging folder with its journal, the renames at the end."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from research.core.errors import UserError, WeightsError
from research.core.weights import checksum
from research.core.weights.cast import Rounding
from research.core.weights.formats.framing import Slot
from research.core.weights.plan import Plan, Target, TargetFile

SPARE_BYTES = 64 << 20  # left free on the target's disk
_READ = 8 << 20
_JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Written:
    """What became of a target tensor. ``checksum`` is of its bytes as they lie in the file."""

    file: str
    target: Target
    checksum: str
    rounding: Rounding


# --- before -------------------------------------------------------------------------------------------------------


def check_space(target: Path, needed: int) -> None:
    """Raise :class:`WeightsError` when the disk of ``target`` has less than ``needed`` bytes free."""
    folder = target.parent
    while not folder.exists():
        folder = folder.parent
    free = os.statvfs(folder)
    available = free.f_bavail * free.f_frsize
    if needed + SPARE_BYTES > available:
        raise WeightsError(
            f"{needed / 1e9:.2f} GB will be written, the disk has {available / 1e9:.2f} GB free",
            where=target,
            hint="free space, or write to another disk",
        )


def check_apart(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Raise :class:`WeightsError` when the target lies inside the source, or the source inside the target."""
    source, target = Path(source).expanduser().resolve(), Path(target).expanduser().resolve()
    if target == source or source in target.parents:
        raise WeightsError(
            f"the target lies inside the source {source}; a source is never written to",
            where=target,
            hint="an output path outside the input folder",
        )
    if source.is_dir() and target in source.parents:
        raise WeightsError(f"the source {source} lies inside the target", where=target, hint="another output path")


def check_target(target: Path, plan: Plan, single_file: bool, overwrite: bool) -> None:
    if single_file:
        assert len(plan.files) == 1, "a single file needs a plan of one file"
        if target.is_dir():
            raise WeightsError("a folder is in the way of the file to write", where=target, hint="another output path")
        if target.exists() and not overwrite:
            raise WeightsError("the output file exists already", where=target, hint="another name, or remove it first")
        beside = [target.parent / name for name in plan.extra if (target.parent / name).exists()]
        if beside and not overwrite:
            raise WeightsError(
                "a file to write exists already", where=beside[0], hint="another folder, or remove it first"
            )
        return
    if target.exists() and not target.is_dir():
        raise WeightsError("a file is in the way of the folder to write", where=target, hint="another output path")
    names = [*(file.path for file in plan.files), *plan.extra]
    weights = [p for p in target.rglob("*") if p.suffix in (".safetensors", ".ckpt", ".bin")] if target.is_dir() else []
    there = weights or [target / name for name in names if (target / name).exists()]
    if there and not overwrite:
        raise WeightsError(
            f"the output folder holds {there[0].relative_to(target)} already",
            where=target,
            hint="another name, or remove it first",
        )


# --- the staging folder ---------------------------------------------------------------------------------------------


class Staging:
    """``.<name>.partial``: the files under work and the journal. Kept when the process is interrupted, removed when it
    fails for a reason that the same command would meet again."""

    def __init__(self, folder: Path, plan: Plan, log: Callable[[str], None]):
        self.folder, self.plan, self.log = folder, plan, log
        self.handles: dict[str, int] = {}
        self.locks: dict[str, threading.Lock] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> Staging:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal = os.open(self.folder / _JOURNAL, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self.journal)
            raise WeightsError("another process is writing this target", where=self.folder) from None
        self.known = self._read_journal()
        if not self.known:
            for path in self.folder.iterdir():
                if path.name != _JOURNAL:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            os.ftruncate(self.journal, 0)
            os.lseek(self.journal, 0, os.SEEK_SET)
            os.write(self.journal, (json.dumps({"plan": self.plan.fingerprint()}) + "\n").encode())
        self.present = sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())
        return self

    def __exit__(self, kind, error, _) -> None:
        for handle in self.handles.values():
            os.close(handle)
        if kind is None or isinstance(error, UserError | OSError):
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self.journal)

    def _read_journal(self) -> dict[tuple[str, str], dict]:
        rows = []
        with open(self.folder / _JOURNAL, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    rows.append(json.loads(line))
                except ValueError:  # cut off by the kill
                    break
        if not rows or rows[0].get("plan") != self.plan.fingerprint():
            return {}
        good = "".join(json.dumps(row) + "\n" for row in rows).encode()
        os.ftruncate(self.journal, 0)
        os.pwrite(self.journal, good, 0)
        os.lseek(self.journal, 0, os.SEEK_END)
        return {(row["file"], row["name"]): row for row in rows[1:]}

    def create(self, files: Sequence[TargetFile]) -> None:
        """Every file at its full size with its header; raises OSError (ENOSPC, EFBIG) before any tensor is read."""
        for file in files:
            path = self.folder / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self.handles[file.path] = handle
            self.locks[file.path] = threading.Lock()
            frame = file.frame()
            try:
                if frame.size:
                    os.posix_fallocate(handle, 0, frame.size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise OSError(error.errno, error.strerror, str(path)) from None
            os.ftruncate(handle, frame.size)
            for offset, data in frame.pieces:
                os.pwrite(handle, data, offset)

    def finished(self, files: Sequence[TargetFile]) -> dict[tuple[str, str], Written]:
        """The tensors that the journal names and whose bytes are there."""
        done = {}
        for file in files:
            for target, slots in zip(file.tensors, file.frame().slots):
                row = self.known.get((file.path, target.name))
                if row is None:
                    continue
                digest = checksum.new()
                for slot in slots:
                    for begin in range(0, slot.bytes, _READ):
                        count = min(_READ, slot.bytes - begin)
                        digest.update(os.pread(self.handles[file.path], count, slot.offset + begin))
                if digest.hexdigest() == row[checksum.NAME]:
                    rounding = Rounding(**row["rounding"])
                    done[file.path, target.name] = Written(file.path, target, row[checksum.NAME], rounding)
        if done:
            total = sum(len(file.tensors) for file in files)
            self.log(f"going on: {len(done)} of {total} tensors are there and whole")
        return done

    def write(self, file: TargetFile, slots: tuple[Slot, ...], begin: int, data: memoryview) -> None:
        """Bytes ``begin ..`` of a tensor. One writer at a time per file: in the kernel two would spin for its lock."""
        with self.locks[file.path]:
            for slot in slots:
                low, high = max(begin, slot.begin), min(begin + len(data), slot.begin + slot.bytes)
                while low < high:
                    part = data[low - begin : high - begin]
                    low += os.pwrite(self.handles[file.path], part, slot.offset + low - slot.begin)

    def note(self, written: Written) -> None:
        row = {"file": written.file, "name": written.target.name, checksum.NAME: written.checksum}
        row["rounding"] = vars(written.rounding)
        with self.lock:
            os.write(self.journal, (json.dumps(row) + "\n").encode())

    def flush(self) -> None:
        for handle in self.handles.values():
            os.fdatasync(handle)

    def publish(
        self, target: Path, files: Sequence[TargetFile], small: Mapping[str, bytes | Path], single_file: bool
    ) -> None:
        """Sync everything, then rename: one file, one folder, or into a folder that was there (weights first)."""
        for name, content in small.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            else:
                path.write_bytes(content)
            _sync(path)
        for handle in self.handles.values():
            os.fsync(handle)
        names = [file.path for file in files] + list(small)
        if single_file:
            os.replace(self.folder / names[0], target)
            names = names[1:]
        elif not target.exists():
            (self.folder / _JOURNAL).unlink()
            _sync(self.folder)
            os.replace(self.folder, target)
            names = []
        base = target.parent if single_file else target
        for name in names:
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.folder / name, base / name)
        _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
