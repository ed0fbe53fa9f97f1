"""MindSpore's trainer: torch's losses, resume (also of the other backend's checkpoints), and what stops it."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from mindspore import Tensor

from research.core.config.schema import LoraConfig
from research.core.errors import Interrupted, UserError
from research.core.mindspore.scaling import LossScale
from research.core.run.folder import RunFolder
from research.core.run.metrics import read_metrics
from tests.core.mindspore.training_case import build, train, train_torch
from tests.core.torch.training_case import MOE, config, write_data

pytestmark = pytest.mark.slow  # each training compiles its graphs
LORA = LoraConfig(rank=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "d", rows=30)


def _losses(run, kind="train") -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(run, kind)]


def _same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name]), name


@pytest.mark.parametrize("case", ["full", "lora", "moe"])
def test_five_steps_have_torchs_losses_norms_and_weights(tmp_path, data, case):
    """Packed rows, two micro batches a step, clipped gradients; with an evaluation where all weights are trained."""
    options = {
        "full": {},
        "lora": {"lora": LORA, "layers": 1},
        "moe": {"model_type": "qwen2_moe", "moe": MOE, "tied": False, "layers": 1},
    }[case]
    settings = {"steps": 5, "accumulation": 2, "clip_norm": 0.7, "head_chunk": 24}
    mine, weights = train(config(**settings), data, tmp_path / "a", evaluates=case == "full", **options)
    theirs, expected = train_torch(config(**settings), data, tmp_path / "b", **options)
    kind = None if case == "full" else "train"
    for one, other in zip(read_metrics(tmp_path / "a", kind), read_metrics(tmp_path / "b", kind), strict=True):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one.keys() == other.keys() and one.get("lr") == other.get("lr")
        for name in {"grad_norm", "router_balance"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-3)
    assert weights.keys() == expected.keys() and mine.tokens == theirs.tokens
    for name, value in weights.items():  # Adam magnifies rounding near zero: five steps of up to lr = 3e-3 each
        assert np.abs(value - expected[name]).max() < 2e-3, name


def test_three_steps_and_three_more_equal_six_bit_for_bit(tmp_path, data):
    """With dropout, whose choices go on too; without, see the test of a killed run."""
    options = {"lora": replace(LORA, dropout=0.3), "layers": 1, "evaluates": False}
    settings = {"steps": 6, "micro_batch": 4}
    whole, weights = train(config(**settings), data, tmp_path / "a", **options)
    with pytest.raises(Interrupted):  # asked to stop at step 2, saved and stopped after step 3
        train(config(**settings, sample_every=2), data, tmp_path / "b", sample=_interrupt, **options)
    assert [p.name for p in (tmp_path / "b" / "checkpoints").iterdir()] == ["step-00000003"]
    again, resumed = train(config(**settings, resume=True), data, tmp_path / "b", **options)
    _same(weights, resumed)
    assert (whole.loss, whole.tokens) == (again.loss, again.tokens)
    assert _losses(tmp_path / "a") == _losses(tmp_path / "b")


def _interrupt(model) -> str:
    os.kill(os.getpid(), signal.SIGTERM)
    return "stopping"


@pytest.mark.parametrize("first", ["torch", "mindspore"])
def test_checkpoint_goes_on_in_the_other_backend(tmp_path, data, capsys, first):
    begin, end = (train_torch, train) if first == "torch" else (train, train_torch)
    settings = {"micro_batch": 4, "schedule": "constant", "warmup_steps": 0}
    begin(config(steps=6, save_every=3, **settings), data, tmp_path / "a", layers=1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # as if it had ended after three steps
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-00000006")
    capsys.readouterr()
    summary, _ = end(config(steps=6, resume=True, **settings), data, tmp_path / "b", layers=1)
    assert f"the checkpoint is from {first}" in capsys.readouterr().err
    assert summary.steps == 6
    for (step, one), (_, other) in zip(_losses(tmp_path / "a"), _losses(tmp_path / "b"), strict=True):
        assert one == pytest.approx(other, abs=1e-4), step


def test_accumulation_checkpointing_and_loss_scaling_do_not_change_the_training(tmp_path, data, capsys):
    """The scale begins where the sum of squared gradients is beyond float32, as fp16's does where a gradient is."""
    one_layer = {"evaluates": False, "layers": 1}
    train(config(steps=3, micro_batch=6), data, tmp_path / "one", **one_layer)
    for name, scale, settings in (
        ("accumulated", LossScale(), {"micro_batch": 2, "accumulation": 3, "checkpointing": "full"}),
        ("selective, scaled", LossScale(2.0**70), {"micro_batch": 6, "checkpointing": "selective"}),
    ):
        with RunFolder(tmp_path / name, task="finetune", model="case") as run:
            trainer = build(config(steps=3, **settings), data, run, **one_layer)
            trainer.loss_scale = scale
            trainer.fit()
        for (_, a), (_, b) in zip(_losses(tmp_path / "one"), _losses(tmp_path / name), strict=True):
            assert a == pytest.approx(b, abs=1e-5), name
    assert "step 1: fp16 overflow, the loss scale is now" in capsys.readouterr().err
    assert 2.0**50 < scale.value < 2.0**70
    meta = json.loads(next((run.path / "checkpoints").glob("*/meta.json")).read_text())
    assert meta["extra"]["loss_scale"] == scale.value


@pytest.mark.parametrize("what", ["weight", "gradient"])
def test_non_finite_step_keeps_the_batch_and_makes_no_update(tmp_path, data, what):
    with RunFolder(tmp_path / "r", task="finetune", model="case") as run:
        trainer = build(config(micro_batch=4), data, run, evaluates=False, layers=1)
        if what == "weight":
            weight = trainer.decoder.model.layers[0].mlp.up_proj.weight
            value = weight.asnumpy().copy()
            value[0, 0] = math.nan
            weight.set_data(Tensor(value))
        else:
            trainer.optimizer.sums[0].set_data(Tensor(np.full(trainer.optimizer.sums[0].shape, math.inf, np.float32)))
        before = trainer.optimizer.trained()
        with pytest.raises(UserError, match=r"step 1: loss .*the update was not made.*\n.*lower train.lr"):
            trainer.fit()
        after = trainer.optimizer.trained()
    assert all(np.array_equal(before[name], after[name], equal_nan=True) for name in before)
    saved = np.load(tmp_path / "r" / "nonfinite-step1-rank0.npz")
    assert json.loads(str(saved["info"]))["step"] == 1 and saved["input_ids_0"].shape[0] == 4
    assert not (tmp_path / "r" / "checkpoints").exists()


KILLED = """
import sys, time
from pathlib import Path
from tests.core.mindspore.training_case import train
from tests.core.torch.training_case import config
folder, data = Path(sys.argv[1]), Path(sys.argv[2])
def wait(model):
    (folder / "reached").touch()
    time.sleep(120)
cfg = config(steps=8, save_every=2, async_save=True, sample_every=5, micro_batch=4)
train(cfg, data, folder / "b", sample=wait, evaluates=False, layers=1)
"""


def test_kill_between_two_saves_then_resume_equals_the_uninterrupted_run(tmp_path, data, repo):
    small = {"evaluates": False, "layers": 1}
    _, weights = train(config(steps=8, micro_batch=4), data, tmp_path / "a", **small)
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(data)]
    process = subprocess.Popen(command, cwd=repo, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 240
        while not (tmp_path / "reached").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
    assert (tmp_path / "reached").exists() and (tmp_path / "b" / "lock").exists(), err[-2000:]
    _, resumed = train(config(steps=8, micro_batch=4, resume=True), data, tmp_path / "b", **small)
    _same(weights, resumed)
    assert [step for step, _ in _losses(tmp_path / "b")] == list(range(1, 9))


def test_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, data):
    train_torch(config(steps=1, micro_batch=4), data, tmp_path / "a")
    with pytest.raises(UserError, match=r"model.layers was 2, is now 3"):
        train(config(steps=2, micro_batch=4, resume=True), data, tmp_path / "a", layers=3)
