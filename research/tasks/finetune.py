"""`make finetune`: all weights are trained on conversations."""

from __future__ import annotations

from research.core.config.schema import Config
from research.core.launch.ranks import launch, needs_launch
from research.tasks.training import build_decoder, conclude, examine, export, prepare_data, skills_exam, start, train


def run(cfg: Config) -> int:
    if needs_launch(cfg):
        return launch(cfg)
    with start(cfg) as job:
        data = prepare_data(job)
        decoder = build_decoder(job)
        exam = skills_exam(job, data)
        examine(job, exam, decoder, "before")
        trainer = train(job, decoder, data)
        export(job, trainer)
        after = examine(job, exam, decoder, "after")
        conclude(job, after)
    return 0
