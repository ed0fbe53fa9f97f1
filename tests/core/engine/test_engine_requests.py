"""What a request can ask for, what it is told, and what is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from research.core.config.schema import EngineConfig
from research.core.engine.api import Constraint, EmbedRequest, EngineRequest
from research.core.engine.memory import count_blocks
from research.core.errors import ConfigError, UserError
from research.core.generation.sampling import Sampling
from research.core.torch.decoder import Decoder
from research.core.torch.generate import generate
from tests.core.engine.small_engine import SPEC, VOCAB, drain, engine, nothing_leaked, random_decoder, run, tokenizer
from tests.core.torch.test_sampler import _oracle


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder()


def _prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


# --- prefixes and blocks ------------------------------------------------------------------------------------------


def test_a_second_request_computes_only_what_follows_the_shared_prefix(decoder):
    shared = _prompt(1000)
    first, second = EngineRequest(shared + (1, 2, 3), max_new_tokens=4), EngineRequest(shared + (9,) * 20)
    second = replace(second, max_new_tokens=4)
    running = engine(decoder)
    plans = []
    execute = running.runner.execute
    running.runner.execute = lambda plan: plans.append(len(plan.tokens)) or execute(plan)
    one = run(running, [first])[0]
    computed = sum(plans)
    two = run(running, [second])[0]
    assert one.last.cached_tokens == 0 and computed == 1003 + 3
    # 62 whole blocks of 16 tokens; the rest and the answer without its last token are computed.
    assert two.last.cached_tokens == 992 and two.last.prompt_tokens == 1020
    assert sum(plans) - computed == 1020 - 992 + 3
    assert two.tokens == run(engine(decoder, prefix_cache=False), [second])[0].tokens
    # The same prompt again: all but its last token, in whole blocks.
    assert run(running, [first])[0].last.cached_tokens == 992
    assert (running.stats().total_prompt_tokens, running.stats().total_cached_tokens) == (3026, 2 * 992)


def test_a_hash_collision_shows_nobody_anothers_text(decoder):
    prompts = [_prompt(40, seed) for seed in range(4)] + [_prompt(16) + _prompt(30, 9)]
    wanted = generate(decoder, prompts, None, 6)
    running = engine(decoder)
    running.pool._hasher = lambda before, tokens: 7
    for prompt, expected in zip(prompts + prompts, wanted + wanted):
        answer = run(running, [EngineRequest(prompt, max_new_tokens=6)])[0]
        assert answer.tokens == expected
        assert answer.last.cached_tokens == (
            16 if prompt[:16] == prompts[0][:16] and running.stats().total_steps > 6 else 0
        )
    assert nothing_leaked(running)


def test_prefixes_are_thrown_away_when_blocks_are_needed_the_longest_unused_first(decoder):
    running = engine(decoder, num_blocks=12)
    old, kept, new = (EngineRequest(_prompt(60, seed), max_new_tokens=2) for seed in range(3))
    expected = [run(engine(decoder), [request])[0].tokens for request in (old, kept, new)]
    answers = run(running, [old]) + run(running, [kept]) + run(running, [kept]) + run(running, [new])
    assert [answer.tokens for answer in answers] == [expected[0], expected[1], expected[1], expected[2]]
    # 3 full blocks each (the fourth is never full); 12 blocks hold two texts and the third's four blocks.
    assert [answer.last.cached_tokens for answer in answers] == [0, 0, 48, 0]
    again = run(running, [kept])[0]
    assert again.last.cached_tokens == 48 and again.tokens == expected[1]
    assert run(running, [EngineRequest(_prompt(180, 5), max_new_tokens=2)])[0].last.finish == "length"
    assert run(running, [old])[0].last.cached_tokens == 0


def test_answers_to_one_prompt_share_its_blocks_and_copy_what_they_write(decoder):
    prompt = _prompt(40)  # two whole blocks and a half
    running = engine(decoder, prefix_cache=False)
    sampling = Sampling(temperature=1.0, seed=5)
    running.submit(EngineRequest(prompt, sampling, max_new_tokens=6, n=4))
    first = running.step()
    assert len(first) == 4 and running.pool.blocks - running.pool.free == 3
    running.step()
    assert running.pool.blocks - running.pool.free == 2 + 4
    answers = drain(running)
    for choice in range(4):
        alone = run(engine(decoder), [EngineRequest(prompt, replace(sampling, seed=5 + choice), max_new_tokens=6)])[0]
        assert [u.tokens[0] for u in first if u.choice == choice] == alone.tokens[:1]
        assert answers[0, choice].tokens == alone.tokens[2:]
    assert nothing_leaked(running)


def test_logit_bias_is_added_before_everything_else(decoder):
    prompt, new = _prompt(20), 8
    free = run(engine(decoder), [EngineRequest(prompt, max_new_tokens=new)])[0].tokens
    bias_V = torch.zeros(VOCAB)
    bias_V[list(set(free))] = -3.0  # less than would forbid them
    bias = tuple((token, -3.0) for token in set(free))
    got = run(engine(decoder), [EngineRequest(prompt, max_new_tokens=new, logit_bias=bias)])[0].tokens
    logits = decoder(torch.tensor([[*prompt, *got[:-1]]]))[0, len(prompt) - 1 :]
    assert got == (logits + bias_V).argmax(-1).tolist() != free
    penalized = EngineRequest(prompt, Sampling(repetition_penalty=2.0), 1, logit_bias=bias)
    exact = _oracle(logits[0] + bias_V, list(prompt), Sampling(temperature=1.0, repetition_penalty=2.0))
    assert run(engine(decoder), [penalized])[0].tokens == [int(exact.argmax())]
    with pytest.raises(UserError, match=f"token id {VOCAB} does not exist"):
        engine(decoder).submit(EngineRequest(prompt, logit_bias=((VOCAB, 1.0),)))


def test_cancelled_requests_say_so_once_and_give_their_blocks_back(decoder):
    running = engine(decoder, max_batch=3, max_tokens_per_step=30)
    numbers = [running.submit(EngineRequest(_prompt(40, n), max_new_tokens=20, n=1 + n % 2)) for n in range(4)]
    got = running.step() + running.step() + running.step()
    for number in [*numbers, 99, numbers[0]]:
        running.cancel(number)
    assert nothing_leaked(running) and running.has_work()
    last = running.step()
    assert [(u.request, u.choice, u.finish) for u in last] == [
        (n, c, "cancelled") for n in numbers for c in range(1 + n % 2)
    ]
    assert not running.has_work() and not any(update.finish for update in got)


def test_smaller_priorities_run_first_and_take_others_places(decoder):
    running = engine(decoder, max_batch=2)
    for number in range(3):
        running.submit(EngineRequest(_prompt(20, number), max_new_tokens=8, priority=5))
    running.step()
    urgent = running.submit(EngineRequest(_prompt(20, 9), max_new_tokens=2, priority=1))
    assert {update.request for update in running.step()} == {0, urgent}
    answers = drain(running)
    order = list(answers)
    assert order.index((urgent, 0)) < order.index((2, 0)) and len(answers[1, 0].tokens) == 7
    assert running.stats().total_preemptions == 1 and nothing_leaked(running)


def test_a_long_prompt_leaves_half_of_each_step_to_others(decoder):
    running = engine(decoder, max_tokens_per_step=32)
    running.submit(EngineRequest(_prompt(600), max_new_tokens=1))
    short = running.submit(EngineRequest(_prompt(30, 1), max_new_tokens=1))
    assert not running.step()
    assert [(u.request, u.finish) for u in running.step()] == [(short, "length")]


# --- choosing tokens ----------------------------------------------------------------------------------------------

SAMPLINGS = [
    Sampling(temperature=0.8),
    Sampling(temperature=1.2, top_k=9),
    Sampling(temperature=1.0, top_p=0.8),
    Sampling(temperature=1.5, min_p=0.1),
    Sampling(temperature=1.0, top_k=30, top_p=0.95, min_p=0.02, repetition_penalty=1.3),
]


@pytest.mark.slow
def test_tokens_are_drawn_from_the_exact_distribution_and_seeds_repeat_them(decoder):
    prompt, draws, each = _prompt(12), 1200, 100
    with torch.inference_mode():
        logits = decoder(torch.tensor([prompt]))[0, -1]
    running = engine(decoder, max_batch=each)
    for sampling in SAMPLINGS:
        requests = [
            EngineRequest(prompt, replace(sampling, seed=seed), max_new_tokens=1, n=each)
            for seed in range(0, draws, each)
        ]
        for request in requests:
            running.submit(request)
        tokens = [answer.tokens[0] for answer in drain(running).values()]
        exact = _oracle(logits.double(), prompt, sampling).numpy()  # what transformers' processors leave
        counts = np.bincount(tokens, minlength=VOCAB)
        assert len(tokens) == draws and not counts[exact == 0].any()
        # Chi-square over the tokens that are expected five times or more, the others as one.
        often = exact * draws >= 5
        seen = np.append(counts[often], counts[~often].sum())
        hoped = np.append(exact[often], exact[~often].sum()) * draws
        seen, hoped = seen[hoped > 0], hoped[hoped > 0]
        chi2, freedom = ((seen - hoped) ** 2 / hoped).sum(), len(hoped) - 1
        # Wilson and Hilferty: normal up to 3.7 standard deviations, one in ten thousand.
        z = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
        assert abs(z) < 3.7, (sampling, chi2, freedom)
        again = run(running, [replace(requests[0], n=1)])[0].tokens
        assert again == tokens[:1]


def test_presence_and_frequency_penalties_take_from_what_the_answer_has(decoder):
    prompt, sampling = _prompt(6), Sampling(presence_penalty=0.7, frequency_penalty=1.1)
    text, counts = list(prompt), torch.zeros(VOCAB)
    with torch.inference_mode():
        for _ in range(12):  # OpenAI's definition, written out
            logits = decoder(torch.tensor([text]))[0, -1]
            text.append(int((logits - counts * 1.1 - (counts > 0) * 0.7).argmax()))
            counts[text[-1]] += 1
    assert run(engine(decoder), [EngineRequest(prompt, sampling, max_new_tokens=12)])[0].tokens == text[6:]
    assert text[6:] != generate(decoder, [prompt], None, 12)[0]


def test_logprobs_are_those_of_the_plain_logits(decoder):
    prompt = _prompt(10)
    sampling = Sampling(temperature=2.0, top_k=40, repetition_penalty=1.5, seed=1)
    answer = run(engine(decoder), [EngineRequest(prompt, sampling, max_new_tokens=5, logprobs=3)])[0]
    with torch.inference_mode():
        rows = decoder(torch.tensor([[*prompt, *answer.tokens]]))[0].log_softmax(-1)[9:-1]
    assert [entry.token for entry in answer.logprobs] == answer.tokens
    for entry, row in zip(answer.logprobs, rows):
        values, ids = row.topk(3)
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)  # float32, values up to 10
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
    silent = run(engine(decoder), [EngineRequest(prompt, max_new_tokens=2, logprobs=0)])[0]
    assert [entry.top for entry in silent.logprobs] == [(), ()]


@pytest.mark.parametrize("native", [True, False])
def test_logprobs_of_a_prompt_are_those_of_the_plain_logits(decoder, native):
    """In chunks beside other rows, given up half-way for an older answer, of a text whose prefix is known, and of one token."""
    running = engine(decoder, native_step=native, max_tokens_per_step=12, num_blocks=8)
    cases = [  # prompt, new tokens, best tokens at each place
        (_prompt(14, 5), 30, None),
        (_prompt(100), 0, 3),
        (_prompt(70, 1), 4, None),
        (_prompt(100), 3, 0),
        (_prompt(1), 2, 2),
    ]
    answers = run(running, [EngineRequest(p, max_new_tokens=n, prompt_logprobs=c) for p, n, c in cases])
    assert running.stats().total_preemptions > 0 and nothing_leaked(running)
    for (prompt, new, count), answer in zip(cases, answers):
        assert len(answer.tokens) == new and answer.last.cached_tokens == 0
        if count is None:
            assert answer.prompt == []
            continue
        assert [entry.token for entry in answer.prompt] == list(prompt[1:])
        with torch.inference_mode():
            rows = decoder(torch.tensor([prompt]))[0].log_softmax(-1)
        for entry, row in zip(answer.prompt, rows):
            values, ids = row.topk(count)
            assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
            assert [token for token, _ in entry.top] == ids.tolist()
            assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def _fits_schema(text: str) -> bool:
    found = json.loads(text)
    right = set(found) == {"name", "age", "kind"} and len(found["name"]) <= 5 and found["kind"] in ("a", "b")
    return right and isinstance(found["age"], int) and 0 <= found["age"] <= 120


CONSTRAINTS = [
    (Constraint("json_schema", SCHEMA), _fits_schema),
    (
        Constraint("regex", r"[a-z]{3,6}@[a-z]{2,4}\.(com|org)"),
        re.compile(r"[a-z]{3,6}@[a-z]{2,4}\.(com|org)").fullmatch,
    ),
    (Constraint("choice", ["yes", "no", 'may "be"\nä']), ["yes", "no", 'may "be"\nä'].__contains__),
    (Constraint("json_object"), lambda text: isinstance(json.loads(text), dict)),
]


def test_constrained_answers_match_whatever_stands_beside_them(decoder):
    ends = (tokenizer().im_end_id,)
    running = engine(decoder, ends)
    requests = [
        EngineRequest(_prompt(5, seed), Sampling(temperature=t, seed=seed), 150, n=2, constraint=constraint)
        for constraint, _ in CONSTRAINTS
        for seed, t in enumerate((0.0, 1.0, 3.0))
    ]
    free = EngineRequest(_prompt(9), max_new_tokens=20, ignore_eos=True)
    numbers = [running.submit(request) for request in [free, *requests]]
    answers, ended = drain(running), Counter()
    assert answers[numbers[0], 0].tokens == generate(decoder, [free.prompt], None, 20)[0]
    for number, (_, fits) in zip(numbers[1:], [pair for pair in CONSTRAINTS for _ in range(3)]):
        for choice in range(2):
            answer = answers[number, choice]
            if answer.last.finish != "length":
                assert fits(answer.text), answer.text
                ended[number] += 1
    assert len(ended) >= 10  # an object of a random model may go on for ever; the others end
    assert nothing_leaked(running)


# --- ends ---------------------------------------------------------------------------------------------------------


def test_answers_end_at_stop_texts_end_tokens_and_lengths(decoder):
    prompt = _prompt(8, 3)
    free = run(engine(decoder), [EngineRequest(prompt, Sampling(temperature=1.0), max_new_tokens=40)])[0]
    text = tokenizer().decode(free.tokens, skip_special=True)
    assert free.text == text and free.last.finish == "length"
    middle = next(
        at for at in range(8, len(text) - 3) if text.count(text[at : at + 2]) == 1 and text[at : at + 2].isascii()
    )
    stop = text[middle : middle + 2]
    request = EngineRequest(prompt, Sampling(temperature=1.0), max_new_tokens=40, stop=("nowhere in it", stop))
    stopped, ended, by_id, ignoring = run(
        engine(decoder, eos_ids=(free.tokens[7],)),
        [
            replace(request, ignore_eos=True),
            replace(request, stop=()),
            replace(request, stop=(), ignore_eos=True, stop_ids=(free.tokens[7],)),
            replace(request, stop=(), ignore_eos=True),
        ],
    )
    assert (stopped.text, stopped.last.finish) == (text[:middle], "stop")
    first = free.tokens.index(free.tokens[7]) + 1
    assert (ended.tokens, ended.last.finish) == (free.tokens[:first], "eos")
    assert ended.text == tokenizer().decode(free.tokens[: first - 1], skip_special=True)
    assert by_id.tokens == ended.tokens and by_id.text == ended.text
    assert (ignoring.tokens, ignoring.last.finish) == (free.tokens, "length")


def test_weights_that_give_no_number_end_the_request_not_the_engine():
    broken = random_decoder()
    running = engine(broken)
    norm = broken.model.norm.weight
    with torch.inference_mode(False), torch.no_grad():
        kept = norm.clone()
        norm.fill_(float("nan"))
        for settings in ({}, {"logprobs": 1}):
            answer = run(running, [EngineRequest((1, 2, 3), **settings)])[0]
            assert answer.last.finish == "error" and "not finite" in answer.last.error
        norm.copy_(kept)
    running.pool.forget()
    assert len(run(running, [EngineRequest((1, 2, 3), max_new_tokens=3)])[0].tokens) == 3
    assert nothing_leaked(running)


def test_a_step_that_fails_can_be_done_again(decoder):
    running = engine(decoder)
    requests = [EngineRequest(_prompt(30, n), max_new_tokens=6) for n in range(3)]
    numbers = [running.submit(request) for request in requests]
    running.step()
    execute = running.runner.execute
    running.runner.execute = lambda plan: 1 / 0
    with pytest.raises(ZeroDivisionError):
        running.step()
    running.runner.execute = execute
    assert running.stats().cached_blocks == 0
    answers = drain(running)
    assert [answers[number, 0].tokens for number in numbers] == [
        ids[1:] for ids in generate(decoder, [r.prompt for r in requests], None, 6)
    ]


WRONG = [
    (EngineRequest(()), "is empty"),
    (EngineRequest((1, VOCAB), max_new_tokens=1), f"token id {VOCAB}"),
    (EngineRequest((1,) * 70, max_new_tokens=60), "70 tokens and 60 new ones are more than the model's 128"),
    (EmbedRequest((1,) * 129), "129 tokens"),
    (EngineRequest((1,), max_new_tokens=1, n=0), "n=0"),
    (EngineRequest((1,), max_new_tokens=1, n=129), "engine.max_batch"),
    (EngineRequest((1,), max_new_tokens=1, logprobs=-1), "logprobs=-1"),
    (EngineRequest((1,), max_new_tokens=1, prompt_logprobs=-1), "prompt_logprobs=-1"),
    (EngineRequest((1,), max_new_tokens=1, adapter="french"), "french"),
    (EngineRequest((1,), max_new_tokens=1, constraint=Constraint("regex", "(((")), "unclosed group"),
    (EngineRequest((1,), max_new_tokens=1, constraint=Constraint("json_schema", {"type": "obj"})), "obj"),
    (EngineRequest((1,), max_new_tokens=1, constraint=Constraint("json_schema", [1])), "not list"),
    (EngineRequest((1,), max_new_tokens=1, constraint=Constraint("choice", [])), "not empty"),
    (EngineRequest((1,), max_new_tokens=1, constraint=Constraint("poem")), "poem"),
]


def test_what_can_never_run_is_refused_and_the_engine_goes_on(decoder):
    running = engine(decoder, num_blocks=8)
    for request, message in WRONG:
        with pytest.raises(UserError, match=message):
            running.submit(request)
    assert not running.has_work()
    assert len(run(running, [EngineRequest((1,) * 70, max_new_tokens=58)])[0].tokens) == 58  # the longest there is
    without_head = Decoder(SPEC, head=False).eval()
    with pytest.raises(UserError, match="embedding model"):
        engine(without_head).submit(EngineRequest((1,), max_new_tokens=1))


def test_heads_that_the_kernels_do_not_know_and_caches_that_do_not_fit(decoder):
    odd = random_decoder(replace(SPEC, head_dim=12))
    assert (
        run(engine(odd), [EngineRequest((1, 2, 3), max_new_tokens=5)])[0].tokens
        == generate(odd, [[1, 2, 3]], None, 5)[0]
    )
    with pytest.raises(ConfigError, match="heads of 12"):
        engine(odd, attention="native")
    with pytest.raises(ConfigError, match=r"engine\.num_blocks"):
        engine(decoder, num_blocks=1 << 60)


@pytest.mark.parametrize("name", ["block_size", "num_blocks", "max_batch", "max_tokens_per_step", "max_length"])
def test_impossible_settings_are_refused_by_name(decoder, name):
    with pytest.raises(ConfigError, match=f"engine.{name}"):
        engine(decoder, **{name: 0})
    with pytest.raises(ConfigError, match=r"engine\.attention"):
        engine(decoder, attention="npu")


def test_the_cache_takes_the_asked_part_of_the_free_memory_and_says_so(monkeypatch):
    monkeypatch.setattr("research.core.engine.memory.free_memory", lambda device: 10**9)
    cpu, said = torch.device("cpu"), []
    spec = replace(SPEC, layers=4, kv_heads=2, head_dim=64, max_positions=100_000)
    # keys and values, 4 layers, 2 heads of 64, 2 bytes, 16 tokens: 32,768 bytes a block
    settings = EngineConfig(memory_fraction=0.25)
    assert count_blocks(settings, spec, torch.bfloat16, cpu, say=said.append) == 250_000_000 // 32768
    assert "7629 blocks of 16 tokens" in said[0] and "0.25 GB" in said[0] and "25% of the 1.0 GB" in said[0]
    few = EngineConfig(memory_fraction=0.25, max_batch=2, max_length=100)
    assert count_blocks(few, spec, torch.bfloat16, cpu, say=said.append) == 2 * 7
    assert "engine.max_batch=2" in said[1]
    with pytest.raises(ConfigError, match=r"engine\.memory_fraction"):
        count_blocks(EngineConfig(memory_fraction=1e-6), spec, torch.bfloat16, cpu, say=said.append)
