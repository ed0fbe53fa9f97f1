"""tools/loss.py against transformers' own loss on the same records."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from research.core.errors import run_cli
from tests.conftest import load_script

VOCAB = 89


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loss")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    ).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(folder / "weights")
    records = []
    for number in range(12):
        ids = torch.randint(0, VOCAB, (5 + 4 * number,)).tolist()
        labels = [i if (i + t) % 3 else -100 for t, i in enumerate(ids)]  # the first is often supervised: never counted
        records.append({"id": str(number), "input_ids": ids, "labels": labels})
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    total, count = 0.0, 0
    with torch.no_grad():
        for record in records:
            ids, labels = torch.tensor([record["input_ids"]]), torch.tensor([record["labels"]])
            targets = int((labels[:, 1:] != -100).sum())
            total += model(input_ids=ids, labels=labels).loss.item() * targets
            count += targets
    return folder, total / count, count


@pytest.fixture
def run(repo, case, capsys):
    """run(words) -> status, standard output, standard error of the program on the case's weights, in this process."""
    tool = load_script(repo / "tools" / "loss.py")

    def call(*words):
        status = run_cli(tool.main, ["--weights", str(case[0] / "weights"), *map(str, words)])
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize("packed", [[], ["--packed"]])
def test_loss_is_that_of_transformers_over_all_targets_packed_or_not(case, run, packed):
    folder, loss, count = case
    status, out, err = run("--data", folder / "records.jsonl", *packed)
    assert status == 0, err
    answer = json.loads(out)
    assert answer["tokens"] == count
    assert answer["loss"] == pytest.approx(loss, abs=1e-5)  # fp32 sums in another order


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", "records.jsonl:2: not valid JSON"),
        ('{"input_ids": [1]}', "records.jsonl:2: a record needs"),
        ('{"input_ids": [1, 2], "labels": [1]}', "of one length"),
        (json.dumps({"input_ids": [1, VOCAB], "labels": [1, 2]}), f"token id {VOCAB} is outside"),
        (json.dumps({"input_ids": [1] * 65, "labels": [1] * 65}), "65 tokens, the model is made for 64"),
    ],
)
def test_wrong_record_is_named_by_line(run, tmp_path, line, message):
    (tmp_path / "records.jsonl").write_text('{"input_ids": [1, 2], "labels": [1, 2]}\n' + line + "\n")
    status, out, err = run("--data", tmp_path / "records.jsonl")
    assert status == 2 and message in err and out == ""


def test_records_without_a_supervised_label_and_missing_files_are_errors(run, tmp_path):
    (tmp_path / "records.jsonl").write_text('{"input_ids": [1, 2], "labels": [-100, -100]}\n')
    status, _, err = run("--data", tmp_path / "records.jsonl")
    assert status == 2 and "no label is supervised" in err
    status, _, err = run("--data", tmp_path / "none.jsonl")
    assert status == 2 and "not found" in err
    status, _, err = run("--data", tmp_path / "records.jsonl", "--weights", tmp_path)
    assert status == 2 and "error:" in err


@pytest.mark.slow
def test_the_program_prints_one_line_of_json_and_an_error_without_a_traceback_from_any_folder(case, repo, tmp_path):
    folder, loss, count = case
    command = [sys.executable, str(repo / "tools" / "loss.py"), "--weights", str(folder / "weights"), "--data"]
    records = folder / "records.jsonl"
    done = subprocess.run([*command, str(records)], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"loss": pytest.approx(loss, abs=1e-5), "tokens": count}
    failed = subprocess.run([*command, "none"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
