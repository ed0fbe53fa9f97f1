"""Groups of workers, and the collectives that layers are cut with: sums and gathers whose gradients are said here.

The CPU has AllReduce(sum) over any group, and AllGather and Broadcast over all workers only; where a gather is wanted
within fewer of them, it is the sum of rows that each worker fills its own of. On Ascend it is AllGather.

Every AllReduce goes through a flat view. MindSpore 2.10 rewrites ``a + AllReduce(b) * c`` into ``AllReduce(a + b) * c``, which
holds for a number ``c`` in gradient accumulation and for nothing else; behind a reshape it does not see the pattern.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, nn, ops

from research.core.mindspore import runtime


@dataclass(frozen=True)
class Group:
    """Some workers of the run in the order of their ranks, of which this is number ``index``; ``everyone``: all of them."""

    name: str
    size: int
    index: int
    everyone: bool

    @property
    def gathers(self) -> bool:
        """Whether AllGather exists for it."""
        return self.everyone or runtime.on_ascend()


class AllReduce(nn.Cell):
    """The sum over the group, without a gradient of its own."""

    def __init__(self, group: Group):
        super().__init__()
        self.reduce = ops.AllReduce(group=group.name)

    def construct(self, x):
        return self.reduce(x.reshape(-1)).reshape(x.shape)


class Together(nn.Cell):
    """The workers' parts of a sum, added up; each part has the whole's gradient. What follows is the same on all."""

    def __init__(self, group: Group):
        super().__init__()
        self.reduce = ops.AllReduce(group=group.name)

    def construct(self, x):
        return self.reduce(x.reshape(-1)).reshape(x.shape)

    def bprop(self, x, out, dout):
        return (dout,)


class Apart(nn.Cell):
    """What is the same on all workers goes into parts that each computes of; the parts' gradients are added up."""

    def __init__(self, group: Group):
        super().__init__()
        self.reduce = ops.AllReduce(group=group.name)

    def construct(self, x):
        return x

    def bprop(self, x, out, dout):
        return (self.reduce(dout.reshape(-1)).reshape(x.shape),)


class Gather(nn.Cell):
    """float32 of one shape on every worker -> [workers, *shape], without a gradient."""

    def __init__(self, group: Group):
        super().__init__()
        self.size, self.index, self.gathers = group.size, group.index, group.gathers
        self.collect = ops.AllGather(group=group.name) if self.gathers else ops.AllReduce(group=group.name)

    def construct(self, x):
        flat = x.reshape(-1) if self.gathers else own_row(x, self.size, self.index)
        return self.collect(flat).reshape((self.size,) + x.shape)


def own_row(x, size: int, index: int):
    """[size * elements of x]: ``x`` at its place among so many, zeros elsewhere."""
    flat = x.reshape(-1)
    parts = (flat,)
    if index:
        parts = (ops.zeros((index * flat.shape[0],), flat.dtype),) + parts
    if index < size - 1:
        parts = parts + (ops.zeros(((size - 1 - index) * flat.shape[0],), flat.dtype),)
    return ops.cat(parts, 0)


def gather_now(group: Group, value: np.ndarray) -> np.ndarray:
    """A float32 array of one shape on every worker of the group -> [workers, *shape], at once."""
    if group.size == 1:
        return value[None]
    if group.gathers:
        flat = ops.AllGather(group=group.name)(Tensor(value.reshape(-1)))
    else:
        rows = np.zeros((group.size, value.size), np.float32)
        rows[group.index] = value.reshape(-1)
        flat = ops.AllReduce(group=group.name)(Tensor(rows))
    return flat.asnumpy().reshape(group.size, *value.shape)


def sum_now(group: Group, value: np.ndarray) -> np.ndarray:
    """The sum of a float32 array over the group, at once."""
    if group.size == 1:
        return value
    flat = ops.AllReduce(group=group.name)(Tensor(np.ascontiguousarray(value).reshape(-1)))
    return flat.asnumpy().reshape(value.shape)
