"""The key/value cache in blocks, as the decoder's layers see it.

Pools are [layers, blocks, kv_heads, block_size, head_dim], one tensor for keys and one for values.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from research.core.engine.batch import PagedBatch
from research.core.errors import ConfigError
from research.core.spec import DecoderSpec
from research.core.torch.layout import Layout


class PagedCache:
    """Pools of one rank. ``batch`` is set by the runner before each forward."""

    def __init__(
        self,
        spec: DecoderSpec,
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        kv_heads: int | None = None,
    ):
        """``kv_heads``: those that this rank holds (None: all)."""
        shape = (spec.layers, blocks, kv_heads or spec.kv_heads, block_size, spec.head_dim)
        try:
            self.k, self.v = _zeros(shape, dtype, device), _zeros(shape, dtype, device)
        except (torch.OutOfMemoryError, OSError, OverflowError):
            size = 2 * math.prod(shape) * dtype.itemsize / 1e9
            raise ConfigError(
                f"a cache of {blocks} blocks takes {size:.1f} GB, more than there is on {device}",
                where="engine.num_blocks",
                hint="fewer blocks, or none given and engine.memory_fraction",
            ) from None
        self.block_size = block_size
        self.batch: PagedBatch | None = None

    def update(self, layer: int, k_1NKD: Tensor, v_1NKD: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Write the step's keys and values; -> the layer's pools [blocks, kv_heads, block_size, head_dim]."""
        k, v = self.k[layer], self.v[layer]
        block, offset = self.batch.blocks, self.batch.offsets
        k[block, :, offset] = k_1NKD[0]
        v[block, :, offset] = v_1NKD[0]
        return k, v

    def advance(self, layout: Layout) -> None:
        """Lengths are the scheduler's business."""

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks (from, to) of all layers."""
        device = self.k.device
        source = torch.tensor([a for a, _ in pairs], device=device)
        target = torch.tensor([b for _, b in pairs], device=device)
        self.k[:, target] = self.k[:, source]
        self.v[:, target] = self.v[:, source]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros, because a masked key still meets a weight of zero, and zero times NaN is NaN. On the host they take memory
    only where they have been written."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = math.prod(shape)
    region = mmap.mmap(-1, max(1, count) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            region.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without huge pages
            pass
    return torch.frombuffer(region, dtype=dtype, count=count).view(shape)
