"""Stages of a pipeline: workers that have some of the layers each, and hand states and gradients to their neighbours.

The schedule is GPipe's (arXiv 1811.06965): all micro batches forward, then all backward. A stage keeps what it received for
each micro batch and nothing else: its backward graph computes the layers again (activation recomputation, section 2.3
there), so memory grows by one state per micro batch. The last stage has no forward of its own in training: its one graph makes
loss and gradients when its turn backward comes.

What travels is a flat tensor: the residual stream, and behind it the router counts so far where there are experts, whose
balance is a product of sums over all layers. Shape letters as in :mod:`research.core.mindspore.decoder`; E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mindspore as ms
from mindspore import Tensor, nn, ops

from research.core.errors import ConfigError
from research.core.mindspore import runtime
from research.core.mindspore.collectives import Group
from research.core.mindspore.decoder import Decoder
from research.core.mindspore.dropout import Dropout
from research.core.mindspore.loss import Objective
from research.core.mindspore.optimizer import Optimizer
from research.core.mindspore.parallel import World
from research.core.mindspore.passes import Accumulating, Given, Passes


def make_passes(
    decoder: Decoder, world: World, head_chunk: int, *, router: bool, optimizer: Optimizer | None = None
) -> Passes | Pipeline:
    """The passes of a decoder with its collectives (:mod:`research.core.mindspore.tensor_parallel`), or of its stage."""
    if world.pipeline == 1:
        return Passes(Objective(decoder, head_chunk, router), optimizer)
    return Pipeline(decoder, world, head_chunk, router, optimizer)


# --- what a stage computes ------------------------------------------------------------------------------------------


class Stage(nn.Cell):
    """A stage that is not the last: the state from before it (None for the first) -> the state for the next."""

    def __init__(self, decoder: Decoder):
        super().__init__(auto_prefix=False)  # parameters keep their names
        self.decoder = decoder
        spec = decoder.spec
        self.experts = spec.moe.experts if decoder.sparse else 0
        self.width = spec.hidden

    def construct(self, input_ids, position_ids, doc_ids, ends, rope_base, state):
        before = None
        if state is not None:
            before = self.unpacked(state)
        x_NH, _, _, counts_2E = self.decoder.hidden(input_ids, position_ids, doc_ids, rope_base, ends, before)
        if not self.experts:
            return x_NH.reshape(-1)
        if counts_2E is None:
            counts_2E = ops.zeros((2, self.experts), ms.float32)
        # in float32: counts have more digits than 16 bits hold
        return ops.cat((x_NH.reshape(-1).astype(ms.float32), counts_2E.reshape(-1)))

    def unpacked(self, state):
        """-> (states [N, H], router counts [2, E] or None)."""
        if not self.experts:
            return state.reshape(-1, self.width), None
        elements = state.shape[0] - 2 * self.experts
        x_NH = state[:elements].reshape(-1, self.width).astype(self.decoder.dtype)
        return x_NH, state[elements:].reshape(2, self.experts)


class LastStage(Stage):
    """The inputs of :class:`research.core.mindspore.loss.Objective` and the state from before -> the objective's results."""

    def __init__(self, decoder: Decoder, objective: Objective):
        super().__init__(decoder)
        self.objective = objective

    def construct(self, input_ids, position_ids, doc_ids, where, targets, ends, rope_base, state):
        before = self.unpacked(state)
        return self.objective(input_ids, position_ids, doc_ids, where, targets, ends, rope_base, before)


class StageBackward(Accumulating):
    """The backward pass of a :class:`Stage`, whose forward it computes again."""

    def __init__(self, stage: Stage, optimizer: Optimizer):
        super().__init__(optimizer)
        self.stage, self.first = stage, stage.decoder.first
        self.grad = ms.value_and_grad(self.forward, None if self.first else 4, self.weights)

    def forward(self, input_ids, position_ids, doc_ids, ends, state, gradient):
        # Its gradients are those of the stage, whose state's gradient the next stage has said.
        out = self.stage(input_ids, position_ids, doc_ids, ends, None, state)
        return (out.astype(ms.float32) * gradient.astype(ms.float32)).sum()

    def construct(self, input_ids, position_ids, doc_ids, ends, state, gradient):
        """-> the gradient of ``state``; of the first stage, which has none, nothing of use."""
        _, found = self.grad(input_ids, position_ids, doc_ids, ends, state, gradient)
        if self.first:
            self.add(found)
            return gradient
        self.add(found[1])
        return found[0]


class LastBackward(Accumulating):
    """Forward and backward of the :class:`LastStage`."""

    def __init__(self, stage: LastStage, optimizer: Optimizer):
        super().__init__(optimizer)
        self.stage = stage
        self.grad = ms.value_and_grad(self.forward, 6, self.weights, has_aux=True)

    def forward(self, input_ids, position_ids, doc_ids, where, targets, ends, state, scale, router_scale):
        total, balance = self.stage(input_ids, position_ids, doc_ids, where, targets, ends, None, state)
        return total * scale + balance * router_scale, total, balance

    def construct(self, input_ids, position_ids, doc_ids, where, targets, ends, state, scale, router_scale):
        """-> (sum of the cross-entropies, router balance, the gradient of ``state``)."""
        found, gradients = self.grad(input_ids, position_ids, doc_ids, where, targets, ends, state, scale, router_scale)
        self.add(gradients[1])
        return found[1], found[2], gradients[0]


# --- between stages -------------------------------------------------------------------------------------------------


class Link:
    """This worker and its counterpart in the next or the former stage. A tensor goes over as a sum: one of the two has it, the
    other zeros. AllReduce is what the CPU has between any two workers, and over a cable for both directions it takes no
    longer than sending, so that Ascend goes the same way."""

    def __init__(self, group: Group):
        self.reduce = ops.AllReduce(group=group.name)

    def send(self, value: Tensor) -> None:
        self._together(value)

    def receive(self, size: int, dtype) -> Tensor:
        return self._together(ops.zeros((size,), dtype))

    def _together(self, value: Tensor) -> Tensor:
        total = self.reduce(value)
        if not runtime.on_ascend():
            total.asnumpy()  # a call outside of graphs is queued; the next graph may bring collectives of its own
        return total


# --- the schedule ---------------------------------------------------------------------------------------------------


class Pipeline:
    """The passes (:class:`research.core.mindspore.passes.Passes`) of one stage; every stage has to ask for the same ones, with
    the same batches. Loss and balance are the last stage's, zero in the others.

    Raises :class:`ConfigError` for a dropout that could not be drawn twice alike.
    """

    def __init__(
        self, decoder: Decoder, world: World, head_chunk: int, router: bool, optimizer: Optimizer | None = None
    ):
        plan = decoder.plan
        self.first, self.last = plan.first, plan.last
        if any(isinstance(cell, Dropout) and not cell.own for _, cell in decoder.cells_and_names()):
            raise ConfigError(
                "a stage computes its layers twice, and MindSpore's dropout would leave out other values the second time",
                where=f"lora.dropout with parallel.pipeline={plan.stages}",
                hint="lora.dropout=0",
            )
        self.before = None if self.first else Link(world.link(plan.stage - 1))
        self.after = None if self.last else Link(world.link(plan.stage))
        if self.last:
            self.stage = LastStage(decoder, Objective(decoder, head_chunk, router))
            self.forward = None
            self.backward = None if optimizer is None else LastBackward(self.stage, optimizer)
        else:
            # A Cell is compiled for training or for evaluation, which differ in Qwen v1's attention and in dropout.
            self.stage, self.forward = Stage(decoder), Stage(decoder)
            self.backward = None if optimizer is None else StageBackward(Stage(decoder), optimizer)
        self.experts, self.width = self.stage.experts, self.stage.width
        self.dtype = ms.float32 if self.experts else decoder.dtype
        self.compiled = False

    def gradients(
        self, inputs: Sequence[Given], scale: Tensor, router_scale: Tensor, begin: Callable[[int], None]
    ) -> list[tuple[float, float]]:
        """:meth:`research.core.mindspore.passes.Passes.gradients`; ``begin`` comes before each of a micro batch's passes."""
        if not self.compiled:
            self._compile(inputs[0], scale, router_scale)
        states = []
        for number, given in enumerate(inputs):
            states.append(self._receive(self.before, given))
            if not self.last:
                begin(number)
                self.after.send(self.forward(*_of_layers(given), None, states[-1]))
        totals = []
        for number, given in enumerate(inputs):
            state, states[number] = states[number], None
            if self.last:
                begin(number)
                total, balance, gradient = self.backward(*given[:6], state, scale, router_scale)
                totals.append((float(total.asnumpy()), float(balance.asnumpy())))
            else:
                wanted = self._receive(self.after, given)
                begin(number)
                gradient = self.backward(*_of_layers(given), state, wanted)
            if not self.first:
                self.before.send(gradient)
        return totals

    def loss(self, given: Given) -> float:
        """:meth:`research.core.mindspore.passes.Passes.loss`."""
        own = given if self.last else (*_of_layers(given), given[6])
        self.stage.compile(*own, self._empty(self.before, given))  # once for each shape; see _compile
        state = self._receive(self.before, given)
        if self.last:
            return float(self.stage(*own, state)[0].asnumpy())
        self.after.send(self.stage(*own, state))
        return 0.0

    def _compile(self, given: Given, scale: Tensor, router_scale: Tensor) -> None:
        """All stages at the same time: one after another, each when its first state comes, the last would wait longer than
        collectives do."""
        state = self._empty(self.before, given)
        if self.last:
            self.backward.compile(*given[:6], state, scale, router_scale)
        else:
            self.forward.compile(*_of_layers(given), None, state)
            self.backward.compile(*_of_layers(given), state, self._empty(self.after, given))
        self.compiled = True

    def _receive(self, link: Link | None, given: Given) -> Tensor | None:
        return None if link is None else link.receive(self._size(given), self.dtype)

    def _empty(self, link: Link | None, given: Given) -> Tensor | None:
        return None if link is None else ops.zeros((self._size(given),), self.dtype)

    def _size(self, given: Given) -> int:
        """Elements of what goes over a link for these rows."""
        rows, time = given[0].shape
        return rows * time * self.width + 2 * self.experts


def _of_layers(given: Given) -> tuple[Tensor | None, ...]:
    """(input_ids, position_ids, doc_ids, ends)."""
    return (*given[:3], given[5])
