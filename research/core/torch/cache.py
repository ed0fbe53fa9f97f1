"""Static key/value cache: one tensor for all layers, allocated once, written in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from research.core.errors import ConfigError
from research.core.spec import DecoderSpec
from research.core.torch.layout import Layout


class KVCache:
    """Keys and values of every layer, [layers, B, kv_heads, length, head_dim].

    Row b holds its real tokens in slots ``0 .. lengths[b]-1`` whatever padding they came with. ``used`` is an upper
    bound of all lengths known without asking the device, ``uniform`` says that all lengths equal it. ``ntk_alpha``
    [B, 1] (float64) is Qwen v1's dynamic NTK factor, set by each row's first forward and kept.
    """

    def __init__(
        self, spec: DecoderSpec, batch: int, length: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        shape = (spec.layers, batch, spec.kv_heads, length, spec.head_dim)
        # Zeros, not empty: a masked slot still meets a weight of zero, and zero times NaN is NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.spec, self.batch, self.length = spec, batch, length
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.used, self.uniform = 0, True
        self.ntk_alpha: Tensor | None = None

    def update(self, layer: int, k_BTKD: Tensor, v_BTKD: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Write this call's keys and values; -> all of the layer's up to ``layout.horizon``, [B, S, K, D] views."""
        self.check_room(layout)
        k, v = self.k[layer].transpose(1, 2), self.v[layer].transpose(1, 2)
        if layout.slots is None:
            k[:, layout.start : layout.horizon] = k_BTKD
            v[:, layout.start : layout.horizon] = v_BTKD
        else:
            rows = torch.arange(self.batch, device=self.k.device)[:, None]
            k[rows, layout.slots] = k_BTKD
            v[rows, layout.slots] = v_BTKD
        return k[:, : layout.horizon], v[:, : layout.horizon]

    def check_room(self, layout: Layout) -> None:
        """Raise :class:`ConfigError` when this call's tokens do not fit."""
        if layout.horizon > self.length:
            raise ConfigError(
                f"{layout.horizon} tokens do not fit the key/value cache of {self.length}",
                where="generate.max_new_tokens",
                hint="a shorter prompt or fewer new tokens",
            )

    def advance(self, layout: Layout) -> None:
        """Count this call's tokens, after the last layer."""
        self.used = layout.horizon
        self.uniform = self.uniform and layout.added is None
        self.lengths = self.lengths + (layout.time if layout.added is None else layout.added)

    def truncate(self, length: int) -> None:
        """Forget what lies behind the first ``length`` tokens of the only row; with 0 also its dynamic NTK factor."""
        assert self.batch == 1 and length <= self.used
        self.lengths = torch.full_like(self.lengths, length)
        self.used, self.uniform = length, True
        if length == 0:
            self.ntk_alpha = None

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with ``rows`` (rising numbers) only: they move to the front, nothing is allocated."""
        for place, row in enumerate(rows):
            if place != row:
                self.k[:, place, :, : self.used] = self.k[:, row, :, : self.used]
                self.v[:, place, :, : self.used] = self.v[:, row, :, : self.used]
        self.batch = len(rows)
        self.k, self.v = self.k[:, : self.batch], self.v[:, : self.batch]
        self.lengths = self.lengths[list(rows)]
        if self.ntk_alpha is not None:
            self.ntk_alpha = self.ntk_alpha[list(rows)]
        lengths = set(self.lengths.tolist())
        self.used, self.uniform = max(lengths, default=0), len(lengths) <= 1

    def grown(self, length: int) -> KVCache:
        """A copy with room for ``length`` tokens per row."""
        new = KVCache(self.spec, self.batch, length, self.k.dtype, self.k.device)
        new.k[:, :, :, : self.used] = self.k[:, :, :, : self.used]
        new.v[:, :, :, : self.used] = self.v[:, :, :, : self.used]
        new.lengths, new.used, new.uniform = self.lengths, self.used, self.uniform
        new.ntk_alpha = self.ntk_alpha
        return new
