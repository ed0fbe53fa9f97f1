"""Paged attention: one interface, several backends. Keys and values of a row lie in the blocks of its table.

Shape letters: N tokens of the step, H query heads, K kv heads, D head_dim, S keys of a row, T queries of a row,
P blocks of the pool. A layer's pool is [P, K, block_size, D]; the last token of a row's queries is at position
``context - 1``.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from research.core.engine.batch import PagedBatch
from research.core.errors import ConfigError

BACKENDS = ("auto", "reference", "sdpa", "native", "triton", "npu")
# Queries that meet a row's keys at one time: bounds the mask (and the scores) of a long prompt's chunk.
QUERY_PIECE = 256


def resolve_backend(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """``auto`` -> the fastest backend of this device. Raises :class:`ConfigError` for one that does not run here."""
    kind = torch.device(device).type
    if name not in BACKENDS:
        raise ConfigError(f"attention backend {name!r} is not one of {', '.join(BACKENDS)}", where="engine.attention")
    home = {"native": "cpu", "triton": "cuda", "npu": "npu"}
    if name == "auto":
        name = next((backend for backend, place in home.items() if place == kind), "sdpa")
        return name if name == "npu" or _ready(name, dtype, head_dim) else "sdpa"
    if home.get(name, kind) != kind or not _ready(name, dtype, head_dim):
        raise ConfigError(
            f"the {name} attention does not run on {kind} here, in {dtype} with heads of {head_dim}",
            where="engine.attention",
            hint="engine.attention=auto",
        )
    return name


def _module(name: str):
    """The module of a backend that has one: ``paged_attention(...)`` as below without ``backend``, ``ready(dtype)``, and ``fits(head_dim)``
    where it does not know every size."""
    try:
        return importlib.import_module(f"research.core.engine.{name}_attention")
    except ImportError:
        return None


def _ready(name: str, dtype: torch.dtype, head_dim: int) -> bool:
    if name in ("reference", "sdpa"):
        return True
    module = _module(name)
    return module is not None and module.ready(dtype) and getattr(module, "fits", lambda size: True)(head_dim)


def paged_attention(
    q_NHD: Tensor,
    k_PKbD: Tensor,
    v_PKbD: Tensor,
    batch: PagedBatch,
    scale: float,
    window: int | None = None,
    backend: str = "sdpa",
) -> Tensor:
    """Causal softmax(q k^T * scale) v over each row's own keys -> [N, H, D] in q's dtype.

    ``window`` limits a query to the last ``window`` keys, itself included.
    """
    if backend == "reference":
        return _rows(q_NHD, k_PKbD, v_PKbD, batch, scale, window, _explicit)
    if backend == "sdpa":
        return _rows(q_NHD, k_PKbD, v_PKbD, batch, scale, window, _sdpa)
    return _module(backend).paged_attention(q_NHD, k_PKbD, v_PKbD, batch, scale, window)


def _rows(q_NHD, k_PKbD, v_PKbD, batch: PagedBatch, scale: float, window: int | None, one) -> Tensor:
    """Row by row, a long row's queries in pieces, so that no more than ``QUERY_PIECE`` x S scores exist."""
    out_NHD, begin = torch.empty_like(q_NHD), 0
    for row, (queries, context) in enumerate(zip(batch.queries, batch.context_list)):
        for first in range(0, queries, QUERY_PIECE):
            last = min(first + QUERY_PIECE, queries)
            end = context - queries + last  # keys that the piece's last query sees
            low = 0 if window is None else max(0, context - queries + first - window + 1)
            k_KSD, v_KSD = (_gather(pool, batch, row, low, end) for pool in (k_PKbD, v_PKbD))
            q_HTD = q_NHD[begin + first : begin + last].transpose(0, 1)
            mask_TS = _mask(last - first, end - low, window, q_NHD.device)
            out_NHD[begin + first : begin + last] = one(q_HTD, k_KSD, v_KSD, mask_TS, scale).transpose(0, 1)
        begin += queries
    return out_NHD


def _gather(pool_PKbD: Tensor, batch: PagedBatch, row: int, low: int, end: int) -> Tensor:
    """Positions ``low .. end-1`` of a row -> [K, S, D]."""
    size = batch.block_size
    first = low // size
    blocks = batch.block_tables[row, first : -(-end // size)].long()
    whole = pool_PKbD[blocks].transpose(0, 1).flatten(1, 2)
    return whole[:, low - first * size : end - first * size]


def _mask(queries: int, keys: int, window: int | None, device) -> Tensor | None:
    """[T, S], True where query t (at key ``keys - queries + t``) may see key s; None where it may see all."""
    if queries == 1 and (window is None or keys <= window):
        return None
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


def _explicit(q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, mask_TS: Tensor | None, scale: float) -> Tensor:
    share = q_HTD.shape[0] // k_KSD.shape[0]
    k, v = (x.float().repeat_interleave(share, 0) for x in (k_KSD, v_KSD))
    scores = q_HTD.float() @ k.transpose(1, 2) * scale
    if mask_TS is not None:
        scores = scores.masked_fill(~mask_TS, float("-inf"))
    return (scores.softmax(-1) @ v).to(q_HTD.dtype)


def _sdpa(q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, mask_TS: Tensor | None, scale: float) -> Tensor:
    share = q_HTD.shape[0] // k_KSD.shape[0]
    if share > 1 and q_HTD.device.type == "cuda":  # no fused kernel there takes a mask and grouped heads
        k_KSD, v_KSD = k_KSD.repeat_interleave(share, 0), v_KSD.repeat_interleave(share, 0)
    grouped = q_HTD.shape[0] != k_KSD.shape[0]
    return F.scaled_dot_product_attention(
        q_HTD[None], k_KSD[None], v_KSD[None], attn_mask=mask_TS, scale=scale, enable_gqa=grouped
    )[0]
