"""One task on several cards: whether this process should start the ranks, and how the backend does it."""

from __future__ import annotations

from collections.abc import Sequence

from research.core.config.schema import Config
from research.core.launch import msrun, torchrun


def needs_launch(cfg: Config) -> bool:
    """Whether this process should start one process per card instead of doing the work itself."""
    return (msrun if cfg.backend == "mindspore" else torchrun).needs_launch(cfg)


def launch(cfg: Config, words: Sequence[str] | None = None) -> int:
    """Run ``words`` (None: this program's own command line) once per card; returns the first failure's exit status.

    One failed rank ends all of them, and its own error is shown.
    """
    return (msrun if cfg.backend == "mindspore" else torchrun).launch(cfg, words)
