"""The server over the real engine with a tiny model, and the examples of its page."""

from __future__ import annotations

import json
import math
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import openai
import pytest
import torch

from research.core.config.schema import EngineConfig
from research.core.engine.engine import PagedEngine
from research.core.text.builtin import builtin_tokenizer
from tests.core.engine.small_engine import SPEC, random_decoder
from tests.core.serve.plain_http import open_socket, post, request_bytes, until

MODEL = "qwen2_5_tiny"


def make_engine() -> PagedEngine:
    tokenizer = builtin_tokenizer()
    decoder = random_decoder(replace(SPEC, vocab=tokenizer.vocab_size))
    return PagedEngine(
        decoder, tokenizer, EngineConfig(num_blocks=600, attention="sdpa", native_step=False), tokenizer.eos_ids()
    )


@pytest.fixture(scope="module")
def server(start):
    engine = make_engine()
    with start(engine) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def user(text):
    return [{"role": "user", "content": text}]


@pytest.mark.slow
def test_many_clients_at_once_get_what_each_would_get_alone(client):
    def ask(number):
        text = ["Hello", "Sort: 3 1 2", "你好"][number % 3] * (1 + number % 4)
        fields = {"max_tokens": 12, "temperature": 0.8 if number % 2 else 0, "seed": number}
        if number % 5 == 0:
            pieces = client.chat.completions.create(model=MODEL, messages=user(text), stream=True, **fields)
            return "".join(piece.choices[0].delta.content or "" for piece in pieces)
        return client.chat.completions.create(model=MODEL, messages=user(text), **fields).choices[0].message.content

    alone = [ask(number) for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))
    assert together == alone and len(set(alone)) > 8


def test_constrained_answers_embeddings_and_logprobs_of_the_engine(client):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "w": {"enum": ["x", "y"]}},
        "required": ["n", "w"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    answer = client.chat.completions.create(model=MODEL, messages=user("?"), response_format=form, max_tokens=200)
    value = json.loads(answer.choices[0].message.content)
    assert 0 <= value["n"] <= 9 and value["w"] in ("x", "y") and answer.choices[0].finish_reason == "stop"
    tool = {"type": "function", "function": {"name": "pick", "parameters": schema}}
    call = client.chat.completions.create(
        model=MODEL, messages=user("?"), tools=[tool], tool_choice="required", max_tokens=300
    ).choices[0]
    assert call.finish_reason == "tool_calls" and set(json.loads(call.message.tool_calls[0].function.arguments)) == {
        "n",
        "w",
    }
    for field, pattern in (
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
    ):
        text = client.completions.create(model=MODEL, prompt="x", max_tokens=50, extra_body=field).choices[0].text
        assert re.fullmatch(pattern, text)
    with pytest.raises(openai.BadRequestError, match="regex"):
        client.completions.create(model=MODEL, prompt="x", extra_body={"guided_regex": "(("})

    vectors = [one.embedding for one in client.embeddings.create(model=MODEL, input=["one text", "another"]).data]
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert 0 < np.dot(*vectors) < 0.9999 or np.dot(*vectors) < 0
    content = (
        client.chat.completions.create(
            model=MODEL, messages=user("?"), max_tokens=3, logprobs=True, top_logprobs=3, temperature=0
        )
        .choices[0]
        .logprobs.content
    )
    for one in content:
        assert one.logprob == pytest.approx(one.top_logprobs[0].logprob, abs=1e-5) and one.logprob < 0
        assert sum(math.exp(top.logprob) for top in one.top_logprobs) <= 1


def test_prompts_are_scored_over_every_interface(server, client):
    text, engine = "The cat sat on the 猫.", server.service.served.engine
    ids = engine.tokenizer.encode(text)
    with torch.inference_mode():
        rows = engine.runner.decoder(torch.tensor([ids]))[0].log_softmax(-1)
    expected = [None, *(pytest.approx(float(row[token]), abs=1e-4) for row, token in zip(rows, ids[1:]))]
    fields = {"model": MODEL, "echo": True, "logprobs": 2, "temperature": 0}
    for prompts in ([text, text], [ids]):  # the second time from the start, too
        scored = client.completions.create(prompt=prompts, max_tokens=0, **fields)
        assert scored.usage.completion_tokens == 0 and {one.text for one in scored.choices} == {text}
        for one in scored.choices:
            assert one.logprobs.token_logprobs == expected and one.finish_reason == "length"
            assert one.logprobs.text_offset[:2] == [0, len(one.logprobs.tokens[0])]
            assert one.logprobs.top_logprobs[0] is None and len(one.logprobs.top_logprobs[1]) == 2
    # As a program that scores asks: one token more, by which the best is known.
    whole = client.completions.create(prompt=text, max_tokens=3, **fields).choices[0]
    assert whole.logprobs.token_logprobs[: len(ids)] == expected and len(whole.logprobs.tokens) == len(ids) + 3
    pieces = [piece.choices[0] for piece in client.completions.create(prompt=text, max_tokens=3, stream=True, **fields)]
    assert "".join(piece.text for piece in pieces) == whole.text
    streamed = [value for piece in pieces if piece.logprobs for value in piece.logprobs.token_logprobs]
    assert streamed[0] is None and streamed[1:] == pytest.approx(whole.logprobs.token_logprobs[1:], abs=1e-4)

    asked = {"inputs": text, "parameters": {"details": True, "decoder_input_details": True, "max_new_tokens": 2}}
    prefill = post(server, "/generate", asked)[2]["details"]["prefill"]
    assert [one["id"] for one in prefill] == ids and [one["logprob"] for one in prefill] == expected


def test_a_shared_prefix_is_computed_once_and_leaving_clients_give_their_blocks_back(server, client):
    text = "word " * 200
    first = client.chat.completions.create(model=MODEL, messages=user(text + "a"), max_tokens=2).usage
    again = client.chat.completions.create(model=MODEL, messages=user(text + "b"), max_tokens=2).usage
    assert first.prompt_tokens_details.cached_tokens < 64 < 150 < again.prompt_tokens_details.cached_tokens

    body = {"messages": user(text), "stream": True, "ignore_eos": True, "max_tokens": 1500, "n": 2}
    connections = [open_socket(server, request_bytes(body)) for _ in range(4)]
    until(lambda: server.service.driver.stats.running > 0)
    for connection in connections:
        connection.close()
    until(lambda: server.service.open == 0 and server.service.driver.stats.running == 0)
    stats = server.service.driver.stats
    assert stats.free_blocks == stats.blocks and stats.waiting == 0


def test_what_can_never_run_is_400_and_the_server_lives(client):
    for fields in ({"max_tokens": 5000}, {"n": 200, "max_tokens": 2}):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model=MODEL, messages=user("x"), **fields)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=user("word " * 3000))
    assert caught.value.code == "context_length_exceeded"
    assert client.completions.create(model=MODEL, prompt="x", max_tokens=1).choices[0].finish_reason == "length"


@pytest.mark.slow
def test_the_pages_examples_run(start, repo, tmp_path, monkeypatch):
    """curl and python blocks of docs/serving.md, at this server's address."""
    page = (repo / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", page, flags=re.M | re.S)
    curls = [text for kind, text in blocks if kind == "sh" and "curl" in text]
    programs = [text for kind, text in blocks if kind == "python"]
    assert len(curls) >= 3 and programs
    with start(make_engine(), name="qwen2_5_7b") as server:
        for text in curls:
            text = text.replace("http://127.0.0.1:8000", server.url)
            done = subprocess.run(["bash", "-ec", text], capture_output=True, text=True, timeout=60, cwd=tmp_path)
            assert done.returncode == 0 and '"error"' not in done.stdout, f"{text}\n{done.stdout}{done.stderr}"
        for text in programs:
            exec(text.replace("http://127.0.0.1:8000", server.url), {})
