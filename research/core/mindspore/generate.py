"""Autoregressive generation on MindSpore against caches of fixed shape.

Every stage is a graph that is compiled once per shape, so shapes come from few sizes: prompts are padded to a power of two,
rows too, and caches grow in steps. A prompt's rest behind a cache that it shares with the turn before goes through
:class:`Extend`. Shape letters: B rows, S cache length, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from mindspore import Tensor, nn

from research.core.errors import ConfigError
from research.core.generation.loop import run_requests
from research.core.generation.requests import OnToken, as_requests
from research.core.generation.sampler import Sampler
from research.core.generation.sampling import Sampling
from research.core.mindspore.cache import GraphCache, cache_length, power_of_two
from research.core.mindspore.decode import DecodeStep, Prefill
from research.core.mindspore.decoder import Decoder
from research.core.mindspore.extend import Extend, Greedy
from research.core.mindspore.layout import rope_base
from research.core.spec import DecoderSpec

SMALLEST_WIDTH = 16


class Runner:
    """Prefill, extension and decode steps of one decoder, each compiled when it first meets a shape.

    With ``states`` a prefill and a step give the hidden states after the final norm instead of logits: of every position of
    the prompts, filling included, [B, width, H], and of a step's tokens [B, H].
    """

    fixed_rows = True

    def __init__(self, decoder: Decoder, states: bool = False):
        self.decoder, self.states = decoder, states
        self._prefills: dict[int, nn.Cell] = {}
        self._extend, self._step = Extend(decoder), DecodeStep(decoder, states)
        self._greedy_step = Greedy(self._step)

    @property
    def spec(self) -> DecoderSpec:
        return self.decoder.spec

    @property
    def length_limit(self) -> int:
        """Prompt and answer together may not be longer, in tokens."""
        return self.spec.usable_length

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """In evaluation mode inside, as before after it."""
        was_training = self.decoder.training
        self.decoder.set_train(False)
        try:
            yield
        finally:
            self.decoder.set_train(was_training)

    def new_cache(self, batch: int, length: int) -> GraphCache:
        return GraphCache(batch, cache_length(length))

    def can_extend(self, cache: GraphCache, kept: int, length: int) -> bool:
        """Whether row 0, cut to ``kept`` tokens, may become a prompt of ``length`` tokens without computing all anew.

        Qwen v1's rotary depends on the length of the whole prompt: a longer one may need other keys.
        """
        if kept == 0 or cache.base is None:
            return True
        return cache.base[0, 0] == rope_base(self.spec, np.array([length]))[0]

    def prefill(self, cache: GraphCache, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Put one prompt (or its rest) behind each row of ``cache`` -> float32 logits [B, V] after the last token."""
        longest = cache.used + max(len(prompt) for prompt in prompts)
        if longest > cache.length:
            raise ConfigError(
                f"{longest} tokens do not fit the key/value cache of {cache.length}",
                where="generate.max_new_tokens",
                hint="a shorter prompt or fewer new tokens",
            )
        if cache.tensors:
            return self._put_behind(cache, prompts)
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        cache.base = rope_base(self.spec, lengths[:, None])
        width = min(power_of_two(int(lengths.max()), SMALLEST_WIDTH), cache.length)
        out = self._prefill_of(cache.length)(*self._inputs(prompts, width), *_rows(cache.base, len(prompts)))
        return self._taken(cache, out, lengths)

    def _put_behind(self, cache: GraphCache, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        assert cache.batch == len(prompts) == 1, "a conversation is one row"
        rest = list(prompts[0])
        while True:
            # Padding may not reach beyond the cache: near its end the rest goes in pieces that need none.
            room = cache.length - cache.used
            width = power_of_two(len(rest), SMALLEST_WIDTH)
            while width > room and width > 1:
                width //= 2
            piece, rest = rest[:width], rest[width:]
            ids, length = self._inputs([piece], width)
            starts = Tensor(_padded(cache.lengths, 1))
            out = self._extend(ids, starts, length, *_rows(cache.base, 1), *cache.tensors)
            logits_BV = self._taken(cache, out, np.array([len(piece)], np.int32))
            if not rest:
                return logits_BV

    def step(self, cache: GraphCache, tokens: Sequence[int], greedy: bool = False) -> np.ndarray:
        """One more token in every row -> float32 logits [B, V], or with ``greedy`` the chosen tokens, int32 [B]."""
        rows = cache.tensors[0].shape[0]
        # A row that has ended may stand at the end of its slots; what it computes there is nobody's.
        positions = np.minimum(cache.lengths, cache.length - 1)
        inputs = Tensor(_padded(np.asarray(tokens, np.int32), rows)), Tensor(_padded(positions, rows))
        stage = self._greedy_step if greedy else self._step
        return self._taken(cache, stage(*inputs, *_rows(cache.base, len(tokens)), *cache.tensors), np.int32(1))

    def finite(self, logits_BV: np.ndarray) -> bool:
        return bool(np.isfinite(logits_BV).all())

    def sampler(self, samplings: Sequence[Sampling], prompts: Sequence[Sequence[int]]) -> Sampler:
        return Sampler(samplings, prompts, self.spec.vocab)

    def _prefill_of(self, length: int) -> nn.Cell:
        if length not in self._prefills:
            self._prefills[length] = Prefill(self.decoder, length, self.states)
        return self._prefills[length]

    def _inputs(self, prompts: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
        """Ids padded to [B', width] and lengths [B']; a row of filling is a prompt of one token."""
        rows = power_of_two(len(prompts))
        ids, lengths = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        return Tensor(ids), Tensor(lengths)

    def _taken(self, cache: GraphCache, out: Sequence[Tensor], more: np.ndarray) -> np.ndarray:
        first, *caches = out
        cache.tensors, cache.lengths = tuple(caches), cache.lengths + more
        return first.asnumpy()[: cache.batch]


def _padded(values: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate((values, np.zeros((rows - len(values), *values.shape[1:]), values.dtype)))


def _rows(base: np.ndarray | None, count: int) -> tuple[Tensor, ...]:
    """The rotary bases of all rows that are computed, filling included; none for models that take none."""
    if base is None:
        return ()
    return (Tensor(np.concatenate((base, np.repeat(base[:1], power_of_two(count) - len(base), 0)))),)


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    max_new_tokens: int = 256,
    eos_ids: Collection[int] = (),
    on_token: OnToken | None = None,
    batch: int = 8,
) -> list[list[int]]:
    """Continue token-id ``prompts``; returns the new tokens of each, in order, an end token included.

    ``sampling`` is one for all or one per prompt (None: greedy). Prompts run ``batch`` at a time, those of like length
    together. Raises :class:`UserError` before anything is computed when a prompt is empty, has an id outside the
    vocabulary, or does not leave room for ``max_new_tokens``.
    """
    requests = as_requests(prompts, sampling, max_new_tokens)
    return [result.ids for result in run_requests(Runner(decoder), requests, eos_ids, on_token, batch)]
