"""The sampler against transformers' logits processors and against the exact distribution."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from research.core.errors import ConfigError
from research.core.generation.sampling import Sampling
from research.core.torch.sampler import Sampler, candidates, draw, penalize

VOCAB = 3000


def _oracle(logits: torch.Tensor, prompt: list[int], sampling: Sampling) -> torch.Tensor:
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    return torch.softmax(chain(torch.tensor([prompt]), logits[None].clone()), -1)[0]


def _ours(logits: torch.Tensor, prompt: list[int], sampling: Sampling) -> torch.Tensor:
    seen = torch.zeros(len(logits), dtype=torch.bool)
    seen[prompt] = True
    probs, ids = candidates(penalize(logits, seen, sampling.repetition_penalty), sampling)
    return torch.zeros(len(logits)).index_put((ids,), probs)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=20),
        Sampling(temperature=1.0, top_k=5 * VOCAB),
        Sampling(temperature=0.9, top_p=0.8),
        Sampling(temperature=5.0, top_p=0.95),  # a nucleus wider than the first guess
        Sampling(temperature=1.0, top_p=1e-6),
        Sampling(temperature=0.7, top_k=50, top_p=0.8, repetition_penalty=1.05),
        Sampling(temperature=1.0, repetition_penalty=1.8),
        Sampling(temperature=1.4, min_p=0.05),
        Sampling(temperature=1.1, top_k=60, top_p=0.99, min_p=0.01),
    ],
    ids=str,
)
def test_filters_leave_the_distribution_that_transformers_leaves(sampling):
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        logits = 3 * torch.randn(VOCAB, generator=generator)
        prompt = torch.randint(VOCAB, (40,), generator=generator).tolist()
        expected, got = _oracle(logits, prompt, sampling), _ours(logits, prompt, sampling)
        assert torch.equal(expected > 0, got > 0)
        # Both are float32 softmaxes of at most 3000 terms; only the order of the sum differs.
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


def test_ties_with_the_kth_score_are_kept():
    logits = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0, -1.0])
    sampling = Sampling(temperature=1.0, top_k=2)
    torch.testing.assert_close(_ours(logits, [], sampling), _oracle(logits, [0], sampling))
    assert (_ours(logits, [], sampling) > 0).sum() == 4


def test_draws_follow_the_exact_distribution():
    probs = torch.softmax(torch.randn(24, generator=torch.Generator().manual_seed(1)), -1)
    generator = torch.Generator().manual_seed(5)
    draws = 20_000
    counts = torch.bincount(torch.tensor([draw(probs, generator) for _ in range(draws)]), minlength=24)
    chi2 = (((counts - draws * probs) ** 2) / (draws * probs)).sum()
    assert chi2 < 49.7  # 99.9 % quantile of chi-square with 23 degrees of freedom
    assert chi2 > 7.5  # 0.1 % quantile: too good a fit would mean the draws are not independent


def test_a_token_of_probability_zero_is_never_drawn():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    generator = torch.Generator().manual_seed(0)
    assert {draw(probs, generator) for _ in range(500)} == {1, 3}


def test_a_rows_tokens_do_not_depend_on_the_batch_around_it():
    logits = torch.randn(6, 4, VOCAB, generator=torch.Generator().manual_seed(2))
    samplings = [Sampling(temperature=1.0, seed=seed, top_p=0.9) for seed in (7, 8, 9, 7)]
    prompts = [[1], [2, 3], [4], [5]]
    batch = Sampler(samplings, prompts, VOCAB)
    together = [batch(step) for step in logits]
    for row in range(4):
        alone = Sampler([samplings[row]], [prompts[row]], VOCAB)
        assert [alone(step[row : row + 1])[0] for step in logits] == [tokens[row] for tokens in together]
    other = Sampler([Sampling(temperature=1.0, seed=99, top_p=0.9)], [[1]], VOCAB)
    assert [other(step[:1])[0] for step in logits] != [tokens[0] for tokens in together]


def test_some_rows_can_be_chosen_alone():
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(4))
    samplings = [Sampling(temperature=1.0, seed=seed) for seed in (1, 2, 3)]
    everyone = Sampler(samplings, [[]] * 3, VOCAB)(logits)
    two = Sampler(samplings, [[]] * 3, VOCAB)(logits[[0, 2]], rows=[0, 2])
    assert two == [everyone[0], everyone[2]]


def test_the_penalty_counts_tokens_of_prompt_and_answer_when_greedy():
    logits = torch.tensor([[3.0, 2.9, 2.8, -5.0]])
    sampler = Sampler([Sampling(repetition_penalty=2.0)], [[0]], 4)
    assert [sampler(logits)[0] for _ in range(3)] == [1, 2, 0]  # 0 is in the prompt; then 1 and 2 are taken


def test_greedy_takes_the_largest():
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(6))
    assert Sampler([Sampling()] * 5, [[]] * 5, VOCAB)(logits) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_k": -3}, {"top_p": 0}, {"top_p": 1.5}, {"repetition_penalty": 0}, {"min_p": 1.1}],
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=f"generate.{next(iter(wrong))}"):
        Sampling(**wrong)
