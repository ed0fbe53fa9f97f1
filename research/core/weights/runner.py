"""Carrying out a plan: streaming, resumable, and visible under its final name only when it is whole.

Everything is written into ``.<name>.partial`` beside the target: the files get their full size first (a full disk shows
at once), then each tensor's bytes their place. A journal names the tensors that are done, with their checksums; the
same command after a kill checks those and goes on. Two threads read, convert, hash and write slabs of a few megabytes;
all four leave the interpreter lock, so that both cores work and reading overlaps writing.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from research.core.errors import WeightsError
from research.core.weights.blocks import Copy, Stored, compose, covers, crop
from research.core.weights.cast import Rounding, cast
from research.core.weights.formats.framing import Slot
from research.core.weights.plan import Plan, Target, TargetFile
from research.core.weights.staging import Staging, Written, check_space, check_target
from research.core.weights.tensors import NUMPY_DTYPES, Entry, Files, RowReader

SLAB_BYTES = 8 << 20  # of a target or of what it is read from, whichever is larger
FLUSH_BYTES = 1 << 30  # written between two requests to the disk


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
    finish: Callable[[list[Written], Path], Mapping[str, bytes]] | None = None,
    allow_overflow: bool = False,
    overwrite: bool = False,
    threads: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = lambda line: None,
) -> list[Written]:
    """Write the plan's files to ``target`` (a folder; with ``single_file`` the plan's one file itself).

    ``finish`` makes further small files (``conversion.json``) from the results and the folder where the written files
    still are; with ``plan.extra`` they go beside the tensors. ``progress`` gets bytes done and in all. Raises :class:`WeightsError`: no space, target in the way, a
    source that turns out damaged, values that overflow. Nothing is left under ``target`` then.
    """
    target = Path(target).expanduser()
    jobs = _jobs(plan)
    check_target(target, plan, single_file, overwrite)
    staging = target.parent / f".{target.name}.partial"
    with Staging(staging, plan, log) as area:
        check_space(target, plan.bytes - area.present)
        area.create(plan.files)
        done = area.finished(plan.files)
        total = sum(file_target.bytes for file in plan.files for file_target in file.tensors)
        _work(plan, jobs, area, done, allow_overflow, threads, lambda count: progress(count, total))
        results = [done[file.path, t.name] for file in plan.files for t in file.tensors]
        small = {**plan.extra, **(finish(results, area.folder) if finish else {})}
        area.publish(target, plan.files, small, single_file)
    return results


# --- what there is to do ------------------------------------------------------------------------------------------


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


# --- the work -------------------------------------------------------------------------------------------------------


def _work(
    plan: Plan,
    jobs: list[_Job],
    area: Staging,
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
