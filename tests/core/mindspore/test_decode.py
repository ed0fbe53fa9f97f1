"""Prefill and decode step, dense and paged, against transformers and against one whole forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mindspore import Tensor

from research.core.errors import ConfigError
from research.core.mindspore.decode import PagedPrefill, PagedStep
from research.core.mindspore.generate import Runner
from tests.core.mindspore.peers import as_tensor, twin
from tests.core.torch.peers import make_pair, random_ids

CLOSE = {"atol": 1e-4, "rtol": 0}  # logits of size ~10 in float32
SLIDING = {"use_sliding_window": True, "sliding_window": 7}


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("gqa", {}),
        # a sliding layer: with a whole one in the test below; experts there and in test_generate
        pytest.param("yarn_factor", SLIDING | {"max_window_layers": 0}, marks=pytest.mark.slow),
    ],
)
def test_64_greedy_tokens_equal_transformers(variant, changes):
    theirs, ours = make_pair(variant, seed=3, num_hidden_layers=1, **changes)
    ids = random_ids(2, 9)
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    runner = Runner(twin(ours))
    cache = runner.new_cache(2, 80)
    logits = runner.prefill(cache, ids.tolist())
    tokens = [logits.argmax(-1)]
    while len(tokens) < 64:
        tokens.append(runner.step(cache, tokens[-1]).argmax(-1))
    assert np.array_equal(np.stack(tokens, 1), expected[:, 9:].numpy())


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "layers"), [("window", 2), ("moe", 1)])
def test_prompts_of_different_lengths_and_their_steps_equal_whole_forwards(variant, layers):
    """Dense caches, and paged ones whose blocks lie in no order; a whole and a sliding layer, and a sparse one."""
    theirs, ours = make_pair(variant, num_hidden_layers=layers)
    decoder, ids, lengths = twin(ours), random_ids(3, 24), [5, 14, 9]
    with torch.no_grad():
        whole = theirs(ids).logits.numpy()
    runner = Runner(decoder)
    cache = runner.new_cache(3, 24)
    logits = runner.prefill(cache, [ids[row, :n].tolist() for row, n in enumerate(lengths)])
    paged = Paged(decoder, rows=3, blocks=12, size=8, per_row=3)
    same = paged.prefill(ids.numpy(), lengths, width=16)
    for _ in range(6):
        for row, n in enumerate(cache.lengths):
            np.testing.assert_allclose(logits[row], whole[row, n - 1], **CLOSE)
        np.testing.assert_allclose(same, logits, **CLOSE)
        following = [int(ids[row, n]) for row, n in enumerate(cache.lengths)]
        same = paged.step(following, cache.lengths)
        logits = runner.step(cache, following)


class Paged:
    """The host's part of a paged cache: which block holds what, the highest numbers first."""

    def __init__(self, decoder, rows: int, blocks: int, size: int, per_row: int):
        self.spec, self.size = decoder.spec, size
        self.prefills, self.steps = PagedPrefill(decoder), PagedStep(decoder)
        numbers = np.arange(blocks)[::-1]
        self.tables = numbers[: rows * per_row].reshape(per_row, rows).T.astype(np.int32)
        empty = np.full((blocks, size, self.spec.kv_heads, self.spec.head_dim), 7.0, np.float32)
        self.caches = [Tensor(empty) for _ in range(2 * self.spec.layers)]

    def slot(self, row: int, place: int) -> int:
        return int(self.tables[row, place // self.size]) * self.size + place % self.size

    def prefill(self, ids, lengths, width: int) -> np.ndarray:
        padded = np.zeros((len(lengths), width), np.int32)
        slots = np.full((len(lengths), width), -1, np.int32)
        for row, n in enumerate(lengths):
            padded[row, :n] = ids[row, :n]
            slots[row, :n] = [self.slot(row, place) for place in range(n)]
        inputs = padded, np.array(lengths), slots.reshape(-1)
        logits, *self.caches = self.prefills(*map(as_tensor, inputs), *self.caches)
        return logits.asnumpy()

    def step(self, tokens, positions) -> np.ndarray:
        slots = np.array([self.slot(row, int(place)) for row, place in enumerate(positions)])
        inputs = np.array(tokens), positions, self.tables, slots
        logits, *self.caches = self.steps(*map(as_tensor, inputs), *self.caches)
        return logits.asnumpy()


@pytest.mark.slow
def test_paged_filling_writes_nowhere():
    _, ours = make_pair("gqa", num_hidden_layers=1)
    paged = Paged(twin(ours), rows=1, blocks=3, size=8, per_row=2)
    paged.prefill(random_ids(1, 5).numpy(), [5], width=16)
    keys = paged.caches[0].asnumpy()
    assert (keys[2, :5] != 7.0).any() and (keys[2, 5:] == 7.0).all() and (keys[:2] == 7.0).all()


def test_a_prompt_longer_than_its_cache_is_an_error():
    _, ours = make_pair("gqa", num_hidden_layers=1)
    runner = Runner(twin(ours))
    with pytest.raises(ConfigError, match="65 tokens do not fit the key/value cache of 64"):
        runner.prefill(runner.new_cache(1, 16), [list(range(65))])


def test_models_that_see_both_ways_do_not_generate():
    from dataclasses import replace

    _, ours = make_pair("gqa", num_hidden_layers=1)
    ours.spec = replace(ours.spec, causal=False)
    with pytest.raises(ConfigError, match="sees both ways"):
        Runner(twin(ours))
