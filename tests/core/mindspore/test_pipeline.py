"""Three stages of a pipeline in one process: their schedule, and that their graphs together compute what the whole decoder does.
Two stages on several workers: test_parallel.py."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from research.core.config.schema import TrainConfig
from research.core.errors import ConfigError
from research.core.mindspore.collectives import Group
from research.core.mindspore.decoder import Decoder
from research.core.mindspore.dropout import Dropout
from research.core.mindspore.loss import Objective
from research.core.mindspore.optimizer import Optimizer
from research.core.mindspore.parallel import World
from research.core.mindspore.passes import Passes
from research.core.mindspore.pipeline import LastBackward, LastStage, Pipeline, Stage, StageBackward
from research.core.mindspore.plan import Plan
from research.core.mindspore.weights import init_weights
from research.core.weights.grid import Grid, shard_model
from tests.core.mindspore.parallel_case import DENSE

ONE = Group("", 1, 0, False)
SPEC = replace(DENSE, layers=3)  # tied: two stages have the matrix


@pytest.mark.slow
def test_three_stages_graphs_give_the_losses_and_gradients_of_the_whole():
    rng = np.random.default_rng(0)
    ids, targets = (rng.integers(0, SPEC.vocab, shape).astype(np.int32) for shape in ((2, 16), 20))
    positions, documents = np.tile(np.arange(16, dtype=np.int32), (2, 1)), np.ones((2, 16), np.int32)
    given = (*map(Tensor, (ids, positions, documents, np.arange(20, dtype=np.int32), targets)), None, None)
    scale = Tensor(1.0, ms.float32)

    whole = init_weights(Decoder(SPEC), 1).set_train()
    optimizer = Optimizer(whole.trainable_params(), TrainConfig(), World())
    ((loss, _),) = Passes(Objective(whole), optimizer).gradients([given], scale, scale, lambda number: None)
    expected = _gradients(optimizer)

    sharding = shard_model(SPEC, Grid(pipeline=3))
    decoders = [init_weights(Decoder(SPEC, plan=Plan(sharding, ONE, n)), 1).set_train() for n in range(3)]
    optimizers = [Optimizer(decoder.trainable_params(), TrainConfig(), World()) for decoder in decoders]
    own = (*given[:3], None)
    states = [None]
    for decoder in decoders[:2]:
        states.append(Stage(decoder)(*own, None, states[-1]))
    last = LastBackward(LastStage(decoders[2], Objective(decoders[2])), optimizers[2])
    total, _, gradient = last(*given[:6], states[2], scale, scale)
    for n in (1, 0):
        gradient = StageBackward(Stage(decoders[n]), optimizers[n])(*own, states[n], gradient)
    assert float(total.asnumpy()) == pytest.approx(loss, rel=1e-6)
    found: dict[str, np.ndarray] = {}
    for name, value in (item for optimizer in optimizers for item in _gradients(optimizer).items()):
        found[name] = found.get(name, 0.0) + value  # the tied matrix has two parts
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * max(1.0, np.abs(value).max()), err_msg=name)


def _gradients(optimizer: Optimizer) -> dict[str, np.ndarray]:
    found = {}
    for bucket, total in zip(optimizer.buckets, optimizer.sums):
        pieces = np.split(total.asnumpy(), np.cumsum(bucket.sizes)[:-1])
        found |= {name: piece.reshape(shape) for name, piece, shape in zip(bucket.names, pieces, bucket.shapes)}
    return found


class Wire:
    """A Link between threads; a tensor that nobody takes for ten seconds is a deadlock."""

    def __init__(self, there: queue.Queue, back: queue.Queue):
        self.there, self.back = there, back

    def send(self, value) -> None:
        self.there.put(value, timeout=10)

    def receive(self, size: int, dtype) -> np.ndarray:
        value = self.back.get(timeout=10)
        assert value.shape == (size,)
        return value


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_every_micro_batchs_gradient_goes_back_through_the_state_that_it_came_from(micro_batches):
    """Stages that multiply by 2, 3 and 5, and hold one tensor at a time between two of them."""
    up, down = ([queue.Queue(1) for _ in range(2)] for _ in range(2))
    inputs = [(np.full((1, 4), n + 1.0), *[None] * 6) for n in range(micro_batches)]
    seen: list[list] = [[], [], []]
    results: list = [None] * 3

    def run(n: int, factor: float) -> None:
        stage = Pipeline.__new__(Pipeline)
        stage.first, stage.last, stage.experts, stage.width, stage.dtype = n == 0, n == 2, 0, 1, None
        stage.compiled = True  # there is nothing to compile
        stage.before = None if n == 0 else Wire(down[n - 1], up[n - 1])
        stage.after = None if n == 2 else Wire(up[n], down[n])

        def forward(ids, positions, documents, ends, base, state):
            return (ids.reshape(-1) if state is None else state) * factor

        def backward(ids, positions, documents, ends, state, gradient):
            seen[n].append(("gradient", float(ids[0, 0]), None if state is None else state[0], gradient[0]))
            return gradient * factor

        def last(ids, positions, documents, where, targets, ends, state, scale, router_scale):
            return Tensor(state.sum() * factor, ms.float32), Tensor(0.0, ms.float32), np.full(4, scale * factor)

        stage.forward, stage.backward = forward, last if n == 2 else backward
        results[n] = stage.gradients(inputs, 7.0, None, lambda number: seen[n].append(number))

    threads = [threading.Thread(target=run, args=case, daemon=True) for case in enumerate((2.0, 3.0, 5.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    numbers = range(micro_batches)
    assert results == [[], [], [(4 * 30.0 * (n + 1), 0.0) for n in numbers]]
    for n, (state, gradient) in enumerate(((None, 105.0), (2.0, 35.0))):
        came = [("gradient", m + 1.0, None if state is None else state * (m + 1), gradient) for m in numbers]
        # Each micro batch begins twice: dropout is drawn again for its second forward.
        assert seen[n] == [*numbers, *(item for m in numbers for item in (m, came[m]))]
    assert seen[2] == list(numbers)


def test_a_dropout_that_cannot_be_drawn_twice_alike_is_refused_by_name():
    decoder = Decoder(replace(DENSE, layers=2), plan=Plan(shard_model(DENSE, Grid(pipeline=2)), ONE, 0))
    drop = Dropout(0.1, ms.Parameter(Tensor(np.zeros(3, np.int32)), requires_grad=False), 0)
    drop.own = False  # as on Ascend
    decoder.model.layers[0].insert_child_to_cell("drop", drop)
    with pytest.raises(ConfigError, match=r"lora.dropout with parallel.pipeline=2[\s\S]*lora.dropout=0"):
        Pipeline(decoder, World(), 24, False)
