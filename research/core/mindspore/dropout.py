"""Dropout whose choices a resumed run repeats.

MindSpore's own operator on the CPU keeps its place in the random numbers to itself. This repository's kernel draws by a
hash of a key that the trainer sets for every micro batch, so the choices depend on seed, step, micro batch, worker and
layer only. On Ascend MindSpore's generator is part of the checkpoint (NOT RUN HERE).
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn

from research.core.mindspore import native, runtime

KEY = "dropout_key"


def new_key() -> Parameter:
    """What one decoder's Dropouts share: (seed, step, micro batch among all workers') int32 [3]."""
    return Parameter(Tensor(np.zeros(3, np.int32)), name=KEY, requires_grad=False)


class Dropout(nn.Cell):
    """``x / (1 - rate)``, or 0 with probability ``rate``, in training mode; ``place`` tells the layers apart."""

    def __init__(self, rate: float, key: Parameter, place: int):
        super().__init__(auto_prefix=False)
        self.own = native.available() and not runtime.on_ascend()
        self.key = key
        if self.own:
            self.place = Tensor([place], ms.int32)
            self.keep = Tensor([1 - rate], ms.float32)
            self.drop = native.dropout()
            self.join = ms.ops.Concat()
        else:
            self.drop = mint.nn.Dropout(rate) if runtime.on_ascend() else nn.Dropout(p=rate)

    def construct(self, x):
        if not self.training:
            return x
        if not self.own:
            return self.drop(x)
        return self.drop(x, self.join((self.key.value(), self.place)), self.keep)


def set_key(decoder: nn.Cell, seed: int, step: int, micro_batch: int) -> None:
    """Choose anew from here on; nothing to do for a decoder without Dropouts."""
    for _, cell in decoder.cells_and_names():
        if isinstance(cell, Dropout):
            cell.key.set_data(Tensor(np.array([seed & 0x7FFFFFFF, step, micro_batch], np.int32)))
            return
