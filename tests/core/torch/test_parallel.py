"""Two processes over gloo against one process, plain and sharded, and what happens when one of them fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from research.core.config.schema import Config, LoraConfig
from research.core.launch.torchrun import needs_launch, torchrun_command
from research.core.run.metrics import read_metrics
from tests.core.torch.training_case import MOE, config, train, write_data

LORA = LoraConfig(rank=4, target_modules=["q_proj", "down_proj"])
MIXED = {"model_type": "qwen2_moe", "moe": MOE, "tied": False}

CASES = {
    "plain": {},
    "sharded": {},
    "sharded lora": {"lora": LORA},
    "plain moe": MIXED,
    "sharded moe": MIXED,
    "plain bf16": {"dtype": torch.bfloat16},
    "sharded bf16": {"dtype": torch.bfloat16},
    "sharded lora bf16": {"lora": LORA, "dtype": torch.bfloat16},
}
SETTINGS = {"steps": 6, "accumulation": 2, "router_aux": 0.0, "save_every": 3}

# One launch runs every case: starting processes takes longer than training.
WORKER = """
import sys
from pathlib import Path
from research.core.torch.parallel import World
from tests.core.torch.test_parallel import CASES, SETTINGS
from tests.core.torch.training_case import config, train
folder = Path(sys.argv[1])
cfg = config(micro_batch=2, **SETTINGS)
cfg.parallel.cards, cfg.parallel.timeout_s = 2, 60
world = World.join(cfg)
for case, changes in CASES.items():
    world.sharded = "sharded" in case
    train(cfg, folder / "d", folder / "two" / case, world=world, **changes)
world.leave()
"""

FAILING = """
from research.core.errors import UserError, run_cli
from research.core.torch.parallel import World
from tests.core.torch.training_case import config
def main(argv):
    cfg = config()
    cfg.parallel.cards, cfg.parallel.timeout_s = 2, 60
    world = World.join(cfg)
    if world.rank == 1:
        raise UserError("rank one has no data", where="here")
    world.sum(1.0)  # waits for the other rank
raise SystemExit(run_cli(main, []))
"""

LAUNCHER = """
import sys
from research.core.config.schema import Config
from research.core.launch.torchrun import launch
cfg = Config()
cfg.parallel.cards = 2
sys.exit(launch(cfg, sys.argv[1:]))
"""


def _launch(repo, folder, script):
    (folder / "worker.py").write_text(script)
    return subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(folder / "worker.py"), str(folder)],
        cwd=repo,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def _weights(run):
    return load_file(run / "checkpoints" / "step-00000006" / "model.safetensors")


@pytest.fixture(scope="module")
def two(tmp_path_factory, repo):
    folder = tmp_path_factory.mktemp("two")
    write_data(folder / "d")
    done = _launch(repo, folder, WORKER)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(tmp_path, two, case):
    summary, _ = train(config(micro_batch=4, **SETTINGS), two / "d", tmp_path / "one", **CASES[case])
    a, b = (list(read_metrics(run, "train")) for run in (tmp_path / "one", two / "two" / case))
    exact = "bf16" not in case  # gradients rounded to 8 bits are added in another order
    assert [r["loss"] for r in a] == pytest.approx([r["loss"] for r in b], abs=1e-5 if exact else 5e-3)
    assert [r["grad_norm"] for r in a] == pytest.approx([r["grad_norm"] for r in b], rel=1e-4 if exact else 2e-2)
    evaluated = next(read_metrics(two / "two" / case, "eval"))["loss"]
    assert evaluated == pytest.approx(summary.eval_loss, abs=1e-5 if exact else 5e-3)
    a, b = _weights(tmp_path / "one"), _weights(two / "two" / case)
    assert a.keys() == b.keys()
    for name in a:  # Adam divides by the gradient's own size: rounding of tiny gradients shows at a part of lr
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4 if exact else 1e-2)


@pytest.mark.slow
def test_sharded_checkpoint_resumes_on_one_card(tmp_path, two):
    run = tmp_path / "run"
    shutil.copytree(two / "two" / "sharded", run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    train(config(micro_batch=4, **SETTINGS, resume=True), two / "d", run)
    a, b = _weights(two / "two" / "sharded"), _weights(run)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_failing_rank_ends_all_with_its_own_message_and_status(tmp_path, repo):
    done = _launch(repo, tmp_path, FAILING)
    assert done.returncode == 2, done.stderr
    assert "error: here: rank one has no data" in done.stderr and "rank 1 ended with status 2" in done.stderr


def test_launch_is_needed_once_and_its_command_is_torchruns(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    cfg = Config()
    assert not needs_launch(cfg)
    cfg.parallel.cards = 4
    assert needs_launch(cfg)
    assert torchrun_command(cfg.parallel, ["run.py", "task=x"]) == [
        "torchrun",
        "--standalone",
        "--nproc-per-node=4",
        "run.py",
        "task=x",
    ]
    cfg.parallel.nodes, cfg.parallel.node_rank, cfg.parallel.master_addr = 2, 1, "10.0.0.1"
    line = " ".join(torchrun_command(cfg.parallel, ["run.py"]))
    assert "--nnodes=2 --node-rank=1 --master-addr=10.0.0.1 --master-port=29500 --nproc-per-node=4" in line
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert not needs_launch(cfg)
