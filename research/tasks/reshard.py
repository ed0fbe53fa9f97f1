"""``make reshard``: shards of one grid made into shards of another, in one pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from research.core.config.schema import Config
from research.core.errors import ConfigError
from research.core.weights.grid import Grid, parse_grid
from research.core.weights.meter import Meter
from research.core.weights.opened import OpenOptions, open_weights
from research.core.weights.reshard import ReshardOptions, reshard
from research.core.weights.sharded import PARTS, kind_of
from research.core.weights.tensors import dtype_from_name
from research.tasks.convert import open_probed, say
from research.tasks.named_model import check_named, preset


def run(cfg: Config) -> int:
    """Write ``cfg.weights`` to ``cfg.output`` in the grid that ``reshard`` describes, as what it is (or ``reshard.to``)."""
    return run_to(cfg, (kind_of(Path(cfg.weights).expanduser()) if cfg.weights else None) or PARTS)


def run_to(cfg: Config, default: str) -> int:
    """The three verbs; ``default`` is what ``reshard.to=auto`` means."""
    if not cfg.weights or not cfg.output:
        raise ConfigError(
            "a source and a target are needed",
            where="weights=" if not cfg.weights else "output=",
            hint=f"make {cfg.task.name.replace('_', '-')} WEIGHTS=folder OUTPUT=folder",
        )
    model = cfg.model.name if cfg.model.hub_id else None
    options, said = _options(cfg, default), _source_concat(cfg, default)
    opening = OpenOptions(
        concat=None if said == "probe" else said,
        config=cfg.convert.config,
        strategy=cfg.reshard.strategy,
        allow_pickle=cfg.allow_pickle,
        presets=preset(model) if model else None,
    )
    opened = open_probed(cfg.weights, opening) if said == "probe" else open_weights(cfg.weights, opening)
    if model:
        check_named(model, opened.spec, str(opened.path))
    with Meter({"hf": "merged", "parts": "split"}.get(options.to, "resharded")) as meter:
        summary = reshard(opened, cfg.output, options, opening, progress=meter, log=say)
    print("\n".join(summary.lines()), flush=True)
    print(f"written: {summary.target}", flush=True)
    return 0


def _options(cfg: Config, default: str) -> ReshardOptions:
    c, r = cfg.convert, cfg.reshard
    to = default if r.to == "auto" else r.to
    if to != "ranks" and r.target_strategy is not None:
        raise ConfigError(
            "strategy files lay out MindSpore ranks", where="reshard.target_strategy", hint="reshard.to=ranks"
        )
    if to == "hf" and r.grid is not None:
        raise ConfigError(
            "one folder has no grid", where=f"reshard.grid={r.grid}", hint="make reshard, or leave it out"
        )
    grid = parse_grid(r.grid, "reshard.grid") if r.grid else Grid(tensor=cfg.parallel.cards)
    return ReshardOptions(
        to=to,
        grid=replace(grid, stage_layers=tuple(r.stage_layers)),
        kv=r.kv,
        vocab=None if r.vocab == "auto" else r.vocab,
        dtype=dtype_from_name(c.dtype, "convert.dtype"),
        strategy=r.target_strategy,
        concat=(c.qkv_concat or "none") if to == "ranks" else "none",
        gmm=bool(c.use_gmm),
        tied_head=c.tied_head,
        files=c.files,
        document_names=r.document_names,
        shard_bytes=int(c.shard_gb * 1e9),
        allow_overflow=c.allow_overflow,
        overwrite=c.overwrite,
    )


def _source_concat(cfg: Config, default: str) -> str | None:
    """How the source joins q, k and v: qkv_concat is the MindFormers side's, source_concat the source's where both are."""
    to = default if cfg.reshard.to == "auto" else cfg.reshard.to
    return cfg.convert.source_concat or (cfg.convert.qkv_concat if to != "ranks" else None)
