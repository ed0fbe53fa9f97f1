"""torch's distributed checkpoints: ``.metadata`` and ``__R_N.distcp`` files, read and written without loading tensors.

A ``.distcp`` file is a run of ``torch.save`` archives, one per chunk of a tensor; ``.metadata`` is the pickle of
``torch.distributed.checkpoint.metadata.Metadata``, which says for every tensor its chunks (offsets and sizes) and where
they lie. The pickle is read with an unpickler that knows those few classes and refuses everything else.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from research.core.errors import WeightsError
from research.core.weights.blocks import Box, box_shape
from research.core.weights.formats.framing import Frame, Slot
from research.core.weights.tensors import Entry, Segment, tensor_bytes

METADATA = ".metadata"
TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_NAMES = {f"torch.{name}": kind for kind, name in TORCH_DTYPES.items()}

_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *TORCH_DTYPES.values()),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath"),
    "builtins": ("set",),
}  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor and its stored bytes."""

    box: Box
    entry: Entry


@dataclass(frozen=True)
class Sharded:
    """A tensor of a distributed checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


# --- reading ------------------------------------------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}")


def read_metadata(folder: Path):
    """The checkpoint's ``Metadata``. Raises :class:`WeightsError` for a damaged file or one that imports anything else."""
    path = folder / METADATA
    if not path.is_file():
        raise WeightsError(
            "no .metadata file: not a torch distributed checkpoint, or one that was not finished", where=folder
        )
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        metadata.state_dict_metadata.items(), metadata.storage_data.items()
    except (
        pickle.UnpicklingError,
        AttributeError,
        EOFError,
        ImportError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
    ) as bad:
        raise WeightsError(f"cannot be read as the metadata of a distributed checkpoint: {bad}", where=path) from None
    return metadata


def read_tensors(folder: Path, wanted=lambda name: True) -> tuple[dict[str, Sharded], list[str]]:
    """-> (name -> tensor with its chunks, names that are no tensors or not ``wanted``)."""
    metadata = read_metadata(folder)
    tensors: dict[str, Sharded] = {}
    others: list[str] = []
    places = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
    for name, item in metadata.state_dict_metadata.items():
        dtype = _NAMES.get(str(getattr(getattr(item, "properties", None), "dtype", None)))
        if dtype is None or not wanted(name):
            others.append(name)
            continue
        chunks = []
        for chunk in item.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if 0 in sizes:
                continue
            info = places.get((name, offsets))
            if info is None:
                raise WeightsError(f"its metadata names no place for a chunk of {name}", where=folder / METADATA)
            box = tuple((low, low + size) for low, size in zip(offsets, sizes))
            chunks.append(Chunk(box, _entry(folder, name, dtype, sizes, info)))
        tensors[name] = Sharded(name, dtype, tuple(item.size), tuple(chunks))
    return tensors, others


def _entry(folder: Path, name: str, dtype: str, shape: tuple[int, ...], info) -> Entry:
    """Where the elements of one chunk lie inside its archive; they must be stored in order, which torch.save does for
    contiguous tensors."""
    path = folder / info.relative_path
    if folder.resolve() not in path.resolve().parents:
        raise WeightsError(f"its metadata points outside the folder ({info.relative_path})", where=folder / METADATA)
    if getattr(info, "transform_descriptors", None):
        raise WeightsError(
            f"{name} is stored transformed ({info.transform_descriptors}), which is not read here", where=path
        )
    if not path.is_file():
        raise WeightsError("a file that the metadata names is missing", where=path, hint="copy the checkpoint again")
    if path.stat().st_size < info.offset + info.length:
        raise WeightsError(f"truncated: {name} would end at byte {info.offset + info.length}", where=path)
    try:
        with path.open("rb") as file:
            view = _Slice(file, info.offset, info.length)
            offset, count = _payload(view)
            begin = _first_element(view, dtype, shape)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, KeyError, ValueError, EOFError) as bad:
        raise WeightsError(f"the archive of {name} at byte {info.offset} is damaged: {bad}", where=path) from None
    needed = tensor_bytes(dtype, shape)
    if begin is None or begin + needed > count:
        raise WeightsError(f"{name} is not stored contiguously as {dtype}{list(shape)}", where=path)
    return Entry(name, dtype, shape, (Segment(path, info.offset + offset + begin, needed),))


def _payload(view: _Slice) -> tuple[int, int]:
    """(offset, bytes) of the archive's one storage."""
    with zipfile.ZipFile(view) as archive:
        storages = [item for item in archive.infolist() if "/data/" in item.filename]
        if len(storages) != 1 or storages[0].compress_type != zipfile.ZIP_STORED:
            raise ValueError("not the archive of one tensor")
        item = storages[0]
    view.seek(item.header_offset + 26)  # the local header's lengths of name and extra field
    lengths = view.read(4)
    skip = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return item.header_offset + 30 + skip, item.file_size


def _first_element(view: _Slice, dtype: str, shape: tuple[int, ...]) -> int | None:
    """Byte of the storage at which the tensor starts; None when its elements are not in order."""
    import torch

    view.seek(0)
    with torch.serialization.skip_data():  # shape and strides only
        tensor = torch.load(view, map_location="cpu", weights_only=True)
    if (
        str(tensor.dtype) != f"torch.{TORCH_DTYPES[dtype]}"
        or tuple(tensor.shape) != shape
        or not tensor.is_contiguous()
    ):
        return None
    return tensor.storage_offset() * tensor.element_size()


class _Slice(io.RawIOBase):
    """Bytes ``offset .. offset+length-1`` of a file as a file."""

    def __init__(self, file, offset: int, length: int):
        self.file, self.offset, self.length, self.at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.length)[whence]
        return self.at

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self.length - self.at))
        self.file.seek(self.offset + self.at)
        data = self.file.read(count)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


# --- writing ------------------------------------------------------------------------------------------------------


class _Sink:
    """A file that keeps what is written and not what is skipped: torch.save's archive around a tensor's bytes."""

    def __init__(self):
        self.at, self.size = 0, 0
        self.pieces: list[tuple[int, bytes]] = []
        self.gap: tuple[int, int] | None = None

    def write(self, data) -> int:
        self.pieces.append((self.at, bytes(data)))
        self.at += len(data)
        self.size = max(self.size, self.at)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == 1 and self.gap is None, "torch.save skips once, forward"
        self.gap = (self.at, offset)
        self.at += offset
        return self.at

    def tell(self) -> int:
        return self.at

    def flush(self) -> None:
        pass


def _archive(dtype: str, shape: tuple[int, ...]) -> _Sink:
    import torch

    sink = _Sink()
    tensor = torch.empty(shape, dtype=getattr(torch, TORCH_DTYPES[dtype]))  # never touched, so it takes no memory
    with torch.serialization.skip_data():
        torch.save(tensor, sink)
    if sink.gap is None:  # nothing to skip in a tensor without elements
        sink.gap = (sink.size, 0)
    assert sink.gap[1] == tensor_bytes(dtype, shape), (sink.gap, dtype, shape)
    return sink


def frame(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> Frame:
    """Where everything of one ``.distcp`` file of ``(name, dtype, chunk's shape)`` goes."""
    pieces, slots, at = [], [], 0
    for _, dtype, shape in tensors:
        sink = _archive(dtype, shape)
        pieces += [(at + place, data) for place, data in _joined(sink.pieces)]
        slots.append((Slot(at + sink.gap[0], 0, sink.gap[1]),))
        at += sink.size
    return Frame(tuple(pieces), tuple(slots), at)


def _joined(pieces: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    out: list[list] = []
    for at, data in pieces:
        if out and out[-1][0] + len(out[-1][1]) == at:
            out[-1][1] += data
        else:
            out.append([at, data])
    return [(at, data) for at, data in out]


def metadata_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], files: Mapping[str, Sequence[tuple[str, str, Box]]]
) -> bytes:
    """``.metadata`` of a checkpoint: ``tensors`` name -> (dtype, whole shape); ``files`` path -> (name, dtype, box) of
    its chunks in order, as given to :func:`frame`."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    chunks: dict[str, list] = {name: [] for name in tensors}
    storage = {}
    for path, items in files.items():
        at = 0
        for name, dtype, box in items:
            shape = box_shape(box)
            length = _archive(dtype, shape).size
            offsets = torch.Size(low for low, _ in box)
            storage[MetadataIndex(name, offsets, len(chunks[name]))] = _StorageInfo(path, at, length)
            chunks[name].append(ChunkStorageMetadata(offsets, torch.Size(shape)))
            at += length
    table = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=getattr(torch, TORCH_DTYPES[dtype])), torch.Size(shape), chunks[name]
        )
        for name, (dtype, shape) in tensors.items()
    }
    planner = {name: (name,) for name in tensors}
    return pickle.dumps(
        Metadata(table, planner_data=planner, storage_data=storage, storage_meta=StorageMeta(), version="1.0.0")
    )
