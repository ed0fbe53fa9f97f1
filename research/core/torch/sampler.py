"""From logits to the next token where the logits lie: the sampler of :mod:`research.core.generation.sampler` in torch.

The order and the meaning of each filter are those of transformers' ``generate``: repetition penalty, then OpenAI's
presence and frequency penalties (which transformers does not have), temperature, top-k, top-p, min-p. Shape letters: B rows, V vocabulary, K candidates that are left after the filters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from research.core.generation.sampling import NUCLEUS_GUESS, Sampling


class Sampler:
    """The random streams and seen tokens of a batch of requests.

    ``samplings`` and ``prompts`` have one entry per row. Each row draws exactly one number per token from a generator of
    its own, so its answer does not depend on what else is in the batch.
    """

    def __init__(self, samplings: Sequence[Sampling], prompts: Sequence[Sequence[int]], vocab: int):
        self.samplings = list(samplings)
        self.plain_greedy = all(s.plain_greedy for s in self.samplings)
        self._generators = [torch.Generator().manual_seed(s.seed) for s in self.samplings]
        self._seen: list[torch.Tensor | None] = [None] * len(self.samplings)
        self._counts = [torch.zeros(vocab) if s.counts else None for s in self.samplings]
        for row, (sampling, prompt) in enumerate(zip(self.samplings, prompts, strict=True)):
            if sampling.repetition_penalty != 1:
                seen = torch.zeros(vocab, dtype=torch.bool)
                seen[torch.as_tensor(list(prompt), dtype=torch.long)] = True
                self._seen[row] = seen

    def __call__(self, logits_BV: torch.Tensor, rows: Sequence[int] | None = None) -> list[int]:
        """Choose one token for each of ``rows`` (default: all, in order) from float ``logits_BV``, one line per row."""
        if self.plain_greedy:
            # On the CPU by numpy, in this thread: waking torch's threads costs the next step's more than it saves.
            on_cpu = logits_BV.device.type == "cpu"
            return (logits_BV.float().numpy().argmax(-1) if on_cpu else logits_BV.argmax(-1)).tolist()
        rows = range(len(self.samplings)) if rows is None else rows
        return [self._choose(logits_V, row) for logits_V, row in zip(logits_BV, rows, strict=True)]

    def _choose(self, logits_V: torch.Tensor, row: int) -> int:
        sampling, seen, counts_V = self.samplings[row], self._seen[row], self._counts[row]
        scores_V = logits_V.float()
        if seen is not None:
            scores_V = penalize(scores_V, seen.to(scores_V.device), sampling.repetition_penalty)
        if counts_V is not None:
            scores_V = discourage(scores_V, counts_V.to(scores_V.device), sampling)
        if sampling.greedy:
            token = int(scores_V.argmax())
        else:
            probs_K, ids_K = candidates(scores_V, sampling)
            token = int(ids_K[draw(probs_K, self._generators[row])])
        if seen is not None:
            seen[token] = True
        if counts_V is not None:
            counts_V[token] += 1
        return token


def penalize(scores_V: torch.Tensor, seen_V: torch.Tensor, penalty: float) -> torch.Tensor:
    """``scores_V`` with the repetition penalty on the tokens marked in the boolean ``seen_V``."""
    return torch.where(seen_V, torch.where(scores_V < 0, scores_V * penalty, scores_V / penalty), scores_V)


def discourage(scores_V: torch.Tensor, counts_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """``scores_V`` with the presence and frequency penalties of tokens that the answer has ``counts_V`` times."""
    return scores_V - (sampling.presence_penalty * (counts_V > 0) + sampling.frequency_penalty * counts_V)


def candidates(scores_V: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that temperature, top-k, top-p and min-p leave: probabilities (float32, falling, sum 1) and ids, both [K].

    As in transformers, ties with the k-th score stay, and a token stays while the mass before it is below ``top_p``.
    """
    scores_V = scores_V / sampling.temperature
    vocab = scores_V.shape[-1]
    if sampling.top_k and sampling.top_k < vocab:
        scores_K, ids_K = torch.topk(scores_V, sampling.top_k)
        ties = (scores_V >= scores_K[-1]).nonzero().squeeze(-1)
        if len(ties) > sampling.top_k:
            scores_K, order = scores_V[ties].sort(descending=True, stable=True)
            ids_K = ties[order]
        log_total = torch.logsumexp(scores_K, -1)
    else:
        log_total = torch.logsumexp(scores_V, -1)
        if sampling.top_p == 1:
            if not sampling.min_p:
                return torch.exp(scores_V - log_total), torch.arange(vocab, device=scores_V.device)
            ids_K = (scores_V >= scores_V.max() + math.log(sampling.min_p)).nonzero().squeeze(-1)
            scores_K, order = scores_V[ids_K].sort(descending=True, stable=True)
            return torch.softmax(scores_K, -1), ids_K[order]
        scores_K, ids_K = torch.topk(scores_V, min(NUCLEUS_GUESS, vocab))
        if torch.exp(torch.logsumexp(scores_K, -1) - log_total) < sampling.top_p:
            scores_K, ids_K = scores_V.sort(descending=True)
    probs_K = torch.exp(scores_K - log_total)
    if sampling.top_p < 1:
        before_K = probs_K.double().cumsum(-1) - probs_K.double()
        kept = max(1, int((before_K < sampling.top_p).sum()))
        probs_K, ids_K = probs_K[:kept], ids_K[:kept]
        probs_K = probs_K / probs_K.sum()
    if sampling.min_p:
        kept = int((probs_K >= sampling.min_p * probs_K[0]).sum())
        probs_K, ids_K = probs_K[:kept] / probs_K[:kept].sum(), ids_K[:kept]
    return probs_K, ids_K


def draw(probs_K: torch.Tensor, generator: torch.Generator) -> int:
    """An index into ``probs_K``, by inverting its cumulative sum at one uniform number of ``generator``."""
    cumulative_K = probs_K.double().cumsum(-1)
    point = torch.rand((), generator=generator, dtype=torch.float64).to(cumulative_K.device) * cumulative_K[-1]
    return min(int(torch.searchsorted(cumulative_K, point, right=True)), len(cumulative_K) - 1)
