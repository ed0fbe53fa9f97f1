"""Attention over documents of one batch: moved together, attended, moved back.

Two orders: *slots*, where documents of like length form padded ``[G, L]`` batches for SDPA; and *document order*, all
real tokens one document after another, for operators that take cumulative lengths (torch's varlen attention on CUDA,
TND on the NPU). Shape letters as in :mod:`research.core.torch.attention`; M real tokens.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor

from research.core.torch.layout import Groups


class _Move(torch.autograd.Function):
    """Rows of ``x`` to new places. The inverse places are known, so backward is a gather too, not a scattered sum."""

    @staticmethod
    def forward(ctx, x, index, real, back, back_real):
        ctx.save_for_backward(back, back_real)
        moved = x.index_select(0, index)
        return moved if real is None else moved.mul_(real[:, None])

    @staticmethod
    def backward(ctx, grad):
        back, back_real = ctx.saved_tensors
        moved = grad.contiguous().index_select(0, back)
        return (moved if back_real is None else moved.mul_(back_real[:, None])), None, None, None, None


def in_slots(x_BTHD: Tensor, g: Groups) -> Tensor:
    """[B, T, H, D] -> [slots, H * D]; filling holds copies of token 0, whose gradient is dropped."""
    batch, time = x_BTHD.shape[:2]
    return _Move.apply(x_BTHD.reshape(batch * time, -1), g.to_slot, None, g.to_token, g.token_real)


def from_slots(x_SHD: Tensor, g: Groups, shape: torch.Size) -> Tensor:
    """[slots, H * D] -> ``shape`` [B, T, H, D]; zero at padding."""
    return _Move.apply(x_SHD, g.to_token, g.token_real, g.to_slot, g.slot_real).view(shape)


def in_document_order(x_BTHD: Tensor, g: Groups) -> Tensor:
    """[B, T, H, D] -> [M, H, D]."""
    batch, time, heads, dim = x_BTHD.shape
    moved = _Move.apply(x_BTHD.reshape(batch * time, -1), g.real_tokens, None, g.real_back, g.token_real)
    return moved.view(-1, heads, dim)


def in_token_order(x_MHD: Tensor, g: Groups, shape: torch.Size) -> Tensor:
    """[M, H, D] -> ``shape`` [B, T, H, D]; zero at padding."""
    flat = x_MHD.reshape(x_MHD.shape[0], -1)
    return _Move.apply(flat, g.real_back, g.token_real, g.real_tokens, None).view(shape)


@functools.cache
def varlen_operator():
    """torch.nn.attention.varlen.varlen_attn when this torch has it with windows and grouped heads, else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "enable_gqa"} <= known.keys() else None


def takes_varlen(q_BTHD: Tensor) -> bool:
    """Whether torch's varlen attention (a flash kernel) runs for these queries."""
    return (
        q_BTHD.is_cuda
        and q_BTHD.dtype in (torch.bfloat16, torch.float16)
        and q_BTHD.shape[-1] <= 256
        and varlen_operator() is not None
    )


def attend_varlen(
    q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, g: Groups, causal: bool, window: int | None
) -> Tensor:
    """All documents in one flash call. NOT RUN HERE on a GPU: tests check its arguments against a stand-in."""
    q_MHD, k_MKD, v_MKD = (in_document_order(x, g) for x in (q_BTHD, k_BTKD, v_BTKD))
    left = -1 if window is None else window - 1
    right = 0 if causal else -1
    out_MHD = varlen_operator()(
        q_MHD,
        k_MKD,
        v_MKD,
        g.starts,
        g.starts,
        g.longest,
        g.longest,
        window_size=(left, right),
        enable_gqa=q_MHD.shape[1] != k_MKD.shape[1],
    )
    return in_token_order(out_MHD, g, q_BTHD.shape)
