"""Paged attention's native kernel against the explicit reference."""

from __future__ import annotations

import pytest
import torch

from research.core.engine import native_attention
from research.core.engine.attention import paged_attention
from research.core.engine.batch import PagedBatch, StepPlan

pytestmark = pytest.mark.skipif(
    not native_attention.ready(torch.float32), reason="no C++ compiler here: the native attention does not exist"
)

# Rows of a step: new tokens and length after it. A decode row, a whole prompt, a decode row at the end of a tile of keys, a
# chunk behind a prefix, and one that ends in the middle of a block.
QUERIES, CONTEXTS = [1, 37, 1, 70, 33], [1, 37, 64, 130, 200]
# float32: sums of up to 200 weights of 1 in total over values of size 1 to 4, in another order. bfloat16: inputs are exact
# in float32, so the results differ by their last rounding at most, 1/256 of values below 2 after averaging.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def _case(heads: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype):
    blocks = 2 + sum(-(-c // block_size) for c in CONTEXTS)
    generator = torch.Generator().manual_seed(heads)
    k, v = (torch.randn(blocks, kv_heads, block_size, dim, generator=generator) for _ in range(2))
    order, tables = torch.randperm(blocks, generator=generator).tolist(), []
    for context in CONTEXTS:
        count = -(-context // block_size)
        tables.append(order[:count])
        order = order[count:]
    for unused in order:
        k[unused] = v[unused] = float("nan")
    plan = StepPlan([0] * sum(QUERIES), QUERIES, CONTEXTS, tables, [])
    q = torch.randn(sum(QUERIES), heads, dim, generator=generator).to(dtype)
    return q, k.to(dtype), v.to(dtype), PagedBatch.of(plan, block_size)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
def test_the_native_attention_gives_the_reference_for_every_shape_block_size_and_window(dtype):
    shapes = [(14, 2, 64, 16), (6, 6, 32, 32), (4, 1, 128, 128), (4, 2, 80, 24), (3, 1, 16, 1), (2, 1, 256, 16)]
    for heads, kv_heads, dim, block_size in shapes:
        q, k, v, batch = _case(heads, kv_heads, dim, block_size, dtype)
        for window in (None, 1, 20, 100):
            arguments = (q, k, v, batch, dim**-0.5, window)
            expected, got = (paged_attention(*arguments, backend=name) for name in ("reference", "native"))
            assert expected.float().abs().max() > 0.5
            torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[dtype])


def test_a_token_s_result_does_not_depend_on_the_other_tokens_of_the_step():
    """The same tokens in chunks of other sizes, and alone: equal in every bit."""
    q, k, v, batch = _case(4, 2, 32, 16, torch.bfloat16)
    for window in (None, 20):
        whole = native_attention.paged_attention(q, k, v, batch, 0.2, window)
        begin = 0
        for row, (queries, context) in enumerate(zip(QUERIES, CONTEXTS)):
            table = batch.block_tables[row].tolist()
            for size in (1, 7, 29):
                for first in range(0, queries, size):
                    last = min(first + size, queries)
                    end = context - queries + last
                    plan = StepPlan([0] * (last - first), [last - first], [end], [table], [])
                    some = slice(begin + first, begin + last)
                    alone = native_attention.paged_attention(q[some], k, v, PagedBatch.of(plan, 16), 0.2, window)
                    assert torch.equal(alone, whole[some])
            begin += queries
