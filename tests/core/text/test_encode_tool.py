"""tools/encode.py as outside programs call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from research.core.text.template import get_template
from tests.conftest import load_script


@pytest.fixture
def call(repo, vocabulary_folder, tmp_path):
    """Run the program on ``lines``; gives back (exit status, answers or None, stderr)."""

    def run(lines, family="qwen2_5", tokenizer=vocabulary_folder):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        rows = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        source.write_bytes(b"\n".join(rows) + b"\n")
        command = [sys.executable, str(repo / "tools" / "encode.py"), "--family", family, "--tokenizer", str(tokenizer)]
        environment = {name: value for name, value in os.environ.items() if name != "DEBUG"}
        done = subprocess.run(
            [*command, "--input", str(source), "--output", str(target)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        leftovers = {path.name for path in tmp_path.iterdir()} - {"in.jsonl", "out.jsonl"}
        assert not [name for name in leftovers if name.startswith(".")]
        answers = [json.loads(line) for line in target.read_text().splitlines()] if target.exists() else None
        return done.returncode, answers, done.stderr

    return run


TEXT = "Hi <|im_start|>你好<tool_call>\n"


def test_answers_come_in_order(call, qwen2_5, shared_data, tmp_path):
    published = shared_data / "configs" / "Qwen2.5-0.5B-Instruct__tokenizer" / "tokenizer_config.json"
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    messages = [{"role": "user", "content": TEXT}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    status, answers, _ = call(
        [
            {"op": "encode", "text": TEXT},
            {"op": "encode", "text": TEXT, "allowed_special": "all"},
            {"op": "encode", "text": TEXT, "allowed_special": ["<|im_start|>"]},
            b"",
            {"op": "decode", "ids": qwen2_5.encode(TEXT, "all")},
            {"op": "chat", "messages": messages},
            {"op": "chat", "messages": messages, "tools": tools, "add_generation_prompt": True},
            {"op": "chat", "messages": messages, "tools": tools, "template_file": str(published)},
            {"op": "chat", "messages": messages, "template_file": "own.jinja"},
            {"op": "decode", "ids": [151700]},
        ]
    )
    template = get_template("qwen2_5")
    assert status == 0
    assert answers == [
        {"ids": qwen2_5.encode(TEXT)},
        {"ids": qwen2_5.encode(TEXT, "all")},
        {"ids": qwen2_5.encode(TEXT, ["<|im_start|>"])},
        {"text": TEXT},
        {"text": template.render(messages), "ids": template.encode(qwen2_5, messages).ids},
        {"text": template.render(messages, tools, True), "ids": template.encode(qwen2_5, messages, tools, True).ids},
        {"text": template.render(messages, tools), "ids": template.encode(qwen2_5, messages, tools).ids},
        {
            "text": f"<|im_start|>{TEXT}<|im_end|>",
            "ids": [qwen2_5.im_start_id, *qwen2_5.encode(TEXT), qwen2_5.im_end_id],
        },
        {"text": ""},
    ]


@pytest.fixture
def inside(repo, qwen2_5, tmp_path, monkeypatch, capsys):
    """The same in this process, with the vocabulary that is loaded already."""
    tool = load_script(repo / "tools" / "encode.py")
    monkeypatch.setattr(tool, "load_tokenizer", lambda folder, family: qwen2_5)

    def run(lines, family="qwen2_5"):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
        words = ["--family", family, "--tokenizer", "here", "--input", str(source), "--output", str(target)]
        status = tool.run_cli(tool.main, words)
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"] + ["out.jsonl"] * target.exists()
        answers = [json.loads(line) for line in target.read_text().splitlines()] if target.exists() else None
        return status, answers, capsys.readouterr().err

    return run


@pytest.mark.parametrize("family", ["qwen", "qwen1_5", "qwen2"])
def test_other_families(inside, family):
    status, answers, _ = inside([{"op": "chat", "messages": [{"role": "user", "content": "x"}]}], family)
    expected = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nx<|im_end|>\n"
    assert status == 0 and answers[0]["text"] == expected
    assert answers[0]["ids"][:2] == [151644, 8948] and answers[0]["ids"][-2:] == [151645, 198]


FAULTS = {
    "malformed": ([{"op": "decode", "ids": [1]}, b'{"op": "encode", '], r"in.jsonl:2: not valid JSON"),
    "not utf-8": ([b'{"op": "encode", "text": "\xff"}'], "in.jsonl:1: not UTF-8"),
    "no object": ([b"[1]"], "in.jsonl:1: a request is an object"),
    "deep": ([b"[" * 100_000], "in.jsonl:1: "),
    "unknown op": ([{"op": "tokenize", "text": "x"}], "in.jsonl:1: a request"),
    "no text": ([{"op": "encode"}], 'in.jsonl:1: encode needs "text"'),
    "text is a number": ([{"op": "encode", "text": 5}], "in.jsonl:1:"),
    "wrong allowed": ([{"op": "encode", "text": "x", "allowed_special": "some"}], "allowed_special"),
    "ids are text": ([{"op": "decode", "ids": "1 2"}], "in.jsonl:1:"),
    "negative id": ([{"op": "decode", "ids": [-1]}], "id -1 is not in the vocabulary"),
    "large id": ([{"op": "decode", "ids": [10**9]}], "id 1000000000 is not in the vocabulary"),
    "bool id": ([{"op": "decode", "ids": [True]}], "whole numbers"),
    "role": ([{"op": "chat", "messages": [{"role": "x", "content": "y"}]}], "in.jsonl:1: message 1: unknown role"),
    "no messages": ([{"op": "chat", "messages": []}], "in.jsonl:1: a conversation"),
    "template missing": ([{"op": "chat", "messages": [], "template_file": "no.jinja"}], "no.jinja: template file not"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_requests_end_with_status_2_and_no_output(inside, fault):
    lines, what = FAULTS[fault]
    status, answers, stderr = inside(lines)
    assert status == 2 and answers is None
    assert what in stderr and "Traceback" not in stderr and len(stderr.splitlines()) < 8


@pytest.mark.slow
def test_wrong_vocabulary_ends_with_status_2(call, tmp_path):
    status, answers, stderr = call([{"op": "encode", "text": "x"}], "qwen2_5", tmp_path)
    assert status == 2 and answers is None and "no vocabulary here" in stderr
    status, _, stderr = call([], "qwen9")
    assert status == 2 and "unknown family" in stderr
    status, answers, stderr = call([{"op": "decode", "ids": [1]}, b"{"])
    assert status == 2 and answers is None and "in.jsonl:2: not valid JSON" in stderr and "Traceback" not in stderr
