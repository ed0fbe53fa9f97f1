"""One backend of mindspore_training.py, in its own process: build, say so, then some steps for every line read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(Path(__file__).resolve().parent)]

from _training_contender import Gate  # noqa: E402


def main() -> None:
    settings = json.loads(sys.argv[1])
    gate = Gate()
    import importlib

    importlib.import_module("research.core.mindspore.runtime").require_mindspore()
    half = importlib.import_module(f"research.core.{settings['backend']}.training")

    from research.core.config.compose import from_yaml
    from research.core.data.dataset import PackedDataset
    from research.core.run.folder import RunFolder
    from research.core.spec import DecoderSpec

    work = Path(settings["work"])
    cfg = from_yaml(work / "config.yaml")
    world = half.World.join(cfg)
    spec = DecoderSpec(**json.loads((work / "spec.json").read_text()))
    decoder = half.build_decoder(cfg, spec, None, half.resolve_dtype(cfg, world), world)
    if cfg.task.name == "lora":
        half.add_adapter(cfg, decoder, lambda line: None)
    with RunFolder(work / settings["backend"], task=cfg.task.name, model="benchmark") as run:
        trainer = half.Trainer(cfg, decoder, PackedDataset(work / "data" / "train"), None, run, world)
        next_batch, update, each = trainer.next_batch, trainer.update, settings["steps"]
        counts = {"tokens": 0, "targets": 0, "flops": 0.0}

        def gated_batch():
            if trainer.at.step % each == 0 and trainer.at.step < cfg.train.steps:
                gate.wait()
            return next_batch()

        def reported_update(micro_batches, agreed):
            before = trainer.meter.total.flops
            numbers = update(micro_batches, agreed)
            counts["tokens"] += agreed.tokens
            counts["targets"] += agreed.targets
            counts["flops"] += trainer.meter.total.flops - before
            if trainer.at.step % each == 0:
                gate.report(loss=numbers["loss"], **counts)
                counts.update(tokens=0, targets=0, flops=0.0)
            return numbers

        trainer.next_batch, trainer.update, trainer.save = gated_batch, reported_update, lambda: None
        gate.loaded()
        trainer.fit()
        sys.stdin.readline()


if __name__ == "__main__":
    main()
