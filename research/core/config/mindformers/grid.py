"""``parallel_config`` and ``use_parallel`` against the ranks that there are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from research.core.errors import ConfigError

if TYPE_CHECKING:
    from research.core.config.mindformers.yaml_file import Reading, YamlFile


@dataclass(frozen=True)
class Ranks:
    """``started``: by a launcher, or asked for as cards; None where nobody says. ``wanted``: ``use_parallel``, likewise."""

    started: int | None = None
    wanted: bool | None = None


# Backends whose training splits layers over cards. On the others every card trains whole layers with the same number of
# sequences a step, and what fills the memory is spread.
SPLITS_LAYERS = ("mindspore",)


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
    splits_layers: bool,
) -> None:
    """Set ``parallel.*`` for ``grid`` (data, tensor, pipeline).

    A file's own grid must make as many cards as were started (``exact``); a published one is fitted to them. Without a
    launcher the grid says how many cards to start. ``micro``: micro batches that fill the pipeline; ``splits_layers``: the
    settings are to be as the grid has them. Else training follows it as far as its backend can (:data:`SPLITS_LAYERS`).
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
    accumulation = micro if micro is not None else int(out.words.get("train.accumulation", "1"))
    follows = splits_layers or backend in SPLITS_LAYERS
    if not answers and tensor * pipeline > 1 and not follows:
        _whole_layers(
            out, data, cards, accumulation, backend, where, f"model_parallel {tensor} x pipeline_stage {pipeline}"
        )
        return
    if answers and data > 1:
        raise ConfigError(
            f"data_parallel {data} would answer the same on every group of cards",
            where=f"{where}: parallel_config",
            hint=f"--parallel_config.data_parallel 1 --parallel_config.model_parallel {data * tensor}",
        )
    if backend == "mindspore":
        for key, size in (("tensor", tensor), ("pipeline", pipeline)):
            if size > 1:
                out.set(f"parallel.{key}", size)
    if micro is not None and not answers:
        out.set("train.accumulation", micro)


def stage_words(out: Reading, file: YamlFile, layers: int) -> None:
    """Set ``parallel.stage_layers`` where ``offset`` lists how many layers each stage has beyond layers // stages."""
    key, stages = "model.model_config.offset", int(out.words.get("parallel.pipeline", "1"))
    more = file.section("model.model_config").get("offset")
    if stages == 1 or not isinstance(more, list):
        return
    file.take(key)
    if len(more) != stages or not all(isinstance(n, int) for n in more) or sum(more) != layers % stages:
        raise ConfigError(
            f"{more} does not say where the {layers % stages} layers go that {layers} are beyond {stages} even stages",
            where=f"{file.where}: {key}",
            hint=f"{[int(stage < layers % stages) for stage in range(stages)]}",
        )
    out.set("parallel.stage_layers", f"[{','.join(str(layers // stages + n) for n in more)}]")


def _whole_layers(out: Reading, data: int, cards: int, accumulation: int, backend: str, where: str, split: str) -> None:
    """Every card with whole layers: as many sequences a step as the grid has, or as few as the cards can have."""
    groups = data * accumulation
    accumulation, rest = max(1, groups // cards), groups % cards
    out.set("parallel.shard", "full")
    out.set("train.accumulation", accumulation)
    note = f"{where}: {split} becomes parallel.shard=full: {backend} trains whole layers on every card"
    if rest or accumulation * cards != groups:
        batch = int(out.words.get("train.micro_batch", "1"))
        note += f"; {batch * accumulation * cards} sequences a step, where the grid has {batch * groups}"
    out.notes.append(note)


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
