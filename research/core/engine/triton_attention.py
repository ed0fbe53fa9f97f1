"""Paged attention on CUDA as a Triton kernel: decode rows and pieces of prompts read the pool through their block tables.

One program is one piece of a row's new tokens with all query heads that share a kv head (they meet each key together); a long
context of few rows is also split along its keys, and the parts are put together by their log-sum-exp (FlashDecoding). The
softmax runs in float32 (FlashAttention-2, arXiv 2307.08691). Not run on a card by this repository's tests, which run the
kernel in Triton's interpreter where Triton is installed.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from research.core.engine.batch import PagedBatch

_KEYS = 64  # keys of a step of the running softmax
_QUERIES = 64  # rows of a piece, heads counted, while prompts are computed
_SPLIT = 512  # keys that are worth a program of their own


def ready(dtype: torch.dtype) -> bool:
    """Whether Triton is installed, with a card that it can use, for this type."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def paged_attention(
    q_NHD: Tensor, k_PKbD: Tensor, v_PKbD: Tensor, batch: PagedBatch, scale: float, window: int | None = None
) -> Tensor:
    """As :func:`research.core.engine.attention.paged_attention`."""
    import triton

    attend, join = _kernels()
    q_NHD = q_NHD.contiguous()
    tokens, heads, dim = q_NHD.shape
    kv_heads = k_PKbD.shape[1]
    group = heads // kv_heads
    width = max(1, _QUERIES // group) if not batch.decode else 1  # tokens of a piece
    rows, firsts = _pieces(batch, width)
    pieces = len(batch.queries) if rows is None else len(rows)
    splits = _splits(batch, pieces * kv_heads, q_NHD.device) if batch.decode else 1
    out_NHD = torch.empty_like(q_NHD)
    # Partial results of the splits: weighted values, and the log-sum-exp of their scores.
    parts = torch.empty(splits, tokens, heads, dim, dtype=torch.float32, device=q_NHD.device) if splits > 1 else out_NHD
    sums = torch.empty(splits, tokens, heads, dtype=torch.float32, device=q_NHD.device) if splits > 1 else out_NHD
    nothing = batch.contexts
    attend[(pieces, kv_heads, splits)](
        q_NHD,
        k_PKbD,
        v_PKbD,
        parts,
        sums,
        batch.block_tables,
        batch.query_starts,
        batch.contexts,
        nothing if rows is None else rows,
        nothing if firsts is None else firsts,
        batch.block_tables.stride(0),
        tokens,
        scale * 1.4426950408889634,  # the kernel's exponentials are powers of two
        heads,
        kv_heads,
        dim,
        window or 0,
        batch.block_size,
        width,
        splits,
        listed=rows is not None,
        M=max(16, triton.next_power_of_2(width * group)),
        N=_KEYS,
        D=max(16, triton.next_power_of_2(dim)),
        exact=q_NHD.dtype == torch.float32,
    )
    if splits > 1:
        join[(tokens, heads)](parts, sums, out_NHD, tokens, heads, dim, splits, D=max(16, triton.next_power_of_2(dim)))
    return out_NHD


def _pieces(batch: PagedBatch, width: int) -> tuple[Tensor | None, Tensor | None]:
    """Row and first token of every piece, int32; None while each row has one token. Made once for all layers."""
    if batch.decode:
        return None, None
    known = getattr(batch, "_triton_pieces", None)
    if known is None or known[0] != width:
        pieces = [(row, first) for row, count in enumerate(batch.queries) for first in range(0, count, width)]
        both = torch.tensor(pieces, dtype=torch.int32).t().contiguous().to(batch.contexts.device, non_blocking=True)
        known = batch._triton_pieces = (width, both[0], both[1])
    return known[1], known[2]


def _splits(batch: PagedBatch, programs: int, device: torch.device) -> int:
    """Parts of the longest context, as many as keep the card's multiprocessors busy. Depends on host numbers only, so that
    a captured graph replays for any shorter context."""
    longest = -(-batch.longest_context // _SPLIT)
    return max(1, min(longest, 2 * _multiprocessors(device) // max(1, programs)))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@cache
def _kernels():
    """The kernels, compiled at their first call; Triton is imported only here."""
    import triton
    import triton.language as tl

    @triton.jit
    def attend(
        q,
        k,
        v,
        out,
        sums,
        tables,
        starts,
        contexts,
        rows,
        firsts,
        table_stride,
        tokens,
        scale,
        heads: tl.constexpr,
        kv_heads: tl.constexpr,
        dim: tl.constexpr,
        window: tl.constexpr,
        block_size: tl.constexpr,
        width: tl.constexpr,
        splits: tl.constexpr,
        listed: tl.constexpr,
        M: tl.constexpr,
        N: tl.constexpr,
        D: tl.constexpr,
        exact: tl.constexpr,
    ):
        piece, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        group: tl.constexpr = heads // kv_heads
        if listed:
            row, first = tl.load(rows + piece), tl.load(firsts + piece)
        else:
            row, first = piece, 0
        start = tl.load(starts + row)
        queries = tl.load(starts + row + 1) - start
        context = tl.load(contexts + row)
        m, d = tl.arange(0, M), tl.arange(0, D)
        token = first + m // group
        real = (m < width * group) & (token < queries)
        place = ((start + token) * heads + kv * group + m % group).to(tl.int64)
        inside = real[:, None] & (d < dim)[None]
        query = tl.load(q + place[:, None] * dim + d[None], mask=inside, other=0.0)
        position = context - queries + token
        end = tl.minimum(context, context - queries + first + width)
        low = 0
        if window > 0:
            low = tl.maximum(0, context - queries + first - window + 1) // N * N
        if splits > 1:
            share = tl.cdiv(tl.cdiv(end - low, splits), N) * N
            low = low + split * share
            end = tl.minimum(end, low + share)
        top = tl.full([M], float("-inf"), tl.float32)
        weight = tl.zeros([M], tl.float32)
        total = tl.zeros([M, D], tl.float32)
        for begin in range(low, end, N):
            key = begin + tl.arange(0, N)
            block = tl.load(tables + row * table_stride + key // block_size, mask=key < end, other=0).to(tl.int64)
            at = ((block * kv_heads + kv) * block_size + key % block_size) * dim
            there = (key < end)[:, None] & (d < dim)[None]
            keys = tl.load(k + at[:, None] + d[None], mask=there, other=0.0)
            values = tl.load(v + at[:, None] + d[None], mask=there, other=0.0)
            scores = tl.dot(query, tl.trans(keys), input_precision="ieee" if exact else "tf32") * scale
            seen = (key[None] <= position[:, None]) & (key < end)[None]
            if window > 0:
                seen = seen & (key[None] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
            high = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(high == float("-inf"), 0.0, high)  # nothing seen so far
            p = tl.exp2(scores - base[:, None])
            keep = tl.exp2(top - base)
            weight = weight * keep + tl.sum(p, 1)
            total = total * keep[:, None]
            total += tl.dot(p.to(values.dtype), values, input_precision="ieee" if exact else "tf32")
            top = high
        result = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
        if splits > 1:
            place += split.to(tl.int64) * tokens * heads
            tl.store(sums + place, tl.where(weight == 0.0, float("-inf"), top + tl.log2(weight)), mask=real)
        tl.store(out + place[:, None] * dim + d[None], result.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def join(parts, sums, out, tokens, heads, dim: tl.constexpr, splits: tl.constexpr, D: tl.constexpr):
        at = (tl.program_id(0) * heads + tl.program_id(1)).to(tl.int64)
        d = tl.arange(0, D)
        top, weight, total = (
            tl.full([D], float("-inf"), tl.float32),
            tl.zeros([D], tl.float32),
            tl.zeros([D], tl.float32),
        )
        for split in range(splits):
            place = at + tokens * heads * split  # of 64 bits, as `at` is
            one = tl.load(sums + place)
            high = tl.maximum(top, one)
            base = tl.where(high == float("-inf"), 0.0, high)
            keep, share = tl.exp2(top - base), tl.exp2(one - base)
            total = total * keep + share * tl.load(parts + place * dim + d, mask=d < dim, other=0.0)
            weight = weight * keep + share
            top = high
        tl.store(out + at * dim + d, (total / weight).to(out.dtype.element_ty), mask=d < dim)

    return attend, join
