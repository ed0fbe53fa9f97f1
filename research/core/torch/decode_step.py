"""The decode step as one native call: for a dense decoder on the CPU, every kernel of a token in a single parallel region.

Layer by layer, a token of a small model costs as much in operator calls as in memory traffic. The kernel
(research/core/native/decode_step.cpp) reads the decoder's own parameters where they lie; nothing is copied or repacked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from research.core.native.build import library
from research.core.torch.cache import KVCache
from research.core.torch.decoder import Decoder
from research.core.torch.layers import MLP, RMSNorm
from research.core.torch.layout import Layout
from research.core.torch.packed_linear import Linear

MOST_ROWS = 8
_ONE_THREAD = 1_000_000  # parameters
_LAYER = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.q_proj.bias",
    "self_attn.k_proj.weight",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.weight",
    "self_attn.v_proj.bias",
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)
_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


class DecodeStep:
    """Steps of one decoder. The parameters may change in place between steps, but must not be replaced."""

    def __init__(self, decoder: Decoder):
        spec = decoder.spec
        self.decoder, self.spec = decoder, spec
        self.dtype = decoder.model.embed_tokens.weight.dtype
        self._keep = kernel_parameters(decoder)  # the addresses below are theirs
        self._weights = torch.tensor([0 if p is None else p.data_ptr() for p in self._keep], dtype=torch.int64)
        self._elements = sum(p.numel() for p in self._keep if p is not None)
        windows = [layer.self_attn.window or 0 for layer in decoder.model.layers]
        self._windows = torch.tensor(windows, dtype=torch.int64)

    @staticmethod
    def fits(decoder: Decoder, head: bool = True) -> bool:
        """Whether the kernel can run this decoder: dense, plain projections, on the CPU, in float32 or bfloat16, with an
        output matrix unless ``head`` is False."""
        spec, embedding = decoder.spec, decoder.model.embed_tokens.weight
        if spec.moe is not None or not spec.causal or spec.head_dim % 16 or spec.head_dim > 256:
            return False
        if head and decoder.lm_head is None:
            return False
        if embedding.device.type != "cpu" or embedding.dtype not in (torch.float32, torch.bfloat16):
            return False
        modules = [] if decoder.lm_head is None else [decoder.lm_head]
        for layer in decoder.model.layers:
            if (
                layer.self_attn.backend != "sdpa"
                or type(layer.mlp) is not MLP
                or type(layer.input_layernorm) is not RMSNorm
            ):
                return False
            modules += [layer.get_submodule(name) for name in _PROJECTIONS]
            modules += [layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
        if any(type(module) not in (Linear, nn.Linear) for module in modules):
            return False  # adapters and quantised layers have their own forward
        if not all(_plain(parameter, embedding.dtype) for parameter in decoder.parameters()):
            return False
        return library() is not None

    def __call__(self, cache: KVCache, tokens: Sequence[int]) -> Tensor:
        """One token in every row (at most ``MOST_ROWS``) -> float32 logits [B, V]."""
        spec, rows = self.spec, len(tokens)
        layout = Layout.cached(cache, 1)
        cache.check_room(layout)
        rope = self.decoder.rope(layout, self.dtype, cache)
        cos, sin = (
            t.float().reshape(-1, spec.head_dim // 2).expand(rows, -1).contiguous() for t in (rope.cos, rope.sin)
        )
        scale = rope.query_scale
        if scale is not None:
            scale = scale.float().reshape(-1).expand(rows).contiguous()
        sizes = torch.tensor(
            [rows, spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.ffn, spec.vocab]
            + list(cache.k.stride()[:3])
        )
        ids, slots = torch.tensor(tokens, dtype=torch.int64), cache.lengths.contiguous()
        logits = torch.empty(rows, spec.vocab)
        library().decode_step(
            int(self.dtype == torch.bfloat16),
            sizes.data_ptr(),
            spec.norm_eps,
            self._weights.data_ptr(),
            self._windows.data_ptr(),
            ids.data_ptr(),
            slots.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            None if scale is None else scale.data_ptr(),
            cache.k.data_ptr(),
            cache.v.data_ptr(),
            logits.data_ptr(),
            self._threads(),
        )
        cache.advance(layout)
        return logits

    def _threads(self) -> int:
        # In a small model threads would wait for each other longer than they work.
        return 1 if self._elements < _ONE_THREAD else torch.get_num_threads()


def _plain(parameter: Tensor, dtype: torch.dtype) -> bool:
    """Whether the address of ``parameter`` says all: not a part of one that is spread over cards."""
    sharded = hasattr(parameter, "full_tensor")
    return not sharded and parameter.dtype == dtype and parameter.is_contiguous() and parameter.device.type == "cpu"


def kernel_parameters(decoder: Decoder) -> list[Tensor | None]:
    """Parameters in the order in which the kernels take their addresses; None for a bias or head that is not there."""
    parameters = [_parameter(layer, name) for layer in decoder.model.layers for name in _LAYER]
    head = None if decoder.lm_head is None else decoder.lm_head.weight
    return [*parameters, decoder.model.embed_tokens.weight, decoder.model.norm.weight, head]


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    path, _, last = name.rpartition(".")
    return getattr(module.get_submodule(path), last)
