"""The decode step through torch.compile: one graph of static shapes, whatever the lengths of the rows.

The graph attends to the whole cache under a mask, writes each row's key and value at the row's own slot, and takes
everything that changes between steps as a tensor, so that it is compiled once for a batch size and a cache length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache as once

import torch
from torch import Tensor

from research.core.torch.cache import KVCache
from research.core.torch.decoder import Decoder
from research.core.torch.layout import Layout


class CompiledStep:
    """Steps of one decoder, compiled at the first call (tens of seconds for a large model)."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    def __call__(self, cache: KVCache, tokens: Sequence[int]) -> Tensor:
        """One token in every row -> float32 logits [B, V]."""
        layout = Layout.cached(cache, 1)
        cache.check_room(layout)
        ids_B1 = torch.tensor(tokens, dtype=torch.long)[:, None].to(cache.lengths.device)
        logits_BV = _compiled()(self.decoder, ids_B1, cache.k, cache.v, cache.lengths, cache.ntk_alpha)
        cache.advance(layout)
        return logits_BV


@once
def _compiled():
    return torch.compile(_step, dynamic=False, fullgraph=True)


def _step(
    decoder: Decoder, ids_B1: Tensor, k: Tensor, v: Tensor, lengths_B: Tensor, ntk_alpha: Tensor | None
) -> Tensor:
    positions = lengths_B[:, None]
    layout = Layout(ids_B1.shape[0], 1, positions, 1, against_cache=True, start=0, horizon=k.shape[3], slots=positions)
    hidden_B1H = decoder.hidden(ids_B1, layout, _Tensors(k, v, lengths_B, ntk_alpha))
    return decoder.logits(hidden_B1H[:, 0]).float()


class _Tensors:
    """A cache as the graph sees it: tensors only; counting is done outside."""

    def __init__(self, k: Tensor, v: Tensor, lengths: Tensor, ntk_alpha: Tensor | None):
        self.k, self.v, self.lengths, self.ntk_alpha = k, v, lengths, ntk_alpha
        self.batch = k.shape[1]

    def update(self, layer: int, k_B1KD: Tensor, v_B1KD: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        k, v = self.k[layer].transpose(1, 2), self.v[layer].transpose(1, 2)
        rows = torch.arange(self.batch, device=k.device)[:, None]
        k.index_put_((rows, layout.slots), k_B1KD)
        v.index_put_((rows, layout.slots), v_B1KD)
        return k, v

    def advance(self, layout: Layout) -> None:
        pass
