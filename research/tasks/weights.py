"""``make weights``: a released model into ``weights/<model>``, from a hub or as a link to a local folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from research.core.config.compose import REPO
from research.core.config.schema import Config
from research.core.errors import ConfigError, Interrupted, WeightsError
from research.core.weights.hub import download, hub
from research.core.weights.meter import Meter
from research.core.weights.opened import OpenOptions, open_huggingface
from research.tasks.named_model import check_named


def model_folder(name: str) -> Path:
    """Where ``make weights MODEL=name`` puts a model and other tasks find it."""
    return REPO / "weights" / name


def run(cfg: Config) -> int:
    """Fetch ``cfg.model`` (or link ``cfg.weights``) and check that its files are whole and of that model."""
    target = Path(cfg.output).expanduser() if cfg.output else model_folder(cfg.model.name)
    source = Path(cfg.weights).expanduser() if cfg.weights else target
    if not cfg.weights:
        _fetch(cfg, target)
    opened = open_huggingface(source, OpenOptions(allow_pickle=cfg.allow_pickle))
    if cfg.model.hub_id:
        check_named(cfg.model.name, opened.spec, str(source / "config.json"))
    if cfg.weights:
        _link(source, target)
    size = sum(entry.bytes for entry in opened.used().values())
    print(
        f"{target}: {len(opened.tensors)} tensors, {opened.spec.parameters() / 1e9:.3f} B parameters, {size / 1e9:.2f} GB"
    )
    return 0


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        raise WeightsError("a folder is here already", where=target, hint="remove it, or name another OUTPUT")
    os.symlink(source.resolve(), target, target_is_directory=True)
    print(f"{target} -> {source.resolve()}")


def _fetch(cfg: Config, target: Path) -> None:
    if cfg.model.hub_id is None:
        raise ConfigError(
            f"{cfg.model.name} has no published weights",
            where="model",
            hint="MODEL=<released model>, or WEIGHTS=<folder>",
        )
    source = hub(cfg.hub.source, cfg.hub.revision)
    print(f"{cfg.model.hub_id} from {source.endpoint} to {target}", file=sys.stderr)
    try:
        with Meter("fetched") as meter:
            download(
                source,
                cfg.model.hub_id,
                target,
                allow_pickle=cfg.allow_pickle,
                progress=meter,
                log=lambda line: print(line, file=sys.stderr),
            )
    except KeyboardInterrupt:
        raise Interrupted("\ninterrupted: the same command continues where it stopped") from None
