"""The Ascend NPU's fused attention operators (torch_npu), imported only when they are called.

NOT RUN HERE: no NPU was at hand. The arguments follow the operators' published description (sparse modes, masks whose
True hides, cumulative lengths in the TND layout); tests check them against a stand-in that computes that description.

Shape letters as in :mod:`research.core.torch.attention`; M real tokens of the batch, documents one after another.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from research.core.errors import ConfigError
from research.core.torch.attention_documents import in_document_order, in_token_order
from research.core.torch.layout import Layout

# The compressed causal mask that sparse modes 2, 3 and 4 read has this size whatever the lengths.
MASK_SIZE = 2048
DEFAULT_MASK, LEFT_UP_CAUSAL, RIGHT_DOWN_CAUSAL, BAND = 0, 2, 3, 4
MAX_DOCUMENTS = 1024  # of one TND call


def _operators():
    try:
        return importlib.import_module("torch_npu")
    except ImportError:
        raise ConfigError(
            "the npu attention needs torch_npu", where="device.attention", hint="requirements/npu.txt, or auto"
        ) from None


def attend_npu(
    q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, layout: Layout, *, causal: bool, window: int | None
) -> Tensor:
    """Same contract as :func:`research.core.torch.attention.attend`."""
    scale = q_BTHD.shape[-1] ** -0.5
    if layout.against_cache:
        return _decode(q_BTHD, k_BSKD, v_BSKD, layout.allowed(causal, window), scale)
    if layout.groups is None:
        mode = _sparse(q_BTHD, causal, window, layout.time, LEFT_UP_CAUSAL)
        return _fusion(q_BTHD, k_BSKD, v_BSKD, q_BTHD.shape[2], "BSND", scale, mode)
    groups = layout.groups
    if len(groups.ends) > MAX_DOCUMENTS:
        raise ConfigError(
            f"{len(groups.ends)} documents in one micro batch, the npu operator takes {MAX_DOCUMENTS}",
            where="train.micro_batch",
            hint="a smaller train.micro_batch",
        )
    q_MHD, k_MKD, v_MKD = (in_document_order(x, groups) for x in (q_BTHD, k_BSKD, v_BSKD))
    mode = _sparse(q_BTHD, causal, window, groups.longest, RIGHT_DOWN_CAUSAL)
    mode |= {"actual_seq_qlen": groups.ends, "actual_seq_kvlen": groups.ends}
    out_MHD = _fusion(q_MHD, k_MKD, v_MKD, q_BTHD.shape[2], "TND", scale, mode)
    return in_token_order(out_MHD, groups, q_BTHD.shape)


def _fusion(q: Tensor, k: Tensor, v: Tensor, heads: int, order: str, scale: float, mode: dict) -> Tensor:
    return _operators().npu_fusion_attention(q, k, v, heads, order, scale=scale, keep_prob=1.0, **mode)[0]


def _sparse(q: Tensor, causal: bool, window: int | None, longest: int, causal_mode: int) -> dict:
    narrow = window is not None and window < longest
    if not causal and not narrow:
        return {"sparse_mode": DEFAULT_MASK}
    mask = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=q.device).triu(1)
    if not narrow:
        return {"sparse_mode": causal_mode, "atten_mask": mask}
    if not causal:
        raise ConfigError("a sliding window needs a causal model on the npu", where="device.attention", hint="sdpa")
    return {"sparse_mode": BAND, "atten_mask": mask, "pre_tockens": window - 1, "next_tockens": 0}


def _decode(q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, allowed_B1TS: Tensor, scale: float) -> Tensor:
    """Inference against the cache: one operator for prompt chunks and single tokens, chosen by the query's length."""
    batch, time, heads, _ = q_BTHD.shape
    hidden = ~allowed_B1TS.expand(batch, 1, time, -1)
    out, _ = _operators().npu_fused_infer_attention_score(
        q_BTHD.transpose(1, 2).contiguous(),
        k_BSKD.transpose(1, 2).contiguous(),
        v_BSKD.transpose(1, 2).contiguous(),
        num_heads=heads,
        num_key_value_heads=k_BSKD.shape[2],
        input_layout="BNSD",
        atten_mask=hidden.contiguous(),
        scale=scale,
        sparse_mode=DEFAULT_MASK,
    )
    return out.transpose(1, 2)
