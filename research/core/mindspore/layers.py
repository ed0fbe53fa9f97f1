"""The decoder's parts: RMSNorm, self-attention, and the layer that joins them with a feed-forward.

Cell names are Hugging Face's for Qwen2, and so are the parameters'. Inside a layer tokens are rows [N, H], N = B * T.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops

from research.core.mindspore import fused, native
from research.core.mindspore.attention import attend, attend_heads, bias_of, in_blocks, read_pages, write_rows
from research.core.mindspore.linear import MLP, Linear, ones
from research.core.mindspore.moe import SparseMLP
from research.core.mindspore.rotary import apply_rotary
from research.core.spec import DecoderSpec


class RMSNorm(nn.Cell):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467); float32 inside, the weight applied after rounding."""

    def __init__(self, hidden: int, eps: float, dtype, kernels: str):
        super().__init__()
        self.weight = ones((hidden,), dtype)
        self.eps, self.kernels = eps, kernels
        if kernels == "native":
            self.norm, self.epsilon = native.rms_norm(), native.epsilon(eps)

    def construct(self, x):
        if self.kernels == "ascend":
            return fused.rms_norm(x, self.weight, self.eps)
        if self.kernels == "native":
            return self.norm(x, self.weight, self.epsilon)[0]
        wide = x.astype(ms.float32)
        wide = wide * ops.rsqrt(ops.mean(ops.square(wide), -1, True) + self.eps)
        return self.weight * wide.astype(x.dtype)


class Attention(nn.Cell):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, spec: DecoderSpec, layer: int, dtype, kernels: str):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        self.share = spec.heads // spec.kv_heads
        self.window = spec.sliding_window if layer in spec.sliding_layers else None
        self.causal, self.kernels = spec.causal, kernels
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q_proj = Linear(spec.hidden, q, spec.qkv_bias, dtype)
        self.k_proj = Linear(spec.hidden, kv, spec.qkv_bias, dtype)
        self.v_proj = Linear(spec.hidden, kv, spec.qkv_bias, dtype)
        self.o_proj = Linear(q, spec.hidden, False, dtype)
        self.write = ops.TensorScatterUpdate()
        if kernels == "native":
            self.turn, self.attention = native.rotary(), native.attention(spec.causal)

    def project(self, x_NH, tables, batch: int, time: int):
        """-> queries [B, T, H, D] (turned and scaled), keys and values [B, T, K, D]."""
        (cos, sin), (q_cos, q_sin) = tables
        q = self.q_proj(x_NH).reshape(batch, time, self.heads, self.head_dim)
        k = self.k_proj(x_NH).reshape(batch, time, self.kv_heads, self.head_dim)
        v = self.v_proj(x_NH).reshape(batch, time, self.kv_heads, self.head_dim)
        return self.rotate(q, q_cos, q_sin), self.rotate(k, cos, sin), v

    def rotate(self, x_BTHD, cos, sin):
        if self.kernels == "ascend":
            return fused.rotary(x_BTHD, cos, sin)
        if self.kernels == "native":
            return self.turn(x_BTHD, cos, sin)
        return apply_rotary(x_BTHD, cos, sin)

    def construct(self, x_NH, tables, batch: int, time: int, block, seen):
        """-> (output [N, H], keys, values [B, T, K, D]). ``seen`` = (mask, ends, documents) of :meth:`Decoder.seen`."""
        mask, ends, documents = seen
        q, keys, values = self.project(x_NH, tables, batch, time)
        k, v = keys, values
        if documents is not None:
            out = self.attention(q, k, v, documents)[0]
        else:
            if block is not None:
                q, k, v = in_blocks(q, k, v, block)
            if self.kernels == "ascend" and self.causal and not self.training and mask is None and ends is None:
                out = fused.prompt_attention(q, k, v, self.window)
            elif self.kernels == "ascend":
                out = fused.flash_attention(q, k, v, mask, ends, self.causal, self.window)
            else:
                out = attend(q, k, v, mask)
        return self.o_proj(out.reshape(batch * time, self.heads * self.head_dim)), keys, values

    def step(self, x_BH, tables, place, k_cache, v_cache):
        """One token per row against its cache, written there first -> (output [B, H], both caches). ``place`` is what
        :meth:`research.core.mindspore.decode.DecodeStep.place` or its paged sister says of the cache."""
        batch = x_BH.shape[0]
        q, k, v = self.project(x_BH, tables, batch, 1)
        k = k.reshape(batch, self.kv_heads, self.head_dim).astype(k_cache.dtype)
        v = v.reshape(batch, self.kv_heads, self.head_dim).astype(v_cache.dtype)
        q_BHD = q.reshape(batch, self.heads, self.head_dim)
        full, sliding, slots, positions, pages = place
        shown_BS = full if self.window is None else sliding
        if pages is None:
            k_cache, v_cache = self.write(k_cache, slots, k), self.write(v_cache, slots, v)
            if self.kernels == "ascend":
                out = fused.incre_attention(q_BHD, k_cache, v_cache, positions, shown_BS)
            else:
                out = self.against(q_BHD, k_cache, v_cache, shown_BS)
        elif self.kernels == "ascend" and self.window is None:
            k_cache, v_cache = self.write_pages(k_cache, v_cache, k, v, slots)
            out = fused.paged_attention(q_BHD, k_cache, v_cache, pages, positions + 1)
        else:
            k_cache, v_cache = self.write_pages(k_cache, v_cache, k, v, slots)
            out = self.against(q_BHD, read_pages(k_cache, pages), read_pages(v_cache, pages), shown_BS)
        return self.o_proj(out.reshape(batch, self.heads * self.head_dim)), k_cache, v_cache

    def extend(self, x_NH, tables, place, k_cache, v_cache):
        """T tokens per row behind what its cache holds, written there first -> (output [N, H], both caches). ``place``:
        :meth:`research.core.mindspore.extend.Extend.place`."""
        full, sliding, slots = place
        batch, time = slots.shape[0], slots.shape[2]
        q, k, v = self.project(x_NH, tables, batch, time)
        k_cache = self.write(k_cache, slots, ops.transpose(k, (0, 2, 1, 3)).astype(k_cache.dtype))
        v_cache = self.write(v_cache, slots, ops.transpose(v, (0, 2, 1, 3)).astype(v_cache.dtype))
        k_BSKD, v_BSKD = ops.transpose(k_cache, (0, 2, 1, 3)), ops.transpose(v_cache, (0, 2, 1, 3))
        shown_BTS = full if self.window is None else sliding
        if self.kernels == "ascend":
            out = fused.flash_attention(q, k_BSKD, v_BSKD, shown_BTS.expand_dims(1), None, True, None)
        else:
            out = attend(q, k_BSKD, v_BSKD, bias_of(shown_BTS))
        return self.o_proj(out.reshape(batch * time, self.heads * self.head_dim)), k_cache, v_cache

    def against(self, q_BHD, k_BKSD, v_BKSD, shown_BS):
        batch = q_BHD.shape[0]
        q = q_BHD.reshape(batch, self.kv_heads, self.share, self.head_dim)
        return attend_heads(q, k_BKSD, v_BKSD, bias_of(shown_BS.expand_dims(1)), self.share)

    def write_pages(self, k_cache, v_cache, k_NKD, v_NKD, slots_N):
        """Tokens' keys and values at their ``slots`` (block * block_size + place; negative: nowhere) of paged caches
        [blocks, block_size, K, D] -> the caches."""
        if self.kernels == "ascend":
            return fused.reshape_and_cache(k_NKD, v_NKD, k_cache, v_cache, slots_N)
        return write_rows(self.write, k_cache, k_NKD, slots_N), write_rows(self.write, v_cache, v_NKD, slots_N)


class DecoderLayer(nn.Cell):
    """Pre-norm attention and feed-forward (dense or mixture of experts) around a residual stream."""

    def __init__(self, spec: DecoderSpec, layer: int, dtype, kernels: str):
        super().__init__()
        self.sparse = spec.is_sparse(layer)
        self.self_attn = Attention(spec, layer, dtype, kernels)
        self.mlp = SparseMLP(spec, dtype, kernels) if self.sparse else MLP(spec.hidden, spec.ffn, dtype, kernels)
        self.input_layernorm = RMSNorm(spec.hidden, spec.norm_eps, dtype, kernels)
        self.post_attention_layernorm = RMSNorm(spec.hidden, spec.norm_eps, dtype, kernels)

    def construct(self, x_NH, tables, batch: int, time: int, block, seen, real_N):
        """-> (residual stream [N, H], keys, values [B, T, K, D], router counts [2, E] or None)."""
        mixed, keys, values = self.self_attn(self.input_layernorm(x_NH), tables, batch, time, block, seen)
        x_NH, counts = self.feed_forward(x_NH + mixed, real_N)
        return x_NH, keys, values, counts

    def step(self, x_BH, tables, place, k_cache, v_cache):
        """One token per row; see :meth:`Attention.step`."""
        mixed, k_cache, v_cache = self.self_attn.step(self.input_layernorm(x_BH), tables, place, k_cache, v_cache)
        x_BH, _ = self.feed_forward(x_BH + mixed, None)
        return x_BH, k_cache, v_cache

    def extend(self, x_NH, tables, place, k_cache, v_cache):
        """Several tokens per row; see :meth:`Attention.extend`."""
        mixed, k_cache, v_cache = self.self_attn.extend(self.input_layernorm(x_NH), tables, place, k_cache, v_cache)
        x_NH, _ = self.feed_forward(x_NH + mixed, None)
        return x_NH, k_cache, v_cache

    def feed_forward(self, x_NH, real_N):
        normed = self.post_attention_layernorm(x_NH)
        if not self.sparse:
            return x_NH + self.mlp(normed), None
        out, counts = self.mlp(normed, real_N)
        return x_NH + out, counts
