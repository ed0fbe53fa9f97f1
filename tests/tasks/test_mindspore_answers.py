"""make predict, make chat and the documents' chat script on MindSpore: the answers of the torch backend."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from research.core.config.compose import compose
from research.core.config.schema import LoraConfig
from research.core.errors import ConfigError, run_cli
from research.tasks import chat_script, predict
from research.tasks.cli import run_task
from tests import small_model

pytest.importorskip("mindspore", reason="the answers compared here are MindSpore's")

NEW = "generate.max_new_tokens=12"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return small_model.save(tmp_path_factory.mktemp("model") / "weights", "qwen1_5_tiny", 1)


@pytest.fixture(scope="module")
def adapter(weights) -> Path:
    import torch

    from research.core.torch.lora import add_lora, save_adapter
    from research.core.torch.weights import load_decoder

    decoder = load_decoder(weights)
    settings = LoraConfig(rank=4)
    add_lora(decoder, settings)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    folder = weights.parent / "adapter"
    save_adapter(decoder, folder, settings)
    return folder


def _words(weights: Path, backend: str, *words: str) -> list[str]:
    own = ["model=qwen1_5_tiny", "model.hf.num_hidden_layers=1", f"weights={weights}", f"backend={backend}", NEW]
    return [*own, "device=cpu", "generate.dtype=fp32", *words]


def _predict(capsys, weights: Path, backend: str, *words: str) -> str:
    assert predict.run(compose(["task=predict", *_words(weights, backend, *words)])) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_predict_gives_the_torch_backends_answers_sampled_from_a_file_raw_and_with_an_adapter(
    weights, adapter, capsys, tmp_path
):
    texts = ["Hello", "A much longer prompt than the others, with many words in it", "你好", "x"]
    (tmp_path / "p.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    cases = [
        [f"prompts={tmp_path / 'p.txt'}", "generate.batch=4", "generate.temperature=1", "generate.top_p=0.9"],
        ["prompt=Once upon a time", "generate.raw=true"],
        ["prompt=Hello", f"adapter={adapter}"],
    ]
    answers = []
    for case in cases:
        expected = _predict(capsys, weights, "torch", *case)
        assert _predict(capsys, weights, "mindspore", *case) == expected
        answers.append(expected)
    assert len(set(answers)) == len(cases), "the model answers everything alike: nothing is proved"


def _ask(weights: Path, *words: str) -> int:
    """The documents' chat script on torch."""
    own = ["--load_checkpoint", str(weights), "model=qwen1_5_tiny", "model.hf.num_hidden_layers=1", NEW]
    return run_cli(lambda words: chat_script.main(words, "qwen1_5"), [*own, "backend=torch", "device=cpu", *words])


@pytest.mark.slow
def test_the_chat_script_answers_several_questions_and_over_a_pipe_as_make_chat_on_torch_does(
    repo, weights, tmp_path, capsys, monkeypatch
):
    questions, history = ["Hello there", "And now?"], ("--enable_history", "True")
    assert _ask(weights, "--predict_data", *questions, *history, "--do_sample", "False") == 0
    asked = capsys.readouterr()
    assert "> Hello there" in asked.err

    talk = "".join(f"{question}\n" for question in questions)
    talk += f"/clear\nHello there\n/save {tmp_path / 't.json'}\n/quit\n"
    command = [sys.executable, str(repo / "research/qwen1_5/run_qwen1_5_chat.py"), "--load_checkpoint", str(weights)]
    command += ["model=qwen1_5_tiny", "model.hf.num_hidden_layers=1", NEW, *history, "--seq_length", "512"]
    piped = subprocess.run(
        [*command, "--device_id", "0"],
        input=talk,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert piped.returncode == 0 and "float32 on CPU (MindSpore)" in piped.stderr, piped.stderr
    answers = piped.stdout.splitlines()
    assert "\n".join(answers[:2]) + "\n" == asked.out and answers[2] == answers[0] != answers[1]
    assert len(json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["messages"]) == 3  # with the system prompt

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(talk.encode())))
    assert _ask(weights, *history) == 0
    assert capsys.readouterr().out == piped.stdout


def test_without_history_every_question_stands_alone(weights, capsys):
    both = ["--predict_data", "Hello there", "And now?"]
    assert _ask(weights, *both) == 0
    alone = capsys.readouterr().out.splitlines()
    assert _ask(weights, *both, "--enable_history", "True") == 0
    together = capsys.readouterr().out.splitlines()
    assert _ask(weights, "--predict_data", "And now?", "--verbose") == 0
    single = capsys.readouterr()
    assert alone[1] == single.out.strip() and alone[0] == together[0] and alone[1] != together[1]
    assert "<|im_start|>system\nYou are a helpful assistant." in single.err and "prompt tokens" in single.err


def test_the_demo_asks_its_own_questions_and_a_system_prompt_is_used(weights, capsys, monkeypatch):
    monkeypatch.setattr(chat_script, "DEMO", ("One?", "Two?"))
    assert (
        _ask(weights, "--run_demo", "True", "--system_prompt", "Be brief.", "--verbose", "True", "--predict_data", "x")
        == 0
    )
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if line.startswith("> ")] == ["> One?", "> Two?", "> x"]
    assert err.count("<|im_start|>system\nBe brief.") == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predict_dat", "x"], "--predict_data"),
        (["--enable_history", "perhaps", "--predict_data", "x"], "--enable_history"),
        (["--seq_length", "long", "--predict_data", "x"], "--seq_length long"),
        (["--seq_length", "40", "--predict_data", "word " * 60], "are more than the model's 40"),
        (["--vocab_file", "/no/vocab.json", "--merges_file", "/other/merges.txt"], "one folder"),
        (["--run_mode", "predict", "generate.max_new_tokens=0"], "generate.max_new_tokens"),
    ],
)
def test_bad_flags_of_the_chat_script_end_with_status_2(weights, capsys, words, message):
    assert _ask(weights, *words) == 2
    assert message in capsys.readouterr().err


def test_several_ranks_cannot_talk_on_one_terminal(weights, capsys, monkeypatch):
    for name, value in {"RANK_TABLE_FILE": "table.json", "RANK_ID": "0", "RANK_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    words = ["--load_checkpoint", str(weights), "model=qwen1_5_tiny"]
    assert run_cli(lambda words: chat_script.main(words, "qwen1_5"), words) == 2
    assert "--predict_data" in capsys.readouterr().err


def test_bf16_on_the_cpu_is_refused_with_the_setting_to_use(weights):
    with pytest.raises(ConfigError, match=r"generate.dtype=bf16[\s\S]*BACKEND=torch"):
        run_task(["task=predict", "prompt=x", *_words(weights, "mindspore"), "generate.dtype=bf16"])
