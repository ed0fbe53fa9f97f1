"""Any layout and grid to any grid, in one pass: split, merge and reshard are this one function with other targets."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from research.core.errors import ConfigError, WeightsError
from research.core.weights.blocks import Block, Stored, compose, hf_layout
from research.core.weights.cast import Rounding
from research.core.weights.compare import check_copies, show
from research.core.weights.convert import SIDE_FILES, ConvertOptions, Summary, common_dtype, convert, how_made
from research.core.weights.exchange import beside, check_ours, exchange
from research.core.weights.grid import Grid, shard_model
from research.core.weights.grid_targets import (
    Small,
    dcp_files,
    part_small_files,
    parts_files,
    place_as,
    rank_strategy,
    ranks_files,
    strategy_small_files,
)
from research.core.weights.layouts.mindformers import mindformers_layout
from research.core.weights.opened import HUGGINGFACE, MINDFORMERS, OpenOptions, OpenWeights, open_weights
from research.core.weights.plan import CKPT, Plan, Target, TargetFile
from research.core.weights.record import NAME, file_mark, make_record, to_bytes
from research.core.weights.runner import run_plan
from research.core.weights.sharded import DCP, PARTS, RANKS, ShardedWeights, memory_layout
from research.core.weights.staging import Written, check_apart
from research.core.weights.strategy import read_strategy
from research.core.weights.tensors import TORCH_NAMES, tensor_bytes
from research.core.weights.write import SHARD_BYTES

WHOLE = "hf"
TARGETS = (WHOLE, PARTS, RANKS, DCP)
VOCAB_DEFAULTS = {PARTS: "pad", RANKS: "replicate", DCP: "pad"}


@dataclass(frozen=True)
class ReshardOptions:
    """What to write. ``kv``, ``vocab``: see :func:`shard_model` (vocab None: pad for parts; replicate for MindSpore, as
    MindFormers does). ``strategy``: lay MindSpore ranks out as these strategy files say, instead of by ``grid``.
    ``concat``, ``gmm``, ``tied_head``, ``files``: of MindSpore ranks, as in a conversion."""

    to: str = PARTS
    grid: Grid = Grid()  # noqa: RUF009 (frozen)
    kv: str = "replicate"
    vocab: str | None = None
    dtype: str | None = None
    strategy: str | None = None
    concat: str = "none"
    gmm: bool = False
    tied_head: str = "copy"
    files: str = CKPT
    document_names: bool = False
    shard_bytes: int = SHARD_BYTES
    allow_overflow: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class _Shards:
    """The files of a target, the small files that belong to them, its layout in words and in lines for a person."""

    files: Sequence[TargetFile]
    small: Small
    facts: Mapping
    notes: Sequence[str]


def reshard(
    source: str | os.PathLike | OpenWeights,
    target: str | os.PathLike,
    options: ReshardOptions,
    opening: OpenOptions,
    *,
    extra: Mapping[str, bytes | Path] = MappingProxyType({}),
    inside: bool = False,
    threads: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Write ``source`` (any layout, whole or in shards) to ``target`` as ``options`` say; the choices made are in the
    summary's notes and in ``conversion.json``. Replicas in the source (norms, shared kv heads) are compared first.

    ``extra``: further small files for the target. ``inside``: the target may be a new folder inside the source's (as the
    documents' ``part_model``). With ``options.overwrite`` a folder that was written here is replaced as a whole.
    Raises :class:`WeightsError` or :class:`ConfigError` and leaves nothing behind when something is wrong.
    """
    target = Path(target).expanduser()
    if options.to not in TARGETS:
        raise ConfigError(f"{options.to!r} is no target", where="reshard.to", hint=" | ".join(TARGETS))
    opened = source if isinstance(source, OpenWeights) else open_weights(source, opening)
    if not (inside and target.resolve().parent == opened.path.resolve()):
        check_apart(opened.path, target)
    if isinstance(opened, ShardedWeights):
        for note in opened.notes:
            log(f"source: {note}")
    if options.to == WHOLE:
        whole = ConvertOptions(
            to=HUGGINGFACE,
            dtype=options.dtype,
            shard_bytes=options.shard_bytes,
            allow_overflow=options.allow_overflow,
            overwrite=options.overwrite,
        )
        return convert(opened, target, whole, opening, threads=threads, progress=progress, log=log)
    check_copies(opened, log)
    sources = opened.sources()
    shards = _shards(opened, sources, options)
    plan = Plan(shards.files, opened.used(), sources, {**shards.small, **extra})
    replace = options.overwrite and target.is_dir() and any(target.iterdir())
    if replace:
        check_ours(target, NAME)
    written = run_plan(
        plan,
        beside(target) if replace else target,
        finish=lambda results, staged: {NAME: _record(opened, plan, shards, options, results, staged)},
        allow_overflow=options.allow_overflow,
        threads=threads,
        progress=progress,
        log=log,
    )
    if replace:
        exchange(target)
    return _summary(opened, target, shards, written)


# --- what is written ----------------------------------------------------------------------------------------------


def _shards(
    opened: OpenWeights, sources: Mapping[str, Sequence[tuple[Hashable, Block]]], options: ReshardOptions
) -> _Shards:
    if "lm_head.weight" not in sources and not opened.spec.tied:
        raise WeightsError("an embedding model (no lm_head.weight) cannot be cut", where=opened.path)
    builder = {PARTS: _parts, RANKS: _ranks, DCP: _dcp}[options.to]
    return builder(opened, _Maker(opened, sources, options.dtype), options)


class _Maker:
    """Targets from stored tensors: the dtype is the whole tensor's on every rank."""

    def __init__(self, opened: OpenWeights, sources, dtype: str | None):
        self.entries, self.sources, self.dtype = opened.entries, sources, dtype
        self.dtypes: dict[str, str] = {}

    def whole(self, layout: Sequence[Stored]) -> Sequence[Stored]:
        for stored in layout:
            self.dtypes[stored.name] = self.dtype or common_dtype(self.entries, compose(stored, self.sources))
        return layout

    def __call__(self, stored: Stored) -> Target:
        copies = compose(stored, self.sources)
        dtype = self.dtypes[stored.name]
        return Target(stored, dtype, how_made(stored, copies, self.entries, dtype) if copies else "zeros")


def _parts(opened: OpenWeights, make: _Maker, options: ReshardOptions) -> _Shards:
    if options.grid.data > 1:
        raise ConfigError(
            "parts hold one replica of the model; data-parallel copies read the same parts",
            where=f"reshard.grid={options.grid}",
            hint=f"tp{options.grid.tensor}-pp{options.grid.pipeline}",
        )
    sharding = shard_model(opened.spec, options.grid, options.kv, options.vocab or VOCAB_DEFAULTS[PARTS])
    layout = make.whole(hf_layout(opened.spec))
    files, small = parts_files(layout, sharding, make, options.shard_bytes)
    small |= part_small_files(_config(opened, files), _sides(opened), sharding)
    facts = {"names": HUGGINGFACE, "files": PARTS, **sharding.facts()}
    return _Shards(files, small, facts, sharding.describe())


def _ranks(opened: OpenWeights, make: _Maker, options: ReshardOptions) -> _Shards:
    spec = opened.spec
    concat_ffn = "none" if spec.moe else options.concat
    layout = mindformers_layout(spec, options.concat, concat_ffn, options.tied_head == "copy", options.gmm)
    facts = {"names": MINDFORMERS, "files": f"{RANKS} of {options.files}", "qkv_concat": options.concat}
    if spec.moe:
        facts["use_gmm"] = options.gmm
    if spec.tied:
        facts["tied_head"] = options.tied_head
    if options.strategy is not None:
        strategy = read_strategy(options.strategy)
        whole = place_as(layout, strategy, options.strategy)
        notes = [f"{strategy.ranks} ranks in {len(strategy.stages)} stages, as {options.strategy} says"]
        facts |= {"strategy": str(options.strategy), "ranks": strategy.ranks}
    else:
        sharding = shard_model(spec, options.grid, options.kv, options.vocab or VOCAB_DEFAULTS[RANKS])
        strategy, whole = rank_strategy(layout, sharding)
        notes = sharding.describe()
        facts |= sharding.facts()
    make.whole(list(whole.values()))
    files = ranks_files(whole, strategy, make, options.files)
    small = strategy_small_files(strategy, document_names=options.document_names)
    small["config.json"] = _json(_config(opened, files))
    return _Shards(files, small | _sides(opened), facts, notes)


def _dcp(opened: OpenWeights, make: _Maker, options: ReshardOptions) -> _Shards:
    layout = make.whole(memory_layout(opened.spec))
    ranks = options.grid.ranks
    files, small = dcp_files(layout, ranks, make)
    small["config.json"] = _json(_config(opened, files))
    facts = {"names": "decoder", "files": DCP, "ranks": ranks}
    notes = [f"{ranks} files, tensors cut along their first axis (torch loads them onto any grid)"]
    return _Shards(files, small | _sides(opened), facts, notes)


def _config(opened: OpenWeights, files: Sequence[TargetFile]) -> dict:
    kinds = Counter(target.dtype for file in files for target in file.tensors)
    name = TORCH_NAMES[kinds.most_common(1)[0][0]]
    config = {**opened.config, "torch_dtype": name}
    return {**config, "dtype": name} if "dtype" in opened.config else config


def _json(value: Mapping) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _sides(opened: OpenWeights) -> Small:
    if opened.sides is None:
        return {}
    return {p.name: p for pattern in SIDE_FILES for p in sorted(opened.sides.glob(pattern)) if p.is_file()}


# --- what is said about it ----------------------------------------------------------------------------------------


def _record(
    opened: OpenWeights, plan: Plan, shards: _Shards, options: ReshardOptions, written: Sequence[Written], staged: Path
) -> bytes:
    made_from: dict[str, dict[str, None]] = {}
    for item in written:
        copies = compose(item.target.stored, plan.sources)
        made_from.setdefault(item.target.name, {}).update({show(copy.source): None for copy in copies})
    kept = {key: value for key, value in asdict(options).items() if key not in ("overwrite", "shard_bytes", "grid")}
    record = make_record(
        source={"path": str(opened.path), "layout": opened.facts},
        target={
            "file": None,
            "layout": {**shards.facts, "model_type": opened.spec.model_type},
            "marks": {Path(file.path).name: file_mark(staged / file.path) for file in plan.files},
        },
        options={**kept, "grid": str(options.grid)},
        written=written,
        made_from=made_from,
        unused=opened.unused,
        missing=opened.missing,
        tied=_tied(opened),
        config=opened.config,
    )
    return to_bytes({**record, "choices": list(shards.notes)})


def _tied(opened: OpenWeights) -> list[str]:
    return ["lm_head.weight = the embedding"] if opened.spec.tied else []


def _summary(opened: OpenWeights, target: Path, shards: _Shards, written: Sequence[Written]) -> Summary:
    rounding = Rounding()
    for item in written:
        rounding.add(item.rounding)
    return Summary(
        target=target,
        record=target / NAME,
        tensors=len(written),
        bytes=sum(tensor_bytes(item.target.dtype, item.target.shape) for item in written),
        source=opened.facts,
        layout={**shards.facts, "model_type": opened.spec.model_type},
        dtypes=Counter(item.target.dtype for item in written),
        rounding=rounding,
        unused=opened.unused,
        missing=opened.missing,
        tied=_tied(opened),
        notes=tuple(shards.notes),
    )
