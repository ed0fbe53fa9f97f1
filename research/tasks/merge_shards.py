"""``make merge-shards``: shards of any grid joined to one Hugging Face folder."""

from __future__ import annotations

from research.core.config.schema import Config
from research.core.errors import ConfigError
from research.tasks.reshard import run_to


def run(cfg: Config) -> int:
    """Join ``cfg.weights`` in ``cfg.output``."""
    if cfg.reshard.to not in ("auto", "hf"):
        raise ConfigError(
            "merge-shards writes one Hugging Face folder", where=f"reshard.to={cfg.reshard.to}", hint="make reshard"
        )
    return run_to(cfg, "hf")
