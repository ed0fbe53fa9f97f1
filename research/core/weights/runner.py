"""Carrying out a plan: streaming, resumable, and visible under its final name only when it is whole.

Everything is written into ``.<name>.partial`` beside the target: the files get their full size first (a full disk shows
at once), then each tensor's bytes their place. A journal names the tensors that are done, with their checksums; the
same command after a kill checks those and goes on. Two threads read, convert, hash and write slabs of a few megabytes;
all four happen outside the interpreter lock, so that both cores work and one reads while the other writes.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from research.core.errors import WeightsError
from research.core.weights import checksum
from research.core.weights.blocks import Copy, Stored, compose, covers, crop
from research.core.weights.cast import Rounding, cast
from research.core.weights.formats.framing import Slot
from research.core.weights.plan import Plan, Target, TargetFile
from research.core.weights.staging import Staging, Written, check_space, check_target
from research.core.weights.tensors import NUMPY_DTYPES, Entry, Files, RowReader, span_bytes

SLAB_BYTES = 2 << 20  # of a target or of what it is read from, whichever is larger: of the size of a core's cache
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
            read = sum(span_bytes(plan.entries[copy.source], copy.of) for copy in copies)
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
    with Files() as files:
        work = _Work(plan, area, files, waiting, done, allow_overflow, max(1, min(threads, len(jobs))))
        work.run(progress)


class _Work:
    """Threads that take jobs, each making and writing its slabs: what one has read is hashed and written while it is still
    in the processor's cache."""

    def __init__(self, plan: Plan, area: Staging, files: Files, waiting, done, allow_overflow: bool, workers: int):
        self.plan, self.area, self.files, self.waiting, self.done = plan, area, files, waiting, done
        self.allow_overflow, self.workers = allow_overflow, workers
        self.bytes = sum(written.target.bytes for written in done.values())
        self.error: BaseException | None = None
        self.stop = False
        self.lock = threading.Lock()

    def run(self, progress: Callable[[int], None]) -> None:
        threads = [threading.Thread(target=self._take_jobs, daemon=True) for _ in range(self.workers)]
        flushed = self.bytes
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.1)
                    progress(self.bytes)
                    if self.bytes - flushed > FLUSH_BYTES:  # the disk works while the next tensors are made
                        flushed = self.bytes
                        self.area.flush()
        finally:
            self.stop = True
            for thread in threads:
                thread.join()
        if self.error is not None:
            raise self.error

    def _take_jobs(self) -> None:
        reader, scratch = RowReader(self.files, self.plan.entries), np.empty(SLAB_BYTES, np.uint8)
        try:
            while not self.stop:
                try:
                    job = self.waiting.get_nowait()
                except queue.Empty:
                    return
                scratch = self._make(job, reader, scratch)
        except BaseException as error:
            self.error = self.error or error
            self.stop = True

    def _make(self, job: _Job, reader: RowReader, scratch: np.ndarray) -> np.ndarray:
        """Slab by slab of the job's targets; -> the buffer for the next job, as large as it had to become."""
        members = [member for member in job.members if (member[0].path, member[1].name) not in self.done]
        digests = [checksum.new() for _ in members]
        counts = [Rounding() for _ in members]
        rows = max(1, members[0][1].shape[0] if members[0][1].shape else 1)
        for low in range(0, rows, job.rows):
            high = min(low + job.rows, rows)
            for (file, target, slots), digest, count in zip(members, digests, counts):
                if self.stop:
                    return scratch
                row = target.bytes // rows
                if scratch.nbytes < (high - low) * row:
                    scratch = np.empty((high - low) * row, np.uint8)
                view = scratch[: (high - low) * row]
                if len(view):
                    _slab(self.plan, target, low, high, reader, view, count)
                if count.overflowed and not self.allow_overflow:
                    raise WeightsError(
                        f"{count.overflowed} values of {target.name} (so far) are too large for {target.dtype}",
                        hint="dtype=bf16, or convert.allow_overflow=true to write infinities",
                    )
                digest.update(view)
                self.area.write(file, slots, low * row, memoryview(view))
                with self.lock:
                    self.bytes += len(view)
        for (file, target, _), digest, count in zip(members, digests, counts):
            written = Written(file.path, target, digest.hexdigest(), count)
            self.area.note(written)
            self.done[file.path, target.name] = written
        return scratch


def _slab(
    plan: Plan, target: Target, low: int, high: int, reader: RowReader, view: np.ndarray, count: Rounding
) -> None:
    """Fill ``view`` (uint8) with rows ``low .. high-1`` of a target."""
    part: Stored = target.stored
    if target.shape:
        part = crop(target.stored, ((low, high), *((0, extent) for extent in target.shape[1:])))
    copies = compose(part, plan.sources)
    if len(copies) == 1 and _fill_straight(plan, target, part, copies[0], reader, view):
        return
    out = view.view(NUMPY_DTYPES[target.dtype]).reshape(part.shape)
    if not covers(part):
        out[...] = 0
    for copy in copies:
        source = reader.take(copy.source, copy.of).transpose(copy.order)
        place = out[copy.into]
        source = source if source.shape == place.shape else source.reshape(place.shape)
        cast(source, plan.entries[copy.source].dtype, place, target.dtype, count)


def _fill_straight(plan: Plan, target: Target, part: Stored, copy: Copy, reader: RowReader, view: np.ndarray) -> bool:
    """Read all of ``part`` into its place when it is one run of bytes in the source, of the target's dtype."""
    whole = all(s.start == 0 and s.stop == n and s.step == 1 for s, n in zip(copy.into, part.shape))
    plain = copy.order == tuple(range(len(copy.order))) and plan.entries[copy.source].dtype == target.dtype
    return whole and plain and reader.fill(copy.source, copy.of, view)
