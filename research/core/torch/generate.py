"""Autoregressive generation on torch against a static key/value cache: prefill, then one step per token.

Shape letters: B rows of the running batch, T time, V vocabulary. Rows of a batch may have different lengths: prompts
are padded on the right for the prefill, each row's real tokens take the first slots of its cache row, and positions
count real tokens, so a row's answer is the one it gets alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from research.core.generation.loop import run_requests
from research.core.generation.requests import OnToken, as_requests
from research.core.generation.sampling import Sampling
from research.core.spec import DecoderSpec
from research.core.torch.cache import KVCache
from research.core.torch.compiled_step import CompiledStep
from research.core.torch.decode_step import MOST_ROWS, DecodeStep
from research.core.torch.decoder import Decoder
from research.core.torch.layout import Layout
from research.core.torch.rotary import ntk_alpha
from research.core.torch.sampler import Sampler


class Runner:
    """Prefill and decode steps of one decoder.

    A step goes layer by layer, or as one call of the native kernel where that can run the decoder
    (:class:`DecodeStep`), or, if ``compiled``, through torch.compile. The answers are the same.
    """

    def __init__(self, decoder: Decoder, compiled: bool = False):
        self.decoder = decoder
        self.fixed_rows = compiled  # a compiled step keeps its shapes
        weight = decoder.model.embed_tokens.weight
        self.dtype, self.device = weight.dtype, weight.device
        self._compiled_step = CompiledStep(decoder) if compiled else None
        self._native_step = DecodeStep(decoder) if not compiled and DecodeStep.fits(decoder) else None

    @property
    def spec(self) -> DecoderSpec:
        return self.decoder.spec

    @property
    def length_limit(self) -> int:
        """Prompt and answer together may not be longer, in tokens."""
        return self.decoder.spec.usable_length

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """In evaluation mode inside, as before after it."""
        was_training = self.decoder.training
        self.decoder.eval()
        try:
            yield
        finally:
            self.decoder.train(was_training)

    def new_cache(self, batch: int, length: int) -> KVCache:
        return KVCache(self.decoder.spec, batch, length, self.dtype, self.device)

    def can_extend(self, cache: KVCache, kept: int, length: int) -> bool:
        """Whether row 0, cut to ``kept`` tokens, may become a prompt of ``length`` tokens without computing all anew.

        Qwen v1's rotary depends on the length of the whole prompt: a longer one may need other keys.
        """
        spec = self.decoder.spec
        if kept == 0 or not spec.dynamic_ntk or cache.ntk_alpha is None:
            return True
        return float(cache.ntk_alpha[0]) == ntk_alpha(length, spec.train_length)

    @torch.inference_mode()
    def prefill(self, cache: KVCache, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Put one prompt (or its rest) behind each row of ``cache`` -> float32 logits [B, V] after the last token."""
        lengths = torch.tensor([len(p) for p in prompts])
        longest = int(lengths.max())
        ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_BT[row, : len(prompt)] = torch.as_tensor(list(prompt), dtype=torch.long)
        mask_BT = torch.arange(longest)[None] < lengths[:, None]
        layout = Layout.cached(cache, longest, mask_BT)
        hidden_BTH = self.decoder.hidden(ids_BT.to(self.device), layout, cache)
        rows = torch.arange(len(prompts), device=self.device)
        return self.decoder.logits(hidden_BTH[rows, lengths.to(self.device) - 1]).float()

    @torch.inference_mode()
    def step(self, cache: KVCache, tokens: Sequence[int], greedy: bool = False) -> Tensor:
        """One more token in every row -> float32 logits [B, V], also when only the largest one's place is wanted."""
        if self._compiled_step is not None:
            return self._compiled_step(cache, tokens)
        if self._native_step is not None and len(tokens) <= MOST_ROWS:
            return self._native_step(cache, tokens)
        ids_B1 = torch.tensor(tokens, dtype=torch.long)[:, None].to(self.device)
        return self.decoder.logits(self.decoder.hidden(ids_B1, None, cache)[:, 0]).float()

    def finite(self, logits_BV: Tensor) -> bool:
        return bool(torch.isfinite(logits_BV).all())

    def sampler(self, samplings: Sequence[Sampling], prompts: Sequence[Sequence[int]]) -> Sampler:
        return Sampler(samplings, prompts, self.spec.vocab)


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    max_new_tokens: int = 256,
    eos_ids: Collection[int] = (),
    on_token: OnToken | None = None,
    batch: int = 8,
    compiled: bool = False,
) -> list[list[int]]:
    """Continue token-id ``prompts``; returns the new tokens of each, in order, an end token included.

    ``sampling`` is one for all or one per prompt (None: greedy). Prompts run ``batch`` at a time, those of like length
    together; ``compiled`` runs the steps through torch.compile. Raises :class:`UserError` before anything is computed when
    a prompt is empty, has an id outside the vocabulary, or does not leave room for ``max_new_tokens``.
    """
    requests = as_requests(prompts, sampling, max_new_tokens)
    return [result.ids for result in run_requests(Runner(decoder, compiled), requests, eos_ids, on_token, batch)]
