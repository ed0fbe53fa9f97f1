"""Stages beside those of :mod:`research.core.mindspore.decode`: several tokens behind a cache, and the greedy choice.

Shape letters: B rows, T tokens of this call, S cache length, K kv heads, V vocabulary.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops

from research.core.mindspore.decode import CacheStage


class Extend(CacheStage):
    """The rest of a prompt, padded on the right: (ids [B, T], starts [B], lengths [B], [base], caches) -> (float32 logits
    [B, V] after each row's last token, caches).

    Row b's cache holds ``starts[b]`` tokens, and its ``lengths[b]`` new ones follow them. ``starts + T`` may not be more
    than S: padding is written too, behind what is real, where the next token overwrites it before it is seen.
    """

    def construct(self, input_ids, starts, lengths, *rest):
        base, caches = self.with_base(rest)
        time = input_ids.shape[1]
        positions_BT = starts.astype(ms.int32).expand_dims(1) + ops.arange(time).astype(ms.int32).expand_dims(0)
        place = self.place(positions_BT, caches[0].shape[2])
        tables = self.decoder.rotary(positions_BT, base, self.decoder.dtype)
        x_NH = self.decoder.model.embed_tokens(input_ids.reshape(-1))
        out = ()
        for n, layer in enumerate(self.decoder.model.layers):
            x_NH, k_cache, v_cache = layer.extend(x_NH, tables, place, caches[2 * n], caches[2 * n + 1])
            out = out + (k_cache, v_cache)
        return (self.last(self.decoder.model.norm(x_NH), lengths, time),) + out

    def place(self, positions_BT, length: int):
        """-> (what full layers see [B, T, S], what sliding layers see, slots [B, K, T, 3])."""
        batch, time = positions_BT.shape
        shape = (batch, self.kv_heads, time, 1)
        slots = ops.cat(
            (
                ops.broadcast_to(ops.arange(batch).astype(ms.int32).reshape(batch, 1, 1, 1), shape),
                ops.broadcast_to(ops.arange(self.kv_heads).astype(ms.int32).reshape(1, self.kv_heads, 1, 1), shape),
                ops.broadcast_to(positions_BT.reshape(batch, 1, time, 1), shape),
            ),
            3,
        )
        slot = ops.arange(length).astype(ms.int32).reshape(1, 1, length)
        position = positions_BT.expand_dims(2)
        full = ops.less_equal(slot, position)
        if not self.windowed:
            return full, full, slots
        return full, ops.logical_and(full, ops.greater(slot, position - self.window)), slots


class Greedy(nn.Cell):
    """A stage whose logits are replaced by the place of the largest, int32 [B]: nothing else leaves the device."""

    def __init__(self, stage: nn.Cell):
        super().__init__(auto_prefix=False)  # parameters keep their names
        self.stage = stage

    def construct(self, *inputs):
        out = self.stage(*inputs)
        return (ops.argmax(out[0], -1).astype(ms.int32),) + out[1:]
