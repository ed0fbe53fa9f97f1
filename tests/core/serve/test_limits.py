"""What a server on a network meets: keys, rates, sizes, clients that leave, dawdle or send rubbish, an engine that fails."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import logging
import signal
import socket
import subprocess
import sys

import pytest

from research.core.config.schema import ServeConfig
from research.core.errors import UserError
from research.core.serve.journal import JsonLines
from research.core.serve.server import bind, close_idle, read_keys
from tests.core.serve.fake_engine import FakeEngine
from tests.core.serve.plain_http import CHAT, get, open_socket, post, request_bytes, until


@pytest.fixture(scope="module")
def server(start):
    settings = ServeConfig(max_body_mb=0.1, read_timeout_s=1.0, max_requests=3, write_timeout_s=1.0)
    engine = FakeEngine(lambda request, choice: "word " * 400, step_s=0.002)
    with start(engine, settings) as server:
        server.engine = engine
        yield server


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'{"messages": "x"}', 400),
        (b"\xff\xfe{}", 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "user": "\\udfff"}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"messages": ' + b"[" * 20000 + b"]" * 20000 + b"}", 400),
        (b'{"messages": [{"role": "user", "content": "' + b"x" * 200_000 + b'"}]}', 413),
    ],
)
def test_rubbish_is_refused_in_openais_shape_and_the_server_lives(server, raw, status):
    got, _, body = post(server, raw=raw)
    assert got == status and body["error"]["message"] and set(body["error"]) == {"message", "type", "param", "code"}
    assert get(server, "/health")[0] == 200


def test_errors_of_the_protocol_have_the_same_shape(server):
    assert json.loads(get(server, "/v1/nothing")[2])["error"]["type"] == "not_found_error"
    status, _, text = get(server, "/v1/chat/completions")
    assert status == 405 and json.loads(text)["error"]["message"]
    assert post(server, headers={"Content-Type": "text/plain"})[0] == 400
    status, _, body = post(server, "/generate", {"inputs": "x", "parameters": {"top_p": 2}})
    assert status == 422 and body["error_type"] == "validation" and "parameters.top_p" in body["error"]


def test_a_client_that_leaves_frees_its_blocks(server):
    for body in (CHAT, {**CHAT, "stream": True, "n": 3}):
        connection = open_socket(server, request_bytes(body))
        until(lambda: server.service.driver.stats.free_blocks < server.engine.blocks)
        connection.close()
        until(lambda: server.service.open == 0 and server.service.driver.stats.free_blocks == server.engine.blocks)
    assert not server.engine.has_work()


def test_one_request_too_many_is_429_with_a_time_to_come_back(server):
    connections = [open_socket(server, request_bytes({**CHAT, "stream": True})) for _ in range(3)]
    until(lambda: server.service.open == 3)
    status, headers, body = post(server)
    assert status == 429 and int(headers["Retry-After"]) >= 1 and body["error"]["code"] == "overloaded"
    assert post(server, "/generate", {"inputs": "x"})[2]["error_type"] == "overloaded"
    for connection in connections:
        connection.close()
    until(lambda: server.service.open == 0)
    assert post(server, body={**CHAT, "max_tokens": 2})[0] == 200


@pytest.mark.slow
def test_slow_heads_bodies_and_readers_are_dropped(server):
    watching = asyncio.run_coroutine_threadsafe(close_idle(server._server, 1.0), server.loop)
    head = open_socket(server, b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
    body = open_socket(server, request_bytes(CHAT)[:-5])
    assert body.recv(65536).startswith(b"HTTP/1.1 408")
    assert head.recv(65536) == b"", "a connection whose head never ends stays open"
    watching.cancel()
    # Nothing is read; 3 x 400 chunks with log-probabilities are more than the socket's buffers hold.
    wide = {**CHAT, "stream": True, "logprobs": True, "top_logprobs": 20, "n": 4, "max_tokens": 800}
    host, port = server.url.removeprefix("http://").split(":")
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect((host, int(port)))
    reader.sendall(request_bytes(wide))
    until(lambda: server.service.open == 1)
    until(lambda: server.service.open == 0, 20)
    reader.close()


def test_keys_are_needed_and_compared(start, tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("# of the team\nsecret-1  # Anna\n\n")
    monkeypatch.setenv("QWEN_API_KEYS", "secret-2, ")
    keys = read_keys(str(tmp_path / "keys"))
    assert set(keys) == {"secret-1", "secret-2"}
    with start(FakeEngine(), api_keys=keys) as server:
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer secret"}, 401),
            ({"Authorization": "Basic secret-1"}, 401),
            ({"Authorization": "Bearer secret-1"}, 200),
            ({"Authorization": "bearer secret-2"}, 200),
            ({"X-Api-Key": "secret-2"}, 200),
        ):
            got, _, body = post(server, headers=headers)
            assert got == status, headers
            assert status == 200 or body["error"]["type"] == "authentication_error"
        assert get(server, "/v1/models")[0] == get(server, "/metrics")[0] == 401
        assert get(server, "/health")[0] == get(server, "/")[0] == 200
    (tmp_path / "empty").write_text("# none\n")
    monkeypatch.delenv("QWEN_API_KEYS")
    with pytest.raises(UserError, match="no key"):
        read_keys(str(tmp_path / "empty"))


def test_the_rate_of_each_key_is_limited(start):
    with start(FakeEngine(), ServeConfig(requests_per_minute=2), api_keys=("a", "b")) as server:
        got = [post(server, headers={"Authorization": f"Bearer {key}"}) for key in "aaab"]
        assert [status for status, _, _ in got] == [200, 200, 429, 200]
        assert got[0][1]["x-ratelimit-remaining-requests"] == "1" and 1 <= int(got[2][1]["Retry-After"]) <= 30
        assert got[2][2]["error"]["code"] == "rate_limit_exceeded"


def test_a_step_that_fails_ends_its_requests_and_the_server_lives_until_it_fails_for_good(start):
    faults = []

    def fail():
        if faults:
            raise RuntimeError(faults.pop())

    engine = FakeEngine(fail=fail)
    with start(engine) as server:
        faults.append("the card has fallen out")
        status, _, body = post(server)
        assert status == 500 and "fallen out" in body["error"]["message"]
        assert post(server)[0] == 200 and get(server, "/health")[0] == 200
        faults.append("again")
        connection = open_socket(server, request_bytes({**CHAT, "stream": True}))
        text = b""
        while b"0\r\n\r\n" not in text:
            text += connection.recv(65536)
        assert b'"engine_error"' in text and b"[DONE]" not in text
        connection.close()
        faults.extend(["for good"] * 10)
        post(server)
        until(lambda: server.service.driver.failure is not None)
        assert get(server, "/health")[0] == 503 and post(server)[0] == 503


def test_the_log_names_the_request_and_never_the_prompt(server):
    lines = io.StringIO()
    handler = logging.StreamHandler(lines)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("research.core.serve.request")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        body = {"messages": [{"role": "user", "content": "my secret question"}], "max_tokens": 3, "user": "u1"}
        _, headers, _ = post(server, body=body, headers={"X-Request-Id": "abc-1"})
        post(server, body={"messages": [{"role": "user", "content": ["my secret question"]}]})
        until(lambda: lines.getvalue().count("\n") == 2)
    finally:
        logger.removeHandler(handler)
    assert headers["X-Request-Id"] == "abc-1"
    assert "secret" not in lines.getvalue() and "word" not in lines.getvalue()
    first, second = map(json.loads, lines.getvalue().splitlines())
    assert (first["id"], first["status"], first["new_tokens"], first["finish"]) == ("abc-1", 200, 3, "length")
    assert first["user"] == "u1" and first["prompt_tokens"] > 5 and first["seconds"] > 0
    assert second["status"] == 400 and second["id"] != "abc-1"


def test_metrics_count_requests_and_tokens(server):
    before = server.engine.stats().total_prompt_tokens
    post(server, body={**CHAT, "max_tokens": 5})
    until(lambda: server.service.driver.stats.total_prompt_tokens > before)
    status, headers, text = get(server, "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['qwen_http_requests_total{path="/v1/chat/completions",status="200"}']) >= 1
    assert float(values["qwen_time_to_first_token_seconds_count"]) >= 1
    assert values["qwen_engine_free_blocks"] == values["qwen_engine_blocks"] == "4096.0"
    get(server, "/v1/nobody/knows/this")
    text = get(server, "/metrics")[2]
    assert 'path="other",status="404"' in text and "nobody" not in text, "any path makes a series of its own"


def test_a_port_in_use_is_said_with_the_setting_to_change():
    taken = bind("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(UserError, match=f"(?s)serve.port={port}.*in use.*PORT={port + 1}"):
        bind("127.0.0.1", port)
    taken.close()
    with pytest.raises(UserError, match=r"serve\.host"):
        bind("no.such.host.invalid", 0)


PROGRAM = """
import sys
from tests.core.serve.conftest import Served, ServeConfig, Sampling, get_template, bind, url
from tests.core.serve.fake_engine import FakeEngine
from tests.core.serve.plain_http import CHAT, get, open_socket, post, request_bytes, until
from research.core.serve.server import serve
engine = FakeEngine(lambda request, choice: "word " * (60 if request.n == 1 else 4000), step_s=0.01, length_limit=9000)
served = Served("m", engine, get_template("qwen2_5"), Sampling(), ServeConfig(drain_s=60))
listener = bind("127.0.0.1", 0)
status = serve(served, listener, lambda: print(url(listener), flush=True))
assert engine.closed
sys.exit(status)
"""
JSON = {"Content-Type": "application/json"}


@pytest.mark.slow
def test_sigterm_ends_what_runs_takes_nothing_new_and_exits_0_a_second_one_does_not_wait(repo):
    """60 words are soon through; two answers of 4,000 would take the whole time that the drain has."""
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=repo, stdout=subprocess.PIPE, text=True)

    def begin(**fields):
        connection = http.client.HTTPConnection(address, timeout=20)
        connection.request("POST", "/v1/chat/completions", json.dumps({**CHAT, "stream": True, **fields}), JSON)
        answer = connection.getresponse()
        return answer, answer.read1(10)

    try:
        address = program.stdout.readline().strip().removeprefix("http://")
        (short, short_text), (long, long_text) = begin(), begin(n=2)
        program.send_signal(signal.SIGTERM)
        other = http.client.HTTPConnection(address, timeout=20)
        until(lambda: (other.request("GET", "/health"), other.getresponse().read())[1] == b'{"status":"draining"}')
        other.request("POST", "/v1/chat/completions", json.dumps(CHAT), JSON)
        refused = other.getresponse()
        assert refused.status == 503 and refused.headers["Retry-After"] and refused.read()
        text = (short_text + short.read()).decode()
        *events, last = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
        # An event holds what has come since the last one: a busy server puts several words into one.
        assert "".join(delta.get("content") or "" for delta in deltas).split() == ["word"] * 60 and last == "[DONE]"
        assert program.poll() is None
        program.send_signal(signal.SIGTERM)
        text = (long_text + long.read()).decode()
        assert '"error"' in text and "[DONE]" not in text
        assert program.wait(20) == 0
    finally:
        program.kill()
        program.wait()
        program.stdout.close()
