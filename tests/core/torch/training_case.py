"""A small training that the trainer's tests share: random documents, a two-layer decoder, a configuration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from research.core.config.schema import Config, LoraConfig
from research.core.data.dataset import PackedDataset
from research.core.data.folder import SplitWriter
from research.core.run.folder import RunFolder
from research.core.run.loop import Summary
from research.core.spec import DecoderSpec, MoeSpec
from research.core.torch.decoder import Decoder
from research.core.torch.lora import add_lora
from research.core.torch.parallel import World
from research.core.torch.trainer import Trainer

VOCAB = 61
MOE = MoeSpec(experts=4, top_k=2, expert_ffn=16, shared_ffn=24)


def spec(**changes) -> DecoderSpec:
    sizes = {
        "model_type": "qwen2",
        "layers": 2,
        "hidden": 32,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn": 48,
        "vocab": VOCAB,
        "max_positions": 128,
        "tied": True,
    }
    return DecoderSpec(**sizes | changes)


def write_data(folder: Path, *, rows: int = 40, seq_length: int = 32, packing: bool = True, seed: int = 0) -> Path:
    """A dataset folder of random documents that a model can partly learn (each token follows from the last)."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    splits = {}
    for split, count in (("train", rows), ("eval", max(2, rows // 8))):
        writer = SplitWriter(folder / split, seq_length, packing)
        for _ in range(count * (3 if packing else 1)):
            ids = np.empty(random.integers(5, seq_length // 2), np.int32)
            ids[0] = random.integers(1, VOCAB)
            for t in range(1, len(ids)):
                ids[t] = (7 * ids[t - 1] + random.integers(0, 3)) % (VOCAB - 1) + 1
            prompt = random.integers(1, len(ids) - 1)
            writer.add(np.concatenate([~ids[:prompt], ids[prompt:]]))
        writer.close()
        splits[split] = writer.counts()
    meta = {
        "format": 1,
        "seq_length": seq_length,
        "pad_id": 0,
        "max_id": VOCAB - 1,
        "tokenizer": "t",
        "template": "c",
        "splits": splits,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def config(**train) -> Config:
    cfg = Config()
    cfg.model.name, cfg.model.family = "case", "qwen2"
    settings = {
        "lr": 3e-3,
        "steps": 20,
        "epochs": None,
        "micro_batch": 2,
        "log_every": 1,
        "dtype": "fp32",
        "async_save": False,
    }
    for name, value in (settings | train).items():
        assert hasattr(cfg.train, name), name
        setattr(cfg.train, name, value)
    return cfg


def decoder(*, lora: LoraConfig | None = None, dtype: torch.dtype = torch.float32, **changes) -> Decoder:
    model = Decoder(spec(**changes)).init_weights(1).to(dtype)
    if lora is not None:
        add_lora(model, lora, seed=2, dtype=torch.float32)
    return model


def train(
    cfg: Config,
    data: Path,
    run: Path,
    *,
    lora: LoraConfig | None = None,
    world: World | None = None,
    dtype: torch.dtype = torch.float32,
    sample=None,
    prepare=None,
    **changes,
) -> tuple[Summary, dict[str, torch.Tensor]]:
    """Run the training ``cfg`` in the folder ``run``; -> (summary, trained weights)."""
    if lora is not None:
        cfg.lora = lora
    world = world or World(torch.device("cpu"))
    model = decoder(lora=lora, dtype=dtype, **changes)
    if prepare is not None:
        prepare(model)
    with RunFolder(run, task="finetune", model="case", resume=cfg.train.resume, main=world.main) as folder:
        trainer = Trainer(
            cfg, model, PackedDataset(data / "train"), PackedDataset(data / "eval"), folder, world, sample=sample
        )
        summary = trainer.fit()
    return summary, {name: value.clone() for name, value in trainer.optimizer.weights().items()}
