"""The torch trainer's small training (:mod:`tests.core.torch.training_case`) on MindSpore, from the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from mindspore import Tensor

from research.core.config.schema import Config, DeviceConfig, LoraConfig
from research.core.data.dataset import PackedDataset
from research.core.mindspore import runtime
from research.core.mindspore.decoder import Decoder
from research.core.mindspore.lora import add_lora
from research.core.mindspore.parallel import World
from research.core.mindspore.trainer import Trainer
from research.core.run.folder import RunFolder
from research.core.run.loop import Summary
from tests.core.torch import training_case


def decoder(*, lora: LoraConfig | None = None, **changes) -> Decoder:
    """The torch case's decoder, value by value."""
    runtime.start(DeviceConfig(kind="cpu"))
    theirs = training_case.decoder(**changes)
    model = Decoder(theirs.spec)
    values = dict(theirs.named_parameters())
    for parameter in model.get_parameters():
        parameter.set_data(Tensor(values[parameter.name].detach().numpy()))
    if lora is not None:
        add_lora(model, lora, seed=2)
    return model


def build(
    cfg: Config,
    data: Path,
    folder: RunFolder,
    *,
    lora=None,
    world=None,
    sample=None,
    prepare=None,
    evaluates: bool = True,
    **changes,
) -> Trainer:
    """``evaluates``: with held-out rows, whose loss takes a graph of its own."""
    if lora is not None:
        cfg.lora = lora
    model = decoder(lora=lora, **changes)
    if prepare is not None:
        prepare(model)
    splits = PackedDataset(data / "train"), PackedDataset(data / "eval") if evaluates else None
    return Trainer(cfg, model, *splits, folder, world or World(), sample=sample)


def train(cfg: Config, data: Path, run: Path, **options) -> tuple[Summary, dict[str, np.ndarray]]:
    """Run the training ``cfg`` in the folder ``run``; -> (summary, trained weights)."""
    world = options.get("world")
    with RunFolder(run, task="finetune", model="case", resume=cfg.train.resume, main=world is None or world.main) as f:
        trainer = build(cfg, data, f, **options)
        summary = trainer.fit()
    return summary, trainer.optimizer.trained()


def train_torch(cfg: Config, data: Path, run: Path, **options) -> tuple[Summary, dict[str, np.ndarray]]:
    """The same on torch."""
    torch.set_num_threads(1)
    summary, weights = training_case.train(cfg, data, run, **options)
    return summary, {name: value.numpy() for name, value in weights.items()}
