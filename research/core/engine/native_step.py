"""A whole step of the engine as one native call: for a dense decoder on the CPU, whatever the step holds.

Layer by layer, a step of a small model costs as much in operator calls as in arithmetic, and torch multiplies bfloat16
slowly where the processor has no product for it. The kernel (research/core/native/paged_step.cpp) reads the decoder's own
parameters and the engine's pools where they lie; every weight is read once for all tokens of the step; the output matrix
meets only the tokens whose results are wanted; and a row's results are the same, to the bit, whatever else is in the step.

Shape letters: N tokens of the step, S wanted tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from research.core.engine.batch import PagedBatch
from research.core.native.build import library
from research.core.torch.decode_step import DecodeStep, kernel_parameters
from research.core.torch.decoder import Decoder
from research.core.torch.rotary import RopeTables

_ONE_THREAD = 1_000_000  # parameters times tokens


class NativePagedStep:
    """Steps of one decoder over pools ``k`` and ``v`` [layers, blocks, kv_heads, block_size, head_dim] in its dtype.

    Parameters and pools may change in place between steps, but must not be replaced."""

    def __init__(self, decoder: Decoder, k_pool: Tensor, v_pool: Tensor):
        spec = decoder.spec
        self.decoder, self.spec = decoder, spec
        self.dtype = decoder.model.embed_tokens.weight.dtype
        self.k, self.v = k_pool, v_pool
        shape = (spec.layers, k_pool.shape[1], spec.kv_heads, k_pool.shape[3], spec.head_dim)
        for pool in (k_pool, v_pool):
            assert pool.shape == shape and pool.dtype == self.dtype and pool.is_contiguous(), (pool.shape, shape)
        self._keep = kernel_parameters(decoder)  # the addresses below are theirs
        self._weights = torch.tensor([0 if p is None else p.data_ptr() for p in self._keep], dtype=torch.int64)
        self._elements = sum(p.numel() for p in self._keep if p is not None)
        self._windows = torch.tensor([layer.self_attn.window or 0 for layer in decoder.model.layers], dtype=torch.int64)
        self._cos, self._sin = torch.empty(0, spec.head_dim // 2), torch.empty(0, spec.head_dim // 2)
        self._logits = torch.empty(0)

    @staticmethod
    def fits(decoder: Decoder) -> bool:
        """Whether the kernel can run this decoder as it is now: dense, plain projections, on the CPU, in float32 or
        bfloat16, with its output matrix or without."""
        return DecodeStep.fits(decoder, head=False)

    @property
    def needs_rope(self) -> bool:
        """Whether a call must be given its rotary tables: Qwen v1's depend on more than the position."""
        return self.spec.dynamic_ntk or self.spec.logn_attention

    def __call__(
        self, tokens: Sequence[int], batch: PagedBatch, wanted: Sequence[int], rope: RopeTables | None = None
    ) -> Tensor:
        """Compute N tokens and keep their keys and values -> float32 logits [S, V] of the tokens numbered ``wanted``.

        The result's memory is used again by the next call. ``rope``: tables [1, N, 1, D/2] of :meth:`Decoder.rope`.
        """
        rows = len(wanted)
        if self._logits.numel() < rows * self.spec.vocab:
            self._logits = torch.empty(rows * self.spec.vocab)
        logits = self._logits[: rows * self.spec.vocab].view(rows, self.spec.vocab)
        self._run(tokens, batch, wanted, rope, logits=logits)
        return logits

    def best(
        self, tokens: Sequence[int], batch: PagedBatch, wanted: Sequence[int], rope: RopeTables | None = None
    ) -> Tensor:
        """As a call, -> each wanted token's most likely next one, int64 [S] (the first of equals; -1: none is a number)."""
        best = torch.empty(len(wanted), dtype=torch.int64)
        self._run(tokens, batch, wanted, rope, best=best)
        return best

    def hidden(
        self, tokens: Sequence[int], batch: PagedBatch, wanted: Sequence[int], rope: RopeTables | None = None
    ) -> Tensor:
        """As a call, -> float32 hidden states [S, H] after the final norm, without the output matrix."""
        hidden = torch.empty(len(wanted), self.spec.hidden)
        self._run(tokens, batch, wanted, rope, hidden=hidden)
        return hidden

    def _run(self, tokens, batch, wanted, rope, logits=None, hidden=None, best=None) -> None:
        spec, pointer = self.spec, _pointer
        assert batch.block_tables.dtype == batch.query_starts.dtype == batch.contexts.dtype == torch.int32
        assert len(wanted) <= len(tokens), "the kernel has room for one result a token"
        assert (logits is None and best is None) or self._keep[-1] is not None, "the decoder has no output matrix"
        positions, scale = batch.positions, None
        if rope is None:
            assert not self.needs_rope
            self._extend_tables(batch.longest_context)
            cos, sin, in_type = self._cos, self._sin, True
        else:
            in_type = rope.cos.dtype == self.dtype
            cos, sin = (t.float().reshape(-1, spec.head_dim // 2).contiguous() for t in (rope.cos, rope.sin))
            positions = torch.arange(len(tokens))
            if rope.query_scale is not None:
                scale = rope.query_scale.float().reshape(-1).contiguous()
            assert len(cos) == len(tokens)
        sizes = torch.tensor(
            [spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.ffn, spec.vocab]
            + [len(tokens), *batch.block_tables.shape, batch.block_size, self.k.stride(0), len(wanted), int(in_type)]
        )
        ids, chosen = torch.tensor(tokens), torch.tensor(wanted)
        library().paged_step(
            int(self.dtype == torch.bfloat16),
            sizes.data_ptr(),
            spec.norm_eps,
            *map(pointer, (self._weights, self._windows, ids, batch.slots, positions)),
            *map(pointer, (batch.block_tables, batch.query_starts, batch.contexts)),
            *map(pointer, (cos, sin, scale, self.k, self.v, chosen, logits, hidden, best)),
            self._threads(len(tokens)),
        )

    def _extend_tables(self, length: int) -> None:
        """cos and sin of all positions so far, a row each."""
        if length <= len(self._cos):
            return
        length = max(length, min(2 * len(self._cos), self.spec.usable_length), 1024)
        rope = self.decoder.rotary.tables(torch.arange(length)[None], self.dtype)
        self._cos, self._sin = (t.float().reshape(length, -1).contiguous() for t in (rope.cos, rope.sin))

    def _threads(self, tokens: int) -> int:
        # In a small step threads would wait for each other longer than they work.
        return 1 if self._elements * tokens < _ONE_THREAD else torch.get_num_threads()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
