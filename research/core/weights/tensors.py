"""What a stored tensor is: dtype name, shape, and where its bytes lie; and reading those bytes by ranges of rows.

dtype names are safetensors' (F32, BF16, ..). numpy has no bfloat16: BF16 is kept as uint16 bits. Nothing here holds a
whole tensor: readers ask for rows, and the kernel's page cache is the only cache of files.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from research.core.errors import WeightsError

# safetensors' name -> numpy dtype of the stored bits
NUMPY_DTYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"), "F8_E4M3": np.dtype("u1"), "F8_E5M2": np.dtype("u1"),
}  # fmt: skip

# What users and other programs call them.
DTYPE_NAMES = {
    "fp32": "F32", "float32": "F32", "f32": "F32",
    "bf16": "BF16", "bfloat16": "BF16",
    "fp16": "F16", "float16": "F16", "f16": "F16", "half": "F16",
}  # fmt: skip
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def dtype_from_name(name: str | None, where: str = "dtype") -> str | None:
    """``fp32 | bf16 | fp16`` and torch's or MindSpore's spellings -> safetensors' name; None and ``keep`` -> None."""
    if name is None or name in ("", "keep", "None"):
        return None
    found = DTYPE_NAMES.get(str(name).lower().removeprefix("torch.").removeprefix("ms."))
    if found is None:
        raise WeightsError(f"{name!r} is no dtype of weights", where=where, hint="fp32, bf16 or fp16, or keep")
    return found


@dataclass(frozen=True)
class Segment:
    """A run of a tensor's bytes in a file."""

    path: Path
    offset: int
    bytes: int


@dataclass(frozen=True)
class Entry:
    """A stored tensor. MindSpore's checkpoints cut tensors above 512 MiB into several segments."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]

    @property
    def bytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = NUMPY_DTYPES[dtype].itemsize
    for extent in shape:
        count *= extent
    return count


class Files:
    """Open files of one process, read by position: threads share a descriptor without sharing its place."""

    def __init__(self):
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read_into(self, path: Path, offset: int, view: memoryview) -> None:
        """Fill ``view``; raises :class:`WeightsError` when the file ends before."""
        handle = self._handle(path)
        done = 0
        while done < len(view):
            got = os.preadv(handle, [view[done:]], offset + done)
            if not got:
                raise WeightsError(
                    f"truncated: it ends at {offset + done} bytes, {offset + len(view)} are needed",
                    where=path,
                    hint="fetch the file again",
                )
            done += got

    def _handle(self, path: Path) -> int:
        with self._lock:
            if path not in self._handles:
                try:
                    self._handles[path] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise WeightsError(f"cannot be read: {error.strerror}", where=path) from None
            return self._handles[path]

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_bytes(files: Files, entry: Entry, begin: int, view: memoryview) -> None:
    """Fill ``view`` with the tensor's bytes from ``begin`` on."""
    done, start = 0, 0
    for segment in entry.segments:
        low, high = max(begin, start), min(begin + len(view), start + segment.bytes)
        if low < high:
            files.read_into(segment.path, segment.offset + low - start, view[done : done + high - low])
            done += high - low
        start += segment.bytes
    assert done == len(view), (entry.name, begin, len(view), done)


def read_tensor(files: Files, entry: Entry) -> np.ndarray:
    """A whole tensor as an array of its stored bits; for tensors known to be small enough."""
    out = np.empty(entry.shape, NUMPY_DTYPES[entry.dtype])
    if out.nbytes:
        read_bytes(files, entry, 0, memoryview(out.reshape(-1).view(np.uint8)))
    return out


class RowReader:
    """Rows of stored tensors for one thread, in buffers that are used again.

    The last few ranges are kept: the targets of one source (the shards of a column split, gate and up of an interleaved
    matrix) ask for the same rows one after the other.
    """

    def __init__(self, files: Files, entries: Mapping[Hashable, Entry], keep: int = 4):
        self.files, self.entries, self.keep = files, entries, keep
        self._ranges: OrderedDict[tuple, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def take(self, key: Hashable, of: tuple[slice, ...]) -> np.ndarray:
        """``tensor[of]`` as a view of stored bits, valid until ``keep`` further calls. Steps are positive."""
        entry = self.entries[key]
        axis, begin, count = _span(entry, of)
        rows = self._read(key, entry, begin, count).view(NUMPY_DTYPES[entry.dtype])
        array = rows.reshape(*(1,) * axis, -1, *entry.shape[axis + 1 :]) if of else rows.reshape(())
        return array[(slice(None),) * axis + (slice(None, None, of[axis].step), *of[axis + 1 :])] if of else array

    def fill(self, key: Hashable, of: tuple[slice, ...], view: np.ndarray) -> bool:
        """Read ``tensor[of]`` straight into ``view`` (uint8) when it is one run of bytes; else do nothing, False."""
        entry = self.entries[key]
        axis, begin, _ = _span(entry, of)
        rest = zip(of[axis + 1 :], entry.shape[axis + 1 :])
        if of and (of[axis].step != 1 or any(s.start or s.stop != n or s.step != 1 for s, n in rest)):
            return False
        read_bytes(self.files, entry, begin, memoryview(view))
        return True

    def _read(self, key: Hashable, entry: Entry, begin: int, count: int) -> np.ndarray:
        name = (key, begin, count)
        if name in self._ranges:
            self._ranges.move_to_end(name)
            return self._ranges[name][1]
        buffer = None
        if len(self._ranges) >= self.keep:
            _, (buffer, _) = self._ranges.popitem(last=False)
        if buffer is None or buffer.nbytes < count:
            buffer = np.empty(max(count, 1), np.uint8)
        view = buffer[:count]
        read_bytes(self.files, entry, begin, memoryview(view))
        self._ranges[name] = (buffer, view)
        return view


def _span(entry: Entry, of: tuple[slice, ...]) -> tuple[int, int, int]:
    """-> (axis, first byte, bytes) of the rows that ``of`` lies in: leading axes with one index are skipped over, the
    first with more is read as a range."""
    begin, stride, axis = 0, entry.bytes, 0
    while axis < len(of) - 1 and of[axis].stop - of[axis].start == 1:
        stride //= entry.shape[axis]
        begin += of[axis].start * stride
        axis += 1
    if not of:
        return 0, 0, stride
    stride //= entry.shape[axis]
    return axis, begin + of[axis].start * stride, (of[axis].stop - of[axis].start) * stride


def span_bytes(entry: Entry, of: tuple[slice, ...]) -> int:
    """Bytes that are read for ``tensor[of]``."""
    return _span(entry, of)[2]
