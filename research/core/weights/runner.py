"""Carrying out a plan: streaming, resumable, and visible under its final name only when it is whole.

Everything is written into ``.<name>.partial`` beside the target: the files get their full size first (a full disk shows
at once), then each tensor's bytes their place. A journal names the tensors that are done, with their checksums; the
same command after a kill checks those and goes on. Two threads read, convert, hash and write slabs of a few megabytes;
all four leave the interpreter lock, so that both cores work and reading overlaps writing.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from research.core.errors import UserError, WeightsError
from research.core.weights.blocks import Copy, Stored, compose, covers, crop
from research.core.weights.cast import Rounding, cast
from research.core.weights.formats.framing import Slot
from research.core.weights.plan import Plan, Target, TargetFile
from research.core.weights.tensors import NUMPY_DTYPES, Entry, Files, RowReader

SLAB_BYTES = 8 << 20  # of a target or of what it is read from, whichever is larger
FLUSH_BYTES = 1 << 30  # written between two requests to the disk
SPARE_BYTES = 64 << 20  # left free on the target's disk
_JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Written:
    """What became of a target tensor. ``sha256`` is of its bytes as they lie in the file."""

    file: str
    target: Target
    sha256: str
    rounding: Rounding


@dataclass(frozen=True)
class _Job:
    """Targets that are cut from the same source rows, made slab by slab together."""

    order: tuple
    members: tuple[tuple[TargetFile, Target, tuple[Slot, ...]], ...]
    rows: int  # of axis 0 per slab


def run_plan(
    plan: Plan,
    target: str | os.PathLike,
    *,
    single_file: bool = False,
    finish: Callable[[list[Written]], Mapping[str, bytes]] | None = None,
    allow_overflow: bool = False,
    overwrite: bool = False,
    threads: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = lambda line: None,
) -> list[Written]:
    """Write the plan's files to ``target`` (a folder; with ``single_file`` the plan's one file itself).

    ``finish`` makes further small files from the results (``conversion.json``); with ``plan.extra`` they go beside the
    tensors. ``progress`` gets bytes done and in all. Raises :class:`WeightsError`: no space, target in the way, a
    source that turns out damaged, values that overflow. Nothing is left under ``target`` then.
    """
    target = Path(target).expanduser()
    jobs = _jobs(plan)
    _check_target(target, plan, single_file, overwrite)
    staging = target.parent / f".{target.name}.partial"
    with _Staging(staging, plan, log) as area:
        check_space(target, plan.bytes - area.present)
        area.create(plan.files)
        done = area.finished(plan.files)
        total = sum(file_target.bytes for file in plan.files for file_target in file.tensors)
        _work(plan, jobs, area, done, allow_overflow, threads, lambda count: progress(count, total))
        results = [done[file.path, t.name] for file in plan.files for t in file.tensors]
        small = {**plan.extra, **(finish(results) if finish else {})}
        area.publish(target, plan.files, small, single_file)
    return results


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
    if target in source.parents and any(target.iterdir()):
        # A new file beside others is harmless, a folder of weights that swallows its own source is not.
        if any(source == entry or entry in source.parents for entry in target.iterdir()) and source.is_dir():
            raise WeightsError(f"the source {source} lies inside the target", where=target, hint="another output path")


def _check_target(target: Path, plan: Plan, single_file: bool, overwrite: bool) -> None:
    if single_file:
        assert len(plan.files) == 1, "a single file needs a plan of one file"
        if target.is_dir():
            raise WeightsError("a folder is in the way of the file to write", where=target, hint="another output path")
        if target.exists() and not overwrite:
            raise WeightsError("the output file exists already", where=target, hint="another name, or remove it first")
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


def _jobs(plan: Plan) -> list[_Job]:
    """Every target with its copies worked out once, so that a source that lacks something is found before any writing."""
    groups: dict[tuple, list] = {}
    for file in plan.files:
        for target, slots in zip(file.tensors, file.frame().slots):
            if not target.bytes:
                groups[file.path, target.name] = [(file, target, slots, 1, ())]
                continue
            copies = compose(target.stored, plan.sources)
            handles = tuple(dict.fromkeys(copy.source for copy in copies))
            read = sum(_span(plan.entries[copy.source], copy.of) for copy in copies)
            row = max(read, target.bytes) / max(1, target.shape[0] if target.shape else 1)
            rows = max(1, int(SLAB_BYTES // max(row, 1)))
            first = min((_place(plan.entries[handle]) for handle in handles), default=("", 0))
            key = (handles, target.shape) if 0 < len(handles) <= 4 else (file.path, target.name)
            groups.setdefault(key, []).append((file, target, slots, rows, first))
    jobs = []
    for members in groups.values():
        rows = min(member[3] for member in members)
        jobs.append(_Job(members[0][4], tuple(member[:3] for member in members), rows))
    return sorted(jobs, key=lambda job: job.order)  # along the source's files: readers of disks like that


def _place(entry: Entry) -> tuple[str, int]:
    return (str(entry.segments[0].path), entry.segments[0].offset) if entry.segments else ("", 0)


def _span(entry: Entry, of: tuple[slice, ...]) -> int:
    """Bytes that RowReader reads for one copy."""
    count, axis = entry.bytes, 0
    while axis < len(of) - 1 and of[axis].stop - of[axis].start == 1:
        count //= entry.shape[axis]
        axis += 1
    return count * (of[axis].stop - of[axis].start) // entry.shape[axis] if of else count


# --- the staging folder ---------------------------------------------------------------------------------------------


class _Staging:
    """``.<name>.partial``: the files under work and the journal. Kept when the process is interrupted, removed when it
    fails for a reason that the same command would meet again."""

    def __init__(self, folder: Path, plan: Plan, log: Callable[[str], None]):
        self.folder, self.plan, self.log = folder, plan, log
        self.handles: dict[str, int] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> _Staging:
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
                digest = hashlib.sha256()
                for slot in slots:
                    for begin in range(0, slot.bytes, SLAB_BYTES):
                        count = min(SLAB_BYTES, slot.bytes - begin)
                        digest.update(os.pread(self.handles[file.path], count, slot.offset + begin))
                if digest.hexdigest() == row["sha256"]:
                    rounding = Rounding(**row["rounding"])
                    done[file.path, target.name] = Written(file.path, target, row["sha256"], rounding)
        if done:
            total = sum(len(file.tensors) for file in files)
            self.log(f"going on: {len(done)} of {total} tensors are there and whole")
        return done

    def write(self, file: TargetFile, slots: tuple[Slot, ...], begin: int, data: memoryview) -> None:
        """Bytes ``begin ..`` of a tensor."""
        for slot in slots:
            low, high = max(begin, slot.begin), min(begin + len(data), slot.begin + slot.bytes)
            while low < high:
                low += os.pwrite(
                    self.handles[file.path], data[low - begin : high - begin], slot.offset + low - slot.begin
                )

    def note(self, written: Written) -> None:
        row = {"file": written.file, "name": written.target.name, "sha256": written.sha256}
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


# --- the work -------------------------------------------------------------------------------------------------------


def _work(
    plan: Plan,
    jobs: list[_Job],
    area: _Staging,
    done: dict[tuple[str, str], Written],
    allow_overflow: bool,
    threads: int,
    progress: Callable[[int], None],
) -> None:
    jobs = [job for job in jobs if any((file.path, t.name) not in done for file, t, _ in job.members)]
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    state = _State(sum(written.target.bytes for written in done.values()), progress)
    with Files() as files:
        workers = [
            threading.Thread(
                target=_worker, args=(plan, files, waiting, area, done, allow_overflow, state), daemon=True
            )
            for _ in range(max(1, min(threads, len(jobs))))
        ]
        for worker in workers:
            worker.start()
        flushed = state.bytes
        try:
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.2)
                    progress(state.bytes)
                    if state.bytes - flushed > FLUSH_BYTES:  # the disk works while the next tensors are made
                        flushed = state.bytes
                        area.flush()
        finally:
            state.stop = True
            for worker in workers:
                worker.join()
    if state.error is not None:
        raise state.error


class _State:
    def __init__(self, done: int, progress: Callable[[int], None]):
        self.bytes, self.progress = done, progress
        self.stop, self.error = False, None
        self.lock = threading.Lock()

    def add(self, count: int) -> None:
        with self.lock:
            self.bytes += count


def _worker(plan, files, waiting, area, done, allow_overflow, state: _State) -> None:
    reader, scratch = RowReader(files, plan.entries), _Scratch()
    try:
        while not state.stop:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            for written in _make(plan, job, reader, scratch, area, allow_overflow, state, done):
                area.note(written)
                done[written.file, written.target.name] = written
    except BaseException as error:
        state.error = state.error or error
        state.stop = True


def _make(plan, job: _Job, reader, scratch, area, allow_overflow, state, done):
    """Write the job's targets slab by slab; yields each one's result when its last slab is written."""
    members = [m for m in job.members if (m[0].path, m[1].name) not in done]
    hashes = [hashlib.sha256() for _ in members]
    counts = [Rounding() for _ in members]
    rows = members[0][1].shape[0] if members[0][1].shape else 1
    for low in range(0, max(rows, 1), job.rows):
        high = min(low + job.rows, rows)
        for (file, target, slots), digest, count in zip(members, hashes, counts):
            if state.stop:
                return
            data = _slab(plan, target, low, high, reader, scratch, count)
            if count.overflowed and not allow_overflow:
                raise WeightsError(
                    f"{count.overflowed} values of {target.name} (so far) are too large for {target.dtype}",
                    hint="dtype=bf16, or convert.allow_overflow=true to write infinities",
                )
            view = memoryview(data)
            digest.update(view)
            area.write(file, slots, low * (target.bytes // max(rows, 1)), view)
            state.add(len(view))
    for (file, target, _), digest, count in zip(members, hashes, counts):
        yield Written(file.path, target, digest.hexdigest(), count)


def _slab(plan, target: Target, low: int, high: int, reader: RowReader, scratch: _Scratch, count: Rounding):
    """Rows ``low .. high-1`` of a target as uint8."""
    if high == low or not target.bytes:
        return np.empty(0, np.uint8)
    shape = (high - low, *target.shape[1:]) if target.shape else ()
    part: Stored = target.stored
    if target.shape:
        part = crop(target.stored, ((low, high), *((0, extent) for extent in target.shape[1:])))
    copies: list[Copy] = compose(part, plan.sources)
    whole = len(copies) == 1 and all(
        s.start == 0 and s.stop == n and s.step == 1 for s, n in zip(copies[0].into, shape)
    )
    if whole:
        source, kind = _ordered(plan, copies[0], reader)
        if kind == target.dtype and source.flags.c_contiguous:
            return source.reshape(-1).view(np.uint8)
    out = scratch.array(shape, NUMPY_DTYPES[target.dtype])
    if not covers(part):
        out[...] = 0
    for copy in copies:
        source, kind = _ordered(plan, copy, reader)
        place = out[copy.into]
        cast(source if source.shape == place.shape else source.reshape(place.shape), kind, place, target.dtype, count)
    return out.reshape(-1).view(np.uint8)


def _ordered(plan: Plan, copy: Copy, reader: RowReader) -> tuple[np.ndarray, str]:
    handle: Hashable = copy.source
    return reader.take(handle, copy.of).transpose(copy.order), plan.entries[handle].dtype


class _Scratch:
    """One thread's buffer for assembled slabs."""

    def __init__(self):
        self.buffer = np.empty(0, np.uint8)

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        if self.buffer.nbytes < size:
            self.buffer = np.empty(size, np.uint8)
        return self.buffer[:size].view(dtype).reshape(shape)
