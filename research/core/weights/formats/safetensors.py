"""safetensors files: 8 bytes little-endian header length, a JSON header, the tensors' bytes.

Read through :mod:`research.core.weights.folder`; written here at positions that are known before the first byte of any
tensor is, so that several threads can write and an interrupted run can go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from research.core.weights.folder import TensorEntry, read_header
from research.core.weights.formats.framing import Frame, Slot
from research.core.weights.tensors import Entry, Segment, tensor_bytes

HF_METADATA = {"format": "pt"}
MINDSPORE_METADATA = {"format": "ms"}


def read_entries(path: Path) -> dict[str, Entry]:
    """Name -> entry of one file, checked against its size. Raises WeightsError for a damaged or truncated file."""
    return {name: from_folder_entry(name, entry) for name, entry in read_header(path).items()}


def from_folder_entry(name: str, entry: TensorEntry) -> Entry:
    return Entry(name, entry.dtype, entry.shape, (Segment(entry.path, entry.begin, entry.bytes),))


def read_metadata(path: Path) -> dict[str, str]:
    """The header's ``__metadata__``; read after :func:`read_entries` has checked the file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)).get("__metadata__") or {}


def frame(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> Frame:
    """Where everything of a file of ``(name, dtype, shape)`` goes."""
    header: dict = {"__metadata__": dict(metadata)}
    sizes, begin = [], 0
    for name, dtype, shape in tensors:
        size = tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + size]}
        sizes.append(size)
        begin += size
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)  # readers map the tensors, which wants them aligned
    head = len(head).to_bytes(8, "little") + head
    slots, at = [], len(head)
    for size in sizes:
        slots.append((Slot(at, 0, size),))
        at += size
    return Frame(((0, head),), tuple(slots), at)
