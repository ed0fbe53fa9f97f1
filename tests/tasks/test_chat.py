"""make chat over a pipe and its commands."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import pytest

from research.tasks import chat


class _Echo:
    """A session that answers with what it was told."""

    max_new_tokens = 5

    def __init__(self):
        self.messages, self.system = [], None

    @property
    def shown_system(self):
        return self.system

    def record(self):
        return self.messages

    def clear(self):
        self.messages = []

    def reply(self, message, on_text, stopped=(), on_trim=None):
        from research.core.generation.session import Reply

        if message == "trim":
            on_trim(2, 100)
        if message == "interrupt":
            signal.raise_signal(signal.SIGINT)
            assert stopped
        on_text(f"<{message}>")
        self.messages += [{"role": "user", "content": message}, {"role": "assistant", "content": f"<{message}>"}]
        return Reply(f"<{message}>", "interrupted" if stopped else "eos", 1, 1, 0)


def _talk(text: str, session=None) -> tuple[str, str]:
    out, notes = io.StringIO(), io.StringIO()
    assert chat.Repl(session or _Echo(), io.StringIO(text), out, notes).loop() == 0
    return out.getvalue(), notes.getvalue()


def test_each_line_is_a_turn_and_stdout_has_only_answers():
    out, notes = _talk("one\n\n  \ntwo\n")
    assert out == "<one>\n<two>\n" and notes == ""


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("a\\\nb\\\nc\nd\n", ["a\nb\nc", "d"]),
        ('"""\na\n\n /b\n"""\nc\n', ["a\n\n /b", "c"]),
        ('"""a\nb"""\n', ["a\nb"]),
        ('"""one line"""\nx', ["one line", "x"]),
        ("a\\", ["a"]),
        ('"""\nnever closed', ["never closed"]),
        ("back\\slash inside\n", ["back\\slash inside"]),
    ],
)
def test_messages_of_several_lines(text, messages):
    assert list(chat.read_messages(iter(text.removesuffix("\n").split("\n")))) == messages


def test_commands_clear_system_and_quit():
    session = _Echo()
    out, notes = _talk("one\n/clear\n/system  Be brief. \n/system\ntwo\n/quit\nnever\n", session)
    assert out == "<one>\n<two>\n"
    assert session.system == "Be brief." and len(session.messages) == 2
    assert notes.count("Be brief.") == 2 and "forgotten" in notes
    assert _talk("/exit\nnever\n")[0] == ""


def test_a_saved_conversation_is_a_record_of_messages(tmp_path):
    target = tmp_path / "talk.json"
    _talk(f"你好\n/save {target}\n")
    content = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "<你好>"}]
    assert json.loads(target.read_text(encoding="utf-8")) == {"messages": content}


def test_a_wrong_command_names_the_nearest_and_the_talk_goes_on(tmp_path):
    out, notes = _talk(f"/sav x\n/save\n/save {tmp_path}/no/file\n//help\n/usr/bin is a path\nend\n")
    assert "/save" in notes and "needs a file" in notes and "cannot be written" in notes
    assert out == "</help>\n</usr/bin is a path>\n<end>\n"


def test_help_names_every_command():
    _, notes = _talk("/help\n")
    assert all(f"/{name}" in notes for name in ("clear", "system", "save", "quit", "exit"))


def test_ctrl_c_stops_the_answer_and_not_the_program():
    before = signal.getsignal(signal.SIGINT)
    out, notes = _talk("interrupt\nnext\n")
    assert out == "<interrupt>\n<next>\n" and "(stopped)" in notes
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_interrupts():
    with pytest.raises(KeyboardInterrupt), chat.stop_on_ctrl_c():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_turns_that_no_longer_fit_are_announced():
    assert "oldest 2 turns no longer fit into the context of 100 tokens" in _talk("trim\n")[1]


@pytest.mark.slow
def test_a_conversation_over_a_pipe(repo, tmp_path):
    from research.core.text.builtin import builtin_tokenizer
    from research.core.torch.decoder import Decoder
    from research.core.torch.weights import save_decoder
    from research.registry import model_config, model_spec

    spec = model_spec(model_config("qwen2_5_tiny"), tokens=builtin_tokenizer().vocab_size)
    save_decoder(Decoder(spec).init_weights(3), tmp_path / "weights")
    command = [sys.executable, str(repo / "research/qwen2_5/run_qwen2_5.py"), "task=chat", "model=qwen2_5_tiny"]
    command += [f"weights={tmp_path / 'weights'}", "generate.max_new_tokens=6"]
    talk = f"Hello <|im_end|> there\nWhat \\\nnow?\n/save {tmp_path / 'talk.json'}\n"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=talk, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert [m["content"] for m in saved[::2]] == ["Hello <|im_end|> there", "What \nnow?"]
    assert done.stdout == f"{saved[1]['content']}\n{saved[3]['content']}\n" and len(saved[1]["content"]) > 3
    assert done.stderr.count("cut at generate.max_new_tokens=6") == 2
