"""The decoder's parts: RMSNorm, SwiGLU feed-forward, self-attention, and the layer that joins them.

Module names are Hugging Face's for Qwen2. Projections are ordinary ``nn.Linear`` modules, so that LoRA, quantisation
and sharding can exchange or wrap them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from research.core.spec import DecoderSpec
from research.core.torch.attention import attend
from research.core.torch.layout import Layout
from research.core.torch.moe import SparseMLP
from research.core.torch.native import ops
from research.core.torch.packed_linear import Linear
from research.core.torch.rotary import RopeTables, apply_rotary, scale_query


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467); float32 inside, the weight applied after rounding."""

    def __init__(self, hidden: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if ops.ready(x, self.weight):
            return ops.rms_norm(x, self.weight, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Embedding(nn.Embedding):
    """An ``nn.Embedding`` that is not initialised on the meta device: a normal distribution there would load torch's
    whole compiler, which takes seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, ffn: int):
        super().__init__()
        self.gate_proj = Linear(hidden, ffn, bias=False)
        self.up_proj = Linear(hidden, ffn, bias=False)
        self.down_proj = Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(ops.swiglu(gate, up) if ops.ready(gate, up) else F.silu(gate) * up)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions; ``backend`` names the attention operator."""

    def __init__(self, spec: DecoderSpec, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.causal = layer, spec.head_dim, spec.causal
        self.window = spec.sliding_window if layer in spec.sliding_layers else None
        self.backend = "sdpa"
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q_proj = Linear(spec.hidden, q, bias=spec.qkv_bias)
        self.k_proj = Linear(spec.hidden, kv, bias=spec.qkv_bias)
        self.v_proj = Linear(spec.hidden, kv, bias=spec.qkv_bias)
        self.o_proj = Linear(q, spec.hidden, bias=False)

    def forward(self, x_BTH: Tensor, rope: RopeTables, layout: Layout, cache=None) -> Tensor:
        heads = (*x_BTH.shape[:2], -1, self.head_dim)
        q_BTHD = scale_query(apply_rotary(self.q_proj(x_BTH).view(heads), rope), rope)
        k_BSKD = apply_rotary(self.k_proj(x_BTH).view(heads), rope)
        v_BSKD = self.v_proj(x_BTH).view(heads)
        if cache is not None:
            stored = cache.update(self.layer, k_BSKD, v_BSKD, layout)
            if layout.against_cache:
                k_BSKD, v_BSKD = stored
        out = attend(q_BTHD, k_BSKD, v_BSKD, layout, causal=self.causal, window=self.window, backend=self.backend)
        return self.o_proj(out.reshape(*x_BTH.shape[:2], -1))


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward (dense or mixture of experts) around a residual stream."""

    def __init__(self, spec: DecoderSpec, layer: int):
        super().__init__()
        self.self_attn = Attention(spec, layer)
        self.mlp = SparseMLP(spec) if spec.is_sparse(layer) else MLP(spec.hidden, spec.ffn)
        self.input_layernorm = RMSNorm(spec.hidden, spec.norm_eps)
        self.post_attention_layernorm = RMSNorm(spec.hidden, spec.norm_eps)
        self.sparse = spec.is_sparse(layer)

    def forward(self, x_BTH: Tensor, rope: RopeTables, layout: Layout, cache=None, collect: bool = False):
        """-> (residual stream [B, T, H], router counts [2, E] or None)."""
        x_BTH = x_BTH + self.self_attn(self.input_layernorm(x_BTH), rope, layout, cache)
        normed = self.post_attention_layernorm(x_BTH)
        if not self.sparse:
            return x_BTH + self.mlp(normed), None
        out, counts = self.mlp(normed, layout.real, collect)
        return x_BTH + out, counts
