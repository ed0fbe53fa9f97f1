"""Attention: layouts and backends against an explicit per-document softmax."""

from __future__ import annotations

import math
import sys
import types
from dataclasses import replace

import pytest
import torch

from research.core.errors import ConfigError
from research.core.torch import attention, attention_documents
from research.core.torch.attention import attend, resolve_backend
from research.core.torch.cache import KVCache
from research.core.torch.decoder import Decoder
from research.core.torch.layout import Layout
from research.core.torch.native import ops
from tests.core.torch.peers import packed_ids
from tests.core.torch.test_decoder import SMALL

HEADS, KV_HEADS, DIM = 4, 2, 16


def qkv(batch: int, time: int, seed: int = 0, dtype=torch.float32) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, time, heads, DIM, generator=random).to(dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def plain(q, k, v, documents, causal, window):
    """Every query of every document on its own, in float64; zero where there is no document."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    rows = []
    for row, numbers in enumerate(documents.tolist()):
        for place, number in enumerate(numbers):
            if number == 0:
                rows.append(torch.zeros(HEADS, DIM, dtype=torch.float64))
                continue
            seen = [
                j
                for j, other in enumerate(numbers)
                if other == number and (not causal or j <= place) and (window is None or j > place - window)
            ]
            heads = []
            for head in range(HEADS):
                keys, values = k[row, seen, head // 2], v[row, seen, head // 2]
                heads.append(torch.softmax(keys @ q[row, place, head] / math.sqrt(DIM), 0) @ values)
            rows.append(torch.stack(heads))
    return torch.stack(rows).view_as(out)


LAYOUTS = {
    "full": [[19]],
    "packed": [[4, 9, 6], [19], [1, 2, 3, 5], [17]],
    "one_padded": [[11]],
    "no_filling": [[10, 9], [9, 10]],
    "many_short": [[2] * 9, [1] * 19],
}


def make_layout(name: str) -> tuple[Layout, torch.Tensor]:
    positions, documents = packed_ids(LAYOUTS[name], 19)
    layout = Layout.full(len(documents), 19) if name == "full" else Layout.packed(positions, documents)
    return layout, documents


@pytest.fixture
def npu(monkeypatch):
    """A stand-in torch_npu that computes what the operators' documentation says, and refuses what it forbids."""

    def fusion(q, k, v, head_num, input_layout, **options):
        scale, mode = options.pop("scale"), options.pop("sparse_mode")
        assert options.pop("keep_prob") == 1.0 and head_num == q.shape[-2]
        mask = options.pop("atten_mask", None)
        before, after = options.pop("pre_tockens", 1 << 31), options.pop("next_tockens", 1 << 31)
        if input_layout == "TND":
            ends = options.pop("actual_seq_qlen")
            assert ends == options.pop("actual_seq_kvlen") and isinstance(ends, list) and ends[-1] == len(q)
            spans = list(zip([0, *ends], ends))
            parts = [(q[a:b][None], k[a:b][None], v[a:b][None]) for a, b in spans]
        else:
            assert input_layout == "BSND"
            parts = [(q, k, v)]
        assert not options
        if mode in (2, 3, 4):
            assert mask.shape == (2048, 2048) and torch.equal(mask, torch.ones(2048, 2048).triu(1).bool())
        outs = []
        for q_part, k_part, v_part in parts:
            time = q_part.shape[1]
            gap = torch.arange(time)[:, None] - torch.arange(time)
            hidden = torch.zeros(time, time, dtype=torch.bool)
            if mode in (2, 3):
                hidden = gap < 0
            if mode == 4:
                hidden = (gap > before) | (-gap > after)
            outs.append(soft(q_part, k_part, v_part, hidden, scale))
        out = outs[0] if input_layout == "BSND" else torch.cat([o[0] for o in outs])
        return (out, None, None, None, 0, 0, 0)

    def infer(q, k, v, *, num_heads, num_key_value_heads, input_layout, atten_mask, scale, sparse_mode):
        assert input_layout == "BNSD" and sparse_mode == 0
        assert (num_heads, num_key_value_heads) == (q.shape[1], k.shape[1])
        assert atten_mask.dtype == torch.bool and atten_mask.shape == (q.shape[0], 1, q.shape[2], k.shape[2])
        swap = [x.transpose(1, 2) for x in (q, k, v)]
        return soft(*swap, atten_mask, scale).transpose(1, 2), None

    def soft(q, k, v, hidden, scale):
        k, v = k.repeat_interleave(q.shape[2] // k.shape[2], 2), v.repeat_interleave(q.shape[2] // v.shape[2], 2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
        return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)

    module = types.ModuleType("torch_npu")
    module.npu_fusion_attention, module.npu_fused_infer_attention_score = fusion, infer
    monkeypatch.setitem(sys.modules, "torch_npu", module)


@pytest.fixture
def varlen(monkeypatch):
    """A stand-in for torch's CUDA varlen attention, on the CPU."""

    def operator(q, k, v, starts_q, starts_k, longest_q, longest_k, *, window_size, enable_gqa):
        assert starts_q.dtype == torch.int32 and torch.equal(starts_q, starts_k) and starts_q[-1] == len(q)
        assert enable_gqa == (q.shape[1] != k.shape[1])
        assert longest_q == longest_k == int(starts_q.diff().max())
        left, right = (1 << 30 if side < 0 else side for side in window_size)
        outs = []
        for a, b in zip(starts_q.tolist(), starts_q.tolist()[1:]):
            gap = torch.arange(b - a)[:, None] - torch.arange(b - a)
            allowed = (gap <= left) & (-gap <= right)
            outs.append(attention._reference(q[None, a:b], k[None, a:b], v[None, a:b], allowed[None, None])[0])
        return torch.cat(outs)

    monkeypatch.setattr(attention, "takes_varlen", lambda q: True)
    monkeypatch.setattr(attention_documents, "varlen_operator", lambda: operator)


@pytest.mark.parametrize("backend", ["sdpa", "native", "reference", "npu", "varlen"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 4), (True, 1), (False, None)])
def test_backends_equal_explicit_attention_with_gradients(request, monkeypatch, backend, name, causal, window):
    operator = "sdpa" if backend in ("native", "varlen") else backend
    if backend in ("npu", "varlen"):
        request.getfixturevalue(backend)
    if backend != "native":
        monkeypatch.setattr(ops, "library", lambda: None)
    elif ops.library() is None:
        pytest.skip("no C++ compiler: the CPU kernels cannot be built")
    layout, documents = make_layout(name)
    ours, theirs = qkv(len(documents), 19), qkv(len(documents), 19)
    real = (documents != 0)[..., None, None]
    out = attend(*ours, layout, causal=causal, window=window, backend=operator)
    expected = plain(*theirs, documents, causal, window)
    assert out.isfinite().all()
    # fp32 against float64 on values of size 1
    torch.testing.assert_close((out * real).double(), expected, atol=2e-6, rtol=0)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    (out * real * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, reference in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, reference.grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["sdpa", "reference", "npu"])
@pytest.mark.parametrize("window", [None, 3])
def test_backends_agree_against_the_cache(npu, backend, window):
    q, k, v = (x.detach() for x in qkv(2, 9))
    cache = KVCache(replace(SMALL, head_dim=DIM), 2, 9, torch.float32)
    documents = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    expected = plain(q, k, v, documents, True, window)
    outs = []
    for begin, end in ((0, 4), (4, 7), (7, 8), (8, 9)):
        layout = Layout.cached(cache, end - begin, documents[:, begin:end])
        keys, values = cache.update(0, k[:, begin:end], v[:, begin:end], layout)
        if not layout.against_cache:
            keys, values = k[:, begin:end], v[:, begin:end]
        outs.append(attend(q[:, begin:end], keys, values, layout, window=window, backend=backend))
        cache.advance(layout)
    real = (documents != 0)[..., None, None]
    torch.testing.assert_close((torch.cat(outs, 1) * real).double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_bf16_grouped_attention_rounds_like_the_reference(name):
    layout, documents = make_layout(name)
    q, k, v = (x.detach() for x in qkv(len(documents), 19, dtype=torch.bfloat16))
    real = (documents != 0)[..., None, None]
    # One bf16 rounding (2^-9 relative) of values up to 4, and one of the probabilities.
    torch.testing.assert_close(
        attend(q, k, v, layout) * real, attend(q, k, v, layout, backend="reference") * real, atol=2e-2, rtol=0
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 4), (False, None)])
def test_cuda_attention_equals_the_explicit_one(name, causal, window):
    _, documents = make_layout(name)
    positions, numbers = packed_ids(LAYOUTS[name], 19)
    layout = Layout.packed(positions, numbers, device="cuda")
    on_card = [x.detach().cuda().requires_grad_() for x in qkv(len(documents), 19, dtype=torch.bfloat16)]
    exact = [x.detach().cpu().requires_grad_() for x in on_card]
    real = (documents != 0)[..., None, None]
    out = attend(*on_card, layout, causal=causal, window=window)
    expected = plain(*exact, documents, causal, window)
    # bf16 rounds values up to 4 to 2^-7
    torch.testing.assert_close((out.cpu() * real).double(), expected, atol=2e-2, rtol=0)
    (out * real.cuda()).sum().backward()
    expected.sum().backward()
    for mine, reference in zip(on_card, exact):
        torch.testing.assert_close(mine.grad.cpu().float(), reference.grad.float(), atol=5e-2, rtol=2e-2)


def test_grouping_wastes_little_and_covers_every_token_once():
    random = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(4):
        row, room = [], 512
        while room > 0:
            row.append(min(int(torch.randint(10, 200, (), generator=random)), room))
            room -= row[-1]
        rows.append(row)
    layout = Layout.packed(*packed_ids(rows, 512))
    groups = layout.groups
    slots = sum(rows * length for rows, length in groups.shapes)
    assert slots <= 1.25 * 4 * 512
    assert len(groups.shapes) <= 8
    assert torch.equal(groups.to_slot[groups.to_token], torch.arange(4 * 512))


@pytest.mark.parametrize(("name", "device", "says"), [("flash", "cpu", "flash"), ("npu", "cpu", "does not run on cpu")])
def test_unusable_backend_is_refused_with_its_name(name, device, says):
    with pytest.raises(ConfigError, match=says):
        resolve_backend(name, device)


def test_npu_backend_without_torch_npu_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    q, k, v = qkv(1, 4)
    with pytest.raises(ConfigError, match="torch_npu"):
        attend(q, k, v, Layout.full(1, 4), backend="npu")


def test_auto_is_the_devices_own_backend():
    assert resolve_backend("auto", "cpu") == "sdpa"
    decoder = Decoder(SMALL)
    decoder.use_attention("reference")
    assert {layer.self_attn.backend for layer in decoder.model.layers} == {"reference"}


def test_cache_that_is_too_short_is_refused():
    decoder = Decoder(SMALL).init_weights(0).eval()
    with pytest.raises(ConfigError, match="9 tokens do not fit"):
        decoder(torch.zeros(1, 9, dtype=torch.long), cache=KVCache(SMALL, 1, 8, torch.float32))
