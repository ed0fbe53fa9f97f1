"""Generation on MindSpore against transformers' greedy search, the torch backend, and what must not depend on the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from research.core.errors import UserError
from research.core.generation.loop import continue_from, run_requests
from research.core.generation.requests import Request
from research.core.generation.sampling import Sampling
from research.core.mindspore.generate import Runner, generate
from research.core.spec import DecoderSpec, MoeSpec, RopeScaling
from research.core.torch import generate as torchs
from tests.core.mindspore.peers import twin
from tests.core.torch.test_generate import _decoder, _transformers_greedy, _transformers_twin

BASE = DecoderSpec(
    "qwen2", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=199, max_positions=256, init_range=0.2
)
KINDS = {
    "gqa": BASE,
    "moe": replace(BASE, layers=1, model_type="qwen2_moe", moe=MoeSpec(6, 2, 32, 48)),
}
SLIDING = replace(
    BASE,
    sliding_window=8,
    sliding_layers=(1,),
    max_positions=64,
    rope_scaling=RopeScaling("yarn", 4.0, original_positions=64),
    tied=True,
)
QWEN = replace(
    BASE,
    layers=1,
    model_type="qwen",
    kv_heads=4,
    logn_attention=True,
    dynamic_ntk=True,
    train_length=16,
    rope_theta=10000.0,
)
PROMPTS = [[5, 9, 2, 77, 31, 8, 120], [4], [7, 7, 7, 11, 150, 3, 8, 9, 10, 42, 6, 1, 0, 198], [3, 2], [100, 101, 102]]


@pytest.fixture(scope="module")
def pair():
    """A torch decoder and a runner of its twin; one for the module, so that its graphs are compiled once."""
    ours = _decoder(SLIDING)
    return ours, Runner(twin(ours))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_different_lengths_gives_transformers_greedy_tokens(kind):
    ours = _decoder(KINDS[kind])
    hf = _transformers_twin(ours)
    expected = [_transformers_greedy(hf, p, 64) for p in PROMPTS]
    got = generate(twin(ours), PROMPTS, max_new_tokens=64)
    assert [p + ids for p, ids in zip(PROMPTS, got)] == expected
    assert len({tuple(ids) for ids in got}) > 1, "all answers are equal: the model is too degenerate to prove anything"


@pytest.mark.slow
def test_qwen_v1_past_its_training_length_gives_the_torch_backends_tokens_whatever_the_batch():
    # The torch decoder's are checked against the published formulas in test_decoder_qwen1.
    ours = _decoder(QWEN)
    generator = torch.Generator().manual_seed(0)
    # Below, just above and far above the training length of 16: alphas of 1, 3 and 7.
    prompts = [torch.randint(199, (n,), generator=generator).tolist() for n in (3, 15, 18, 40)]
    runner = Runner(twin(ours))
    requests = [Request(p, max_new_tokens=64) for p in prompts]
    expected = torchs.generate(ours, prompts, max_new_tokens=64)
    for batch in (4, 1):
        assert [r.ids for r in run_requests(runner, requests, batch=batch)] == expected


@pytest.mark.slow
def test_sampled_answers_are_the_torch_backends_whatever_the_batch(pair):
    ours, runner = pair
    sampling = [Sampling(temperature=1.0, top_p=0.9, seed=s, repetition_penalty=1.1) for s in range(len(PROMPTS))]
    requests = [Request(p, s, 20) for p, s in zip(PROMPTS, sampling)]
    expected = torchs.generate(ours, PROMPTS, sampling, 20)
    for batch in (1, 8):
        assert [r.ids for r in run_requests(runner, requests, batch=batch)] == expected
    assert expected != torchs.generate(ours, PROMPTS, [replace(s, seed=s.seed + 1) for s in sampling], 20)


@pytest.mark.slow
def test_rows_end_at_their_own_end_token_or_callback_while_the_batch_keeps_its_shape(pair):
    ours, runner = pair
    free = torchs.generate(ours, PROMPTS, max_new_tokens=30)
    eos = {free[0][3], free[2][10]}
    streamed: list[list[int]] = [[] for _ in PROMPTS]

    def on_token(row: int, token: int) -> bool:
        streamed[row].append(token)
        return row == 4 and len(streamed[4]) == 2

    expected = run_requests(
        torchs.Runner(ours), [Request(p, max_new_tokens=30) for p in PROMPTS], eos, lambda row, token: None
    )
    got = run_requests(runner, [Request(p, max_new_tokens=30) for p in PROMPTS], eos, on_token)
    assert [r.ids for r in got] == streamed
    for row, (mine, theirs) in enumerate(zip(got, expected)):
        if row != 4:
            assert (mine.ids, mine.reason) == (theirs.ids, theirs.reason)
    assert got[4].ids == expected[4].ids[:2] and {r.reason for r in got} >= {"eos", "length"}


@pytest.mark.slow
def test_a_prompt_can_be_put_in_piece_by_piece_up_to_the_last_slot(pair):
    ours, runner = pair
    prompt = [(7 * i) % 199 for i in range(61)]
    expected = torchs.generate(ours, [prompt], max_new_tokens=4)[0]
    for first in (1, 40, 59):
        cache = runner.new_cache(1, 64)
        assert cache.length == 64
        runner.prefill(cache, [prompt[:first]])
        logits = runner.prefill(cache, [prompt[first:]])  # padded, it would reach beyond the cache
        assert continue_from(runner, cache, logits, [Request(prompt, max_new_tokens=4)])[0].ids == expected
        assert cache.used == 64


@pytest.mark.slow
def test_a_conversation_can_go_back_grow_and_continue_differently(pair):
    ours, runner = pair
    first, second = PROMPTS[2], PROMPTS[2][:6] + [1, 2, 3]
    cache = runner.new_cache(1, 32)
    runner.prefill(cache, [first])
    cache.truncate(6)
    cache = cache.grown(100)
    assert cache.length == 128
    logits = runner.prefill(cache, [second[6:]])
    result = continue_from(runner, cache, logits, [Request(second, max_new_tokens=20)])[0]
    assert result.ids == torchs.generate(ours, [second], max_new_tokens=20)[0]


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [([], 5, "empty"), ([1] * 250, 7, "250 tokens and 7 new ones"), ([199], 5, "199"), ([1], -1, "-1")],
)
def test_impossible_requests_are_refused_before_anything_runs(pair, prompt, new, message):
    with pytest.raises(UserError, match=message):
        run_requests(pair[1], [Request([1, 2], max_new_tokens=new), Request(prompt, max_new_tokens=new)])


@pytest.mark.slow
def test_generation_leaves_the_training_mode_as_it_was_and_reports_weights_that_give_no_number():
    ours = _decoder(replace(BASE, layers=1))
    with torch.no_grad():
        ours.model.norm.weight.fill_(float("nan"))
    decoder = twin(ours).set_train()
    with pytest.raises(UserError, match="not finite"):
        generate(decoder, [[1]], max_new_tokens=1)
    assert decoder.training
