"""finetune and lora with backend=mindspore as a user starts them, on the smallest model there is."""

from __future__ import annotations

import json

import pytest

from research.core.run.metrics import read_metrics
from research.tasks.cli import main
from tests.tasks.test_training import SMALL

pytest.importorskip("mindspore", reason="MindSpore is not installed")


def _run(task: str, folder, *words: str) -> int:
    small = [*SMALL, "model.hf.num_hidden_layers=1"]  # a graph's compilation is most of the time
    return main([f"task={task}", f"run={folder}", "backend=mindspore", "device=cpu", *small, *words])


@pytest.mark.slow
def test_finetune_on_skills_leaves_a_whole_run_folder_and_lora_goes_on_from_it(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["data=skills", "data.skills_records=100", "train.eval_every=2", "train.sample_every=2"]
    assert _run("finetune", run, *words, "train.steps=3") == 0
    err = capsys.readouterr().err
    for part in (
        "exact match before training: ",
        "exact match after training: ",
        "sample answers",
        "make predict RUN=",
    ):
        assert part in err
    names = {path.name for path in run.iterdir()}
    expected = {"config.yaml", "command.txt", "log.txt", "metrics.jsonl", "tensorboard", "loss.png", "checkpoints"}
    assert expected | {"report.json", "weights", "dataset"} <= names and "lock" not in names
    assert [r["step"] for r in read_metrics(run, "eval")] == [2, 3]
    assert json.loads((run / "report.json").read_text())["training"]["steps"] == 3
    assert "->" in next(read_metrics(run, "sample"))["text"]
    assert main(["task=finetune", f"run={run}", "train.resume=true", "train.steps=4"]) == 0
    assert [r["step"] for r in read_metrics(run, "train")] == [1, 2, 3, 4]
    words = [f"weights={run}", "data=skills", "data.skills_records=100", "data.eval_records=0", "train.steps=1"]
    assert _run("lora", tmp_path / "lora", *words, "lora.rank=2") == 0
    assert (tmp_path / "lora" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.dtype=bf16"], "train.dtype=bf16"),
        (["train.dtype=fp16"], "train.dtype=fp16"),
        (["parallel.shard=full"], "parallel.shard=optimizer"),
        (["device=cuda"], "device.kind=cuda"),
    ],
)
def test_wrong_settings_end_with_status_2_and_no_result(tmp_path, capsys, words, message):
    assert _run("finetune", tmp_path / "run", "data=skills", "train.steps=1", "parallel.cards=1", *words) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and not (tmp_path / "run" / "checkpoints").exists()
