"""make serve: from settings to a server that says where it is, answers as predict does, and leaves on SIGTERM."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from research.core.config.compose import compose
from research.core.errors import ConfigError, UserError
from research.core.serve.server import bind
from research.tasks import predict, serve
from tests import small_model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small_model.save(tmp_path_factory.mktemp("model") / "weights", "qwen2_5_tiny", vocabulary=False)


@pytest.fixture(autouse=True)
def plain_logs(monkeypatch):
    """Other tests listen to the same loggers."""
    monkeypatch.setattr(serve, "log_as_json", lambda: None)


def settings(weights, *words):
    common = ["model=qwen2_5_tiny", f"weights={weights}", "generate.dtype=fp32", "device.kind=cpu"]
    engine = ["engine.num_blocks=300", "engine.attention=sdpa", "engine.native_step=false"]
    return compose(["task=serve", *common, *engine, *words])


@pytest.mark.slow
def test_it_says_where_it_is_answers_as_predict_does_and_leaves_on_sigterm(weights, capsys, tmp_path):
    question, cfg = "What is 2 + 3?", settings(weights, "generate.max_new_tokens=12")
    cfg.prompt = question
    assert predict.run(cfg) == 0
    expected = capsys.readouterr().out.removesuffix("\n")

    free = bind("127.0.0.1", 0)
    port = free.getsockname()[1]
    free.close()
    (tmp_path / "keys").write_text("the-key\n")
    cfg = settings(weights, f"serve.port={port}", f"serve.api_keys={tmp_path / 'keys'}", "serve.name=tiny")
    got = {}

    def ask():
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(0.05)
            body = {"model": "tiny", "messages": [{"role": "user", "content": question}], "max_tokens": 12}
            headers = {"Content-Type": "application/json", "Authorization": "Bearer the-key"}
            request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                got.update(json.loads(answer.read()))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    status = serve.run(cfg)
    thread.join()
    said = capsys.readouterr().out
    assert status == 0 and got["model"] == "tiny"
    assert got["choices"][0]["message"]["content"].strip() == expected.strip()
    assert re.search(rf"^tiny is served at http://127\.0\.0\.1:{port}$", said, re.M)
    assert re.search(r"keys +1$", said, re.M) and "2048 tokens" in said and "the-key" not in said


@pytest.mark.slow
def test_two_cards_serve_what_one_answers_and_all_leave_on_sigterm(repo, weights, capsys):
    question, words = "What is 2 + 3?", ["generate.max_new_tokens=12"]
    cfg = settings(weights, *words)
    cfg.prompt = question
    assert predict.run(cfg) == 0
    expected = capsys.readouterr().out.removesuffix("\n")

    command = ["bash", "scripts/task.sh", "serve", "generate.dtype=fp32", "engine.num_blocks=300", *words]
    own = {
        "MODEL": "qwen2_5_tiny",
        "WEIGHTS": str(weights),
        "PORT": "0",
        "CARDS": "2",
        "DEVICE": "cpu",
        "PY": sys.executable,
    }
    program = subprocess.Popen(
        command, cwd=repo, env=os.environ | own | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )
    try:
        said = []
        while not (found := re.search(r"is served at (http://\S+)$", said[-1] if said else "")):
            said.append(program.stdout.readline().rstrip("\n"))
            assert program.poll() is None, said
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 12}
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{found[1]}/v1/chat/completions", json.dumps(body).encode(), head)
        with urllib.request.urlopen(request, timeout=60) as answer:
            got = json.loads(answer.read())
        assert got["choices"][0]["message"]["content"].strip() == expected.strip()
        program.send_signal(signal.SIGTERM)
        assert program.wait(60) == 0
    finally:
        program.kill()
        program.wait()
        program.stdout.close()


def test_what_is_wrong_is_said_before_the_weights_are_read(weights, monkeypatch):
    monkeypatch.setattr(serve, "open_engine_model", lambda cfg: pytest.fail("the weights were read"))
    taken = bind("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    for word, says in (
        (f"serve.port={port}", rf"{port}.*in use"),
        ("serve.api_keys=/nowhere/keys", "file of API keys not found"),
        ("serve.adapter_folder=/nowhere", "folder of adapters not found"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            serve.run(settings(weights, *({"serve.port=0", word} if "port" not in word else {word})))
        assert caught.value.exit_status == 2
    taken.close()
    with pytest.raises(ConfigError, match="paged engine"):
        serve.run(settings(weights, "engine.mode=flash"))
