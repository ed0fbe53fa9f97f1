"""Mixture of experts: router, experts as grouped matmul, shared expert, load-balancing loss.

Shape letters: N tokens, C chosen experts per token, P = N * C pairs, E experts, H hidden, F expert ffn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from research.core.spec import DecoderSpec


class Experts(nn.Module):
    """All experts' weights in two tensors: ``gate_up_proj`` [E, 2F, H] (gate rows first), ``down_proj`` [E, H, F]."""

    def __init__(self, experts: int, hidden: int, ffn: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * ffn, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, ffn))

    def forward(self, x_PH: Tensor, ends_E: Tensor) -> Tensor:
        """``x_PH`` sorted by expert, expert e owning rows ``ends[e-1] .. ends[e]`` (int32) -> [P, H]."""
        gate, up = grouped_linear(x_PH, self.gate_up_proj, ends_E).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * up, self.down_proj, ends_E)


def grouped_linear(x_PI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Row p times the transposed weight of its expert -> [P, O]. Uses torch's grouped matmul where it exists."""
    operator = _grouped_operator(x_PI, weight_EOI)
    if operator is not None:
        return operator(x_PI, weight_EOI.transpose(-2, -1), offs=ends_E)
    return _padded_bmm(x_PI, weight_EOI, ends_E)


def _grouped_operator(x_PI: Tensor, weight_EOI: Tensor):
    operator = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if operator is None or x_PI.device.type not in ("cpu", "cuda"):
        return None
    # Rows must be aligned to 16 bytes (a card's share of a small expert may not be); CUDA's kernel takes bf16 only.
    width = x_PI.element_size() * weight_EOI.shape[-1]
    height = x_PI.element_size() * weight_EOI.shape[-2]
    if width % 16 or height % 16 or (x_PI.device.type == "cuda" and x_PI.dtype != torch.bfloat16):
        return None
    return operator


def _padded_bmm(x_PI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Experts as a batch, each padded to the busiest one: one batched matmul, one device synchronisation."""
    experts = weight_EOI.shape[0]
    ends = ends_E.long()
    begins = F.pad(ends[:-1], (1, 0))
    capacity = max(int((ends - begins).max()), 1)
    pair = torch.arange(x_PI.shape[0], device=x_PI.device)
    owner = torch.searchsorted(ends, pair, right=True)
    slot = owner * capacity + pair - begins[owner]
    padded = x_PI.new_zeros(experts * capacity, x_PI.shape[1]).index_copy(0, slot, x_PI)
    out = torch.bmm(padded.view(experts, capacity, -1), weight_EOI.transpose(1, 2))
    return out.view(experts * capacity, -1).index_select(0, slot)


class SparseMLP(nn.Module):
    """Qwen2-MoE's feed-forward: softmax router in fp32, top-k experts, and a shared expert behind a sigmoid gate."""

    def __init__(self, spec: DecoderSpec):
        from research.core.torch.layers import MLP

        super().__init__()
        moe = spec.moe
        self.experts_count, self.top_k, self.norm_topk = moe.experts, moe.top_k, moe.norm_topk
        self.gate = nn.Linear(spec.hidden, moe.experts, bias=False)
        self.experts = Experts(moe.experts, spec.hidden, moe.expert_ffn)
        self.shared_expert = MLP(spec.hidden, moe.shared_ffn)
        self.shared_expert_gate = nn.Linear(spec.hidden, 1, bias=False)

    def forward(self, x_BTH: Tensor, real_BT: Tensor | None = None, collect: bool = False):
        """-> ([B, T, H], router counts [2, E] when ``collect``, else None); ``real_BT`` leaves filling uncounted."""
        x_NH = x_BTH.reshape(-1, x_BTH.shape[-1])
        probs_NE = F.softmax(self.gate(x_NH), dim=-1, dtype=torch.float32)
        weights_NC, chosen_NC = torch.topk(probs_NE, self.top_k, dim=-1)
        if self.norm_topk:
            weights_NC = weights_NC / weights_NC.sum(-1, keepdim=True)
        routed_NH = self._route(x_NH, weights_NC.to(x_NH.dtype), chosen_NC)
        shared_NH = torch.sigmoid(self.shared_expert_gate(x_NH)) * self.shared_expert(x_NH)
        out = (routed_NH + shared_NH).view(x_BTH.shape)
        return out, (self._counts(probs_NE, chosen_NC, real_BT) if collect else None)

    def _route(self, x_NH: Tensor, weights_NC: Tensor, chosen_NC: Tensor) -> Tensor:
        tokens, chosen_P = x_NH.shape[0], chosen_NC.reshape(-1)
        order_P = torch.argsort(chosen_P, stable=True)
        ends_E = _assignments(chosen_P, self.experts_count).cumsum(0).to(torch.int32)
        y_PH = self.experts(x_NH.index_select(0, order_P // self.top_k), ends_E)
        back_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=order_P.device))
        y_NCH = y_PH.index_select(0, back_P).view(tokens, self.top_k, -1)
        return (y_NCH * weights_NC[..., None]).sum(1)

    def _counts(self, probs_NE: Tensor, chosen_NC: Tensor, real_BT: Tensor | None) -> Tensor:
        if real_BT is None:
            return torch.stack((_assignments(chosen_NC.reshape(-1), self.experts_count).float(), probs_NE.sum(0)))
        real_N = real_BT.reshape(-1).float()
        share = real_N.repeat_interleave(self.top_k)
        counts = torch.zeros_like(probs_NE[0]).scatter_add_(0, chosen_NC.reshape(-1), share)
        return torch.stack((counts, (probs_NE * real_N[:, None]).sum(0)))


def _assignments(chosen_P: Tensor, experts: int) -> Tensor:
    return torch.zeros(experts, dtype=torch.long, device=chosen_P.device).scatter_add_(
        0, chosen_P, torch.ones_like(chosen_P)
    )


class RouterCounts:
    """Gathers every sparse layer's router counts of one forward, for :meth:`loss`."""

    def __init__(self):
        self.layers: list[Tensor] = []
        self.rows: Tensor | int = 0

    def add(self, counts_2E: Tensor, rows: Tensor | int) -> None:
        self.layers.append(counts_2E)
        self.rows = self.rows + rows

    def loss(self) -> Tensor:
        """The load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4 to 6) over all layers' tokens, as
        transformers' ``load_balancing_loss_func`` computes it, before the coefficient. float32 scalar."""
        counts, probs = (torch.stack(self.layers).sum(0) / self.rows).unbind(0)
        return (counts.detach() * probs).sum() * counts.shape[0]
