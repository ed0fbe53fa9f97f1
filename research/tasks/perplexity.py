"""The loss of weights on a data set (`--run_mode eval` of run_mindformer.py): mean over all supervised targets, and its exp."""

from __future__ import annotations

import math
import time
from pathlib import Path

from research.core.config.schema import Config
from research.core.data.dataset import IGNORE, PackedDataset
from research.core.errors import DataError, WeightsError
from research.core.launch.ranks import launch, needs_launch
from research.core.run.progress import Progress
from research.tasks.framework import half
from research.tasks.training import Job, build_decoder, prepare_data, start


def run(cfg: Config) -> int:
    if needs_launch(cfg):
        return launch(cfg)
    with start(cfg) as job:
        if job.weights is None:
            raise WeightsError("there are no weights to measure", where="task=perplexity", hint="WEIGHTS=<folder>")
        rows = PackedDataset(Path(prepare_data(job)) / "train")
        begin = time.perf_counter()
        total, targets = measure(job, rows)
        if not targets:
            raise DataError(
                "no token is supervised: there is no loss", where=cfg.data.source, hint="data.supervise=all"
            )
        loss = total / targets
        job.report["result"] = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),  # of random weights it may be beyond any number
            "targets": int(targets),
            "rows": len(rows),
        }
        job.run.say(
            f"loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.4g} over {int(targets):,} targets of {len(rows):,} rows "
            f"({time.perf_counter() - begin:.1f} s)"
        )
    return 0


def measure(job: Job, rows: PackedDataset) -> tuple[float, float]:
    """(sum of the cross-entropies, number of targets) over all rows, ``train.micro_batch`` of each card at a time."""
    cfg, world = job.cfg, job.world
    own = half(cfg.backend, "perplexity")
    decoder = build_decoder(job)
    if cfg.adapter:
        half(cfg.backend, "lora").load_adapter(decoder, cfg.adapter, allow_pickle=cfg.allow_pickle)
    loss_of = own.row_loss(cfg, decoder, rows, world)
    total, targets, size = 0.0, 0, cfg.train.micro_batch
    with Progress(job.run, len(rows), "measure", "rows") as bar:
        for begin in range(0, len(rows), size * world.data_size):
            first = begin + world.data_rank * size
            mine = range(first, min(first + size, len(rows)))
            batch = rows.rows(mine or [0], pad_to=own.PAD_TO)
            if not mine:  # every card takes part in every forward, some without a row of their own
                batch.labels[:] = IGNORE
            total, targets = total + loss_of(batch), targets + batch.supervised
            so_far = f"loss {total / max(1, targets):.3f}" if total else ""  # the last stage of a pipeline has it
            bar.update(min(begin + size * world.data_size, len(rows)), so_far)
    total, targets = world.sum(total, targets)
    return total, targets
