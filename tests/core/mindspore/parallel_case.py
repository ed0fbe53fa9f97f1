"""A small training on any grid of workers, from the same weights: what tests run alone and on several workers.

Nothing here imports torch: each of four workers would. The program of a worker reads its cases from a JSON file.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from research.core.config.schema import Config, LoraConfig
from research.core.data.dataset import PackedDataset
from research.core.errors import ConfigError
from research.core.mindspore import runtime
from research.core.run.folder import RunFolder
from research.core.spec import DecoderSpec, MoeSpec

DENSE = DecoderSpec(
    "qwen2", layers=2, hidden=32, heads=4, kv_heads=2, head_dim=16, ffn=48, vocab=61, max_positions=128, tied=True
)  # neither kv heads nor vocabulary divide by 4
MOE = replace(DENSE, model_type="qwen2_moe", moe=MoeSpec(4, 2, 16, 24, aux_coefficient=0.1), tied=False)
SPECS = {
    "dense": DENSE,
    "thin": replace(DENSE, layers=1),
    "moe": replace(MOE, layers=1),
    "mixed": replace(MOE, moe=replace(MOE.moe, dense_layers=(1,))),  # one stage with experts, one without
}


def config(
    *,
    steps: int = 3,
    rows: int = 4,
    accumulation: int = 1,
    tensor: int = 1,
    stages: tuple[int, ...] | list[int] = (),
    shard: str = "none",
    checkpointing: str = "none",
    resume: bool = False,
) -> Config:
    """``rows`` sequences a micro batch, ``stages``: the layers of each stage of a pipeline.

    Adam divides a gradient by its own size: of one near zero, rounding decides. An epsilon far above the rounding makes the
    update smooth, so that what differs after it would be a mistake.
    """
    cfg = Config()
    cfg.model.name, cfg.model.family = "case", "qwen2"
    train = cfg.train
    train.lr, train.eps, train.steps, train.epochs, train.schedule = 1e-3, 1e-3, steps, None, "constant"
    train.micro_batch, train.accumulation, train.checkpointing = rows, accumulation, checkpointing
    train.log_every, train.dtype, train.async_save, train.resume, train.warmup_steps = 1, "fp32", False, resume, 0
    train.clip_norm, train.head_chunk = 0.7, 48
    cfg.parallel.tensor, cfg.parallel.shard = tensor, shard
    cfg.parallel.pipeline, cfg.parallel.stage_layers = max(1, len(stages)), list(stages)
    cfg.device.kind, cfg.device.threads = "cpu", 1
    return cfg


def train(
    cfg: Config, data: Path, run: Path, world, kind: str = "dense", *, lora: float | None = None, evaluates: bool = True
) -> dict[str, np.ndarray]:
    """Run the training ``cfg`` in the folder ``run``, with its held-out loss at the end; ``lora``: of an adapter with so much
    dropout. -> the trained weights, whole."""
    from research.core.mindspore.decoder import Decoder
    from research.core.mindspore.lora import add_lora
    from research.core.mindspore.trainer import Trainer
    from research.core.mindspore.weights import init_weights

    spec = SPECS[kind]
    decoder = init_weights(Decoder(spec, plan=world.plan(spec)), 1)
    if lora is not None:
        cfg.lora = LoraConfig(rank=4, dropout=lora)
        add_lora(decoder, cfg.lora, seed=2)
    with RunFolder(run, task="finetune", model="case", resume=cfg.train.resume, main=world.main) as folder:
        held_out = PackedDataset(data / "eval") if evaluates else None
        trainer = Trainer(cfg, decoder, PackedDataset(data / "train"), held_out, folder, world)
        trainer.fit()
        return trainer.optimizer.trained()


def work(folder: Path) -> None:
    """The trainings of ``cases.json``, one after another in one cluster of workers."""
    from research.core.mindspore.parallel import World

    world = saved = None
    for case in json.loads((folder / "cases.json").read_text()):
        name, fails = case.pop("name"), case.pop("fails", None)
        kind, data = case.pop("kind", "dense"), Path(case.pop("data"))
        options = {"lora": case.pop("lora", None), "evaluates": case.pop("evaluates", True)}
        run, strict = folder / case.pop("run", name), case.pop("strict", False)
        cfg = config(**case)
        cfg.auto_transform = not strict
        if world is None:
            world = World.join(cfg)
        world.stand(cfg)
        world.folder = folder
        if fails == world.rank:
            while saved is not None and not saved.exists():
                time.sleep(0.05)
            raise SystemExit("this worker fails on purpose")
        try:
            weights = train(cfg, data, run, world, kind, **options)
        except ConfigError as refused:
            (folder / f"{name}-{world.rank}.error").write_text(str(refused))
            continue
        saved = folder / f"{name}.npz"
        if world.main:
            np.savez(folder / "saving.npz", **weights)
            (folder / "saving.npz").rename(saved)
    if world is not None:
        world.leave()


if __name__ == "__main__":
    runtime.require_mindspore()
    work(Path(sys.argv[1]))
