"""PyTorch's ``.bin`` files, read only when the user says that their source is trusted.

A pickle can run code when it is opened. The names, shapes and places come from torch's weights-only loader, which builds
nothing but tensors (as fake ones: no memory); the bytes are then read from the zip entries where they lie.
"""

from __future__ import annotations

import json
from pathlib import Path

from research.core.errors import WeightsError
from research.core.weights.tensors import TORCH_NAMES, Entry, Segment, tensor_bytes

INDEX = "pytorch_model.bin.index.json"
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")


def read_entries(folder: Path) -> dict[str, Entry]:
    """Name -> entry over the folder's ``.bin`` files, those of the index where there is one."""
    index = folder / INDEX
    if index.is_file():
        try:
            paths = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise WeightsError("not an index of weights", where=index) from None
    else:
        paths = [path for path in sorted(folder.glob("*.bin")) if not path.name.startswith(_NOT_WEIGHTS)]
    absent = [path.name for path in paths if not path.is_file()]
    if absent or not paths:
        raise WeightsError(f"missing: {', '.join(absent) or 'any .bin file'}", where=folder, hint="fetch the files")
    entries: dict[str, Entry] = {}
    for path in paths:
        found = read_file(path)
        for name in found.keys() & entries.keys():
            raise WeightsError(f"tensor {name} is in {entries[name].segments[0].path.name} too", where=path)
        entries |= found
    return entries


def read_file(path: Path) -> dict[str, Entry]:
    """Name -> entry of one file. Raises :class:`WeightsError` for anything but a dictionary of plain tensors."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader raises many kinds: no zip, forbidden names, damage
        raise WeightsError(
            f"the weights-only loader refuses it: {str(error).splitlines()[0]}",
            where=path,
            hint="safetensors files of the same model",
        ) from None
    if not isinstance(state, dict):
        raise WeightsError("it holds no dictionary of tensors", where=path)
    kinds = {getattr(torch, name): kind for kind, name in TORCH_NAMES.items()}
    return {name: _entry(path, name, value, kinds) for name, value in state.items() if isinstance(value, torch.Tensor)}


def _entry(path: Path, name: str, value, kinds: dict) -> Entry:
    offset = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise WeightsError(
            "an old pickle without places of its tensors",
            where=path,
            hint="load and save it with a newer torch, or fetch safetensors",
        )
    kind = kinds.get(value.dtype)
    if kind is None:
        raise WeightsError(f"tensor {name} is {value.dtype}; floating-point weights are needed", where=path)
    if not value.is_contiguous():
        raise WeightsError(f"tensor {name} is a strided view of another", where=path, hint="fetch safetensors")
    shape = tuple(value.shape)
    begin = offset + value.storage_offset() * value.element_size()
    return Entry(name, kind, shape, (Segment(path, begin, tensor_bytes(kind, shape)),))
