"""Parameters of one kind one after another in flat buckets: what a collective sums and an update goes through at a time.

Where workers share layers, a bucket holds parameters of one :class:`Kind`: what is cut, what all workers of a row of the grid
have, what some do, and the embedding that two stages have because it is the head as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mindspore as ms
from mindspore import Parameter, ops

BUCKET = 64 * 2**20


@dataclass(frozen=True, order=True)
class Kind:
    """``copies`` workers of a row of the grid hold the same values; ``partial``: the gradients that they compute are parts of a
    sum, else each has all of it. ``stages``: those that hold the values too, and compute parts; none said: only the worker's
    own."""

    copies: int = 1
    partial: bool = True
    stages: tuple[int, ...] = ()

    @property
    def counted(self) -> float:
        """Each copy's share in what is counted once."""
        return 1.0 / (self.copies * max(1, len(self.stages)))

    @property
    def share(self) -> float:
        """What the sum of the copies' gradients is multiplied by."""
        return 1.0 if self.partial else 1.0 / self.copies


WHOLE = Kind()


@dataclass(frozen=True)
class Bucket:
    """Some parameters one after another; ``length`` is filled up so that every worker's part has ``part`` elements."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    decay: float
    part: int
    shards: int
    kind: Kind = WHOLE

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def length(self) -> int:
        return self.part * self.shards

    @property
    def filling(self) -> int:
        return self.length - sum(self.sizes)


def make_buckets(
    parameters: Sequence[Parameter],
    decay: float,
    shards: int,
    limit: int = BUCKET,
    kind_of: Callable[[str], Kind] = lambda name: WHOLE,
) -> list[Bucket]:
    """Buckets in the parameters' order, matrices first; a parameter is never cut."""
    kinds = {p.name: (len(p.shape) >= 2, kind_of(p.name)) for p in parameters}
    buckets = []
    for matrices, kind in sorted(set(kinds.values()), key=lambda found: (not found[0], found[1])):
        group: list[Parameter] = []
        for parameter in [*(p for p in parameters if kinds[p.name] == (matrices, kind)), None]:
            if group and (parameter is None or 4 * (sum(p.size for p in group) + parameter.size) > limit):
                part = -(-sum(p.size for p in group) // shards)
                names, shapes = tuple(p.name for p in group), tuple(tuple(p.shape) for p in group)
                buckets.append(Bucket(names, shapes, decay if matrices else 0.0, part, shards, kind))
                group = []
            if parameter is not None:
                group.append(parameter)
    return buckets


# The primitives: of tensors' methods, one for each of a model's parameters, a graph takes twice as long to compile.
_reshape, _cast, _slice, _concat = ops.Reshape(), ops.Cast(), ops.Slice(), ops.Concat(0)


def flat(bucket: Bucket, tensors):
    """The bucket's tensors, in its order, as one float32 vector."""
    parts = ()
    for tensor in tensors:
        row = _reshape(tensor, (-1,))
        parts += (row if tensor.dtype == ms.float32 else _cast(row, ms.float32),)
    if bucket.filling:
        parts += (ops.zeros((bucket.filling,), ms.float32),)
    return parts[0] if len(parts) == 1 else _concat(parts)


def piece(values, place: int, like):
    """What lies from ``place`` on in a flat float32 vector, in the shape and dtype of the tensor ``like``."""
    found = _reshape(_slice(values, (place,), (like.size,)), like.shape)
    return found if like.dtype == ms.float32 else _cast(found, like.dtype)
