"""MindSpore's strategy files: how each parameter of a distributed run lies on the devices of its pipeline stage.

``ckpt_strategy_rank_N.ckpt`` (one per rank, equal within a stage) and the merged file of all stages are protocol buffers
(``node_strategy.proto`` of MindSpore 2.x, ``ParallelStrategyMap``); merged names carry their stage: ``0-model.layers..``.
Written so that ``mindspore.transform_checkpoints``, ``rank_list_for_transform`` and ``merge_pipeline_strategys`` take
them, and read back without MindSpore. The JSON form that newer versions write is read too.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from research.core.errors import WeightsError
from research.core.weights.blocks import Box
from research.core.weights.wire import WireError, bytes_field, fields, int_field, int_fields, numbers, signed

RANK_FILE = "ckpt_strategy_rank_{rank}.ckpt"
MERGED_FILE = "merged_ckpt_strategy.ckpt"
REPLICATED = -1


@dataclass(frozen=True)
class Layout:
    """How one parameter is cut over the devices of a stage.

    ``dev_matrix`` arranges the stage's devices, the last axis fastest. ``tensor_map`` has for every axis of the
    parameter the device axis that cuts it, counted from the last (0), or -1 for none; several device axes for one
    parameter axis are a tuple, the slowest first. ``opt_size`` > 1: each shard is cut once more along its first axis
    over the devices that hold copies of it, ``opt_step`` ranks apart (the parallel optimizer; -1: over all of them).
    """

    dev_matrix: tuple[int, ...]
    tensor_map: tuple[int | tuple[int, ...], ...]
    opt_step: int = 0
    opt_size: int = 0

    @property
    def devices(self) -> int:
        return math.prod(self.dev_matrix)

    def parts(self) -> tuple[int, ...]:
        """Into how many parts each axis of the parameter is cut (the parallel optimizer not counted)."""
        return tuple(math.prod(self._extent(axis) for axis in _axes(entry)) for entry in self.tensor_map)

    def optimizer_parts(self) -> int:
        if self.opt_size == -1:
            return self.devices // math.prod(self.parts())
        return max(self.opt_size, 1)

    def full_shape(self, local: Sequence[int]) -> tuple[int, ...]:
        """Shape of the parameter of which a device holds a shard of shape ``local``."""
        self._check_rank(local)
        cuts = list(self.parts())
        if cuts:
            cuts[0] *= self.optimizer_parts()
        return tuple(extent * cut for extent, cut in zip(local, cuts))

    def box(self, device: int, full: Sequence[int]) -> Box:
        """The part of a parameter of shape ``full`` that ``device`` (0 .. devices - 1 within the stage) holds."""
        self._check_rank(full)
        places = self._places(device)
        out = []
        for extent, entry, cut in zip(full, self.tensor_map, self.parts()):
            if extent % cut:
                raise WeightsError(
                    f"an axis of {extent} cannot be cut into {cut} equal parts",
                    hint="are these strategy files of this model?",
                )
            index = 0
            for axis in _axes(entry):
                index = index * self._extent(axis) + places[axis]
            size = extent // cut
            out.append((index * size, (index + 1) * size))
        if out and self.optimizer_parts() > 1:
            out[0] = self._optimizer_part(device, out[0])
        return tuple(out)

    def _optimizer_part(self, device: int, rows: tuple[int, int]) -> tuple[int, int]:
        parts = self.optimizer_parts()
        height = rows[1] - rows[0]
        if height % parts:
            raise WeightsError(f"{height} rows cannot be cut into {parts} equal parts of the parallel optimizer")
        # The copies of a shard lie along the device axes that cut nothing; the parallel optimizer numbers them.
        used = {axis for entry in self.tensor_map for axis in _axes(entry)}
        places, index = self._places(device), 0
        for axis in reversed(range(len(self.dev_matrix))):
            if axis not in used:
                index = index * self._extent(axis) + places[axis]
        start = rows[0] + (index % parts) * (height // parts)
        return start, start + height // parts

    def _places(self, device: int) -> list[int]:
        """Coordinate of ``device`` on every device axis, counted from the last."""
        out = []
        for extent in reversed(self.dev_matrix):
            out.append(device % extent)
            device //= extent
        return out

    def _extent(self, axis: int) -> int:
        return self.dev_matrix[len(self.dev_matrix) - 1 - axis]

    def _check_rank(self, shape: Sequence[int]) -> None:
        if len(shape) != len(self.tensor_map):
            raise WeightsError(
                f"a layout of {len(self.tensor_map)} axes for a parameter of shape {list(shape)}",
                hint="do these strategy files belong to this checkpoint?",
            )


def _axes(entry: int | tuple[int, ...]) -> tuple[int, ...]:
    entries = entry if isinstance(entry, tuple) else (entry,)
    return tuple(axis for axis in entries if axis != REPLICATED)


@dataclass(frozen=True)
class Strategy:
    """The layouts of a run: one table of parameters for every pipeline stage."""

    stages: tuple[Mapping[str, Layout], ...]

    @property
    def stage_devices(self) -> int:
        for layouts in self.stages:
            for layout in layouts.values():
                return layout.devices
        return 1

    @property
    def ranks(self) -> int:
        return self.stage_devices * len(self.stages)

    def stage(self, rank: int) -> int:
        return rank // self.stage_devices

    def device(self, rank: int) -> int:
        return rank % self.stage_devices

    def layouts(self, rank: int) -> Mapping[str, Layout]:
        return self.stages[self.stage(rank)]


# --- writing ------------------------------------------------------------------------------------------------------


def encode_stage(layouts: Mapping[str, Layout], stage: int, merged: bool = False) -> bytes:
    """The ``ParallelStrategyMap`` of one stage; ``merged``: parameter names carry the stage."""
    return int_field(1, 1) + _encode_items(layouts, stage, merged)


def encode_merged(strategy: Strategy) -> bytes:
    """The file that ``merge_pipeline_strategys`` would write of all stages."""
    return int_field(1, 1) + b"".join(
        _encode_items(layouts, stage, merged=True) for stage, layouts in enumerate(strategy.stages)
    )


def _encode_items(layouts: Mapping[str, Layout], stage: int, merged: bool) -> bytes:
    out = []
    for name, layout in layouts.items():
        # MindSpore lists its operators here; its tools take the stage from the first entry and no more.
        cuts = bytes_field(2, int_fields(1, layout.parts()))
        out.append(bytes_field(2, bytes_field(1, name) + bytes_field(2, int_field(1, stage) + cuts)))
    for name, layout in layouts.items():
        full = f"{stage}-{name}" if merged else name
        out.append(bytes_field(3, bytes_field(1, full) + bytes_field(2, _encode_layout(layout))))
    return b"".join(out)


def _encode_layout(layout: Layout) -> bytes:
    if any(isinstance(entry, tuple) for entry in layout.tensor_map):
        maps = b"".join(bytes_field(2, int_fields(1, _tuple(entry))) for entry in layout.tensor_map)
    else:
        maps = bytes_field(2, int_fields(1, layout.tensor_map))
    return b"".join(
        (
            bytes_field(1, int_fields(1, layout.dev_matrix)),
            maps,
            bytes_field(3, b""),  # param_split_shape and indices_offset: for uneven embedding tables only
            bytes_field(4, b""),
            int_field(5, 0),
            int_field(6, layout.opt_step),
            int_field(7, layout.opt_size),
        )
    )


def _tuple(entry: int | tuple[int, ...]) -> tuple[int, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def strategy_files(strategy: Strategy, document_names: bool = False) -> dict[str, bytes]:
    """File name -> contents: one file per rank and the merged one.

    ``document_names``: ``ckpt_strategy_rank_N_rank_N.ckpt``, as MindFormers of the documents' time named them.
    """
    encoded = [encode_stage(layouts, stage) for stage, layouts in enumerate(strategy.stages)]
    files = {}
    for rank in range(strategy.ranks):
        name = RANK_FILE.format(rank=f"{rank}_rank_{rank}" if document_names else rank)
        files[name] = encoded[strategy.stage(rank)]
    files[MERGED_FILE] = encode_merged(strategy)
    return files


# --- reading ------------------------------------------------------------------------------------------------------

_RANK = re.compile(r"rank_(\d+)\.(?:ckpt|json)$")


def read_strategy(path: str | os.PathLike) -> Strategy:
    """Read a merged file, one rank's file (a run of one stage), or a folder of either.

    Raises :class:`WeightsError` for files that are no strategy files, or a folder in which a stage is missing.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise WeightsError("strategy file or folder not found", where=path)
    if path.is_file():
        return _assemble(_read_file(path), path)
    merged = sorted(path.glob("merged_ckpt_strategy*"))
    if merged:
        return _assemble(_read_file(merged[0]), merged[0])
    files = sorted(
        (p for p in path.iterdir() if _RANK.search(p.name)), key=lambda p: int(_RANK.search(p.name).group(1))
    )
    if not files:
        raise WeightsError(
            "no strategy files here (ckpt_strategy_rank_N.ckpt or merged_ckpt_strategy.ckpt)", where=path
        )
    stages: dict[int, dict[str, Layout]] = {}
    seen: set[bytes] = set()
    for file in files:
        content = file.read_bytes()
        if content in seen:
            continue
        seen.add(content)
        for stage, layouts in _read_file(file).items():
            if stages.setdefault(stage, layouts) != layouts:
                raise WeightsError(f"contradicts another file about stage {stage}", where=file)
    return _assemble(stages, path)


def _assemble(stages: dict[int, dict[str, Layout]], where: Path) -> Strategy:
    count = max(stages, default=-1) + 1
    absent = [stage for stage in range(count) if stage not in stages]
    if count == 0 or absent:
        raise WeightsError(
            f"stage {absent[0]} of {count} is missing" if absent else "no parameter is described here", where=where
        )
    strategy = Strategy(tuple(stages[stage] for stage in range(count)))
    if any(layout.devices != strategy.stage_devices for table in strategy.stages for layout in table.values()):
        raise WeightsError("its layouts are of different numbers of devices", where=where)
    return strategy


def _read_file(path: Path) -> dict[int, dict[str, Layout]]:
    """Stage -> parameter -> layout."""
    try:
        if path.suffix == ".json":
            stage, items = _parse_json(json.loads(path.read_text(encoding="utf-8")))
        else:
            stage, items = _parse(path.read_bytes())
    except (WireError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, IndexError, AttributeError):
        raise WeightsError("not a MindSpore strategy file", where=path) from None
    stages: dict[int, dict[str, Layout]] = {}
    for name, layout in items:
        number, _, rest = name.partition("-")
        own, plain = (int(number), rest) if rest and number.isdigit() else (stage, name)
        stages.setdefault(own, {})[plain] = layout
    return stages


def _parse(data: bytes) -> tuple[int, list[tuple[str, Layout]]]:
    stage, first, items = 0, True, []
    for number, value in fields(data):
        if number == 2 and first:
            stage = next((v for f, v in fields(_message(value, 2)) if f == 1), 0)
            first = False
        elif number == 3:
            name = bytes(_message(value, 1)).decode()
            items.append((name, _parse_layout(_message(value, 2))))
    return stage, items


def _message(data: memoryview, wanted: int) -> memoryview:
    found = [value for number, value in fields(data) if number == wanted]
    if not found or isinstance(found[-1], int):
        raise WireError(f"field {wanted} is missing")
    return found[-1]


def _parse_layout(data: memoryview) -> Layout:
    devices: tuple[int, ...] = ()
    maps: list[tuple[int, ...]] = []
    step = size = 0
    for number, value in fields(data):
        if number == 1:
            devices = _dims(value)
        elif number == 2:
            maps.append(_dims(value))
        elif number == 3 and _dims(value):
            raise WeightsError("unevenly cut parameters (param_split_shape) are not read here")
        elif number == 6:
            step = signed(value)
        elif number == 7:
            size = signed(value)
    return Layout(devices, _tensor_map(maps), step, size)


def _dims(message: memoryview) -> tuple[int, ...]:
    return tuple(signed(n) for number, value in fields(message) if number == 1 for n in numbers(value))


def _tensor_map(maps: list[tuple[int, ...]]) -> tuple[int | tuple[int, ...], ...]:
    if len(maps) == 1:
        return maps[0]
    # One list per axis; MindSpore leaves an empty one for a scalar.
    return tuple(entry[0] if len(entry) == 1 else entry for entry in maps if entry)


def _parse_json(content: dict) -> tuple[int, list[tuple[str, Layout]]]:
    operators = list(content.get("parallel_strategy_item", {}).values())
    stage = int(operators[0]["stage"]) if operators else 0
    items = []
    for name, item in content["parallel_layout_item"].items():
        if item.get("param_split_shape"):
            raise WeightsError("unevenly cut parameters (param_split_shape) are not read here")
        tensor_map = tuple(tuple(e) if isinstance(e, list) else int(e) for e in item["tensor_map"])
        layout = Layout(
            tuple(item["dev_matrix"]),
            tensor_map,
            int(item.get("opt_weight_shard_step", 0)),
            int(item.get("opt_weight_shard_size", 0)),
        )
        items.append((name, layout))
    return stage, items
