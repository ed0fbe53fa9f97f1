"""The next tokens of a step's rows, from their logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from research.core.engine.api import TokenLogprob
from research.core.engine.constraint import Match
from research.core.generation.sampler import candidates, discourage, draw, penalize
from research.core.generation.sampling import Sampling, UniformStream


class RowSampler:
    """How one answer chooses: its settings, its own stream of random numbers, the tokens it has seen, what it must match.

    Draws exactly one number per token, so the answer does not depend on what else is in the batch, and is that of
    :class:`research.core.generation.sampler.Sampler`.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        vocab: int,
        choice: int = 0,
        match: Match | None = None,
        bias: Sequence[tuple[int, float]] = (),
    ):
        self.sampling, self.match = sampling, match
        self.plain_greedy = sampling.plain_greedy and match is None and not bias
        self._biased = np.array([token for token, _ in bias], np.int64)
        self._bias = np.array([value for _, value in bias], np.float32)
        self._stream = None if sampling.greedy else UniformStream(sampling.seed + choice)
        self._seen = self._counts = None
        if sampling.repetition_penalty != 1:
            self._seen = np.zeros(vocab, bool)
            self._seen[np.array(prompt)] = True
        if sampling.counts:
            self._counts = np.zeros(vocab, np.float32)

    def __call__(self, logits_V: np.ndarray) -> int:
        scores_V, sampling = logits_V, self.sampling
        if len(self._biased):
            scores_V = scores_V.copy()
            scores_V[self._biased] += self._bias
        if self._seen is not None:
            scores_V = penalize(scores_V, self._seen, sampling.repetition_penalty)
        if self._counts is not None:
            scores_V = discourage(scores_V, self._counts, sampling)
        if self.match is not None:
            scores_V = np.where(self.match.allowed(), scores_V, np.float32("-inf"))
        if sampling.greedy:
            token = int(scores_V.argmax())
        else:
            probs_K, ids_K = candidates(scores_V, sampling)
            token = int(ids_K[draw(probs_K, self._stream())])
        if self.match is not None:
            self.match.take(token)
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        return token


def choose(logits_SV: Tensor, samplers: Sequence[RowSampler], rows: Sequence[int]) -> list[int]:
    """One token for each sampler, from its row of ``logits_SV`` (float32, or the best tokens [S] themselves)."""
    if logits_SV.ndim == 1:
        best = logits_SV.tolist()
        return [best[row] for row in rows]
    best = best_tokens(logits_SV) if any(sampler.plain_greedy for sampler in samplers) else []
    others = sorted({row for sampler, row in zip(samplers, rows) if not sampler.plain_greedy})
    if logits_SV.device.type == "cpu":
        host = logits_SV.numpy()
    elif others:  # one copy for all of them
        host = dict(zip(others, logits_SV[others].cpu().numpy()))
    return [best[row] if sampler.plain_greedy else sampler(host[row]) for sampler, row in zip(samplers, rows)]


def best_tokens(logits_SV: Tensor) -> list[int]:
    # On the CPU by numpy, in this thread: waking torch's threads costs the next step's more than it saves.
    on_cpu = logits_SV.device.type == "cpu"
    return (logits_SV.numpy().argmax(-1) if on_cpu else logits_SV.argmax(-1)).tolist()


def numbers(logits_V: Tensor) -> bool:
    """Whether a row of logits (or its best token, -1 if there is none) can be used."""
    return int(logits_V) >= 0 if logits_V.ndim == 0 else bool(torch.isfinite(logits_V).all())


def logprob(logits_V: Tensor, token: int, count: int) -> TokenLogprob:
    """Of the chosen token and the ``count`` best ones."""
    logits_V = logits_V.float()
    total = torch.logsumexp(logits_V, -1)
    top = ()
    if count:
        values, ids = torch.topk(logits_V, min(count, len(logits_V)))
        top = tuple(zip(ids.tolist(), (values - total).tolist()))
    return TokenLogprob(token, float(logits_V[token] - total), top)
