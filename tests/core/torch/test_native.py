"""The compiled CPU kernels against torch's own operators, forward and gradients, float32 and bfloat16."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from research.core.native import build
from research.core.torch.native import ops

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# float32: sums in another order. bfloat16: results are rounded to 8 bits, gradients of rounded values may differ by
# one such step more.
CLOSE = {torch.float32: {"rtol": 2e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


@pytest.fixture(autouse=True)
def _kernels():
    if build.library() is None:
        pytest.skip("no C++ compiler: the kernels cannot be built here")


def _random(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _compare(ours, theirs, inputs, dtype, exact_forward=False):
    """``theirs`` computes in float32 on copies of ``inputs``; outputs and all input gradients must agree."""
    mine = [x.clone().requires_grad_() for x in inputs]
    wide = [x.float().requires_grad_() for x in inputs]
    a, b = ours(*mine), theirs(*wide)
    torch.testing.assert_close(a.float(), b, **CLOSE[dtype])
    with torch.no_grad():
        assert torch.equal(ours(*inputs), a), "the result must not depend on whether a gradient is wanted"
    grad = _random(*a.shape, dtype=dtype, seed=9)
    a.backward(grad)
    b.backward(grad.float())
    for x, y in zip(mine, wide):
        torch.testing.assert_close(x.grad.float(), y.grad, **CLOSE[dtype])


@BOTH
@pytest.mark.parametrize("width", [64, 100, 7])
def test_rms_norm_and_its_gradients(dtype, width):
    def plain(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    x, weight = _random(3, 300, width, dtype=dtype), _random(width, dtype=dtype, seed=1) + 1
    _compare(lambda x, w: ops.rms_norm(x, w, 1e-6), plain, [x, weight], dtype)


@BOTH
@pytest.mark.parametrize("count", [9999, 4096, 5])
def test_swiglu_and_its_gradients(dtype, count):
    gate, up = 4 * _random(count, dtype=dtype), _random(count, dtype=dtype, seed=1)
    _compare(ops.swiglu, lambda g, u: F.silu(g) * u, [gate, up], dtype)


def test_swiglu_far_from_zero_neither_overflows_nor_loses_nan():
    gate = torch.tensor([-1000.0, -90.0, 90.0, 1000.0, float("nan"), float("inf")])
    out = ops.swiglu(gate, torch.ones(6))
    torch.testing.assert_close(out, F.silu(gate), equal_nan=True)


@BOTH
@pytest.mark.parametrize("rows", [1, 2])  # one table for all rows of the batch, or one each
def test_rotary_and_its_gradient(dtype, rows):
    x = _random(2, 50, 3, 32, dtype=dtype)
    angles = 10 * _random(rows, 50, 1, 16, dtype=torch.float32, seed=1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def plain(x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos.float() - b * sin.float(), b * cos.float() + a * sin.float()), -1)

    _compare(lambda x: ops.rotary(x, cos, sin), plain, [x], dtype)


def _sdpa_by_document(lengths, causal):
    def attend(q, k, v):
        outs = []
        for parts in zip(q.split(lengths), k.split(lengths), v.split(lengths)):
            a, b, c = (x.transpose(0, 1)[None] for x in parts)
            out = F.scaled_dot_product_attention(a, b, c, is_causal=causal, enable_gqa=True)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    return attend


@BOTH
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (2, 2, 80), (3, 1, 128)])
def test_attention_inside_documents_and_its_gradients(dtype, causal, heads, kv_heads, dim):
    lengths = [1, 5, 64, 65, 128, 200]
    ends = torch.tensor(lengths).cumsum(0)
    documents = ops.Documents(ends - torch.tensor(lengths), torch.tensor(lengths), 200, True)
    n = sum(lengths)
    q = _random(n, heads, dim, dtype=dtype)
    k, v = (_random(n, kv_heads, dim, dtype=dtype, seed=s) for s in (1, 2))
    _compare(
        lambda q, k, v: ops.attention(q, k, v, documents, causal), _sdpa_by_document(lengths, causal), [q, k, v], dtype
    )


def test_attention_leaves_tokens_of_no_document_zero_and_without_gradient():
    documents = ops.Documents(torch.tensor([2]), torch.tensor([3]), 3, False)
    q, k, v = (_random(7, 2, 16, dtype=torch.float32, seed=s).requires_grad_() for s in range(3))
    out = ops.attention(q, k, v, documents, True)
    out.sum().backward()
    outside = [0, 1, 5, 6]
    assert out[2:5].abs().min() > 0
    assert out[outside].abs().max() == 0
    assert all(x.grad[outside].abs().max() == 0 for x in (q, k, v))


def test_attention_does_not_hide_nan():
    documents = ops.Documents(torch.tensor([0]), torch.tensor([70]), 70, True)
    q, k, v = (_random(70, 1, 16, dtype=torch.float32, seed=s) for s in range(3))
    k[3] = float("nan")
    assert ops.attention(q, k, v, documents, True)[3:].isnan().all()


@BOTH
@pytest.mark.parametrize("vocabulary", [1000, 37])
def test_cross_entropy_and_its_gradient_in_place(dtype, vocabulary):
    logits = 5 * _random(33, vocabulary, dtype=dtype)
    targets = torch.randint(0, vocabulary, (33,), generator=torch.Generator().manual_seed(1))
    wide = logits.float().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="none")
    expected.sum().backward()
    kept = logits.clone()
    torch.testing.assert_close(ops.cross_entropy_(kept, targets, False), expected.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(kept, logits)
    torch.testing.assert_close(ops.cross_entropy_(kept, targets, True), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept.float(), wide.grad, **CLOSE[dtype])


def test_cross_entropy_does_not_hide_nan():
    logits = torch.zeros(2, 50)
    logits[1, 20] = float("nan")
    loss = ops.cross_entropy_(logits, torch.tensor([3, 3]), False)
    assert loss.isnan().tolist() == [False, True]


@BOTH
@pytest.mark.parametrize("rows", range(1, ops.MOST_ROWS + 1))
@pytest.mark.parametrize("shape", [(130, 100), (64, 96), (33, 7)])
def test_linear_of_few_rows(dtype, rows, shape):
    weight, bias = _random(*shape, dtype=dtype), _random(shape[0], dtype=dtype, seed=1)
    x = _random(rows, shape[1], dtype=dtype, seed=2)
    for b in (bias, None):
        expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
        torch.testing.assert_close(ops.linear_rows(x, weight, b).double(), expected, **CLOSE[dtype])


def test_other_devices_and_types_stay_with_torch():
    assert ops.ready(torch.zeros(2))
    assert not ops.ready(torch.zeros(2, dtype=torch.float64))
    assert not ops.ready(torch.zeros(2, device="meta"))
    assert not ops.ready(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))


def _in_a_process(code, **env):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


CODE = "from research.core.native.build import library; print(library() is not None)"


@pytest.mark.slow
def test_two_processes_build_at_once_and_leave_one_library(tmp_path):
    quick = tmp_path / "quick"
    quick.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')  # how fast the kernels are does not matter here
    quick.chmod(0o755)
    processes = [_in_a_process(CODE, QWEN_CACHE=str(tmp_path), CXX=str(quick)) for _ in range(2)]
    results = [p.communicate(timeout=300) for p in processes]
    assert [out for out, _ in results] == ["True\n"] * 2
    assert all(line.startswith("compil") for _, err in results for line in err.splitlines())
    files = list((tmp_path / "native").iterdir())
    assert len(files) == 1 and files[0].suffix == ".so"


@pytest.mark.slow
@pytest.mark.parametrize("cause", ["no compiler", "a compiler that fails", "an unwritable cache"])
def test_without_kernels_everything_runs_and_the_reason_is_said_once(tmp_path, cause):
    env = {"QWEN_CACHE": str(tmp_path)}
    if cause == "no compiler":
        env |= {"PATH": str(tmp_path), "CXX": ""}
    elif cause == "a compiler that fails":
        broken = tmp_path / "broken"
        broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho the compiler is broken >&2; exit 1\n')
        broken.chmod(0o755)
        env |= {"CXX": str(broken)}
    else:
        (tmp_path / "native").write_text("a file where the folder should be")
    code = (
        CODE
        + "; library(); from research.core.torch.layers import RMSNorm; import torch; print(RMSNorm(4, 1e-6)(torch.ones(1, 4)).tolist())"
    )
    out, err = _in_a_process(code, **env).communicate(timeout=120)
    assert out.splitlines() == [
        "False",
        "[[0.9999995231628418, 0.9999995231628418, 0.9999995231628418, 0.9999995231628418]]",
    ]
    said = [line for line in err.splitlines() if not line.startswith("compiling")]
    assert len(said) == 1 and "plain operators are used" in said[0]
    assert not list(tmp_path.rglob("*.so"))


def test_kernels_can_be_switched_off():
    out, err = _in_a_process(CODE, QWEN_NATIVE="0").communicate(timeout=60)
    assert (out, err) == ("False\n", "")
