"""The files of a checkpoint in shards: tensor-parallel parts, MindSpore ranks with their strategy files, torch's
distributed checkpoints. Pure planning: names, shapes, blocks and small files; nothing is read or written here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from research.core.errors import ConfigError, WeightsError
from research.core.weights.blocks import (
    Block,
    Box,
    Stored,
    box_elements,
    crop,
    full_box,
    intersect,
    logical_shapes,
)
from research.core.weights.formats import dcp
from research.core.weights.formats.safetensors import HF_METADATA, MINDSPORE_METADATA
from research.core.weights.grid import Sharding, rule, shard_stored, stage_tensors
from research.core.weights.plan import CKPT, DCP, SAFETENSORS, Target, TargetFile, index_file, shard_files
from research.core.weights.sharded import PARALLEL
from research.core.weights.strategy import Layout, Strategy, strategy_files

Make = Callable[[Stored], Target]  # a stored tensor with its dtype and recipe
Small = dict[str, bytes | Path]


# --- tensor-parallel parts ------------------------------------------------------------------------------------------


def parts_files(
    layout: Sequence[Stored], sharding: Sharding, make: Make, shard_bytes: int
) -> tuple[list[TargetFile], Small]:
    """``<rank>/model*.safetensors`` of every rank, with its index. Ranks count the tensor axis fastest, then the stage."""
    shapes = logical_shapes(sharding.spec)
    files: list[TargetFile] = []
    small: Small = {}
    for rank in range(sharding.grid.ranks):
        place = sharding.grid.place(rank)
        tensors = stage_tensors(layout, sharding, place.stage)
        targets = [make(shard_stored(stored, sharding, place.tensor, shapes)) for stored in tensors]
        own = shard_files(targets, shard_bytes, HF_METADATA)
        if len(own) > 1:
            small[f"{rank}/model.safetensors.index.json"] = index_file(own)
        files += [replace(file, path=f"{rank}/{file.path}") for file in own]
    return files, small


def part_small_files(config: Mapping, sides: Mapping[str, bytes | Path], sharding: Sharding) -> Small:
    """Every part's ``config.json`` (the whole model's, and how it was cut) and its copies of the model's other files.

    The whole model's own are beside the parts, so that the folder can stand for the model (``WEIGHTS=part_model``).
    """
    small: Small = {"config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(), **sides}
    ranks = sharding.grid.ranks
    for rank in range(ranks):
        own = {**config, PARALLEL: {**sharding.facts(), "rank": rank}, "rank": rank, "world_size": ranks}
        small[f"{rank}/config.json"] = (json.dumps(own, indent=2, ensure_ascii=False) + "\n").encode()
        small |= {f"{rank}/{name}": content for name, content in sides.items()}
    return small


# --- MindSpore's ranks ----------------------------------------------------------------------------------------------


def rank_strategy(layout: Sequence[Stored], sharding: Sharding) -> tuple[Strategy, dict[str, Stored]]:
    """How MindSpore cuts the tensors of a MindFormers layout on a grid, and the whole tensors (a vocabulary padded).

    Raises :class:`ConfigError` when a joined tensor cannot be cut so that each card gets its own heads.
    """
    whole = {stored.name: _padded(stored, sharding) for stored in layout}
    stages: list[dict[str, Layout]] = [{} for _ in range(sharding.grid.pipeline)]
    for stored in whole.values():
        how = _layout(stored, sharding)
        for stage in _stages(stored, sharding):
            stages[stage][stored.name] = how
    return Strategy(tuple(stages)), whole


def _padded(stored: Stored, sharding: Sharding) -> Stored:
    if sharding.vocab != "padded" or rule(stored.blocks[0].name) != (0, "vocab"):
        return stored
    return Stored(stored.name, (sharding.padded_vocab, *stored.shape[1:]), stored.blocks)


def _stages(stored: Stored, sharding: Sharding) -> tuple[int, ...]:
    if stored.name == "lm_head.weight":  # also the copy of a tied head
        return (sharding.grid.pipeline - 1,)
    return sharding.stages(stored.blocks[0].name)


def _layout(stored: Stored, sharding: Sharding) -> Layout:
    first = stored.blocks[0]
    how = sharding.layout(first.name, len(first.box))
    tensor_map = tuple(-1 if axis is None else how.tensor_map[axis] for axis in first.axes)
    how = replace(how, tensor_map=tensor_map)
    _check_cut(stored, how, sharding)
    return how


def _check_cut(stored: Stored, how: Layout, sharding: Sharding) -> None:
    """MindSpore cuts rectangles of the stored tensor; see that each card's holds its own heads and columns, and all of them."""
    shapes = {block.name: _logical_shape(block, stored.blocks) for block in stored.blocks}
    for tensor in range(sharding.grid.tensor):
        held = crop(stored, how.box(tensor, stored.shape))
        for name, shape in shapes.items():
            own = intersect(sharding.box(name, shape, tensor), full_box(shape))
            parts = [block.box for block in held.blocks if block.name == name]
            inside = own is not None and all(intersect(part, own) == part for part in parts)
            if own is None and not parts:
                continue
            if not inside or sum(map(box_elements, parts)) != box_elements(own):
                raise ConfigError(
                    f"{stored.name} joins several matrices; cut into {sharding.grid.tensor} by rows, as MindSpore does, "
                    f"card {tensor} would not get its own part of {name}",
                    where="qkv_concat",
                    hint="qkv_concat=grouped with kv heads that divide, or qkv_concat=none",
                )


def _logical_shape(block: Block, blocks: Sequence[Block]) -> tuple[int, ...]:
    own = [b.box for b in blocks if b.name == block.name]
    return tuple(max(box[axis][1] for box in own) for axis in range(len(block.box)))


def ranks_files(
    whole: Mapping[str, Stored], strategy: Strategy, make: Make, files: str, prefix: str = "checkpoint_"
) -> list[TargetFile]:
    """``rank_N/<prefix>N.ckpt`` (or .safetensors) of every rank: the tensors that the strategy places on its stage."""
    out = []
    suffix, metadata = (SAFETENSORS, MINDSPORE_METADATA) if files == SAFETENSORS else (CKPT, {})
    for rank in range(strategy.ranks):
        layouts = strategy.layouts(rank)
        targets = [
            make(crop(stored, layouts[name].box(strategy.device(rank), stored.shape)))
            for name, stored in whole.items()
            if name in layouts
        ]
        if files == SAFETENSORS:
            targets.sort(key=lambda target: target.name)  # as MindSpore writes them
        out.append(TargetFile(f"rank_{rank}/{prefix}{rank}.{suffix}", suffix, tuple(targets), metadata))
    return out


def place_as(layout: Sequence[Stored], strategy: Strategy, where: str) -> dict[str, Stored]:
    """The whole tensors of a model for given strategy files; all of them must be placed somewhere."""
    placed = {name for table in strategy.stages for name in table}
    absent = [stored.name for stored in layout if stored.name not in placed]
    if absent:
        raise WeightsError(
            f"the strategy files place {len(placed)} parameters, but not {absent[0]} (and {len(absent) - 1} more)",
            where=where,
            hint="strategy files of a run of this model and of the same qkv_concat",
        )
    return {stored.name: stored for stored in layout}


def strategy_small_files(strategy: Strategy, folder: str = "strategy", document_names: bool = False) -> Small:
    return {f"{folder}/{name}": content for name, content in strategy_files(strategy, document_names).items()}


# --- torch's distributed checkpoints ------------------------------------------------------------------------------------


def dcp_files(layout: Sequence[Stored], ranks: int, make: Make) -> tuple[list[TargetFile], Small]:
    """``__R_0.distcp`` of every rank and ``.metadata``. Tensors are cut along their first axis as FSDP2 does (equal
    chunks, the last ones shorter or absent); torch loads them onto any grid."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    chunks: list[list[tuple[Target, Box]]] = [[] for _ in range(ranks)]
    for stored in layout:
        rows = stored.shape[0]
        each = -(-rows // ranks)
        for rank in range(ranks):
            low, high = min(rank * each, rows), min((rank + 1) * each, rows)
            if low == high:
                continue
            box = ((low, high), *((0, extent) for extent in stored.shape[1:]))
            target = make(crop(stored, box))
            tensors[stored.name] = (target.dtype, stored.shape)
            chunks[rank].append((target, box))
    paths = [f"__{rank}_0.distcp" for rank in range(ranks)]
    files = [TargetFile(path, DCP, tuple(t for t, _ in own)) for path, own in zip(paths, chunks) if own]
    places = {path: [(t.name, t.dtype, box) for t, box in own] for path, own in zip(paths, chunks) if own}
    return files, {dcp.METADATA: dcp.metadata_bytes(tensors, places)}
