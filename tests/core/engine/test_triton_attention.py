"""Paged attention's Triton kernel in Triton's interpreter, against the explicit reference. No card is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

# The interpreter is chosen when Triton is imported, so the kernel runs in a process of its own.
SCRIPT = """
import torch
from research.core.engine import triton_attention
from research.core.engine.attention import paged_attention
from research.core.engine.batch import PagedBatch, StepPlan

assert triton_attention.ready(torch.float32)
worst = 0.0
for queries, contexts in (([1, 9, 1, 40], [1, 9, 100, 70]), ([1, 1], [1300, 5]), ([1], [600])):
    for heads, kv_heads, dim, block_size in ((6, 2, 16, 16), (7, 1, 80, 32)):
        generator, blocks = torch.Generator().manual_seed(heads), sum(-(-c // block_size) for c in contexts)
        order, tables = torch.randperm(blocks, generator=generator).tolist(), []
        for context in contexts:
            count = -(-context // block_size)
            tables.append(order[:count])
            order = order[count:]
        k, v = (torch.randn(blocks, kv_heads, block_size, dim, generator=generator) for _ in range(2))
        q = torch.randn(sum(queries), heads, dim, generator=generator)
        batch = PagedBatch.of(StepPlan([0] * sum(queries), queries, contexts, tables, []), block_size)
        for window in (None, 20):
            expected, got = (paged_attention(q, k, v, batch, 0.3, window, name) for name in ("reference", "triton"))
            worst = max(worst, float((expected - got).abs().max()))
assert worst < 1e-5, worst
print("equal")
"""


@pytest.mark.slow
def test_the_kernel_gives_the_reference_for_pieces_splits_windows_and_grouped_heads():
    # float32, sums of up to 1,300 weights of 1 in total in another order: 1e-5 (asserted in the process)
    root = Path(__file__).resolve().parents[3]
    env = {"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join([str(root), *sys.path])}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
