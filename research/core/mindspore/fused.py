"""Ascend's fused operators: the one file that calls them, and the one switch that says which kernels are used.

NOT RUN HERE: no NPU was at hand, and MindSpore's CPU package has none of these operators. The arguments follow the operators' published
description; tests check them against stand-ins that compute that description. Everywhere else the decoder computes
with composites of plain operators, which stand beside each call.

Shape letters: B batch, T query time, S key time, H query heads, K kv heads, D head_dim, N = B * T tokens. Queries come
multiplied by 1/sqrt(D) (see :mod:`research.core.mindspore.rotary`), so that every scale here is 1.
"""

from __future__ import annotations

import functools

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from research.core.errors import ConfigError
from research.core.mindspore import native, runtime

KINDS = ("ascend", "native", "composite")
# The compressed causal mask that sparse modes 2, 3 and 4 read has this size whatever the lengths.
MASK_SIZE = 2048
DEFAULT_MASK, LEFT_UP_CAUSAL, RIGHT_DOWN_CAUSAL, BAND = 0, 2, 3, 4
MAX_DOCUMENTS = 1024  # of one TND call


def choose_kernels(choice: str = "auto", dtype=ms.float32) -> str:
    """The switch: which operators a decoder of ``dtype`` is built with.

    ``ascend``: the fused operators of this file; ``native``: this repository's CPU kernels
    (:mod:`research.core.mindspore.native`); ``composite``: plain operators only, which every device has and every MINDIR
    runtime knows. ``auto`` follows the device. Raises :class:`ConfigError` for another name, or native where there is no
    compiler or another dtype.
    """
    if choice not in ("auto", *KINDS):
        raise ConfigError(f"{choice!r} is not one of auto, {', '.join(KINDS)}", where="kernels")
    if choice == "auto" and runtime.on_ascend():
        return "composite" if dtype == ms.float32 else "ascend"  # the attention operators take 16-bit floats only
    if choice in ("auto", "native"):
        if dtype == ms.float32 and native.available():
            native.use_threads(runtime.threads())
            return "native"
        if choice == "native":
            raise ConfigError("the CPU kernels need float32 and a C++ compiler", where="kernels=native", hint="auto")
        return "composite"
    return choice


@functools.cache
def causal_mask() -> Tensor:
    """uint8 [2048, 2048], 1 (hidden) above the diagonal."""
    return Tensor(np.triu(np.ones((MASK_SIZE, MASK_SIZE), np.uint8), 1))


# --- the layers ---------------------------------------------------------------------------------------------------


def rms_norm(x, weight, eps: float):
    return ops.rms_norm(x, weight, eps)[0]


def swiglu(gate, up):
    """silu(gate) * up; the operator wants the two side by side."""
    return ops.swiglu(ops.cat((gate, up), -1), -1)


def rotary(x_BTHD, cos, sin):
    """``cos`` and ``sin`` [B, T, 1, D/2]: the operator takes both halves' tables and rotates halves (mode 0)."""
    cos, sin = ops.cat((cos, cos), -1), ops.cat((sin, sin), -1)
    return ops.rotary_position_embedding(x_BTHD.astype(cos.dtype), cos, sin, 0).astype(x_BTHD.dtype)


def grouped_linear(x_PI, weight_EOI, ends_E):
    """Row p times the transposed weight of its expert; expert e owns rows ``ends[e-1] .. ends[e]``."""
    weight_EIO = ops.transpose(weight_EOI, (0, 2, 1))
    # split_item 3: one tensor in, one out; group_type 0: the rows are grouped
    return ops.auto_generate.grouped_matmul(
        [x_PI], [weight_EIO], group_list=ends_E.astype(ms.int64), split_item=3, group_type=0
    )[0]


# --- attention over tokens of this call: training and prefill ---------------------------------------------------------


def flash_attention(q_BTHD, k_BSKD, v_BSKD, visible, ends, causal: bool, window: int | None):
    """FlashAttentionScore -> [B, T, H, D].

    ``ends`` int64: the documents' ends in the B * T tokens, attended in the TND layout; else ``visible`` bool
    [B or 1, 1, T, S]; with neither, whole rows.
    """
    batch, time, heads, size = q_BTHD.shape
    if ends is not None:
        tokens = batch * time
        narrow = window is not None and window < time
        mode = RIGHT_DOWN_CAUSAL if not narrow else BAND
        out = ops.flash_attention_score(
            q_BTHD.reshape(tokens, heads, size),
            k_BSKD.reshape(tokens, -1, size),
            v_BSKD.reshape(tokens, -1, size),
            heads,
            attn_mask=causal_mask() if causal else None,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
            pre_tokens=window - 1 if narrow else 2147483647,
            next_tokens=0 if narrow else 2147483647,
            input_layout="TND",
            sparse_mode=mode if causal else DEFAULT_MASK,
        )
        return out.reshape(batch, time, heads, size)
    if visible is not None:
        hidden = ops.logical_not(visible).astype(ms.uint8)
        hidden = ops.broadcast_to(hidden, (batch, 1, time, k_BSKD.shape[1]))
        return ops.flash_attention_score(
            q_BTHD, k_BSKD, v_BSKD, heads, attn_mask=hidden, input_layout="BSND", sparse_mode=DEFAULT_MASK
        )
    if not causal:
        return ops.flash_attention_score(q_BTHD, k_BSKD, v_BSKD, heads, input_layout="BSND", sparse_mode=DEFAULT_MASK)
    if window is not None and window < time:
        return ops.flash_attention_score(
            q_BTHD,
            k_BSKD,
            v_BSKD,
            heads,
            attn_mask=causal_mask(),
            pre_tokens=window - 1,
            next_tokens=0,
            input_layout="BSND",
            sparse_mode=BAND,
        )
    return ops.flash_attention_score(
        q_BTHD, k_BSKD, v_BSKD, heads, attn_mask=causal_mask(), input_layout="BSND", sparse_mode=LEFT_UP_CAUSAL
    )


def prompt_attention(q_BTHD, k_BSKD, v_BSKD, window: int | None):
    """PromptFlashAttention, causal, for a prefill without gradient -> [B, T, H, D]."""
    heads, kv_heads, time = q_BTHD.shape[2], k_BSKD.shape[2], q_BTHD.shape[1]
    narrow = window is not None and window < time
    out = ops.prompt_flash_attention(
        ops.transpose(q_BTHD, (0, 2, 1, 3)),
        ops.transpose(k_BSKD, (0, 2, 1, 3)),
        ops.transpose(v_BSKD, (0, 2, 1, 3)),
        attn_mask=causal_mask(),
        num_heads=heads,
        scale_value=1.0,
        pre_tokens=window - 1 if narrow else 2147483647,
        next_tokens=0,
        input_layout="BNSD",
        num_key_value_heads=kv_heads,
        sparse_mode=BAND if narrow else LEFT_UP_CAUSAL,
    )
    return ops.transpose(out, (0, 2, 1, 3))


# --- attention of one token against a cache --------------------------------------------------------------------------


def incre_attention(q_BHD, k_BKSD, v_BKSD, positions_B, visible_BS):
    """IncreFlashAttention of the token at ``positions`` against its row's cache -> [B, H, D]."""
    batch, heads, size = q_BHD.shape
    hidden = ops.logical_not(visible_BS).reshape(batch, 1, 1, -1)
    out = ops.incre_flash_attention(
        q_BHD.reshape(batch, heads, 1, size),
        [k_BKSD],
        [v_BKSD],
        attn_mask=hidden,
        actual_seq_lengths=positions_B.astype(ms.int64) + 1,
        num_heads=heads,
        input_layout="BNSD",
        scale_value=1.0,
        num_key_value_heads=k_BKSD.shape[1],
    )
    return out.reshape(batch, heads, size)


def reshape_and_cache(k_NKD, v_NKD, k_blocks, v_blocks, slots_N):
    """Write N tokens' keys and values at ``slots`` (block * block_size + place, negative: nowhere) of paged caches
    [blocks, block_size, K, D] in place -> the caches, ordered after the writing."""
    done = ops.auto_generate.ReshapeAndCache()(k_NKD, v_NKD, k_blocks, v_blocks, slots_N)
    return ops.depend(k_blocks, done), ops.depend(v_blocks, done)


def paged_attention(q_BHD, k_blocks, v_blocks, tables, lengths_B):
    """PagedAttention of one token per row against paged caches; ``tables`` int32 [B, blocks per row], ``lengths`` int32
    [B] with the token itself -> [B, H, D]."""
    heads, kv_heads = q_BHD.shape[1], k_blocks.shape[2]
    operator = ops.auto_generate.PagedAttention(heads, 1.0, kv_heads)
    return operator(q_BHD, k_blocks, v_blocks, tables, lengths_B)
