"""The documents' training commands with a tiny model and paths filled in: from Alpaca records to trained weights on two workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import yaml

from research.core.errors import run_cli
from research.core.launch.host import free_port
from research.tasks.convert_scripts import qwen1_5_convert
from research.tasks.preprocess_scripts import chatml_alpaca, preprocess
from tests import small_model
from tests.conftest import load_script

pytest.importorskip("mindspore", reason="the documents train with MindSpore")
pytestmark = pytest.mark.slow

MODEL = "qwen1_5_tiny"
# One layer: every worker compiles its graphs. A file for a size that no preset has needs the difference beside it.
SIZE = f"model={MODEL} model.hf.num_hidden_layers=1"


@pytest.fixture(scope="module")
def run(repo, tmp_path_factory):
    """Run words in a folder (default: the repository); stops the test with what was printed when they fail."""

    def start(*words, cwd=repo, status=0, **env):
        full = {**os.environ, "PY": sys.executable, "DEVICE": "cpu", "OMP_NUM_THREADS": "1", **env}
        done = subprocess.run(list(map(str, words)), cwd=cwd, env=full, capture_output=True, text=True, timeout=600)
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        return done

    return start


@pytest.fixture(scope="module")
def prepared(run, repo, tmp_path_factory):
    """A folder with alpaca.mindrecord, vocabulary, a whole checkpoint in model_dir/rank_0, and two YAML files."""
    folder = tmp_path_factory.mktemp("documents")
    records = [{"instruction": f"What is {n} plus {n}?", "input": "", "output": f"It is {2 * n}."} for n in range(24)]
    (folder / "alpaca_data.json").write_text(json.dumps(records))
    small_model.save(folder / "hf", MODEL, 1, eos=True)

    def go(program, *words):
        assert run_cli(program, [str(word) for word in words]) == 0

    go(chatml_alpaca, "--data_path", folder / "alpaca_data.json", "--output_path", folder / "messages.json")
    go(partial(preprocess, "qwen1_5"), "--input_glob", folder / "messages.json", "--vocab_file", folder / "hf" / "vocab.json",
       "--merges_file", folder / "hf" / "merges.txt", "--seq_length", 64, "--output_file", folder / "alpaca.mindrecord")  # fmt: skip
    ckpt = folder / "model_dir" / "rank_0" / "tiny.ckpt"
    go(qwen1_5_convert, "--torch_ckpt_dir", folder / "hf", "--mindspore_ckpt_path", ckpt)
    size = [
        f"model.hf.vocab_size={json.loads((folder / 'hf' / 'config.json').read_text())['vocab_size']}",
        "model.hf.num_hidden_layers=1",
        "parallel.cards=2",
        "data.seq_length=64",
        "train.micro_batch=2",
    ]
    for task in ("finetune", "lora"):
        words = [f"model={MODEL}", f"task={task}", *size, "train.epochs=1", "train.lr=1e-3", "train.keep_last=1"]
        go(load_script(repo / "tools" / "mindformers_yaml.py").main, *words, "--output", folder / f"{task}.yaml")
    return folder


def test_finetune_on_two_workers_with_run_singlenode(run, repo, prepared):
    out = prepared / "run_finetune"
    command = (
        f"python qwen1_5/run_qwen1_5.py --config {prepared}/finetune.yaml --load_checkpoint {prepared}/model_dir "
        f"--use_parallel True --run_mode finetune --auto_trans_ckpt True --train_data {prepared}/alpaca.mindrecord "
        f"--vocab_file {prepared}/hf/vocab.json --merges_file {prepared}/hf/merges.txt --output_dir {out} train.log_every=1 {SIZE}"
    )
    launcher = repo / "research" / "run_singlenode.sh"
    done = run(
        "bash", launcher, command, "RANK_TABLE_FILE", "[0,2]", "2", cwd=repo / "research", LOG_MF_PATH=prepared / "log"
    )
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["backend"], config["parallel"]["cards"], config["model"]["name"]) == ("mindspore", 2, MODEL)
    assert config["data"]["format"] in ("auto", "mindrecord") and config["train"]["lr"] == 1e-3
    report = json.loads((out / "report.json").read_text())
    assert report["training"]["steps"] == 6  # 24 records, two of them on each of two workers a step
    assert (out / "weights" / "config.json").is_file() and (out / "loss.png").is_file()
    assert "trained 6 steps" in done.stdout + done.stderr
    assert (prepared / "log" / "rank_1" / "mindformer.log").is_file()


def test_lora_on_two_workers_with_msrun_launcher(run, repo, prepared):
    out = prepared / "run_lora"
    command = (
        f"run_mindformer.py --register_path research/qwen1_5 --config {prepared}/lora.yaml --load_checkpoint {prepared}/hf "
        f"--use_parallel True --run_mode finetune --auto_trans_ckpt True --train_dataset {prepared}/alpaca.mindrecord "
        f"--output_dir {out} train.log_every=1 {SIZE}"
    )
    port = free_port(first=23000)
    run("bash", "scripts/msrun_launcher.sh", command, 2, port, prepared / "msrun_log")
    assert yaml.safe_load((out / "config.yaml").read_text())["task"]["name"] == "lora"
    assert json.loads((out / "report.json").read_text())["training"]["steps"] == 6
    assert (out / "adapter" / "adapter_config.json").is_file()
    assert (prepared / "msrun_log" / "worker_1.log").is_file()


def test_a_grid_that_is_not_the_launchers_ends_both_ranks_with_the_reason(run, repo, prepared):
    command = (
        f"run_mindformer.py --config {prepared}/finetune.yaml --run_mode finetune --parallel_config.data_parallel 4 "
        f"--train_dataset {prepared}/alpaca.mindrecord {SIZE}"
    )
    done = run(
        "bash", "scripts/msrun_launcher.sh", command, 2, free_port(first=23100), prepared / "failed_log", status=2
    )
    assert "--parallel_config.data_parallel 2" in done.stdout + done.stderr
    assert done.stderr.count("error: ") <= 2
