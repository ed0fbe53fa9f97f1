"""Paged attention on the Ascend NPU: torch_npu's fused inference operator reads the pool through the block tables.

NOT RUN HERE: no NPU was at hand. The arguments follow the operator's published description: layout TND with cumulative query
lengths, keys and values in blocks of [kv_heads, block_size, head_dim], lengths of the rows with the step's tokens, and the
compressed mask of sparse modes 3 and 4. Tests check them against a stand-in that computes that description.
"""

from __future__ import annotations

import torch
from torch import Tensor

from research.core.engine.batch import PagedBatch
from research.core.errors import ConfigError
from research.core.torch.attention_npu import BAND, MASK_SIZE, RIGHT_DOWN_CAUSAL, _operators

BLOCK_STEP, LARGEST_BLOCK = 16, 512


def ready(dtype: torch.dtype) -> bool:
    """Whether the operator knows the type. Where torch_npu is missing, the call says so."""
    return dtype in (torch.float16, torch.bfloat16)


def paged_attention(
    q_NHD: Tensor, k_PKbD: Tensor, v_PKbD: Tensor, batch: PagedBatch, scale: float, window: int | None = None
) -> Tensor:
    """As :func:`research.core.engine.attention.paged_attention`."""
    if batch.block_size % BLOCK_STEP or batch.block_size > LARGEST_BLOCK:
        raise ConfigError(
            f"the npu operator does not take blocks of {batch.block_size} tokens",
            where="engine.block_size",
            hint=f"a multiple of {BLOCK_STEP} up to {LARGEST_BLOCK}, 128 at best",
        )
    narrow = window is not None and window < batch.longest_context
    mask = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=q_NHD.device).triu(1)
    out_NHD, _ = _operators().npu_fused_infer_attention_score(
        q_NHD.contiguous(),
        k_PKbD,
        v_PKbD,
        atten_mask=mask,
        actual_seq_lengths=[end + 1 for end in batch.ends],
        actual_seq_lengths_kv=list(batch.context_list),
        block_table=batch.block_tables,
        block_size=batch.block_size,
        num_heads=q_NHD.shape[1],
        num_key_value_heads=k_PKbD.shape[1],
        input_layout="TND",
        scale=scale,
        sparse_mode=BAND if narrow else RIGHT_DOWN_CAUSAL,
        **({"pre_tokens": window - 1, "next_tokens": 0} if narrow else {}),
    )
    return out_NHD
