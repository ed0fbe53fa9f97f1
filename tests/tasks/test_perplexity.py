"""The loss of weights on a data set is transformers' loss, on both backends, and is what `--run_mode eval` measures."""

from __future__ import annotations

import json

import pytest

from research.core.config.compose import compose
from research.core.data.dataset import IGNORE, PackedDataset
from research.core.errors import run_cli
from research.tasks import perplexity
from research.tasks.cli import run_task

MODEL = "qwen2_5_tiny"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(folder with weights and records, transformers' mean loss, its number of targets)."""
    import torch
    from transformers import AutoModelForCausalLM

    from research.core.text.builtin import builtin_tokenizer
    from research.core.torch.decoder import Decoder
    from research.core.torch.weights import save_decoder
    from research.registry import model_config, model_spec

    folder = tmp_path_factory.mktemp("perplexity")
    decoder = Decoder(model_spec(model_config(MODEL), tokens=builtin_tokenizer().vocab_size)).init_weights(3)
    save_decoder(decoder, folder / "weights")
    records = [{"instruction": f"What is {n} plus {n}?", "input": "", "output": f"It is {2 * n}."} for n in range(9)]
    (folder / "records.json").write_text(json.dumps(records))
    assert run_task(_words(folder, "run_torch")) == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "weights", dtype=torch.float32)
    rows, total, targets = PackedDataset(folder / "run_torch" / "dataset" / "train"), 0.0, 0
    for number in range(rows.documents):
        ids, labels = (torch.from_numpy(values.copy())[None] for values in rows.document(number))
        count = int((labels[:, 1:] != IGNORE).sum())
        total, targets = total + float(model(ids.long(), labels=labels.long()).loss.detach()) * count, targets + count
    return folder, total / targets, targets


def _words(folder, run, *words):
    return [
        "task=perplexity", f"model={MODEL}", f"weights={folder / 'weights'}", f"data={folder / 'records.json'}", f"run={folder / run}",
        "data.seq_length=64", "train.micro_batch=2", "train.dtype=fp32", "device=cpu", *words,
    ]  # fmt: skip


def _result(folder, run):
    return json.loads((folder / run / "report.json").read_text())["result"]


def test_torch_measures_transformers_loss(case):
    folder, loss, targets = case
    found = _result(folder, "run_torch")
    assert found["targets"] == targets
    assert found["loss"] == pytest.approx(loss, rel=1e-5)  # fp32 sums in another order


@pytest.mark.slow
def test_mindspore_measures_the_same(case):
    pytest.importorskip("mindspore", reason="the other backend")
    folder, loss, targets = case
    assert run_task(_words(folder, "run_mindspore", "backend=mindspore")) == 0
    found = _result(folder, "run_mindspore")
    assert found["targets"] == targets and found["loss"] == pytest.approx(loss, rel=1e-4)


def test_run_mode_eval_measures_the_eval_data_set(case):
    folder, loss, _ = case
    flags = [
        "--run_mode",
        "eval",
        "--eval_dataset_dir",
        str(folder / "records.json"),
        "--load_checkpoint",
        str(folder / "weights"),
    ]
    words = [word for word in _words(folder, "run_eval") if not word.startswith(("task=", "data=", "weights="))]
    assert run_task([*flags, *words]) == 0
    assert _result(folder, "run_eval")["loss"] == pytest.approx(loss, rel=1e-5)


def test_without_weights_or_targets_it_says_so(case, capsys, monkeypatch):
    folder = case[0]
    monkeypatch.setattr(perplexity, "prepare_data", lambda job: folder / "run_torch" / "dataset")
    monkeypatch.setattr(perplexity, "measure", lambda job, rows: (0.0, 0))
    config = compose(_words(folder, "run_empty"))
    assert run_cli(lambda words: perplexity.run(config), []) == 2
    assert "no token is supervised" in capsys.readouterr().err
