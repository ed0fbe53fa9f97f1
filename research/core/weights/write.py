"""Writing a weight folder: safetensors shards tensor by tensor, the index, the JSON files; all under a temporary name
first, so that the final name holds a whole folder or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from research.core.errors import WeightsError
from research.core.weights.folder import INDEX, ITEM_BYTES, SINGLE
from research.core.weights.keys import StoredTensor

SHARD_BYTES = 5_000_000_000


@contextmanager
def new_folder(target: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``target`` to fill; renamed to it when the block ends well, removed when it does not.

    Raises :class:`WeightsError` when ``target`` exists and is not empty, unless ``overwrite``.
    """
    target = Path(target).expanduser()
    if target.exists() and not target.is_dir():
        raise WeightsError("a file of this name is in the way of the folder", where=target)
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise WeightsError("the output folder exists already", where=target, hint="another name, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.parent / f".{target.name}.writing-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for path in aside.rglob("*"):
            _sync(path)
        _sync(aside)
        if target.exists():
            old = target.parent / f".{target.name}.old-{os.getpid()}"
            os.replace(target, old)
            os.replace(aside, target)
            shutil.rmtree(old)
        else:
            os.replace(aside, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(
    folder: Path,
    tensors: list[StoredTensor],
    dtype: str,
    content: Callable[[StoredTensor], object],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``tensors`` as safetensors of ``dtype`` (F32, BF16, ..) in files of at most ``shard_bytes`` (a larger
    tensor has a file of its own), with an index when there are several.

    ``content(tensor)`` returns its bytes (anything with the buffer interface); one tensor is asked for at a time.
    """
    sizes = [_bytes(tensor, dtype) for tensor in tensors]
    shards: list[list[int]] = [[]]
    room = shard_bytes
    for number, size in enumerate(sizes):
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(number)
        room -= size
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for name, members in zip(names, shards):
        _write_shard(folder / name, [(tensors[i], sizes[i]) for i in members], dtype, content)
    if len(shards) > 1:
        weight_map = {tensors[i].name: name for name, members in zip(names, shards) for i in members}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def _bytes(tensor: StoredTensor, dtype: str) -> int:
    count = ITEM_BYTES[dtype]
    for extent in tensor.shape:
        count *= extent
    return count


def _write_shard(path: Path, members: list[tuple[StoredTensor, int]], dtype: str, content) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor, size in members:
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, begin + size]}
        begin += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # readers map the tensors, which wants them aligned
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor, size in members:
            data = memoryview(content(tensor)).cast("B")
            assert len(data) == size, (tensor.name, len(data), size)
            file.write(data)
