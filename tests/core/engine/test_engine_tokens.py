"""The engine's greedy tokens and logits against transformers and the plain decoder, however the work is cut."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
import torch

from research.core.config.schema import EngineConfig
from research.core.engine.api import EmbedRequest, EngineRequest
from research.core.engine.batch import StepPlan
from research.core.engine.runner import ModelRunner
from research.core.spec import MoeSpec, RopeScaling, spec_to_hf
from research.core.torch.decoder import Decoder
from research.core.torch.generate import generate
from tests.core.engine.small_engine import SPEC, VOCAB, engine, nothing_leaked, random_decoder, run

SPECS = {
    "gqa": SPEC,
    "mha-tied-window": replace(SPEC, kv_heads=4, tied=True, sliding_window=9, sliding_layers=(1,)),
    "yarn": replace(SPEC, max_positions=64, rope_scaling=RopeScaling("yarn", 4.0, original_positions=64)),
    "moe": replace(SPEC, model_type="qwen2_moe", moe=MoeSpec(6, 2, 32, 48)),
    # Prompts below, above and far above the training length: three rotary factors in one batch.
    "qwen": replace(SPEC, model_type="qwen", kv_heads=4, logn_attention=True, dynamic_ntk=True, train_length=24),
}
HOW = {
    "as it comes": {},
    "reference, no prefixes": {"attention": "reference", "prefix_cache": False},
    "sdpa in small chunks": {"attention": "sdpa", "max_tokens_per_step": 7, "max_batch": 5, "block_size": 4},
    "layers, too few blocks": {"native_step": False, "num_blocks": 34, "block_size": 4, "max_tokens_per_step": 48},
    "one call, too few blocks": {"num_blocks": 17, "block_size": 8, "max_batch": 9, "max_tokens_per_step": 20},
}


@cache
def _decoder(name: str) -> Decoder:
    return random_decoder(SPECS[name])


def _requests(count: int) -> list[EngineRequest]:
    """Mixed lengths; every third opens with the same 30 tokens, and some stand there twice."""
    rng = random.Random(7)
    opening = tuple(rng.randrange(VOCAB) for _ in range(30))
    requests = []
    for number in range(count):
        prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 5, 15, 16, 17, 33, 70])))
        if number % 3 == 0:
            prompt = opening + prompt
        requests.append(EngineRequest(prompt, max_new_tokens=rng.choice([1, 4, 9, 16, 24])))
    return requests[:-4] + requests[:4]


@cache
def _expected(name: str, count: int) -> list[list[int]]:
    """The plain decoder's answers, batched by length of the answer."""
    requests = _requests(count)
    answers: list[list[int]] = [[] for _ in requests]
    for new in {r.max_new_tokens for r in requests}:
        chosen = [i for i, r in enumerate(requests) if r.max_new_tokens == new]
        for i, ids in zip(chosen, generate(_decoder(name), [requests[i].prompt for i in chosen], None, new, batch=16)):
            answers[i] = ids
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", SPECS)
def test_mixed_requests_get_the_plain_decoders_tokens(name, how):
    count = 64 if name == "gqa" else 20
    running = engine(_decoder(name), **HOW[how])
    answers = run(running, _requests(count))
    assert [answer.tokens for answer in answers] == _expected(name, count)
    assert {answer.last.finish for answer in answers} == {"length"}
    assert nothing_leaked(running)
    stats = running.stats()
    assert (stats.total_preemptions > 0) == ("too few" in how)
    assert (stats.total_cached_tokens > 0) == ("no prefixes" not in how)
    assert stats.total_new_tokens == sum(answer.last is not None and len(answer.tokens) for answer in answers)


def _twin(name: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**spec_to_hf(SPECS[name]))
    twin = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    state = twin.load_state_dict(_decoder(name).state_dict(), strict=False)
    assert not state.missing_keys and not state.unexpected_keys
    return twin


@pytest.mark.parametrize("name", [name for name in SPECS if name != "qwen"])
@torch.inference_mode()
def test_answers_and_logits_are_those_of_transformers(name):
    """Each answer's tokens are transformers' best ones behind what stands before them, so greedy search finds them."""
    twin, requests = _twin(name), _requests(64 if name == "gqa" else 12)
    answers = run(engine(_decoder(name), max_tokens_per_step=40), requests)
    for request, answer in zip(requests, answers):
        text = [*request.prompt, *answer.tokens]
        best = twin(torch.tensor([text[:-1]])).logits[0, len(request.prompt) - 1 :].argmax(-1)
        assert answer.tokens == best.tolist()

    text = list(requests[0].prompt) * 2
    theirs = twin(torch.tensor([text])).logits[0]
    for settings in HOW.values():
        runner = ModelRunner(_decoder(name), EngineConfig(**settings), 40)
        table, got = list(range(3, 3 + -(-len(text) // runner.block_size))), []
        for begin in range(0, len(text), 13):
            part = text[begin : begin + 13]
            plan = StepPlan(part, [len(part)], [begin + len(part)], [table], [0])
            got.append(runner.execute(plan).logits[0].clone())
        places = [*range(12, len(text) - 1, 13), len(text) - 1]
        # float32, values up to 10: the asked-for bound; what is seen is 1e-5.
        torch.testing.assert_close(torch.stack(got), theirs[places], rtol=0, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("native", [True, False])
def test_embeddings_are_the_plain_decoders(causal, native):
    decoder = Decoder(replace(SPEC, causal=causal), head=causal)
    decoder.load_state_dict(random_decoder(decoder.spec).state_dict(), strict=False)
    requests = [EmbedRequest(r.prompt, normalize=n % 2 == 0) for n, r in enumerate(_requests(12))]
    running = engine(decoder.eval(), max_tokens_per_step=50, native_step=native)
    if causal:  # in one batch with answers
        requests.append(EngineRequest((5, 6), max_new_tokens=6))
    answers = run(running, requests)
    for request, answer in zip(requests, answers[:12]):
        ours = torch.tensor(answer.last.embedding)
        expected = decoder.embed(torch.tensor([request.prompt]), normalize=request.normalize)[0]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)  # float32, values up to 5
        assert answer.last.finish == "stop" and not answer.tokens
    if causal:
        assert answers[-1].tokens == generate(decoder, [[5, 6]], None, 6)[0]
    assert nothing_leaked(running)
