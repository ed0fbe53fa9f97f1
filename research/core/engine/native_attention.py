"""Paged attention on the CPU as one native call: keys and values are read where they lie in the pool.

The kernel (research/core/native/paged_attention.h) takes keys 64 at a time with a running softmax in float32, so its memory
does not grow with the context, and a token's result does not depend on the other tokens of the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from research.core.engine.batch import PagedBatch
from research.core.native.build import library

_ONE_THREAD = 16384  # multiply-adds


def ready(dtype: torch.dtype) -> bool:
    """Whether the kernel exists here and knows the type. Head sizes that it does not know are refused by the call."""
    return dtype in (torch.float32, torch.bfloat16) and library() is not None


def fits(head_dim: int) -> bool:
    """Whether the kernel can do heads of this size."""
    return head_dim % 16 == 0 and head_dim <= 256


def paged_attention(
    q_NHD: Tensor, k_PKbD: Tensor, v_PKbD: Tensor, batch: PagedBatch, scale: float, window: int | None = None
) -> Tensor:
    """As :func:`research.core.engine.attention.paged_attention`. The pools are contiguous, in q's dtype."""
    assert k_PKbD.is_contiguous() and v_PKbD.is_contiguous() and k_PKbD.dtype == v_PKbD.dtype == q_NHD.dtype
    assert fits(q_NHD.shape[-1])
    q_NHD = q_NHD.contiguous()
    out_NHD, (tokens, heads, dim) = torch.empty_like(q_NHD), q_NHD.shape
    work = tokens * heads * dim * batch.longest_context
    library().paged_attention(
        int(q_NHD.dtype == torch.bfloat16),
        *batch.block_tables.shape,
        batch.block_size,
        heads,
        k_PKbD.shape[1],
        dim,
        window or 0,
        scale,
        batch.block_tables.data_ptr(),
        batch.query_starts.data_ptr(),
        batch.contexts.data_ptr(),
        q_NHD.data_ptr(),
        k_PKbD.data_ptr(),
        v_PKbD.data_ptr(),
        out_NHD.data_ptr(),
        1 if work < _ONE_THREAD else torch.get_num_threads(),
    )
    return out_NHD
