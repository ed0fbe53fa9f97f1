"""`make pretrain`: every token of plain text is learned."""

from __future__ import annotations

from research.core.config.schema import Config
from research.core.launch.ranks import launch, needs_launch
from research.tasks.training import build_decoder, conclude, export, prepare_data, start, train


def run(cfg: Config) -> int:
    if needs_launch(cfg):
        return launch(cfg)
    with start(cfg) as job:
        data = prepare_data(job)
        decoder = build_decoder(job)
        trainer = train(job, decoder, data)
        export(job, trainer)
        conclude(job)
    return 0
