"""A batch of prompts and their key/value caches, and the two compiled steps that work on them.

Shape letters: B rows, S cache length, K kv heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor

from research.core.errors import ConfigError
from research.core.mindspore.decode import DecodeStep, Prefill
from research.core.mindspore.decoder import Decoder
from research.core.mindspore.layout import rope_base

SMALLEST_WIDTH = 16


@dataclass
class KVCache:
    """``tensors``: keys and values of every layer in turn, [B, K, S, D]. ``lengths`` int32 [B]: tokens in each row.
    ``base`` float32 [B, 1]: the rotary base of each row's prompt, kept while it is continued (dynamic NTK only)."""

    tensors: tuple[Tensor, ...]
    lengths: np.ndarray
    base: np.ndarray | None

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def length(self) -> int:
        return self.tensors[0].shape[2]


class Runner:
    """Prefill and decode steps of one decoder with caches of ``length`` slots: compiled once per number of rows (and
    prompt width), whatever the prompts.

    With ``states`` the results are the hidden states after the final norm instead of logits: of every position of a prompt
    [B, width, H], and of a step's tokens [B, H].
    """

    def __init__(self, decoder: Decoder, length: int, states: bool = False):
        self.decoder, self.length, self.spec = decoder, length, decoder.spec
        self._prefill, self._step = Prefill(decoder, length, states), DecodeStep(decoder, states)
        for stage in (self._prefill, self._step):
            stage.set_train(False)

    def prefill(self, prompts: Sequence[Sequence[int]], width: int | None = None) -> tuple[np.ndarray, KVCache]:
        """Token-id prompts (at least one token each) -> (float32 logits [B, V] after the last token, their cache).

        Prompts are padded on the right to ``width`` (None: the next power of two, so that few shapes are compiled).
        Raises :class:`ConfigError` when one does not fit the cache.
        """
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        longest = int(lengths.max())
        if longest > self.length:
            raise ConfigError(
                f"a prompt of {longest} tokens does not fit the key/value cache of {self.length}",
                where="generate.max_new_tokens",
                hint="a shorter prompt",
            )
        if width is None:
            width = SMALLEST_WIDTH
            while width < longest:
                width *= 2
            width = min(width, self.length)
        ids = np.zeros((len(prompts), width), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        base = rope_base(self.spec, lengths[:, None])
        logits, *caches = self._prefill(Tensor(ids), Tensor(lengths), *_tensors(base))
        return logits.asnumpy(), KVCache(tuple(caches), lengths, base)

    def step(self, cache: KVCache, tokens: Sequence[int], counted: np.ndarray | None = None) -> np.ndarray:
        """One more token in every row -> float32 logits [B, V]; ``cache`` goes on. Raises :class:`ConfigError` when a row
        is full.

        ``counted`` [B] bool: rows whose token stays; another row's token is filling, overwritten by its next one.
        """
        if int(cache.lengths.max()) >= cache.length:
            raise ConfigError(
                f"the key/value cache of {cache.length} tokens is full",
                where="generate.max_new_tokens",
                hint="fewer new tokens",
            )
        inputs = Tensor(np.asarray(tokens, np.int32)), Tensor(cache.lengths)
        logits, *caches = self._step(*inputs, *_tensors(cache.base), *cache.tensors)
        more = np.int32(1) if counted is None else np.asarray(counted, np.int32)
        cache.tensors, cache.lengths = tuple(caches), cache.lengths + more
        return logits.asnumpy()


def _tensors(base: np.ndarray | None) -> tuple[Tensor, ...]:
    return () if base is None else (Tensor(base),)
