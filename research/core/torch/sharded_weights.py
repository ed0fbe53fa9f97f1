"""Weights in shards (tensor-parallel parts, MindSpore ranks, torch's distributed checkpoints) -> the decoder, directly."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from research.core.weights.blocks import Stored
from research.core.weights.compare import check_copies, read_stored
from research.core.weights.opened import OpenOptions, open_weights
from research.core.weights.sharded import ShardedWeights, kind_of, memory_layout
from research.core.weights.tensors import Files, RowReader

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_shards(folder: str | os.PathLike) -> ShardedWeights | None:
    """The shards of a folder, checked (replicas must agree), or None when the folder holds whole weights."""
    if kind_of(Path(folder).expanduser()) is None:
        return None
    opened = open_weights(folder, OpenOptions())
    check_copies(opened)
    return opened


def sharded_parameters(opened: ShardedWeights, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
    """The decoder's parameters by name, put together one at a time from the ranks that hold them."""
    sources = opened.sources()
    made = {}
    with Files() as files:
        reader = RowReader(files, opened.entries)
        for stored in memory_layout(opened.spec):
            kind = opened.entries[sources[stored.blocks[0].name][0][0]].dtype
            made[stored.name] = _tensor(stored, kind, sources, opened, reader).to(device=device, dtype=dtype)
    return made


def _tensor(stored: Stored, kind: str, sources, opened: ShardedWeights, reader: RowReader) -> Tensor:
    bits = torch.from_numpy(read_stored(stored, sources, opened.entries, reader, kind))
    return bits.view(_TYPES[kind])
