"""Ascend's operators as their documentation describes them, in numpy, for tests of the arguments that they are given."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, ops

FAR = 2147483647
COMPRESSED = np.triu(np.ones((2048, 2048)), 1)


def install(monkeypatch) -> list[str]:
    """Put the stand-ins in MindSpore's place; -> the names of those called, as they are called."""
    called: list[str] = []

    def counted(function):
        def call(*args, **kwargs):
            called.append(function.__name__)
            return function(*args, **kwargs)

        return call

    for function in (
        rms_norm,
        swiglu,
        rotary_position_embedding,
        flash_attention_score,
        prompt_flash_attention,
        incre_flash_attention,
    ):
        monkeypatch.setattr(ops, function.__name__, counted(function))
    monkeypatch.setattr(ops.auto_generate, "grouped_matmul", counted(grouped_matmul))
    monkeypatch.setattr(ops.auto_generate, "ReshapeAndCache", lambda: counted(reshape_and_cache))
    monkeypatch.setattr(
        ops.auto_generate, "PagedAttention", lambda *sizes: counted(lambda *a: paged_attention(sizes, *a))
    )
    return called


def rms_norm(x, gamma, epsilon=1e-6):
    x = x.asnumpy()
    factor = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
    return Tensor(x * factor * gamma.asnumpy()), Tensor(factor)


def swiglu(input, dim=-1):
    first, second = np.split(input.asnumpy(), 2, dim)
    return Tensor(first / (1 + np.exp(-first)) * second)


def rotary_position_embedding(x, cos, sin, mode=0):
    x, cos, sin = (t.asnumpy() for t in (x, cos, sin))
    batch, time, _, dim = x.shape  # BSND: tables 1S1D or BS1D
    assert mode == 0 and cos.shape == sin.shape and cos.shape in ((1, time, 1, dim), (batch, time, 1, dim))
    first, second = np.split(x, 2, -1)
    return Tensor((x * cos + np.concatenate((-second, first), -1) * sin).astype(x.dtype))


def grouped_matmul(x, weight, group_list=None, split_item=0, group_type=-1):
    assert split_item == 3 and group_type == 0 and len(x) == len(weight) == 1
    rows, matrices, out, begin = x[0].asnumpy(), weight[0].asnumpy(), [], 0
    for matrix, end in zip(matrices, group_list.asnumpy().tolist()):
        out.append(rows[begin:end] @ matrix)
        begin = end
    assert begin == len(rows)
    return [Tensor(np.concatenate(out).astype(np.float32))]


def softmax_attention(q, k, v, hidden, scale):
    """q [heads, T, D], k and v [kv, S, D], hidden [T, S] or None -> [heads, T, D]."""
    share = len(q) // len(k)
    k, v = np.repeat(k, share, 0), np.repeat(v, share, 0)
    scores = q @ k.transpose(0, 2, 1) * scale
    if hidden is not None:
        scores = np.where(hidden != 0, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ v


def sparse_mask(mode: int, mask, pre: int, following: int, queries: int, keys: int):
    """What a sparse mode hides [T, S]; ``mask`` already that of this row for mode 0."""
    place, key = np.arange(queries)[:, None], np.arange(keys)[None]
    if mode == 0:
        return mask
    assert mask.shape == (2048, 2048) and np.array_equal(mask, COMPRESSED), "modes 2 to 4 read the compressed mask"
    if mode == 2:  # aligned to the upper left corner
        return key > place
    place = place + keys - queries  # aligned to the lower right corner
    if mode == 3:
        return key > place
    assert mode == 4
    return (key > place + following) | (key < place - pre)


def flash_attention_score(
    query, key, value, head_num, attn_mask=None, actual_seq_qlen=None, actual_seq_kvlen=None, scalar_value=1.0,
    pre_tokens=FAR, next_tokens=FAR, input_layout="BSH", sparse_mode=0,
):  # fmt: skip
    q, k, v = (t.asnumpy() for t in (query, key, value))
    mask = None if attn_mask is None else attn_mask.asnumpy()
    if input_layout == "TND":
        ends = actual_seq_qlen.asnumpy().tolist()
        assert ends == actual_seq_kvlen.asnumpy().tolist() and ends == sorted(ends) and ends[-1] == len(q)
        out, begin = np.zeros_like(q), 0
        for end in ends:
            part, size = slice(begin, end), end - begin
            if size:
                hidden = sparse_mask(sparse_mode, mask, pre_tokens, next_tokens, size, size)
                heads = (x[part].transpose(1, 0, 2) for x in (q, k, v))
                out[part] = softmax_attention(*heads, hidden, scalar_value).transpose(1, 0, 2)
            begin = end
        return Tensor(out)
    assert input_layout == "BSND" and q.shape[2] == head_num
    return Tensor(
        np.stack(
            [
                rows(q[b], k[b], v[b], mask, b, len(q), sparse_mode, pre_tokens, next_tokens, scalar_value)
                for b in range(len(q))
            ]
        )
    )


def rows(q_TND, k_SKD, v_SKD, mask, row, batch, mode, pre, following, scale):
    queries, keys = len(q_TND), len(k_SKD)
    if mode == 0 and mask is not None:
        assert mask.shape == (batch, 1, queries, keys) and mask.dtype == np.uint8
        mask = mask[row, 0]
    hidden = sparse_mask(mode, mask, pre, following, queries, keys)
    heads = (x.transpose(1, 0, 2) for x in (q_TND, k_SKD, v_SKD))
    return softmax_attention(*heads, hidden, scale).transpose(1, 0, 2).astype(np.float32)


def prompt_flash_attention(
    query, key, value, attn_mask=None, num_heads=1, scale_value=1.0, pre_tokens=FAR, next_tokens=0, input_layout="BSH",
    num_key_value_heads=0, sparse_mode=0,
):  # fmt: skip
    assert input_layout == "BNSD" and query.shape[1] == num_heads and key.shape[1] == num_key_value_heads
    q, k, v = (t.asnumpy() for t in (query, key, value))
    hidden = sparse_mask(sparse_mode, attn_mask.asnumpy(), pre_tokens, next_tokens, q.shape[2], k.shape[2])
    return Tensor(np.stack([softmax_attention(*heads, hidden, scale_value) for heads in zip(q, k, v)]))


def incre_flash_attention(
    query, key, value, attn_mask=None, actual_seq_lengths=None, num_heads=1, input_layout="BSH", scale_value=1.0,
    num_key_value_heads=0,
):  # fmt: skip
    assert input_layout == "BNSD" and isinstance(key, list) and isinstance(value, list)
    q, k, v, hidden = (t.asnumpy() for t in (query, key[0], value[0], attn_mask))
    lengths = actual_seq_lengths.asnumpy()
    assert q.shape[1:3] == (num_heads, 1) and k.shape[1] == num_key_value_heads
    assert hidden.shape == (len(q), 1, 1, k.shape[2]) and hidden.dtype == bool
    out = [
        softmax_attention(q[b], k[b][:, :n], v[b][:, :n], hidden[b, 0, :, :n], scale_value)
        for b, n in enumerate(lengths)
    ]
    return Tensor(np.stack(out).astype(np.float32))


def reshape_and_cache(key, value, key_cache, value_cache, slot_mapping):
    for new, cache in ((key, key_cache), (value, value_cache)):
        values = cache.asnumpy().copy()
        flat = values.reshape(-1, *values.shape[2:])
        for row, slot in zip(new.asnumpy(), slot_mapping.asnumpy()):
            if slot >= 0:
                flat[slot] = row
        cache.assign_value(Tensor(values))
    return key


def paged_attention(sizes, query, key_cache, value_cache, block_tables, context_lens):
    heads, scale, kv_heads = sizes
    q, k, v = (t.asnumpy() for t in (query, key_cache, value_cache))
    assert q.shape[1] == heads and k.shape[2] == kv_heads and scale == 1.0
    out = []
    for row, table, length in zip(q, block_tables.asnumpy(), context_lens.asnumpy()):
        keys, values = (x[table].reshape(-1, *x.shape[2:])[:length].transpose(1, 0, 2) for x in (k, v))
        out.append(softmax_attention(row[:, None], keys, values, None, scale)[:, 0])
    return Tensor(np.stack(out).astype(np.float32))
