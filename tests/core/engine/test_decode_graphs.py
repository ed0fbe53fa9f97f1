"""What stands around a captured step (fixed tensors, rows that nobody asked for), with a stand-in for the capture; and the
npu operator's arguments, with a stand-in that computes its description."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch

from research.core.engine import cuda_graphs, npu_attention
from research.core.engine.api import EngineRequest
from research.core.engine.attention import paged_attention
from research.core.engine.batch import PagedBatch, StepPlan
from research.core.errors import ConfigError
from research.core.torch.generate import generate
from tests.core.engine.small_engine import SPEC, VOCAB, drain, engine, random_decoder

QWEN = replace(SPEC, model_type="qwen", kv_heads=4, logn_attention=True, train_length=24)


def _replayed(work):
    """Runs the work again at each replay, into the same memory: what a graph does, without the speed."""
    result = work().clone()
    return (lambda: result.copy_(work())), result


@pytest.mark.parametrize("spec", [SPEC, QWEN], ids=["qwen2", "qwen"])
def test_steps_from_graphs_give_the_plain_tokens_and_touch_no_blocks_of_others(spec, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "fits", lambda spec, device, backend: True)
    decoder = random_decoder(spec)
    running = engine(decoder, num_blocks=60, max_batch=6, native_step=False, attention="sdpa")
    graphs = running.runner._graphs
    graphs._record = _replayed
    # The stand-in for the kernel reads lengths from tensors, as a captured one does.
    monkeypatch.setattr("research.core.engine.runner.paged_attention", _attention_of_tensors)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (3, 40, 17, 60, 20)]
    news = [4, 9, 12, 7, 15]
    numbers = [running.submit(EngineRequest(tuple(p), max_new_tokens=n)) for p, n in zip(prompts, news)]
    answers = drain(running)
    for number, prompt, new in zip(numbers, prompts, news):
        assert answers[number, 0].tokens == generate(decoder, [prompt], None, new)[0]
    assert cuda_graphs.row_buckets(6) == [1, 2, 4, 6] and cuda_graphs.row_buckets(17) == [1, 2, 4, 8, 16, 17]
    assert set(graphs._captured) == {1, 2, 4, 6} and running.runner.cache.k.shape[1] == 61


def _attention_of_tensors(q, k, v, batch, scale, window, backend):
    now = replace(batch, context_list=batch.contexts.tolist(), longest_context=int(batch.contexts.max()))
    return paged_attention(q, k, v, now, scale, window, "reference")


def _described(query, key, value, *, atten_mask, actual_seq_lengths, actual_seq_lengths_kv, block_table, **rest):
    """The operator as its documentation describes it, for layout TND with keys and values in blocks."""
    assert rest["input_layout"] == "TND" and atten_mask.shape == (2048, 2048) and atten_mask.equal(atten_mask.triu(1))
    assert query.shape[1] == rest["num_heads"] and key.shape[1:3] == (rest["num_key_value_heads"], rest["block_size"])
    out, begin = torch.empty_like(query), 0
    for row, (end, length) in enumerate(zip(actual_seq_lengths, actual_seq_lengths_kv)):
        k, v = (x[block_table[row].long()].transpose(0, 1).flatten(1, 2)[:, :length] for x in (key, value))
        k, v = (x.repeat_interleave(rest["num_heads"] // x.shape[0], 0) for x in (k, v))
        scores = query[begin:end].transpose(0, 1) @ k.transpose(1, 2) * rest["scale"]
        far = torch.arange(length)[None] - torch.arange(length - (end - begin), length)[:, None]  # from the lower right
        hidden = far > 0
        if rest["sparse_mode"] == 4:
            hidden = (far > rest["next_tokens"]) | (far < -rest["pre_tokens"])
        else:
            assert rest["sparse_mode"] == 3
        out[begin:end] = (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1)
        begin = end
    return out, None


@pytest.mark.parametrize("window", [None, 9, 500])
def test_the_npu_operator_is_asked_for_what_the_reference_computes(window, monkeypatch):
    stand_in = types.SimpleNamespace(npu_fused_infer_attention_score=_described)
    monkeypatch.setattr(npu_attention, "_operators", lambda: stand_in)
    plan = StepPlan([0] * 45, [1, 37, 7], [30, 37, 64], [[3, 1], [4, 5, 6], [7, 2, 8, 9]], [])
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(45, 4, 16, generator=generator)
    k, v = (torch.randn(10, 2, 16, 16, generator=generator) for _ in range(2))
    batch = PagedBatch.of(plan, 16)
    expected = paged_attention(q, k, v, batch, 0.25, window, "reference")
    got = npu_attention.paged_attention(q, k, v, batch, 0.25, window)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # float32 sums in another order
    with pytest.raises(ConfigError, match=r"engine\.block_size"):
        npu_attention.paged_attention(q, k, v, replace(batch, block_size=8), 0.25)
