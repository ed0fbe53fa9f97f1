"""Weights that lie in shards, opened: tensor-parallel parts, MindSpore's ``rank_N`` folders, torch's distributed
checkpoints. Every stored tensor of every rank gets the blocks that say which rectangles of the model it holds, so that
conversions, merges and comparisons read shards like anything else.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from research.core.errors import WeightsError
from research.core.spec import DecoderSpec, spec_from_hf
from research.core.weights.blocks import Box, Stored, crop, hf_layout, logical_shapes, plain
from research.core.weights.config_source import find_config
from research.core.weights.folder import WeightFolder, read_config, read_spec
from research.core.weights.formats import dcp, safetensors
from research.core.weights.grid import Grid, Sharding, shard_model, shard_stored, stage_tensors
from research.core.weights.keys import IGNORED, parameter_shapes
from research.core.weights.layouts.mindformers import embedding_name
from research.core.weights.opened import OpenOptions, OpenWeights, open_mindformers, some
from research.core.weights.rank_folders import Rank, find_strategy, open_ranks, rank_folders, whole_entries
from research.core.weights.record import recorded_layout
from research.core.weights.strategy import Strategy
from research.core.weights.tensors import Entry

PARTS, RANKS, DCP = "parts", "ranks", "dcp"
PARALLEL = "parallel"  # the section of a part's config.json that says how it was cut
PART_KEYS = (PARALLEL, "rank", "world_size")
Handle = tuple[int, str]


@dataclass
class ShardedWeights(OpenWeights):
    """Opened shards. Handles are (rank or chunk, stored name); ``copies`` are the replicas that must be equal (norms, the
    router, shared kv heads). ``notes``: how it was cut, in lines for a person."""

    sharding: Sharding | None = None
    strategy: Strategy | None = None
    notes: list[str] = field(default_factory=list)


def kind_of(path: Path) -> str | None:
    """``dcp``, ``parts``, ``ranks``, or None for weights that are not in shards (one rank without strategy files)."""
    if not path.is_dir():
        return None
    if (path / dcp.METADATA).is_file():
        return DCP
    if (path / "0" / "config.json").is_file():
        return PARTS
    ranks = rank_folders(path)
    if len(ranks) > 1 or (ranks and find_strategy(path) is not None):
        return RANKS
    return None


def open_sharded(path: Path, options: OpenOptions) -> ShardedWeights:
    """Open shards of any kind; raises :class:`WeightsError` for what is missing, damaged or contradictory."""
    opener = {PARTS: open_parts, RANKS: open_rank_weights, DCP: open_dcp}.get(kind_of(path))
    if opener is None:
        raise WeightsError("no shards here (0/, 1/, ..; rank_0/, ..; or .metadata)", where=path)
    return opener(path, options)


# --- tensor-parallel parts ------------------------------------------------------------------------------------------


def part_folders(folder: Path) -> list[Path]:
    """``0``, ``1``, .. of a folder of parts, complete and in order. Raises :class:`WeightsError` when one is missing."""
    numbers = sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdigit())
    absent = [n for n in range(len(numbers)) if n not in numbers]
    if absent:
        raise WeightsError(
            f"part {absent[0]} is missing; there are {numbers}", where=folder, hint="cut the model again"
        )
    return [folder / str(n) for n in numbers]


def open_parts(folder: Path, options: OpenOptions) -> ShardedWeights:
    """Read a folder of tensor-parallel parts (``part_model``): one Hugging Face folder per rank.

    The parts say themselves how they were cut; parts of other programs, which do not, are recognised by their shapes
    (tensor-parallel only).
    """
    paths = part_folders(folder)
    configs = [read_config(path) for path in paths]
    _check_one_cut(paths, configs)
    spec = read_spec(paths[0])
    parts = [WeightFolder(path) for path in paths]
    facts = configs[0].get(PARALLEL)
    sharding = _recorded_sharding(spec, facts, paths[0]) if facts else _foreign_sharding(spec, parts)
    if sharding.grid.ranks != len(paths):
        raise WeightsError(f"cut for {sharding.grid.ranks} ranks, but {len(paths)} parts are here", where=folder)
    shapes, layout = logical_shapes(spec), hf_layout(spec)
    entries: dict[Handle, Entry] = {}
    tensors: list[tuple[Handle, Stored]] = []
    for rank, part in enumerate(parts):
        place = sharding.grid.place(rank)
        wanted = [shard_stored(t, sharding, place.tensor, shapes) for t in stage_tensors(layout, sharding, place.stage)]
        for stored in _match_part(part, wanted):
            entries[rank, stored.name] = safetensors.from_folder_entry(stored.name, part.entries[stored.name])
            tensors.append(((rank, stored.name), stored))
    return ShardedWeights(
        path=folder,
        kind=PARTS,
        spec=spec,
        config={key: value for key, value in configs[0].items() if key not in PART_KEYS},
        entries=entries,
        tensors=tensors,
        facts={"names": "huggingface", "model_type": spec.model_type, "files": PARTS, **sharding.facts()},
        copies=replicas(tensors),
        sides=paths[0],
        sharding=sharding,
        notes=sharding.describe(),
    )


def _check_one_cut(paths: list[Path], configs: list[dict]) -> None:
    def without_rank(config: dict) -> dict:
        facts = {key: value for key, value in (config.get(PARALLEL) or {}).items() if key != "rank"}
        return {**{key: value for key, value in config.items() if key != "rank"}, PARALLEL: facts}

    for number, (path, config) in enumerate(zip(paths, configs)):
        if without_rank(config) != without_rank(configs[0]):
            raise WeightsError(f"part {number} is of another cut than part 0", where=path, hint="cut the model again")
        rank = (config.get(PARALLEL) or {}).get("rank", number)
        if rank != number:
            raise WeightsError(f"this is part {rank} in the place of part {number}", where=path)


def _recorded_sharding(spec: DecoderSpec, facts: dict, where: Path) -> Sharding:
    try:
        grid = Grid(1, int(facts["tensor"]), int(facts["pipeline"]), tuple(facts["stage_layers"]))
        return Sharding(spec, grid, facts["kv_heads"], facts["vocab"], int(facts["padded_vocab_size"]))
    except (KeyError, TypeError, ValueError):
        raise WeightsError(f"its {PARALLEL!r} section is damaged", where=where / "config.json") from None


def _foreign_sharding(spec: DecoderSpec, parts: list[WeightFolder]) -> Sharding:
    sharding = shard_model(spec, Grid(tensor=len(parts)))
    name = "transformer.wte.weight" if spec.model_type == "qwen" else "model.embed_tokens.weight"
    rows = parts[0].shape(name)[0] if name in parts[0].entries else 0
    if rows == spec.vocab and len(parts) > 1:
        return Sharding(spec, sharding.grid, sharding.kv, "replicated", spec.vocab)
    padded = rows * len(parts)
    if padded < spec.vocab:
        raise WeightsError(
            f"{len(parts)} parts of {rows} vocabulary rows do not make up {spec.vocab}", where=parts[0].folder.parent
        )
    return Sharding(spec, sharding.grid, sharding.kv, "padded" if padded > spec.vocab else "split", padded)


def _match_part(part: WeightFolder, wanted: list[Stored]) -> list[Stored]:
    found = {name for name in part.names() if not IGNORED.search(name)}
    missing = [stored.name for stored in wanted if stored.name not in found]
    if missing:
        raise WeightsError(f"{len(missing)} tensors are missing: {some(missing)}", where=part.folder)
    extra = found - {stored.name for stored in wanted}
    if extra:
        raise WeightsError(f"{len(extra)} tensors do not belong to this part: {some(sorted(extra))}", where=part.folder)
    for stored in wanted:
        if part.shape(stored.name) != stored.shape:
            raise WeightsError(
                f"{stored.name} is {list(part.shape(stored.name))}, this cut makes it {list(stored.shape)}",
                where=part.folder,
            )
    return wanted


# --- MindSpore's rank folders -----------------------------------------------------------------------------------------


def open_rank_weights(folder: Path, options: OpenOptions) -> ShardedWeights:
    """Read the ``rank_N`` folders of a model with MindFormers' names, cut as their strategy files say."""
    strategy, ranks = open_ranks(folder, options.strategy)
    whole = whole_entries(ranks)
    files = [rank.file for rank in ranks]
    unpadded, padded = _without_padding(folder, files, whole, options)
    opened = open_mindformers(folder, files, unpadded, [], options)
    layout = {name: Stored(name, whole[name].shape, stored.blocks) for name, stored in opened.tensors}
    heads = {name for pair in opened.copies for name in pair}
    entries: dict[Handle, Entry] = {}
    tensors: list[tuple[Handle, Stored]] = []
    for number, rank in enumerate(ranks):
        for name, entry in rank.entries.items():
            if name in layout:
                tensors.append(((number, name), rank.part(layout[name])))
            if name in layout or name in heads:
                entries[number, name] = entry
    notes = [f"{len(ranks)} ranks in {len(strategy.stages)} pipeline stages, as their strategy files say"]
    if padded:
        notes.append(f"vocabulary padded to {padded} rows")
    return ShardedWeights(
        path=folder,
        kind=RANKS,
        spec=opened.spec,
        config=opened.config,
        entries=entries,
        tensors=tensors,
        facts={**opened.facts, "ranks": len(ranks), "stages": len(strategy.stages)},
        copies=[*replicas(tensors, _first_replica(ranks)), *_same_places(ranks, opened.copies)],
        unused=opened.unused,
        sides=opened.sides,
        strategy=strategy,
        notes=notes,
    )


def _without_padding(
    folder: Path, files: list[Path], whole: Mapping[str, Entry], options: OpenOptions
) -> tuple[dict[str, Entry], int]:
    """The whole tensors with the vocabulary's zero rows left off, and the padded size (0: not padded)."""
    source = find_config(folder, options.config, recorded_layout(files[0]), options.presets)
    spec = spec_from_hf(source.config, where=source.where)
    out, padded = dict(whole), 0
    for name in (embedding_name(spec), "lm_head.weight"):
        entry = whole.get(name)
        if entry is not None and len(entry.shape) == 2 and entry.shape[0] > spec.vocab:
            padded = entry.shape[0]
            out[name] = replace(entry, shape=(spec.vocab, entry.shape[1]))
    return out, padded


def _same_places(ranks: Sequence[Rank], pairs: Sequence[tuple[Hashable, Hashable]]) -> list[tuple[Handle, Handle]]:
    """Shards of tensors that must be equal (a tied head and its embedding): each with one of the same rectangle."""
    out = []
    for first, second in pairs:
        places: dict[Box, int] = {}
        for number, rank in enumerate(ranks):
            if first in rank.entries:
                places.setdefault(rank.box(first), number)
        for number, rank in enumerate(ranks):
            if second in rank.entries and rank.box(second) in places:
                out.append(((places[rank.box(second)], first), (number, second)))
    return out


def _first_replica(ranks: Sequence[Rank]) -> set[int]:
    """Ranks whose shards no lower rank holds all of: the first of the data-parallel copies."""
    seen: set[frozenset] = set()
    first = set()
    for number, rank in enumerate(ranks):
        held = frozenset((name, rank.box(name)) for name in rank.entries)
        if held not in seen:
            seen.add(held)
            first.add(number)
    return first


def replicas(tensors: Sequence[tuple[Handle, Stored]], ranks: set[int] | None = None) -> list[tuple[Handle, Handle]]:
    """Pairs of stored tensors that hold the same part of the model, each with the first that does; only of ``ranks``."""
    first: dict[tuple, Handle] = {}
    pairs = []
    for handle, stored in tensors:
        if ranks is not None and handle[0] not in ranks:
            continue
        known = first.setdefault((stored.shape, stored.blocks), handle)
        if known != handle:
            pairs.append((known, handle))
    return pairs


# --- torch's distributed checkpoints ------------------------------------------------------------------------------------


def open_dcp(folder: Path, options: OpenOptions) -> ShardedWeights:
    """Read a torch distributed checkpoint of a Qwen model, whatever grid wrote it.

    Its parameter names are Hugging Face's or the decoder's, behind a common prefix (``model.``, ``app.model.``) or none;
    everything else (optimiser state, counters) is left alone and named in ``unused``.
    """
    source = find_config(folder, options.config, recorded_layout(folder / dcp.METADATA), options.presets)
    spec = spec_from_hf(source.config, where=source.where)
    sharded, others = dcp.read_tensors(folder)
    prefix, layout = _match_names(sharded, spec, folder)
    entries: dict[Handle, Entry] = {}
    tensors: list[tuple[Handle, Stored]] = []
    for stored in layout:
        tensor = sharded.pop(prefix + stored.name)
        if tensor.shape != stored.shape:
            raise WeightsError(
                f"tensor {tensor.name} has the wrong shape: expected {list(stored.shape)}, found {list(tensor.shape)}",
                where=folder,
                hint=f"is {source.where} the config.json of this model?",
            )
        for number, chunk in enumerate(tensor.chunks):
            entries[number, stored.name] = chunk.entry
            tensors.append(((number, stored.name), crop(stored, chunk.box)))
    return ShardedWeights(
        path=folder,
        kind=DCP,
        spec=spec,
        config=source.config,
        entries=entries,
        tensors=tensors,
        facts={"names": "decoder", "model_type": spec.model_type, "files": DCP, "prefix": prefix},
        unused=sorted([*others, *sharded]),
        sides=source.folder,
        notes=[f"parameter names begin with {prefix!r}"] if prefix else [],
    )


def memory_layout(spec: DecoderSpec) -> list[Stored]:
    """The parameters of the decoder in memory (also of transformers 5): Qwen2's names, experts stacked."""
    if spec.model_type != "qwen":
        return hf_layout(spec, stacked_experts=True)
    return [plain(name, shape) for name, shape in parameter_shapes(spec).items()]


def _match_names(found: Mapping[str, object], spec: DecoderSpec, folder: Path) -> tuple[str, list[Stored]]:
    best: list[str] | None = None
    for layout in (memory_layout(spec), hf_layout(spec)):
        anchor = layout[0].name
        for name in found:
            if not name.endswith(anchor):
                continue
            prefix = name[: -len(anchor)]
            missing = [stored.name for stored in layout if prefix + stored.name not in found]
            if not missing:
                return prefix, layout
            if best is None or len(missing) < len(best):
                best = missing
    hint = "does the MODEL (or convert.config) belong to this checkpoint?"
    if best is None:
        raise WeightsError("no parameter of a Qwen model is in it", where=folder, hint=hint)
    raise WeightsError(f"{len(best)} tensors are missing: {some(best)}", where=folder, hint=hint)
