"""How a request chooses its tokens, and its own stream of random numbers. No framework: both draw the same numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from research.core.errors import ConfigError

# With top-p alone the whole vocabulary would have to be sorted; the nucleus nearly always lies in this many.
NUCLEUS_GUESS = 1024


@dataclass(frozen=True)
class Sampling:
    """How one request chooses its tokens.

    ``temperature=0`` is greedy (the repetition penalty still applies). ``top_k=0`` and ``top_p=1`` filter nothing.
    ``repetition_penalty`` divides the positive and multiplies the negative logits of every token that is already in the
    prompt or the answer (CTRL, arXiv 1909.05858). ``min_p`` leaves tokens of at least that share of the best one's
    probability. ``presence_penalty`` is taken from the logit of every token of the answer, ``frequency_penalty`` once for
    each time it stands there (both as OpenAI's API defines them). ``seed`` starts the request's own random stream.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self):
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or more"
        )
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (no limit) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 (no limit) to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(math.isfinite(getattr(self, name)), name, getattr(self, name), "that is finite; 0 is none")
        penalty = self.repetition_penalty
        _require(math.isfinite(penalty) and penalty > 0, "repetition_penalty", penalty, "above 0; 1 is none")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def plain_greedy(self) -> bool:
        """Whether the largest logit is the choice, whatever came before."""
        return self.greedy and self.repetition_penalty == 1 and not self.counts

    @property
    def counts(self) -> bool:
        """Whether a logit depends on how often its token stands in the answer."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


def _require(holds: bool, name: str, value: float, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{value} is not possible", where=f"generate.{name}", hint=f"a value {allowed}")


class _NoEntropy(np.random.bit_generator.ISeedSequence):
    """A state that is replaced at once: making a real one takes half a millisecond."""

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        return np.ones(n_words, dtype)


class UniformStream:
    """Uniform numbers in [0, 1), float64, from Mersenne Twister 19937 with its authors' seeding of 32 bits.

    These are the numbers of ``torch.rand((), dtype=torch.float64)`` with a generator of that seed: 53 bits of two draws.
    """

    def __init__(self, seed: int):
        self._twister = np.random.MT19937(_NoEntropy())
        self._twister._legacy_seeding(seed & 0xFFFFFFFF)

    def __call__(self) -> float:
        high, low = (int(value) for value in self._twister.random_raw(2))
        return ((high << 32 | low) & ((1 << 53) - 1)) * 2.0**-53
