"""``make split``: weights cut for several cards."""

from __future__ import annotations

from research.core.config.schema import Config
from research.tasks.reshard import run_to


def run(cfg: Config) -> int:
    """Cut ``cfg.weights`` into ``cfg.output`` (``0/``, ``1/``, .. unless ``reshard.to`` says otherwise)."""
    return run_to(cfg, "parts")
