"""One decoder for all families, dense and mixture of experts, built from a DecoderSpec.

Shape letters: B batch, T time, H hidden, V vocabulary. Module names are Hugging Face's Qwen2 names for every family;
checkpoints with other names are translated by :mod:`research.core.weights.keys`.
"""

from __future__ import annotations

import sys
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from research.core.spec import DecoderSpec
from research.core.torch.attention import hide_groups_from_compiler, resolve_backend
from research.core.torch.cache import KVCache
from research.core.torch.layers import Attention, DecoderLayer, Embedding, RMSNorm
from research.core.torch.layout import Layout
from research.core.torch.moe import Experts, RouterCounts
from research.core.torch.rotary import RopeTables, Rotary, ntk_alpha


class DecoderModel(nn.Module):
    """Embedding, layers and final norm: the part that Hugging Face calls ``model``."""

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        self.embed_tokens = Embedding(spec.vocab, spec.hidden)
        self.layers = nn.ModuleList(DecoderLayer(spec, layer) for layer in range(spec.layers))
        self.norm = RMSNorm(spec.hidden, spec.norm_eps)


class Decoder(nn.Module):
    """The model. Works under ``torch.device("meta")``; weights come from :meth:`init_weights` or from
    :func:`research.core.torch.weights.load_decoder`.

    Qwen v1's log-n attention and dynamic NTK act in evaluation mode only, as in the published model: training
    (``decoder.train()``) always sees the plain rotary.
    """

    def __init__(self, spec: DecoderSpec, head: bool = True):
        """``head=False`` leaves out the output matrix (embedding models); :meth:`embed` does not need it."""
        super().__init__()
        self.spec = spec
        self.model = DecoderModel(spec)
        self.lm_head = nn.Linear(spec.hidden, spec.vocab, bias=False) if head else None
        self.rotary = Rotary(spec)
        self.attention = "sdpa"
        self.parallel = None  # the TensorPart that this decoder is (research.core.torch.tensor_parallel)
        self.tie()

    def tie(self) -> None:
        """Let the head share the embedding's weight where the spec says so (again after weights were replaced)."""
        if self.spec.tied and self.lm_head is not None:
            self.lm_head.weight = self.model.embed_tokens.weight

    def use_attention(self, name: str) -> None:
        """Choose the attention backend of every layer: auto, sdpa, reference or npu."""
        self.attention = resolve_backend(name, self.model.embed_tokens.weight.device)
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = self.attention

    def init_weights(self, seed: int = 0) -> Decoder:
        """Normal(0, init_range) matrices, zero biases, norms of one. Each parameter has a random stream of its own,
        named by seed and parameter name, so that the result depends neither on order nor on sharding."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
                elif "norm" in name.rsplit(".", 2)[-2]:
                    parameter.fill_(1.0)
                else:
                    stream = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
                    values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                    parameter.copy_(values.normal_(0.0, self.spec.init_range, generator=stream))
        return self

    def set_causal(self, causal: bool) -> None:
        """Causal or bidirectional attention in every layer (embedding models may be either)."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.causal = causal

    def hidden(
        self,
        input_ids: Tensor,
        layout: Layout | None = None,
        cache: KVCache | None = None,
        router: RouterCounts | None = None,
    ) -> Tensor:
        """Token ids [B, T] (int64) -> [B, T, H] after the final norm, in the weights' dtype.

        Without ``layout`` every row is one whole document, or continues ``cache``. ``router`` collects the counts
        that its ``loss()`` needs.
        """
        if layout is None:
            batch, time = input_ids.shape
            layout = Layout.full(batch, time, input_ids.device) if cache is None else Layout.cached(cache, time)
        if layout.groups is not None and "torch._dynamo" in sys.modules:
            hide_groups_from_compiler()
        x = self.model.embed_tokens(input_ids)
        rope = self.rope(layout, x.dtype, cache)
        for layer in self.model.layers:
            x, counts = layer(x, rope, layout, cache, router is not None)
            if counts is not None:
                router.add(counts, input_ids.numel() if layout.real is None else layout.real.sum())
        if cache is not None:
            cache.advance(layout)
        return self.model.norm(x)

    def rope(self, layout: Layout, dtype: torch.dtype, cache: KVCache | None = None) -> RopeTables:
        """The rotary tables of one call, with Qwen v1's length rules in evaluation mode."""
        spec = self.spec
        alpha: Tensor | float = 1.0
        if spec.dynamic_ntk and not self.training:
            alpha = ntk_alpha(layout.lengths, spec.train_length)
            if cache is not None and layout.paged is None:
                alpha = self._kept_alpha(alpha, cache)
        return self.rotary.tables(layout.positions, dtype, alpha, logn=spec.logn_attention and not self.training)

    @staticmethod
    def _kept_alpha(alpha: Tensor | float, cache: KVCache) -> Tensor:
        """A row that has tokens already keeps the alpha of its first forward."""
        if not isinstance(alpha, Tensor):
            alpha = torch.full((cache.batch, 1), alpha, dtype=torch.float64, device=cache.lengths.device)
        if cache.ntk_alpha is not None:
            alpha = torch.where(cache.lengths[:, None] > 0, cache.ntk_alpha, alpha)
        cache.ntk_alpha = alpha
        return alpha

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V], in the weights' dtype."""
        return self.lm_head(hidden)

    def forward(self, input_ids: Tensor, layout: Layout | None = None, cache: KVCache | None = None) -> Tensor:
        """Token ids [B, T] -> logits [B, T, V]."""
        return self.logits(self.hidden(input_ids, layout, cache))

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None = None, normalize: bool = True) -> Tensor:
        """Hidden state of each row's last real token -> [B, H] float32, of length 1 when ``normalize``."""
        batch, time = input_ids.shape
        if attention_mask is None:
            layout = Layout.full(batch, time, input_ids.device)
            last = torch.full((batch,), time - 1, device=input_ids.device)
        else:
            layout = Layout.padded(attention_mask, input_ids.device)
            place = torch.arange(time, device=input_ids.device)
            last = (place * attention_mask.to(input_ids.device).bool()).amax(1)
        hidden = self.hidden(input_ids, layout)
        rows = hidden[torch.arange(batch, device=hidden.device), last].float()
        return F.normalize(rows, dim=-1) if normalize else rows


def expert_parameters(decoder: Decoder) -> list[nn.Parameter]:
    """The stacked expert tensors, for passes that treat them apart from the projections."""
    return [p for module in decoder.modules() if isinstance(module, Experts) for p in module.parameters()]
