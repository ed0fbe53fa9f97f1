"""The training loop: the loss it reports and minimises, accumulation, packing, precision, and what stops it."""

from __future__ import annotations

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from research.core.config.schema import LoraConfig
from research.core.data.dataset import PackedDataset
from research.core.errors import Interrupted, UserError
from research.core.run.flops import document_pairs, step_flops
from research.core.run.folder import RunFolder
from research.core.run.loop import planned_steps
from research.core.run.metrics import read_metrics
from research.core.torch.parallel import World
from research.core.torch.trainer import Trainer
from tests.core.torch.training_case import MOE, config, decoder, spec, train, write_data

CPU = World(torch.device("cpu"))


def _losses(run) -> list[float]:
    return [r["loss"] for r in read_metrics(run, "train")]


def _documents(data: PackedDataset, rows):
    """Every document of ``rows`` on its own: ids and labels."""
    for row in rows:
        batch = data.rows([row])
        for number in range(1, batch.doc_ids.max() + 1):
            at = batch.doc_ids[0] == number
            yield torch.from_numpy(batch.input_ids[:, at[:]]), torch.from_numpy(batch.labels[:, at])


def test_step_loss_is_the_mean_over_all_targets_of_the_global_batch(tmp_path):
    data = write_data(tmp_path / "d")
    cfg = config(steps=1, micro_batch=2, accumulation=3)
    cfg.data.shuffle = False
    train(cfg, data, tmp_path / "r")
    # the same by F.cross_entropy on one document at a time, no packing, no chunks
    model, total, count = decoder(), 0.0, 0
    for ids, labels in _documents(PackedDataset(data / "train"), range(6)):
        logits = model(ids)[0, :-1]
        total += F.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum").item()
        count += int((labels[0, 1:] != -100).sum())
    assert _losses(tmp_path / "r")[0] == pytest.approx(total / count, abs=1e-6)


@pytest.mark.parametrize("packing", [True, False])
def test_accumulation_and_micro_batch_size_do_not_change_the_training(tmp_path, packing):
    data = write_data(tmp_path / "d", packing=packing)
    one, weights = train(config(steps=6, micro_batch=6), data, tmp_path / "a")
    _, other = train(config(steps=6, micro_batch=2, accumulation=3), data, tmp_path / "b")
    assert _losses(tmp_path / "a") == pytest.approx(_losses(tmp_path / "b"), abs=1e-5)
    for name in weights:
        torch.testing.assert_close(weights[name], other[name], rtol=0, atol=2e-4)  # Adam magnifies rounding near zero
    assert one.steps == 6 and one.eval_loss == pytest.approx(
        list(read_metrics(tmp_path / "b", "eval"))[-1]["loss"], abs=1e-4
    )


def test_packed_training_equals_documents_apart(tmp_path):
    """Loss and gradients of a packed global batch against the same documents one by one (1e-5)."""
    data = PackedDataset(write_data(tmp_path / "d") / "train")
    cfg = config(micro_batch=4)
    model, plain = decoder(), decoder()
    with RunFolder(tmp_path / "r", task="finetune", model="case") as run:
        trainer = Trainer(cfg, model, data, None, run, CPU)
        batch = data.rows([0, 1, 2, 3], pad_to=0)
        assert batch.doc_ids.max() > 1
        summed, _ = trainer.objective(*trainer.to_device(batch))
        (summed / batch.supervised).backward()
    total = 0.0
    for ids, labels in _documents(data, range(4)):
        loss = F.cross_entropy(plain(ids)[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum") / batch.supervised
        loss.backward()
        total += loss.item()
    assert summed.item() / batch.supervised == pytest.approx(total, abs=1e-5)
    for (name, mine), (_, other) in zip(model.named_parameters(), plain.named_parameters()):
        error = (mine.grad - other.grad).norm() / other.grad.norm().clamp(min=1e-8)
        assert error < 1e-5, name


def test_loss_falls_and_the_run_folder_is_complete(tmp_path):
    data = write_data(tmp_path / "d")
    cfg = config(steps=60, micro_batch=4, lr=1e-2, eval_every=20, save_every=20, keep_last=2, async_save=True)
    summary, _ = train(cfg, data, tmp_path / "r")
    losses = _losses(tmp_path / "r")
    assert losses[-1] < losses[0] - 1.0 and summary.eval_loss < losses[0] - 0.5
    assert [r["step"] for r in read_metrics(tmp_path / "r", "eval")] == [20, 40, 60]
    assert sorted(p.name for p in (tmp_path / "r" / "checkpoints").iterdir()) == ["step-00000040", "step-00000060"]
    assert {"loss.png", "metrics.jsonl", "log.txt", "command.txt", "tensorboard"} <= {
        p.name for p in (tmp_path / "r").iterdir()
    }
    meta = json.loads((tmp_path / "r" / "checkpoints" / "step-00000060" / "meta.json").read_text())
    assert meta["step"] == 60 and meta["position"] == 240 and meta["tokens"] == summary.tokens
    record = list(read_metrics(tmp_path / "r", "train"))[-1]
    assert record["tokens_per_second"] > record["supervised_per_second"] > 0
    assert record["mfu"] > 0 and record["memory"] > 2**20 and record["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, dropout=0.1)])
def test_bf16_with_fp32_masters_follows_the_fp32_training(tmp_path, lora):
    data = write_data(tmp_path / "d")
    train(config(steps=30, lr=1e-2), data, tmp_path / "a", lora=lora)
    train(config(steps=30, lr=1e-2, dtype="bf16"), data, tmp_path / "b", lora=lora, dtype=torch.bfloat16)
    a, b = np.array(_losses(tmp_path / "a")), np.array(_losses(tmp_path / "b"))
    assert np.abs(a - b).max() < 0.05 * a[0] and b[-1] < b[0] - (0.3 if lora is None else 0.02)


def test_fp32_masters_keep_updates_that_bf16_weights_would_lose(tmp_path):
    data = write_data(tmp_path / "d")
    _, kept = train(config(steps=3, lr=1e-6, weight_decay=0.0), data, tmp_path / "a", dtype=torch.bfloat16)
    _, lost = train(
        config(steps=3, lr=1e-6, weight_decay=0.0, master="same"), data, tmp_path / "b", dtype=torch.bfloat16
    )
    start = dict(decoder(dtype=torch.bfloat16).named_parameters())["model.layers.0.input_layernorm.weight"].float()
    name = "model.layers.0.input_layernorm.weight"
    assert kept[name].dtype == torch.float32 and not torch.equal(kept[name], start)
    assert lost[name].dtype == torch.bfloat16 and torch.equal(lost[name].float(), start)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, dropout=0.2)])
def test_activation_checkpointing_changes_no_number(tmp_path, mode, lora):
    data = write_data(tmp_path / "d")
    _, plain = train(config(steps=4), data, tmp_path / "a", lora=lora)
    _, saved = train(config(steps=4, checkpointing=mode), data, tmp_path / "b", lora=lora)
    assert _losses(tmp_path / "a") == _losses(tmp_path / "b")
    assert all(torch.equal(plain[name], saved[name]) for name in plain)


def test_moe_trains_with_its_router_loss(tmp_path):
    data = write_data(tmp_path / "d")
    moe = {"model_type": "qwen2_moe", "moe": MOE, "tied": False}

    def unbalance(model):
        for layer in model.model.layers:
            layer.mlp.gate.weight.data *= 100

    train(config(steps=15, router_aux=0.0), data, tmp_path / "a", prepare=unbalance, **moe)
    train(config(steps=15, router_aux=1.0), data, tmp_path / "b", prepare=unbalance, **moe)
    without, with_aux = [[r["router_balance"] for r in read_metrics(tmp_path / x, "train")] for x in "ab"]
    assert with_aux[0] == pytest.approx(without[0]) and with_aux[0] > MOE.top_k + 0.05
    # top_k is what experts chosen equally often have
    assert with_aux[-1] < MOE.top_k + 0.6 * (without[-1] - MOE.top_k)


def test_lora_trains_the_adapter_only(tmp_path):
    data = write_data(tmp_path / "d")
    lora = LoraConfig(rank=4, target_modules=["q_proj", "v_proj"])
    _, weights = train(config(steps=10), data, tmp_path / "r", lora=lora)
    assert all(".lora_" in name for name in weights) and len(weights) == 8
    assert all(value.abs().sum() > 0 for value in weights.values())
    losses = _losses(tmp_path / "r")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("what", ["weight", "gradient"])
def test_non_finite_step_keeps_the_batch_and_makes_no_update(tmp_path, what):
    data = write_data(tmp_path / "d")
    model = decoder()
    with RunFolder(tmp_path / "r", task="finetune", model="case") as run:
        trainer = Trainer(config(), model, PackedDataset(data / "train"), None, run, CPU)
        if what == "weight":
            model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
        else:
            model.model.norm.weight.register_hook(lambda grad: grad * math.inf)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.raises(UserError, match=r"step 1: loss .*the update was not made.*\n.*lower train.lr"):
            trainer.fit()
    assert all(torch.equal(before[n], p) or (what == "weight" and "up_proj" in n) for n, p in model.named_parameters())
    saved = np.load(tmp_path / "r" / "nonfinite-step1-rank0.npz")
    assert json.loads(str(saved["info"]))["step"] == 1 and saved["input_ids_0"].shape[0] == 2
    assert not (tmp_path / "r" / "checkpoints").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_a_checkpoint_and_names_the_command_to_go_on(tmp_path, number):
    data = write_data(tmp_path / "d")
    cfg = config(steps=1000, sample_every=5)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stop:
        train(cfg, data, tmp_path / "r", sample=lambda model: os.kill(os.getpid(), number) or "text")
    assert f"make finetune RUN={tmp_path / 'r'} ARGS=train.resume=true" in str(stop.value)
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["step-00000006"]
    assert next(read_metrics(tmp_path / "r", "sample"))["text"] == "text"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_sampling_leaves_the_training_as_it_was(tmp_path):
    data = write_data(tmp_path / "d")
    lora = LoraConfig(rank=4, dropout=0.3)
    train(config(steps=6), data, tmp_path / "a", lora=lora)
    train(
        config(steps=6, sample_every=2),
        data,
        tmp_path / "b",
        lora=lora,
        sample=lambda m: str(torch.rand(1)) and m.eval() and "x",
    )
    assert _losses(tmp_path / "a") == _losses(tmp_path / "b")


@pytest.mark.slow
def test_clock_ends_the_training_with_the_schedule_run_out(tmp_path):
    data = write_data(tmp_path / "d")
    cfg = config(steps=None, max_minutes=0.02, lr=1e-3)
    summary, _ = train(cfg, data, tmp_path / "r")
    rates = [r["lr"] for r in read_metrics(tmp_path / "r", "train")]
    assert 1.0 < summary.seconds < 6.0 and summary.steps > 3
    assert rates[-1] < 0.3 * max(rates) and rates.index(max(rates)) < len(rates) / 2


def test_steps_from_epochs(tmp_path):
    cfg = config(steps=None, epochs=2)
    assert planned_steps(cfg, rows=10, rows_per_step=4) == 5
    cfg.train.epochs = None
    with pytest.raises(UserError, match="all null"):
        planned_steps(cfg, 10, 4)


def test_flops_are_six_per_parameter_and_token_without_attention_and_head():
    s = spec(tied=False)
    matrices = s.parameters() - 2 * s.vocab * s.hidden
    assert step_flops(s, tokens=10, targets=0, pairs=0, frozen=False) == 6 * matrices * 10
    assert step_flops(s, tokens=10, targets=4, pairs=0, frozen=True) == 4 * (matrices * 10 + s.vocab * s.hidden * 4)
    assert document_pairs(np.array([[1, 1, 2, 0], [1, 1, 1, 1]])) == 4 + 1 + 16


@pytest.mark.slow
def test_compiled_layers_train_as_plain_ones(tmp_path):
    data = write_data(tmp_path / "d")
    train(config(steps=3), data, tmp_path / "a", layers=1)
    train(config(steps=3, compile=True), data, tmp_path / "b", layers=1)
    assert _losses(tmp_path / "a") == pytest.approx(_losses(tmp_path / "b"), abs=1e-4)
