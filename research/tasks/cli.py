"""The entry of every task: words to configuration, configuration to the task's ``run``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from research.core.config.backends import check_sharing, without_effect
from research.core.config.compose import compose, compose_resumed, from_yaml, group_options
from research.core.config.flags import translate
from research.core.config.schema import Config
from research.core.errors import ConfigError, run_cli
from research.core.launch.environment import is_scheduler

# Tasks that go on from a run folder take its model unless another is named.
_FROM_RUN = ("predict", "chat", "serve", "export", "merge")
# Tasks that have no MindSpore half (yet).
_TORCH_ONLY = ("merge", "serve")


def main(argv: Sequence[str] | None = None, family: str | None = None) -> int:
    """Run the task that ``argv`` names; returns the exit status. ``family`` is that of the script it was called by."""
    return run_cli(lambda words: run_task(words, family), argv)


def run_task(words: Sequence[str], family: str | None = None) -> int:
    """Compose ``words`` and run the task; raises UserError for what a user can mend."""
    if any(word in ("-h", "--help", "help") for word in words):
        print(_help())
        return 0
    if is_scheduler():
        return bring_workers_together()
    config = configuration(words, family)
    if config.backend == "mindspore" and config.task.name in _TORCH_ONLY:
        raise ConfigError(
            f"{config.task.name} runs on torch only in this version", where="backend=mindspore", hint="BACKEND=torch"
        )
    return importlib.import_module(f"research.tasks.{config.task.name}").run(config)


def configuration(words: Sequence[str], family: str | None = None) -> Config:
    """The settings that ``words`` come to, flags included; what has no effect is noted. Raises :class:`ConfigError`."""
    translation = translate(words, family)
    words = translation.words
    for note in translation.notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    config = compose(words)
    if config.train.resume and (Path(config.run) / "config.yaml").is_file():
        config = compose_resumed(words, config.run)
    named = {word.split("=", 1)[0] for word in words}
    if "model" not in named:
        _model_from_folder(config)
    elif family is not None and config.model.family != family:
        raise ConfigError(
            f"{config.model.name} is a model of the family {config.model.family}, not {family}",
            where=f"research/{family}/run_{family}.py",
            hint=f"python research/{config.model.family}/run_{config.model.family}.py",
        )
    check_sharing(config)
    for note in without_effect(config):
        print(f"note: {note}", file=sys.stderr, flush=True)
    return config


def bring_workers_together() -> int:
    """The part of MindSpore's scheduler, which msrun starts with the workers' command line: it takes no part in the work."""
    from mindspore.communication import init

    init()  # returns when the workers have left
    return 0


def _model_from_folder(config: Config) -> None:
    # Without MODEL, a run folder or a weight folder says itself which model it is.
    from research.tasks.sources import model_of_folder

    if config.task.name in _FROM_RUN or config.train.resume:
        for folder in (config.weights, config.run):
            if folder and (Path(folder) / "config.yaml").is_file():
                config.model = from_yaml(Path(folder) / "config.yaml").model
                return
    if config.weights and (Path(config.weights) / "config.json").is_file():
        config.model = model_of_folder(Path(config.weights))


def _help() -> str:
    return "\n".join(
        [
            "usage: run_<family>.py task=TASK model=MODEL [setting=value ...]",
            f"tasks: {', '.join(group_options('task'))}",
            f"models: {', '.join(group_options('model'))}",
            f"data sets: {', '.join(group_options('data'))}, or a file, folder or glob",
            "settings: research/core/config/schema.py; README.md has examples",
        ]
    )
