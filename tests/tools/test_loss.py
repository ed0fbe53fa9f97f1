"""tools/loss.py against transformers' own loss on the same records."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

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


def _run(repo, *words, cwd=None):
    command = [sys.executable, str(repo / "tools" / "loss.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


@pytest.mark.parametrize("packed", [[], ["--packed"]])
def test_loss_is_that_of_transformers_over_all_targets_packed_or_not(case, repo, packed, tmp_path):
    folder, loss, count = case
    done = _run(repo, "--weights", folder / "weights", "--data", folder / "records.jsonl", *packed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
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
def test_wrong_record_is_named_by_line(case, repo, tmp_path, line, message):
    folder = case[0]
    (tmp_path / "records.jsonl").write_text('{"input_ids": [1, 2], "labels": [1, 2]}\n' + line + "\n")
    done = _run(repo, "--weights", folder / "weights", "--data", tmp_path / "records.jsonl")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_records_without_a_supervised_label_and_missing_files_are_errors(case, repo, tmp_path):
    folder = case[0]
    (tmp_path / "records.jsonl").write_text('{"input_ids": [1, 2], "labels": [-100, -100]}\n')
    done = _run(repo, "--weights", folder / "weights", "--data", tmp_path / "records.jsonl")
    assert done.returncode == 2 and "no label is supervised" in done.stderr
    done = _run(repo, "--weights", folder / "weights", "--data", tmp_path / "none.jsonl")
    assert done.returncode == 2 and "not found" in done.stderr
    done = _run(repo, "--weights", tmp_path, "--data", tmp_path / "records.jsonl")
    assert done.returncode == 2 and "error:" in done.stderr
