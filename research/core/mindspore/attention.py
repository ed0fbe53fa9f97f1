"""Attention as composites of plain operators, and which tokens see which.

Shape letters: B batch, T query time, S key time, H query heads, K kv heads, G = H / K, D head_dim, L block.

``block`` is for packed rows: when no document is longer than L tokens, a query's document lies in the query's own block
of L tokens and the one before, so that attending those 2 L keys is the whole of it: exact, and T / (2 L) times less
work. It is a static choice of the data set (:func:`research.core.mindspore.layout.choose_block`).
"""

from __future__ import annotations

import mindspore as ms
from mindspore import ops

HIDDEN = -1e30  # added to a score in float32: its weight is exactly zero


def visible(doc_ids, time: int, block: int | None, causal: bool, window: int | None):
    """Boolean [B or 1, T, S], or in blocks [B * T / L, L, 2 L]; None where every token sees every other one.

    ``doc_ids`` [B, T] int32, 0 for filling, None: whole rows. Filling sees itself, so no query is without a key.
    """
    if block is not None:
        return _visible_in_blocks(doc_ids, block, causal, window)
    place = ops.arange(time).astype(ms.int32)
    query, key = place.expand_dims(1), place.expand_dims(0)
    shown = _shown(query, key, time, causal, window)
    if doc_ids is None:
        return None if shown is None else shown.expand_dims(0)
    documents = doc_ids.astype(ms.int32)
    same = ops.logical_and(ops.equal(documents.expand_dims(2), documents.expand_dims(1)), documents.expand_dims(1) != 0)
    if shown is not None:
        same = ops.logical_and(same, shown.expand_dims(0))
    return ops.logical_or(same, ops.equal(query, key).expand_dims(0))


def _visible_in_blocks(doc_ids, block: int, causal: bool, window: int | None):
    batch, time = doc_ids.shape
    own = doc_ids.astype(ms.int32).reshape(batch, time // block, block)
    before = ops.cat((ops.zeros_like(own[:, :1]), own[:, :-1]), 1)
    keys = ops.cat((before, own), 2).reshape(-1, 1, 2 * block)
    queries = own.reshape(-1, block, 1)
    query = ops.arange(block).astype(ms.int32).expand_dims(1) + block
    key = ops.arange(2 * block).astype(ms.int32).expand_dims(0)
    same = ops.logical_and(ops.equal(queries, keys), keys != 0)
    shown = _shown(query, key, 2 * block, causal, window)
    if shown is not None:
        same = ops.logical_and(same, shown.expand_dims(0))
    return ops.logical_or(same, ops.equal(query, key).expand_dims(0))


def _shown(query, key, reach: int, causal: bool, window: int | None):
    shown = ops.less_equal(key, query) if causal else None
    if window is not None and window < reach:
        near = ops.greater(key, query - window)
        shown = near if shown is None else ops.logical_and(shown, near)
    return shown


def bias_of(shown):
    """Boolean visibility -> what is added to scores [B or 1, 1, 1, T, S] float32; None stays None."""
    if shown is None:
        return None
    bias = (1.0 - shown.astype(ms.float32)) * HIDDEN
    return bias.reshape(shown.shape[0], 1, 1, shown.shape[1], shown.shape[2])


def attend(q_BTHD, k_BSKD, v_BSKD, bias):
    """Softmax(q k^T + bias) v with grouped kv heads -> [B, T, H, D]; softmax in float32. ``q`` comes scaled."""
    batch, time, heads, size = q_BTHD.shape
    kv_heads = k_BSKD.shape[2]
    share = heads // kv_heads
    q = ops.transpose(q_BTHD.reshape(batch, time, kv_heads, share, size), (0, 2, 3, 1, 4))
    k, v = ops.transpose(k_BSKD, (0, 2, 1, 3)), ops.transpose(v_BSKD, (0, 2, 1, 3))
    out = attend_heads(q.reshape(batch, kv_heads, share * time, size), k, v, bias, share)
    out = ops.transpose(out.reshape(batch, kv_heads, share, time, size), (0, 3, 1, 2, 4))
    return out.reshape(batch, time, heads, size)


def attend_heads(q_BKXD, k_BKSD, v_BKSD, bias, share: int):
    """The same on tensors by kv head, X = G * T query rows each -> [B, K, X, D]."""
    batch, kv_heads, rows, _ = q_BKXD.shape
    keys = k_BKSD.shape[2]
    scores = ops.BatchMatMul(transpose_b=True)(q_BKXD, k_BKSD).astype(ms.float32)
    if bias is not None:
        scores = scores.reshape(batch, kv_heads, share, rows // share, keys) + bias
    weights = ops.softmax(scores, -1).reshape(batch, kv_heads, rows, keys)
    return ops.BatchMatMul()(weights.astype(v_BKSD.dtype), v_BKSD)


def in_blocks(q_BTHD, k_BTKD, v_BTKD, block: int):
    """Rows cut into blocks: queries [B * T / L, L, H, D], keys and values [B * T / L, 2 L, K, D].

    The block before a row's first one is another row's; no document of this row reaches it.
    """
    batch, time, heads, size = q_BTHD.shape
    count = batch * time // block
    return q_BTHD.reshape(count, block, heads, size), _with_before(k_BTKD, block), _with_before(v_BTKD, block)


def _with_before(x_BTKD, block: int):
    own = x_BTKD.reshape(-1, block, x_BTKD.shape[2], x_BTKD.shape[3])
    return ops.cat((ops.cat((own[-1:], own[:-1]), 0), own), 1)


# --- paged caches -------------------------------------------------------------------------------------------------


def write_rows(scatter, cache, new_NKD, slots_N):
    """``cache`` [blocks, block_size, K, D] with row ``slots[n]`` (of blocks * block_size) replaced by ``new[n]``; a
    negative slot writes nothing."""
    rows = cache.shape[0] * cache.shape[1]
    flat = cache.reshape(rows, cache.shape[2], cache.shape[3])
    spare = ops.zeros_like(flat[:1])  # where the negative ones go
    slots_N = ops.select(slots_N < 0, ops.full_like(slots_N, rows), slots_N)
    written = scatter(ops.cat((flat, spare), 0), slots_N.expand_dims(1), new_NKD.astype(cache.dtype))
    return written[:rows].reshape(cache.shape)


def read_pages(cache, tables):
    """The blocks that each row's table [B, M] names, in order -> [B, K, M * block_size, D]."""
    pages = ops.gather(cache, tables, 0)
    batch, count, size, kv_heads, dim = pages.shape
    return ops.transpose(pages.reshape(batch, count * size, kv_heads, dim), (0, 2, 1, 3))
