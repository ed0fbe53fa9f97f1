"""Attention: one interface, three backends (sdpa, reference, npu).

Shape letters: B batch, T query time, S key time, H query heads, K kv heads, D head_dim, N = B * T tokens,
G rows and L padded length of a group of documents (see :mod:`research.core.torch.layout`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from research.core.errors import ConfigError
from research.core.torch.attention_documents import attend_varlen, from_slots, in_slots, takes_varlen
from research.core.torch.layout import Groups, Layout
from research.core.torch.native import ops

BACKENDS = ("auto", "sdpa", "reference", "npu")


def resolve_backend(name: str, device: torch.device | str) -> str:
    """``auto`` -> the backend of this device. Raises :class:`ConfigError` for a name that does not exist here."""
    kind = torch.device(device).type
    if name not in BACKENDS:
        raise ConfigError(f"attention backend {name!r} is not one of {', '.join(BACKENDS)}", where="device.attention")
    if name == "npu" and kind not in ("npu", "meta"):
        raise ConfigError(
            f"the npu attention operator does not run on {kind}", where="device.attention", hint="device.attention=auto"
        )
    if name == "auto":
        return "npu" if kind == "npu" else "sdpa"
    return name


def attend(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    layout: Layout,
    *,
    causal: bool = True,
    window: int | None = None,
    backend: str = "sdpa",
) -> Tensor:
    """Softmax(q k^T / sqrt(D)) v with grouped kv heads -> [B, T, H, D] in q's dtype.

    ``layout`` says which tokens see which; ``window`` limits a query to the last ``window`` keys (itself included).
    """
    if layout.paged is not None:
        assert causal, "a cache holds the past only"
        return layout.paged(q_BTHD, k_BSKD, v_BSKD, window)
    if backend == "reference":
        return _reference(q_BTHD, k_BSKD, v_BSKD, layout.allowed(causal, window))
    if backend == "npu":
        from research.core.torch.attention_npu import attend_npu

        return attend_npu(q_BTHD, k_BSKD, v_BSKD, layout, causal=causal, window=window)
    if not layout.against_cache and ops.attention_ready(q_BTHD, k_BSKD, v_BSKD):
        documents = layout.runs()
        if documents is not None and (window is None or window >= documents.longest):
            return _by_runs(q_BTHD, k_BSKD, v_BSKD, documents, causal)
    if layout.groups is not None:
        return _grouped(q_BTHD, k_BSKD, v_BSKD, layout.groups, causal, window)
    if layout.needs_mask(causal, window):
        return _sdpa(q_BTHD, k_BSKD, v_BSKD, layout.allowed(causal, window))
    return _sdpa(q_BTHD, k_BSKD, v_BSKD, None, causal=causal and layout.time > 1)


def _reference(q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, allowed_B1TS: Tensor) -> Tensor:
    heads, kv_heads = q_BTHD.shape[2], k_BSKD.shape[2]
    share = heads // kv_heads
    q = q_BTHD.float().transpose(1, 2)
    k = k_BSKD.float().repeat_interleave(share, dim=2).transpose(1, 2)
    v = v_BSKD.float().repeat_interleave(share, dim=2).transpose(1, 2)
    scores_BHTS = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores_BHTS = scores_BHTS.masked_fill(~allowed_B1TS, float("-inf"))
    return (scores_BHTS.softmax(-1) @ v).transpose(1, 2).to(q_BTHD.dtype)


def _sdpa(q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    q, k, v = q_BTHD.transpose(1, 2), k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None and q.device.type == "cuda":
        # On CUDA no fused kernel takes both a mask and grouped heads; expanding keeps the memory-efficient one.
        share = q.shape[1] // k.shape[1]
        k, v, grouped = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1), False
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def _by_runs(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, documents: ops.Documents, causal: bool) -> Tensor:
    q_NHD, k_NKD, v_NKD = (x.reshape(-1, *x.shape[2:]) for x in (q_BTHD, k_BTKD, v_BTKD))
    return ops.attention(q_NHD, k_NKD, v_NKD, documents, causal).view(q_BTHD.shape)


def _grouped(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, g: Groups, causal: bool, window: int | None) -> Tensor:
    """Each group of documents as one padded batch; a causal mask hides the filling behind every document."""
    if takes_varlen(q_BTHD) and (causal or window is None):
        return attend_varlen(q_BTHD, k_BTKD, v_BTKD, g, causal, window)
    heads, dim = q_BTHD.shape[2:]
    q, k, v = in_slots(q_BTHD, g), in_slots(k_BTKD, g), in_slots(v_BTKD, g)
    outs, begin, first = [], 0, 0
    for rows, length in g.shapes:
        end = begin + rows * length
        part = [x[begin:end].view(rows, length, -1, dim) for x in (q, k, v)]
        mask = _group_mask(g.lengths[first : first + rows], length, causal, window)
        outs.append(_sdpa(*part, mask, causal=causal and mask is None).reshape(rows * length, heads * dim))
        begin, first = end, first + rows
    return from_slots(outs[0] if len(outs) == 1 else torch.cat(outs), g, q_BTHD.shape)


def hide_groups_from_compiler() -> None:
    """Let torch.compile call the grouped attention as it is: its shapes change with every step's documents.

    Done on demand, because asking for it loads the whole compiler.
    """
    global _grouped
    if not getattr(_grouped, "_torchdynamo_disable", False):
        _grouped = torch.compiler.disable(_grouped)


def _group_mask(lengths: Tensor, length: int, causal: bool, window: int | None) -> Tensor | None:
    """Mask [G or 1, 1, L or 1, L] of a group; None where a plain causal one says it all."""
    narrow = window is not None and window < length
    if causal and not narrow:
        return None
    place = torch.arange(length, device=lengths.device)
    mask = (place <= place[:, None])[None] if causal else (place < lengths[:, None])[:, None]
    if narrow:
        mask = mask & (place > place[:, None] - window) | (place == place[:, None])
    return mask[:, None]
