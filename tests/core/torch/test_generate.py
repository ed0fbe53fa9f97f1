"""Generation against transformers' greedy search, and what must not depend on the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from research.core.errors import UserError
from research.core.generation.loop import continue_from, run_requests
from research.core.generation.requests import Request
from research.core.generation.sampling import Sampling
from research.core.spec import DecoderSpec, MoeSpec, RopeScaling, spec_to_hf
from research.core.torch.decode_step import DecodeStep
from research.core.torch.decoder import Decoder
from research.core.torch.generate import Runner, generate

BASE = DecoderSpec(
    "qwen2", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=199, max_positions=256, init_range=0.2
)
KINDS = {
    "gqa": BASE,
    "mha-tied": replace(BASE, kv_heads=4, tied=True),
    "sliding": replace(BASE, sliding_window=8, sliding_layers=(1,)),
    "yarn": replace(BASE, max_positions=32, rope_scaling=RopeScaling("yarn", 4.0, original_positions=32)),
    "moe": replace(BASE, model_type="qwen2_moe", moe=MoeSpec(6, 2, 32, 48)),
}
QWEN = replace(
    BASE, model_type="qwen", kv_heads=4, logn_attention=True, dynamic_ntk=True, train_length=16, rope_theta=10000.0
)
PROMPTS = [[5, 9, 2, 77, 31, 8, 120], [4], [7, 7, 7, 11, 150, 3, 8, 9, 10, 42, 6, 1, 0, 198], [3, 2], [100, 101, 102]]


def _decoder(spec: DecoderSpec, seed: int = 0) -> Decoder:
    decoder = Decoder(spec).init_weights(seed).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return decoder


def _transformers_twin(decoder: Decoder):
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = spec_to_hf(decoder.spec)
    config = AutoConfig.for_model(**hf)
    twin = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    missing = twin.load_state_dict(decoder.state_dict(), strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    return twin


def _transformers_greedy(twin, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)  # otherwise id 0 in a prompt would be taken for padding
    out = twin.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("native", [True, False], ids=["native", "layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_different_lengths_gives_transformers_greedy_tokens(kind, native, monkeypatch):
    if not native:
        monkeypatch.setattr(DecodeStep, "fits", lambda decoder: False)
    decoder = _decoder(KINDS[kind])
    twin = _transformers_twin(decoder)
    expected = [_transformers_greedy(twin, p, 64) for p in PROMPTS]
    got = generate(decoder, PROMPTS, max_new_tokens=64)
    assert [p + ids for p, ids in zip(PROMPTS, got)] == expected
    assert len({tuple(ids) for ids in got}) > 1, "all answers are equal: the model is too degenerate to prove anything"


def test_qwen_v1_rows_keep_their_own_dynamic_ntk_in_a_batch():
    decoder = _decoder(QWEN)
    generator = torch.Generator().manual_seed(0)
    # Below, just above and far above the training length of 16: alphas of 1, 3 and 7.
    prompts = [torch.randint(199, (n,), generator=generator).tolist() for n in (3, 15, 18, 40)]
    together = generate(decoder, prompts, max_new_tokens=40)
    alone = [generate(decoder, [p], max_new_tokens=40)[0] for p in prompts]
    assert together == alone


def test_an_answer_does_not_depend_on_its_batch_or_place():
    decoder = _decoder(BASE)
    sampling = [Sampling(temperature=1.0, top_p=0.9, seed=s, repetition_penalty=1.1) for s in range(len(PROMPTS))]
    alone = [generate(decoder, [p], s, 20)[0] for p, s in zip(PROMPTS, sampling)]
    for batch in (1, 2, 8):
        assert generate(decoder, PROMPTS, sampling, 20, batch=batch) == alone
    assert generate(decoder, PROMPTS[::-1], sampling[::-1], 20) == alone[::-1]


def test_a_seed_repeats_the_answer_and_another_changes_it():
    decoder = _decoder(BASE)
    first, again, other = (generate(decoder, PROMPTS[:1], Sampling(temperature=1.0, seed=s), 20) for s in (1, 1, 2))
    assert first == again != other


def test_rows_end_at_their_own_end_token_and_keep_it():
    decoder = _decoder(BASE)
    free = generate(decoder, PROMPTS, max_new_tokens=30)
    eos = {free[0][3], free[2][10]}
    got = run_requests(Runner(decoder), [Request(p, max_new_tokens=30) for p in PROMPTS], eos)
    for ids, result in zip(free, got):
        first = next((i for i, token in enumerate(ids) if token in eos), None)
        assert result.ids == (ids if first is None else ids[: first + 1])
        assert result.reason == ("length" if first is None else "eos")
    assert {r.reason for r in got} == {"eos", "length"}


def test_streamed_tokens_are_the_answers_and_the_callback_can_stop_a_row():
    decoder = _decoder(BASE)
    free = generate(decoder, PROMPTS, max_new_tokens=12)
    streamed: list[list[int]] = [[] for _ in PROMPTS]

    def on_token(row: int, token: int) -> bool:
        streamed[row].append(token)
        return row == 2 and len(streamed[2]) == 4

    got = generate(decoder, PROMPTS, max_new_tokens=12, on_token=on_token, batch=3)
    assert got == streamed
    assert got[2] == free[2][:4] and [got[i] for i in (0, 1, 3, 4)] == [free[i] for i in (0, 1, 3, 4)]


def test_requests_may_ask_for_different_lengths_and_for_none():
    decoder = _decoder(BASE)
    free = generate(decoder, PROMPTS, max_new_tokens=12)
    wanted = [3, 0, 12, 1, 7]
    got = run_requests(Runner(decoder), [Request(p, max_new_tokens=n) for p, n in zip(PROMPTS, wanted)])
    assert [r.ids for r in got] == [ids[:n] for ids, n in zip(free, wanted)]


def test_a_prompt_can_be_put_in_piece_by_piece():
    decoder = _decoder(BASE)
    runner = Runner(decoder)
    prompt = PROMPTS[2]
    cache = runner.new_cache(1, 64)
    runner.prefill(cache, [prompt[:5]])
    logits = runner.prefill(cache, [prompt[5:]])
    result = continue_from(runner, cache, logits, [Request(prompt, max_new_tokens=20)])[0]
    assert result.ids == generate(decoder, [prompt], max_new_tokens=20)[0]
    assert cache.used == len(prompt) + 19


def test_a_conversation_can_go_back_and_continue_differently():
    decoder = _decoder(BASE)
    runner = Runner(decoder)
    first, second = PROMPTS[2], PROMPTS[2][:6] + [1, 2, 3]
    cache = runner.new_cache(1, 32)
    runner.prefill(cache, [first])
    cache.truncate(6)
    cache = cache.grown(64)
    logits = runner.prefill(cache, [second[6:]])
    result = continue_from(runner, cache, logits, [Request(second, max_new_tokens=20)])[0]
    assert result.ids == generate(decoder, [second], max_new_tokens=20)[0]


def test_generation_leaves_the_training_mode_as_it_was():
    decoder = _decoder(BASE).train()
    generate(decoder, PROMPTS[:1], max_new_tokens=2)
    assert decoder.training


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [([], 5, "empty"), ([1] * 250, 7, "250 tokens and 7 new ones"), ([199], 5, "199"), ([1], -1, "-1")],
)
def test_impossible_requests_are_refused_before_anything_runs(prompt, new, message):
    seen = []
    with pytest.raises(UserError, match=message) as error:
        generate(_decoder(BASE), [[1, 2], prompt], max_new_tokens=new, on_token=lambda *a: seen.append(a))
    assert not seen
    assert "prompt 1" in str(error.value) or new < 0


def test_the_longest_possible_request_runs():
    assert len(generate(_decoder(BASE), [[1] * 250], max_new_tokens=6)[0]) == 6


def test_weights_that_give_no_number_are_reported():
    decoder = _decoder(BASE)
    with torch.no_grad():
        decoder.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        generate(decoder, [[1]], max_new_tokens=1)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [BASE, QWEN], ids=["qwen2", "qwen"])
def test_compiled_steps_give_the_same_tokens(spec):
    decoder = _decoder(replace(spec, layers=1))
    wanted = [3, 9, 12, 1, 7]  # rows end one by one while the compiled batch keeps its shape
    requests = [Request(p, max_new_tokens=n) for p, n in zip(PROMPTS, wanted)]
    plain, compiled = run_requests(Runner(decoder), requests), run_requests(Runner(decoder, compiled=True), requests)
    assert compiled == plain
