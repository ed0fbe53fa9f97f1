"""Keys and values of a batch of rows between compiled stages. Their graphs are compiled per shape, so lengths come from few sizes.

Shape letters: B rows, S cache length, K kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, ops

SMALLEST_LENGTH = 64
LENGTH_STEP = 512  # caches longer than this grow by it


def power_of_two(count: int, smallest: int = 1) -> int:
    """The smallest power of two from ``smallest`` on that is not below ``count``."""
    size = smallest
    while size < count:
        size *= 2
    return size


def cache_length(needed: int) -> int:
    """Slots of the cache that is compiled for ``needed`` tokens."""
    if needed <= LENGTH_STEP:
        return power_of_two(needed, SMALLEST_LENGTH)
    return -(-needed // LENGTH_STEP) * LENGTH_STEP


class GraphCache:
    """``tensors``: keys and values of every layer in turn, [B', K, S, D], none before the first prefill; B' may be more
    than the ``batch`` rows in use. ``lengths`` int32 [B]: tokens in each row. ``base`` float32 [B, 1]: the rotary base
    of each row's prompt, kept while it is continued (dynamic NTK only)."""

    def __init__(self, batch: int, length: int):
        self.batch, self.length = batch, length
        self.tensors: tuple[Tensor, ...] = ()
        self.lengths = np.zeros(batch, np.int32)
        self.base: np.ndarray | None = None

    @property
    def used(self) -> int:
        return int(self.lengths.max(initial=0))

    def truncate(self, length: int) -> None:
        """Forget what lies behind the first ``length`` tokens of the only row; with 0 also its rotary base."""
        assert self.batch == 1 and length <= self.used
        self.lengths = np.full_like(self.lengths, length)
        if length == 0:
            self.tensors, self.base = (), None

    def keep(self, rows: Sequence[int]) -> None:
        raise AssertionError("a compiled step keeps its rows")

    def grown(self, length: int) -> GraphCache:
        """A copy with room for ``length`` tokens per row."""
        new = GraphCache(self.batch, cache_length(length))
        new.lengths, new.base = self.lengths.copy(), self.base
        new.tensors = tuple(ops.pad(x, (0, 0, 0, new.length - x.shape[2])) for x in self.tensors)
        return new
