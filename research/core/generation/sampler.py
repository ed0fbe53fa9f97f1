"""From logits to the next token in numpy: greedy, temperature, top-k, top-p, min-p and the penalties.

The order and the meaning of each filter are those of transformers' ``generate``: repetition penalty, then OpenAI's
presence and frequency penalties (which transformers does not have), temperature, top-k, top-p, min-p. Logits that lie on a torch device are filtered there (:mod:`research.core.torch.sampler`), to the same
tokens. Shape letters: B rows, V vocabulary, K candidates that are left after the filters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from research.core.generation.sampling import NUCLEUS_GUESS, Sampling, UniformStream

# Below the largest score, where the tokens that the filters leave are looked for first.
_DISTANCES = (3.0, 6.0, 12.0)


class Sampler:
    """The random streams and seen tokens of a batch of requests.

    ``samplings`` and ``prompts`` have one entry per row. Each row draws exactly one number per token from a stream of
    its own, so its answer does not depend on what else is in the batch.
    """

    def __init__(self, samplings: Sequence[Sampling], prompts: Sequence[Sequence[int]], vocab: int):
        self.samplings = list(samplings)
        self.plain_greedy = all(s.plain_greedy for s in self.samplings)
        self._streams = [UniformStream(s.seed) for s in self.samplings]
        self._seen: list[np.ndarray | None] = [None] * len(self.samplings)
        self._counts = [np.zeros(vocab, np.float32) if s.counts else None for s in self.samplings]
        for row, (sampling, prompt) in enumerate(zip(self.samplings, prompts, strict=True)):
            if sampling.repetition_penalty != 1:
                self._seen[row] = np.zeros(vocab, bool)
                self._seen[row][np.asarray(prompt, np.int64)] = True

    def __call__(self, logits_BV: np.ndarray, rows: Sequence[int] | None = None) -> list[int]:
        """Choose one token for each of ``rows`` (default: all, in order) from float ``logits_BV``, one line per row.

        Integers [B] are tokens that a greedy graph has chosen already.
        """
        if logits_BV.ndim == 1:
            assert self.plain_greedy
            return logits_BV.tolist()
        if self.plain_greedy:
            return logits_BV.argmax(-1).tolist()
        rows = range(len(self.samplings)) if rows is None else rows
        return [self._choose(logits_V, row) for logits_V, row in zip(logits_BV, rows, strict=True)]

    def _choose(self, logits_V: np.ndarray, row: int) -> int:
        sampling, seen, counts_V = self.samplings[row], self._seen[row], self._counts[row]
        scores_V = np.asarray(logits_V, np.float32)
        if seen is not None:
            scores_V = penalize(scores_V, seen, sampling.repetition_penalty)
        if counts_V is not None:
            scores_V = discourage(scores_V, counts_V, sampling)
        if sampling.greedy:
            token = int(scores_V.argmax())
        else:
            probs_K, ids_K = candidates(scores_V, sampling)
            token = int(ids_K[draw(probs_K, self._streams[row]())])
        if seen is not None:
            seen[token] = True
        if counts_V is not None:
            counts_V[token] += 1
        return token


def penalize(scores_V: np.ndarray, seen_V: np.ndarray, penalty: float) -> np.ndarray:
    """``scores_V`` with the repetition penalty on the tokens marked in the boolean ``seen_V``."""
    penalty = np.float32(penalty)
    return np.where(seen_V, np.where(scores_V < 0, scores_V * penalty, scores_V / penalty), scores_V)


def discourage(scores_V: np.ndarray, counts_V: np.ndarray, sampling: Sampling) -> np.ndarray:
    """``scores_V`` with the presence and frequency penalties of tokens that the answer has ``counts_V`` times."""
    presence, frequency = np.float32(sampling.presence_penalty), np.float32(sampling.frequency_penalty)
    return scores_V - (presence * (counts_V > 0) + frequency * counts_V)


def candidates(scores_V: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that temperature, top-k, top-p and min-p leave: probabilities (float32, falling, sum 1) and ids, both [K].

    As in transformers, ties with the k-th score stay, and a token stays while the mass before it is below ``top_p``.
    """
    scores_V = scores_V / np.float32(sampling.temperature)
    largest = scores_V.max()
    if sampling.top_k and sampling.top_k < len(scores_V):
        ids_K = _best(scores_V, largest, lambda ids: len(ids) >= sampling.top_k)
        if len(ids_K) > 4 * sampling.top_k:
            least = np.partition(scores_V[ids_K], len(ids_K) - sampling.top_k)[len(ids_K) - sampling.top_k]
            ids_K = ids_K[scores_V[ids_K] >= least]
        scores_K, ids_K = _falling(scores_V, ids_K)
        kept = int((scores_K >= scores_K[sampling.top_k - 1]).sum())
        scores_K, ids_K = scores_K[:kept], ids_K[:kept]
        log_total = _log_sum(scores_K)
    else:
        log_total = _log_sum(scores_V)
        if sampling.top_p == 1:
            if not sampling.min_p:
                return np.exp(scores_V - log_total), np.arange(len(scores_V))
            least = largest + np.float32(math.log(sampling.min_p))
            scores_K, ids_K = _falling(scores_V, np.flatnonzero(scores_V >= least))
            return np.exp(scores_K - _log_sum(scores_K)), ids_K

        def holds_nucleus(ids: np.ndarray) -> bool:
            return bool(np.exp(_log_sum(scores_V[ids]) - log_total) >= sampling.top_p)

        ids_K = _best(scores_V, largest, holds_nucleus)
        if len(ids_K) > 4 * NUCLEUS_GUESS:
            guess = ids_K[np.argpartition(scores_V[ids_K], len(ids_K) - NUCLEUS_GUESS)[len(ids_K) - NUCLEUS_GUESS :]]
            ids_K = guess if holds_nucleus(guess) else ids_K
        scores_K, ids_K = _falling(scores_V, ids_K)
    probs_K = np.exp(scores_K - log_total)
    if sampling.top_p < 1:
        wide_K = probs_K.astype(np.float64)
        kept = max(1, int((wide_K.cumsum() - wide_K < sampling.top_p).sum()))
        probs_K, ids_K = probs_K[:kept] / probs_K[:kept].sum(), ids_K[:kept]
    if sampling.min_p:
        kept = int((probs_K >= np.float32(sampling.min_p) * probs_K[0]).sum())
        probs_K, ids_K = probs_K[:kept] / probs_K[:kept].sum(), ids_K[:kept]
    return probs_K, ids_K


def draw(probs_K: np.ndarray, number: float) -> int:
    """An index into ``probs_K``, by inverting its cumulative sum at the uniform ``number``."""
    cumulative_K = probs_K.astype(np.float64).cumsum()
    return min(int(np.searchsorted(cumulative_K, number * cumulative_K[-1], side="right")), len(cumulative_K) - 1)


def _best(scores_V: np.ndarray, largest: np.float32, enough: Callable[[np.ndarray], bool]) -> np.ndarray:
    """Ids, rising, of all scores above some border that are ``enough``: a look at each, where a sort costs a hundred."""
    for distance in _DISTANCES:
        ids = np.flatnonzero(scores_V >= largest - np.float32(distance))
        if enough(ids):
            return ids
    return np.arange(len(scores_V))


def _falling(scores_V: np.ndarray, ids_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``ids_K`` and their scores, the largest score first, of equal ones the smaller id.

    One sort of 64-bit integers, of which the upper half falls as the score rises, is faster than a stable argsort.
    """
    scores_K = scores_V[ids_K] + np.float32(0)  # of the two zeros the positive one
    bits = scores_K.view(np.uint32)
    rising = np.where(bits >> 31 == 0, bits | np.uint32(1 << 31), ~bits)
    order = np.sort(((~rising).astype(np.uint64) << np.uint64(32)) | ids_K.astype(np.uint64))
    ids_K = (order & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return scores_V[ids_K], ids_K


def _log_sum(scores: np.ndarray) -> np.float32:
    largest = scores.max()
    return np.float32(largest + np.log(np.exp(scores - largest).sum(dtype=np.float64)))
