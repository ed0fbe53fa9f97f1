"""Checkpoints: whole or not there, checked when read, and a resumed training equal to the uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from research.core.config.schema import LoraConfig
from research.core.errors import Interrupted, UserError
from research.core.run.checkpoint import PARTS, Checkpoint, Checkpoints, load_checkpoint
from research.core.run.metrics import read_metrics
from research.core.torch import checkpoint as module
from research.core.torch.checkpoint import TorchTables, random_state, restore_random_state
from tests.core.torch.training_case import MOE, config, train, write_data

DROPOUT = LoraConfig(rank=4, dropout=0.2)


def _checkpoint(step: int) -> Checkpoint:
    return Checkpoint({"step": step, "loss": 1.5}, {"w": torch.full((4,), float(step))}, {"w.step": torch.ones(())})


def _interrupt(model) -> str:
    os.kill(os.getpid(), signal.SIGTERM)
    return "stopping"


def _same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- resume is the same training ---


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, DROPOUT], ids=["full", "lora with dropout"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_ten_steps_and_ten_more_equal_twenty_bit_for_bit(tmp_path, lora, packing):
    data = write_data(tmp_path / "d", packing=packing, rows=30)  # more than one epoch
    settings = {"steps": 20, "accumulation": 2, "eval_every": 5}
    whole, weights = train(config(**settings), data, tmp_path / "a", lora=lora)
    with pytest.raises(Interrupted):  # asked to stop at step 9, saved and stopped after step 10
        train(config(**settings, sample_every=9), data, tmp_path / "b", lora=lora, sample=_interrupt)
    assert [p.name for p in (tmp_path / "b" / "checkpoints").iterdir()] == ["step-00000010"]
    again, resumed = train(config(**settings, resume=True), data, tmp_path / "b", lora=lora)
    _same(weights, resumed)
    assert (whole.eval_loss, whole.loss, whole.tokens) == (again.eval_loss, again.loss, again.tokens)
    for kind in ("train", "eval"):
        a, b = ([(r["step"], r["loss"]) for r in read_metrics(tmp_path / run, kind)] for run in "ab")
        assert a == b  # no step twice, none missing


@pytest.mark.slow
@pytest.mark.parametrize("background", [True, False])
def test_bf16_masters_and_moe_resume_bit_for_bit(tmp_path, background):
    data = write_data(tmp_path / "d")
    case = {"dtype": torch.bfloat16, "model_type": "qwen2_moe", "moe": MOE, "tied": False}
    _, weights = train(config(steps=8), data, tmp_path / "a", **case)
    settings = {"steps": 8, "async_save": background}
    with pytest.raises(Interrupted):
        train(config(**settings, sample_every=3), data, tmp_path / "b", sample=_interrupt, **case)
    _, resumed = train(config(**settings, resume=True), data, tmp_path / "b", **case)
    _same(weights, resumed)


KILLED = """
import sys, time
from pathlib import Path
from tests.core.torch.test_checkpoint import DROPOUT
from tests.core.torch.training_case import config, train
folder, kind = Path(sys.argv[1]), sys.argv[2]
def wait(model):
    (folder / "reached").touch()
    time.sleep(60)
cfg = config(steps=20, save_every=5, async_save=True, sample_every=13, keep_last=3)
train(cfg, folder / "d", folder / "b", lora=DROPOUT if kind == "lora" else None, sample=wait)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_kill_between_two_saves_then_resume_equals_the_uninterrupted_run(tmp_path, repo, kind):
    lora = DROPOUT if kind == "lora" else None
    data = write_data(tmp_path / "d")
    _, weights = train(config(steps=20), data, tmp_path / "a", lora=lora)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), kind], cwd=repo, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "reached").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "reached").exists() and (tmp_path / "b" / "lock").exists()
    (tmp_path / "b" / "checkpoints" / ".step-00000015.partial").mkdir()  # as if killed while it was writing
    _, resumed = train(config(steps=20, save_every=5, keep_last=3, resume=True), data, tmp_path / "b", lora=lora)
    _same(weights, resumed)
    assert [r["step"] for r in read_metrics(tmp_path / "b", "train")] == list(range(1, 21))
    names = sorted(p.name for p in (tmp_path / "b" / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000015", "step-00000020"]


def test_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys):
    data = write_data(tmp_path / "d")
    _, weights = train(config(steps=12, save_every=4, keep_last=3), data, tmp_path / "a")
    for step, damage in ((12, b"x"), (8, None)):
        file = tmp_path / "a" / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + damage if damage else content[:-7])
    _, again = train(config(steps=12, resume=True), data, tmp_path / "a")
    err = capsys.readouterr().err
    assert err.count("the checkpoint is damaged") == 2 and "resumed at step 4" in err
    _same(weights, again)
    names = sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir())
    assert names == ["damaged-step-00000008", "damaged-step-00000012", "step-00000004", "step-00000012"]
    load_checkpoint(tmp_path / "a" / "checkpoints" / "step-00000012", TorchTables())  # written anew


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    data = write_data(tmp_path / "d")
    _, weights = train(config(steps=4), data, tmp_path / "a")
    before = (tmp_path / "a" / "checkpoints" / "step-00000004" / "meta.json").read_bytes()
    _, again = train(config(steps=4, resume=True), data, tmp_path / "a")
    _same(weights, again)
    assert (tmp_path / "a" / "checkpoints" / "step-00000004" / "meta.json").read_bytes() == before


def test_resume_without_a_checkpoint_starts_at_the_beginning_and_says_so(tmp_path, capsys):
    data = write_data(tmp_path / "d")
    _, weights = train(config(steps=3), data, tmp_path / "a")
    (tmp_path / "b").mkdir()
    _, again = train(config(steps=3, resume=True), data, tmp_path / "b")
    assert "starts at its beginning" in capsys.readouterr().err
    _same(weights, again)


# --- settings that a checkpoint cannot go on with ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("layers", "model.layers was 2, is now 3"),
        ("rank", "lora.rank was 4, is now 8"),
        ("method", "task was lora, is now full"),
        ("seq_length", "data.seq_length was 32, is now 16"),
        ("shuffle", "data.seed"),
        ("base", "weights was"),
        ("master", "train.master"),
    ],
)
def test_resume_with_settings_that_break_it_is_refused_by_name(tmp_path, change, message):
    data = write_data(tmp_path / "d")
    lora = LoraConfig(rank=4, target_modules=["q_proj"])
    dtype = torch.bfloat16 if change == "master" else torch.float32
    train(config(steps=2), data, tmp_path / "a", lora=lora if change != "master" else None, dtype=dtype)
    cfg, case = config(steps=4, resume=True), {"lora": lora}
    if change == "layers":
        case["layers"] = 3
    elif change == "rank":
        case["lora"] = LoraConfig(rank=8, target_modules=["q_proj"])
    elif change == "method":
        case["lora"] = None
    elif change == "seq_length":
        data = write_data(tmp_path / "d2", seq_length=16)
    elif change == "shuffle":
        cfg.data.seed = 5
    elif change == "base":
        case["prepare"] = lambda model: model.model.layers[0].mlp.up_proj.weight.data.add_(0.1)
    elif change == "master":
        cfg.train.master, case = "same", {"dtype": dtype}
    with pytest.raises(UserError, match=message):
        train(cfg, data, tmp_path / "a", **case)


def test_resume_announces_changes_that_it_can_live_with(tmp_path, capsys):
    data = write_data(tmp_path / "d")
    train(config(steps=2), data, tmp_path / "a")
    train(config(steps=4, micro_batch=4, lr=1e-4, resume=True), data, tmp_path / "a")
    assert "global_batch was 2, is now 4" in capsys.readouterr().err


# --- files ---


def test_checkpoint_round_trip_and_keep_last(tmp_path):
    store = Checkpoints(tmp_path / "c", TorchTables(), keep_last=2)
    for step in (1, 2, 3):
        store.save(_checkpoint(step))
    store.wait()
    assert [p.name for p in store.paths()] == ["step-00000002", "step-00000003"]
    found = store.newest()
    assert found.meta["step"] == 3 and found.model["w"].tolist() == [3.0] * 4
    meta = json.loads((store.paths()[-1] / "meta.json").read_text())
    assert set(meta["files"]) == {f"{part}.safetensors" for part in PARTS}


def test_error_while_writing_surfaces_and_the_former_checkpoint_stays(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path / "c", TorchTables(), keep_last=1)
    store.save(_checkpoint(1))
    store.wait()

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(module, "save_file", full)
    store.save(_checkpoint(2))
    with pytest.raises(OSError, match="No space"):
        store.wait()
    store.wait()  # raised once
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-00000001"]
    assert store.newest().meta["step"] == 1


def test_save_returns_before_the_disk_and_the_next_one_waits(tmp_path, monkeypatch):
    original, order = module.save_file, []

    def slow(tensors, path):
        time.sleep(0.1)
        order.append(path.parent.name)
        original(tensors, path)

    monkeypatch.setattr(module, "save_file", slow)
    store = Checkpoints(tmp_path / "c", TorchTables(), keep_last=5)
    start = time.monotonic()
    store.save(_checkpoint(1))
    assert time.monotonic() - start < 0.08
    store.save(_checkpoint(2))
    store.wait()
    assert order == [".step-00000001.partial"] * 3 + [".step-00000002.partial"] * 3


def test_random_state_of_all_generators_comes_back():
    cpu = torch.device("cpu")
    random.gauss(0, 1), np.random.normal()  # leaves a cached second value
    state = random_state(cpu)
    first = torch.rand(3), np.random.normal(size=3), random.gauss(0, 1), random.random()
    restore_random_state(state, cpu)
    again = torch.rand(3), np.random.normal(size=3), random.gauss(0, 1), random.random()
    assert torch.equal(first[0], again[0]) and (first[1] == again[1]).all() and first[2:] == again[2:]
