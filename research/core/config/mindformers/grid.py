"""``parallel_config`` and ``use_parallel`` against the ranks that there are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from research.core.errors import ConfigError

if TYPE_CHECKING:
    from research.core.config.mindformers.yaml_file import Reading


@dataclass(frozen=True)
class Ranks:
    """``started``: by a launcher, or asked for as cards; None where nobody says. ``wanted``: ``use_parallel``, likewise."""

    started: int | None = None
    wanted: bool | None = None


def grid_words(
    out: Reading,
    grid: tuple[int, int, int],
    ranks: Ranks,
    where: str,
    *,
    mode: str,
    backend: str,
    exact: bool,
    micro: int | None,
) -> None:
    """Set ``parallel.*`` for ``grid`` (data, tensor, pipeline).

    A file's own grid must make as many cards as were started (``exact``); a published one is fitted to them. Without a
    launcher the grid says how many cards to start. ``micro``: micro batches that fill the pipeline.
    """
    if ranks.wanted is False:
        if ranks.started is not None and ranks.started > 1:
            raise ConfigError(
                f"use_parallel is False, and there are {ranks.started} ranks, which would all do the same",
                where=where,
                hint="--use_parallel True, or the command without the launcher",
            )
        return
    answers = mode not in ("train", "finetune")
    data, tensor, pipeline = grid
    if answers and data > 1 and not exact:
        data = 1
    started = ranks.started
    if started is not None and data * tensor * pipeline != started:
        if exact:
            raise ConfigError(
                f"data_parallel {data} x model_parallel {tensor} x pipeline_stage {pipeline} = {data * tensor * pipeline} "
                f"cards, and there are {started}",
                where=f"{where}: parallel_config",
                hint=_fitting(data, tensor, pipeline, started),
            )
        data, tensor, pipeline = _fitted(tensor, pipeline, started, answers)
        out.notes.append(
            f"{where}: the grid is fitted to {started} cards: data {data} x tensor {tensor} x pipeline {pipeline} "
            f"(published: {grid[0]} x {grid[1]} x {grid[2]})"
        )
    cards = data * tensor * pipeline
    if cards == 1:
        return
    if started is None:
        out.set("parallel.cards", cards)
    if backend == "torch":
        if tensor * pipeline > 1:
            out.set("parallel.shard", "full")
            out.notes.append(
                f"{where}: model_parallel {tensor} x pipeline_stage {pipeline} becomes parallel.shard=full on torch: "
                "whole layers on every card, their weights spread over all"
            )
    else:
        if answers and data > 1:
            raise ConfigError(
                f"data_parallel {data} would answer the same on every group of cards",
                where=f"{where}: parallel_config",
                hint=f"--parallel_config.data_parallel 1 --parallel_config.model_parallel {data * tensor}",
            )
        for key, size in (("tensor", tensor), ("pipeline", pipeline)):
            if size > 1:
                out.set(f"parallel.{key}", size)
    if micro is not None and not answers:
        out.set("train.accumulation", micro)


def _fitting(data: int, tensor: int, pipeline: int, started: int) -> str:
    if started == 1:
        return "--use_parallel False"
    if started % (tensor * pipeline) == 0:
        return f"--parallel_config.data_parallel {started // (tensor * pipeline)}"
    return f"{data * tensor * pipeline} ranks, or --parallel_config.model_parallel and its neighbours with a product of {started}"


def _fitted(tensor: int, pipeline: int, started: int, answers: bool) -> tuple[int, int, int]:
    """data, tensor, pipeline for ``started`` ranks, as near to the published ones as can be."""
    if answers:
        return 1, started, 1
    if started % (tensor * pipeline) == 0:
        return started // (tensor * pipeline), tensor, pipeline
    tensor = math.gcd(tensor, started)
    return started // tensor, tensor, 1
