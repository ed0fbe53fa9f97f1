"""What a training computes of its micro batches, and an evaluation of a batch, where a worker has all layers.

:class:`research.core.mindspore.pipeline.Pipeline` does the same where stages share them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mindspore as ms
from mindspore import Tensor, nn, ops

from research.core.mindspore.buckets import flat
from research.core.mindspore.loss import Objective
from research.core.mindspore.optimizer import Optimizer

Given = Sequence[Tensor | None]  # what :class:`research.core.mindspore.feed.Feed` makes of a batch


class Accumulating(nn.Cell):
    """A backward pass whose gradients are added to the optimiser's sums."""

    def __init__(self, optimizer: Optimizer):
        super().__init__(auto_prefix=False)  # parameters keep their names
        self.buckets, self.weights = optimizer.buckets, optimizer.weights
        self.sums, self.groups = optimizer.sums, optimizer.groups

    def add(self, gradients):
        for n in range(len(self.buckets)):
            mine = [gradients[i] for i in self.groups[n]]
            ops.assign_add(self.sums[n], flat(self.buckets[n], mine))


class Backward(Accumulating):
    """Forward and backward of one micro batch."""

    def __init__(self, objective: Objective, optimizer: Optimizer):
        super().__init__(optimizer)
        self.objective = objective
        self.grad = ms.value_and_grad(self.forward, None, self.weights, has_aux=True)

    def forward(self, input_ids, position_ids, doc_ids, where, targets, ends, scale, router_scale):
        total, balance = self.objective(input_ids, position_ids, doc_ids, where, targets, ends)
        return total * scale + balance * router_scale, total, balance

    def construct(self, input_ids, position_ids, doc_ids, where, targets, ends, scale, router_scale):
        """The inputs of :class:`research.core.mindspore.loss.Objective`; ``scale`` and ``router_scale``: float32 scalars on the
        summed loss and on the router's -> (sum of the cross-entropies, router balance)."""
        # One by one: tensors in a tuple would be constants, and every step a graph of its own.
        found, gradients = self.grad(input_ids, position_ids, doc_ids, where, targets, ends, scale, router_scale)
        self.add(gradients)
        return found[1], found[2]


class Passes:
    """The passes of a whole decoder. Without an ``optimizer`` only the forward one."""

    def __init__(self, objective: Objective, optimizer: Optimizer | None = None):
        self.objective = objective
        self.backward = None if optimizer is None else Backward(objective, optimizer)

    def gradients(
        self, inputs: Sequence[Given], scale: Tensor, router_scale: Tensor, begin: Callable[[int], None]
    ) -> list[tuple[float, float]]:
        """Add the gradients of every micro batch of ``inputs`` to the sums -> its (sum of the cross-entropies, router balance).
        ``begin`` is told the number of a micro batch before it is computed."""
        totals = []
        for number, given in enumerate(inputs):
            begin(number)
            total, balance = self.backward(*given[:6], scale, router_scale)
            totals.append((float(total.asnumpy()), float(balance.asnumpy())))
        return totals

    def loss(self, given: Given) -> float:
        """Sum of the cross-entropies of one batch, without gradients."""
        return float(self.objective(*given)[0].asnumpy())
