"""Prefill and decode step as Cells of fixed shape, with the key/value cache as inputs and outputs.

Each compiles once per shape and can be exported as it is (MINDIR). Shape letters: B rows, T prompt width, S cache length,
K kv heads, D head_dim, V vocabulary, P blocks of a paged cache, Z tokens of a block, M blocks of a row.

A dense cache is [B, K, S, D] per layer for keys and for values; row b holds its tokens in slots 0 .. length-1. A paged
one is [P, Z, K, D] per layer, shared by the rows; a row's table lists its blocks. Caches come and go in the order
keys of layer 0, values of layer 0, keys of layer 1, .. Models with dynamic NTK take the rotary base [B, 1] of each
row's prompt before them (:func:`research.core.mindspore.layout.rope_base`); others have no such input.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops

from research.core.errors import ConfigError
from research.core.mindspore.decoder import Decoder


class Head(nn.Cell):
    """States [N, H] -> float32 logits [N, V]."""

    def __init__(self, decoder: Decoder):
        super().__init__(auto_prefix=False)  # parameters keep their names
        self.decoder = decoder

    def construct(self, states_NH):
        return self.decoder.logits(states_NH).astype(ms.float32)


class States(nn.Cell):
    """(ids, positions, doc_ids [B, T], [base]) -> hidden states after the final norm [B, T, H]."""

    def __init__(self, decoder: Decoder):
        super().__init__(auto_prefix=False)
        self.decoder = decoder

    def construct(self, input_ids, position_ids, doc_ids, base=None):
        hidden_NH, _, _, _ = self.decoder.hidden(input_ids, position_ids, doc_ids, base)
        return hidden_NH.reshape(input_ids.shape[0], input_ids.shape[1], -1)


class CacheStage(nn.Cell):
    """What the stages that work on caches have in common."""

    def __init__(self, decoder: Decoder, states: bool = False):
        """``states``: the hidden states after the final norm take the place of the logits, for :class:`Head`."""
        super().__init__(auto_prefix=False)
        self.states = states
        if not decoder.causal:
            raise ConfigError("generation needs a causal model; this one sees both ways", where="model")
        self.decoder, self.dynamic = decoder, decoder.spec.dynamic_ntk
        self.kv_heads = decoder.model.layers[0].self_attn.kv_heads  # this worker's
        self.layers = decoder.spec.layers
        self.windowed, self.window = decoder.any_sliding, decoder.window

    def with_base(self, rest):
        """-> (rotary base or None, caches)."""
        if self.dynamic:
            return rest[0], rest[1:]
        return None, rest

    def last(self, hidden_NH, lengths_B, time: int):
        """float32 logits [B, V] after each row's last real token."""
        rows = ops.arange(lengths_B.shape[0]).astype(ms.int32) * time + lengths_B.astype(ms.int32) - 1
        return self.decoder.logits(ops.gather(hidden_NH, rows, 0)).astype(ms.float32)


class Prefill(CacheStage):
    """Prompts padded on the right: (ids [B, T], lengths [B], [base]) -> (logits, caches of ``length`` slots).

    The logits are float32 [B, V] after each row's last token; ``states`` are those of every position, [B, T, H].
    """

    def __init__(self, decoder: Decoder, length: int, states: bool = False):
        super().__init__(decoder, states)
        self.length = length

    def construct(self, input_ids, lengths, *rest):
        base, _ = self.with_base(rest)
        batch, time = input_ids.shape
        hidden_NH, keys, values, _ = self.decoder.hidden(input_ids, None, None, base)
        if self.states:
            logits = hidden_NH.reshape(batch, time, -1)
        else:
            logits = self.last(hidden_NH, lengths, time)
        caches = ()
        for n in range(self.layers):
            caches = caches + (self.padded(keys[n]), self.padded(values[n]))
        return (logits,) + caches

    def padded(self, x_BTKD):
        # Zeros, not whatever was there: a hidden slot still meets a weight of zero, and zero times NaN is NaN.
        x_BKTD = ops.transpose(x_BTKD, (0, 2, 1, 3))
        batch, kv_heads, time, size = x_BKTD.shape
        if time == self.length:
            return x_BKTD
        return ops.cat((x_BKTD, ops.zeros((batch, kv_heads, self.length - time, size), x_BKTD.dtype)), 2)


class DecodeStep(CacheStage):
    """One token per row: (tokens [B], positions [B], [base], caches) -> (float32 logits [B, V], caches).

    ``positions`` is the number of tokens that a row's cache holds: the token's own position and slot.
    """

    def construct(self, tokens, positions, *rest):
        base, caches = self.with_base(rest)
        return self.through(tokens, positions, base, self.place(positions, caches[0].shape[2]), caches)

    def place(self, positions, length: int):
        """-> (what full layers see [B, S], what sliding layers see, slots [B, K, 3], positions, no pages)."""
        batch = positions.shape[0]
        rows = ops.arange(batch).astype(ms.int32).reshape(batch, 1, 1)
        heads = ops.arange(self.kv_heads).astype(ms.int32).reshape(1, self.kv_heads, 1)
        shape = (batch, self.kv_heads, 1)
        slots = ops.cat(
            (
                ops.broadcast_to(rows, shape),
                ops.broadcast_to(heads, shape),
                ops.broadcast_to(positions.astype(ms.int32).reshape(batch, 1, 1), shape),
            ),
            2,
        )
        full, sliding = self.shown(positions, length)
        return full, sliding, slots, positions, None

    def shown(self, positions, length: int):
        slot = ops.arange(length).astype(ms.int32).expand_dims(0)
        position = positions.astype(ms.int32).expand_dims(1)
        full = ops.less_equal(slot, position)
        if not self.windowed:
            return full, full
        return full, ops.logical_and(full, ops.greater(slot, position - self.window))

    def through(self, tokens, positions, base, place, caches):
        tables = self.decoder.rotary(positions.astype(ms.int32).expand_dims(1), base, self.decoder.dtype)
        x_BH = self.decoder.model.embed_tokens(tokens)
        out = ()
        for n, layer in enumerate(self.decoder.model.layers):
            x_BH, k_cache, v_cache = layer.step(x_BH, tables, place, caches[2 * n], caches[2 * n + 1])
            out = out + (k_cache, v_cache)
        x_BH = self.decoder.model.norm(x_BH)
        return (x_BH if self.states else self.decoder.logits(x_BH).astype(ms.float32),) + out


class PagedPrefill(CacheStage):
    """(ids [B, T], lengths [B], slots [B * T], [base], paged caches) -> (float32 logits [B, V], caches).

    ``slots``: block * Z + place of each token, negative for filling.
    """

    def construct(self, input_ids, lengths, slots, *rest):
        base, caches = self.with_base(rest)
        batch, time = input_ids.shape
        hidden_NH, keys, values, _ = self.decoder.hidden(input_ids, None, None, base)
        out = ()
        for n, layer in enumerate(self.decoder.model.layers):
            k_NKD = keys[n].reshape(batch * time, self.kv_heads, -1)
            v_NKD = values[n].reshape(batch * time, self.kv_heads, -1)
            out = out + layer.self_attn.write_pages(caches[2 * n], caches[2 * n + 1], k_NKD, v_NKD, slots)
        return (self.last(hidden_NH, lengths, time),) + out


class PagedStep(DecodeStep):
    """(tokens [B], positions [B], tables [B, M], slots [B], [base], paged caches) -> (float32 logits [B, V], caches)."""

    def construct(self, tokens, positions, tables, slots, *rest):
        base, caches = self.with_base(rest)
        full, sliding = self.shown(positions, tables.shape[1] * caches[0].shape[1])
        return self.through(tokens, positions, base, (full, sliding, slots, positions, tables), caches)
