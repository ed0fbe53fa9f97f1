"""The numpy sampler beside torch's, and its random stream beside torch's generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from research.core.generation import sampler as ours
from research.core.generation.sampling import Sampling, UniformStream
from research.core.torch import sampler as torchs

VOCAB = 3000
SAMPLINGS = [
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=1.3, top_k=20, seed=2),
    Sampling(temperature=1.0, top_k=5 * VOCAB),
    Sampling(temperature=0.9, top_p=0.8, seed=3),
    Sampling(temperature=5.0, top_p=0.95),  # a nucleus wider than the first guess
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=0.7, top_k=50, top_p=0.8, repetition_penalty=1.05, seed=2**40 + 7),
    Sampling(repetition_penalty=1.8),
    Sampling(),
    Sampling(temperature=1.4, min_p=0.05, seed=4),
    Sampling(temperature=1.1, top_k=60, top_p=0.99, min_p=0.01, seed=5),
    Sampling(temperature=0.05, top_k=700),  # as many as the best scores' neighbourhood does not hold
]


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 - 1, 2**40 + 7])
def test_the_stream_is_torchs(seed):
    generator, stream = torch.Generator().manual_seed(seed), UniformStream(seed)
    expected = [float(torch.rand((), generator=generator, dtype=torch.float64)) for _ in range(700)]
    assert [stream() for _ in range(700)] == expected


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_filters_leave_what_torchs_sampler_leaves(sampling):
    if sampling.greedy:
        return
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        logits = 3 * torch.randn(VOCAB, generator=generator)
        seen = torch.rand(VOCAB, generator=generator) < 0.01
        expected = torchs.candidates(torchs.penalize(logits, seen, sampling.repetition_penalty), sampling)
        got = ours.candidates(ours.penalize(logits.numpy(), seen.numpy(), sampling.repetition_penalty), sampling)
        assert got[1].tolist() == expected[1].tolist()
        np.testing.assert_allclose(got[0], expected[0].numpy(), rtol=1e-5)  # float32 sums in another order


def test_equal_scores_at_the_kth_place_stay():
    logits = np.array([1.0, 3.0, 2.0, 2.0, 0.0, 2.0], np.float32)
    probs, ids = ours.candidates(logits, Sampling(temperature=1.0, top_k=2))
    assert ids.tolist() == [1, 2, 3, 5] and probs.sum() == pytest.approx(1)


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0]])
def test_a_batch_draws_the_tokens_that_torchs_sampler_draws(rows):
    penalties = Sampling(temperature=2.0, presence_penalty=1.0, frequency_penalty=0.5, seed=8)
    samplings, prompts = [SAMPLINGS[3], SAMPLINGS[6], penalties], [[5, 6], [7] * 30, list(range(40))]
    mine, theirs = ours.Sampler(samplings, prompts, VOCAB), torchs.Sampler(samplings, prompts, VOCAB)
    generator = torch.Generator().manual_seed(5)
    for _ in range(200):
        logits = 3 * torch.randn(len(rows), VOCAB, generator=generator)
        assert mine(logits.numpy(), rows) == theirs(logits, rows)


def test_tokens_that_a_graph_has_chosen_pass_through():
    assert ours.Sampler([Sampling()] * 2, [[1], [2]], VOCAB)(np.array([7, 9], np.int32)) == [7, 9]
