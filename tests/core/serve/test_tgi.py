"""text-generation-inference's interface: what its clients send and expect, whole and streamed."""

from __future__ import annotations

import json
import urllib.request

import pytest

from tests.core.serve.fake_engine import FakeEngine
from tests.core.serve.plain_http import get, post

TEXT = "Grüße, 世界 🙂 STOP and more"


@pytest.fixture(scope="module")
def server(start):
    engine = FakeEngine(lambda request, choice: TEXT, adapters=("french",))
    with start(engine, info=(("model_dtype", "float32"), ("model_device_type", "cpu"))) as server:
        server.engine = engine
        yield server


def stream(server, body):
    request = urllib.request.Request(
        f"{server.url}/generate_stream", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        return [json.loads(line[5:]) for line in answer.read().decode().splitlines() if line.startswith("data:")]


def test_whole_and_streamed_answers_agree_token_by_token(server):
    body = {"inputs": "Hello", "parameters": {"details": True, "top_n_tokens": 2, "max_new_tokens": 60}}
    _, _, whole = post(server, "/generate", body)
    events = stream(server, body)
    details = whole["details"]
    assert whole["generated_text"] == TEXT and details["finish_reason"] == "eos_token"
    assert [event["token"] for event in events] == details["tokens"]
    assert "".join(token["text"] for token in details["tokens"]) == TEXT
    assert [event["index"] for event in events] == list(range(1, details["generated_tokens"] + 1))
    assert details["tokens"][-1]["special"] and [len(top) for top in details["top_tokens"]] == [2] * len(events)
    assert all(event["generated_text"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == TEXT and events[-1]["details"]["finish_reason"] == "eos_token"


def test_parameters_reach_the_engine_and_greedy_is_the_default(server):
    asked = {"do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.2}
    body = {
        "inputs": "one two three four",
        "parameters": {**asked, "stop": ["STOP"], "truncate": 2, "adapter_id": "french"},
    }
    _, _, answer = post(server, "/generate", {**body, "parameters": {**body["parameters"], "return_full_text": True}})
    request = server.engine.requests[-1]
    s = request.sampling
    assert (s.temperature, s.top_k, s.top_p, s.seed, s.repetition_penalty) == (0.5, 7, 0.9, 3, 1.2)
    assert (len(request.prompt), request.adapter, request.max_new_tokens) == (2, "french", 100)
    assert answer["generated_text"] == "one two three four" + TEXT.split("STOP")[0]
    post(server, "/generate", {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "[ab]"}}})
    request = server.engine.requests[-1]
    assert request.sampling.greedy and (request.constraint.kind, request.constraint.value) == ("regex", "[ab]")


def test_errors_have_tgis_shape_and_info_says_the_limits(server):
    for parameters, says in (
        ({"max_new_tokens": 0}, "parameters.max_new_tokens"),
        ({"tempature": 1}, "temperature"),
        ({"max_new_tokens": 10**6}, "parameters.max_new_tokens"),
        ({"grammar": {"type": "json", "value": "{"}}, "parameters.grammar.value"),
        ({"decoder_input_details": True}, "needs details=true"),
    ):
        status, _, body = post(server, "/generate", {"inputs": "x", "parameters": parameters})
        assert status == 422 and body["error_type"] == "validation" and says in body["error"]
    for name in ("decoder_input_details", "return_full_text"):
        body = {"inputs": "x", "parameters": {"details": True, name: True}}
        status, _, body = post(server, "/generate_stream", body)
        assert status == 422 and f"parameters.{name}: is not possible in a stream" in body["error"]
    assert post(server, "/generate", {"inputs": "x", "parameters": {"adapter_id": "frensh"}})[0] == 404
    info = json.loads(get(server, "/info")[2])
    assert info["model_id"] == "qwen2_5_tiny" and info["max_total_tokens"] == 2048 and info["model_dtype"] == "float32"
