"""Grids of cards (data x tensor x pipeline) and which part of every tensor each card holds.

The rules are data (:data:`SHARD_RULES`): a tensor is cut along one axis in units that must not be torn (heads, kv heads,
FFN columns, vocabulary rows), as in Megatron-LM (arXiv 1909.08053); everything else is on every card. Two choices are
open and named in every output: what happens to kv heads when there are fewer than cards, and to a vocabulary that
does not divide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from research.core.errors import ConfigError, WeightsError
from research.core.spec import DecoderSpec
from research.core.weights.blocks import Block, Box, Stored
from research.core.weights.strategy import REPLICATED, Layout

KV_CHOICES = ("replicate", "refuse")
VOCAB_CHOICES = ("pad", "replicate", "whole", "refuse")

# (logical tensor, axis, unit). A unit's count and size come from the DecoderSpec.
SHARD_RULES: tuple[tuple[str, int, str], ...] = (
    (r"model\.embed_tokens\.weight|lm_head\.weight", 0, "vocab"),
    (r"model\.layers\.\d+\.self_attn\.q_proj\.(weight|bias)", 0, "heads"),
    (r"model\.layers\.\d+\.self_attn\.[kv]_proj\.(weight|bias)", 0, "kv_heads"),
    (r"model\.layers\.\d+\.self_attn\.o_proj\.weight", 1, "heads"),
    (r"model\.layers\.\d+\.mlp\.(gate|up)_proj\.weight", 0, "ffn"),
    (r"model\.layers\.\d+\.mlp\.down_proj\.weight", 1, "ffn"),
    (r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up)_proj\.weight", 0, "expert_ffn"),
    (r"model\.layers\.\d+\.mlp\.experts\.\d+\.down_proj\.weight", 1, "expert_ffn"),
    (r"model\.layers\.\d+\.mlp\.shared_expert\.(gate|up)_proj\.weight", 0, "shared_ffn"),
    (r"model\.layers\.\d+\.mlp\.shared_expert\.down_proj\.weight", 1, "shared_ffn"),
)
_RULES = tuple((re.compile(pattern), axis, unit) for pattern, axis, unit in SHARD_RULES)


@dataclass(frozen=True)
class Place:
    """Where a rank stands in the grid."""

    stage: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Grid:
    """Cards as data x tensor x pipeline. Ranks count the tensor axis fastest, then data, then the stage (MindSpore's order).

    ``stage_layers``: decoder layers per pipeline stage; empty: as even as possible, the first stages one more.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    stage_layers: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("data", "tensor", "pipeline"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1", where=f"grid {name}={getattr(self, name)}")
        if self.stage_layers and len(self.stage_layers) != self.pipeline:
            raise ConfigError(
                f"{len(self.stage_layers)} numbers of layers for {self.pipeline} pipeline stages", where="stage_layers"
            )

    @property
    def ranks(self) -> int:
        return self.data * self.tensor * self.pipeline

    def place(self, rank: int) -> Place:
        rest, tensor = divmod(rank, self.tensor)
        stage, data = divmod(rest, self.data)
        return Place(stage, data, tensor)

    def rank(self, place: Place) -> int:
        return (place.stage * self.data + place.data) * self.tensor + place.tensor

    def layers_per_stage(self, layers: int) -> tuple[int, ...]:
        """Decoder layers of each stage; raises :class:`ConfigError` when they do not add up or a stage is empty."""
        if self.stage_layers:
            if sum(self.stage_layers) != layers or min(self.stage_layers) < 1:
                raise ConfigError(
                    f"{'+'.join(map(str, self.stage_layers))} layers in the stages, the model has {layers}",
                    where="stage_layers",
                )
            return self.stage_layers
        if self.pipeline > layers:
            raise ConfigError(f"{self.pipeline} pipeline stages for {layers} layers", where="grid", hint=f"pp{layers}")
        small, more = divmod(layers, self.pipeline)
        return tuple(small + (stage < more) for stage in range(self.pipeline))

    def __str__(self) -> str:
        return f"dp{self.data}-tp{self.tensor}-pp{self.pipeline}"


def parse_grid(text: str, where: str = "grid") -> Grid:
    """``tp4``, ``dp2-tp4-pp2`` (any order, any of them), or a bare number of tensor-parallel cards."""
    text = str(text).strip().lower()
    if text.isdigit():
        return Grid(tensor=int(text))
    found: dict[str, int] = {}
    for part in filter(None, re.split(r"[-_x, ]+", text)):
        match = re.fullmatch(r"(dp|tp|mp|pp)=?(\d+)", part)
        if match is None:
            raise ConfigError(f"{text!r} is no grid of cards", where=where, hint="tp4, or dp2-tp4-pp2")
        key = {"dp": "data", "tp": "tensor", "mp": "tensor", "pp": "pipeline"}[match[1]]
        if key in found:
            raise ConfigError(f"{text!r} names its {key} axis twice", where=where, hint="tp4, or dp2-tp4-pp2")
        found[key] = int(match[2])
    if not found:
        raise ConfigError("the grid is empty", where=where, hint="tp4, or dp2-tp4-pp2")
    return Grid(**found)


# --- units --------------------------------------------------------------------------------------------------------


def rule(name: str) -> tuple[int, str] | None:
    """(axis, unit) along which a logical tensor is cut over the tensor axis; None: every card has all of it."""
    for pattern, axis, unit in _RULES:
        if pattern.fullmatch(name):
            return axis, unit
    return None


def unit_counts(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """unit -> (how many the model has, elements of each)."""
    counts = {
        "vocab": (spec.vocab, 1),
        "heads": (spec.heads, spec.head_dim),
        "kv_heads": (spec.kv_heads, spec.head_dim),
        "ffn": (spec.ffn, 1),
    }
    if spec.moe is not None:
        counts["expert_ffn"] = (spec.moe.expert_ffn, 1)
        counts["shared_ffn"] = (spec.moe.shared_ffn, 1)
        if all(spec.is_sparse(layer) for layer in range(spec.layers)):
            del counts["ffn"]  # no layer has a dense feed-forward: its size must not stand in the way
    return counts


@dataclass(frozen=True)
class Sharding:
    """A model on a grid, with the open choices made. ``kv``: split | replicated; ``vocab``: split | padded | replicated."""

    spec: DecoderSpec
    grid: Grid
    kv: str = "split"
    vocab: str = "split"
    padded_vocab: int = 0
    _counts: Mapping[str, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "_counts", unit_counts(self.spec))

    def describe(self) -> list[str]:
        """The choices as lines for a person."""
        grid, spec = self.grid, self.spec
        lines = [f"grid {grid}: {grid.ranks} ranks (the tensor axis counts fastest, then data, then the stage)"]
        if grid.tensor > 1:
            kv = f"{spec.kv_heads} kv heads over {grid.tensor} cards: "
            kv += (
                f"{spec.kv_heads // grid.tensor} on each card"
                if self.kv == "split"
                else f"replicated, each head on {grid.tensor // spec.kv_heads} cards"
            )
            vocab = {
                "split": f"{spec.vocab // grid.tensor} rows on each card",
                "padded": f"padded with zeros to {self.padded_vocab}, {self.padded_vocab // grid.tensor} rows on each card",
                "replicated": "whole on each card",
            }[self.vocab]
            lines += [kv, f"vocabulary of {spec.vocab}: {vocab}"]
        if grid.pipeline > 1:
            lines.append("layers per stage: " + " ".join(map(str, grid.layers_per_stage(spec.layers))))
            if spec.tied:
                lines.append("the head is tied: the embedding is in the first and in the last stage")
        return lines

    def facts(self) -> dict:
        """The same for config.json and conversion.json."""
        return {
            "data": self.grid.data,
            "tensor": self.grid.tensor,
            "pipeline": self.grid.pipeline,
            "stage_layers": list(self.grid.layers_per_stage(self.spec.layers)),
            "kv_heads": self.kv,
            "vocab": self.vocab,
            "padded_vocab_size": self.padded_vocab,
        }

    def stages(self, name: str) -> tuple[int, ...]:
        """Pipeline stages that hold a logical tensor (a tied embedding is in two)."""
        last = self.grid.pipeline - 1
        match = re.match(r"model\.layers\.(\d+)\.", name)
        if match:
            layer = int(match[1])
            for stage, count in enumerate(self.grid.layers_per_stage(self.spec.layers)):
                if layer < count:
                    return (stage,)
                layer -= count
            raise WeightsError(f"{name} is of a layer that the model does not have")
        if name == "model.embed_tokens.weight":
            return (0, last) if self.spec.tied and last else (0,)
        return (last,)

    def box(self, name: str, shape: Sequence[int], tensor: int) -> Box:
        """The part of a logical tensor that the cards at ``tensor`` hold. With a padded vocabulary it may end past ``shape``."""
        box = [(0, extent) for extent in shape]
        cut = rule(name)
        if cut is not None and self.grid.tensor > 1:
            axis, unit = cut
            box[axis] = self._range(unit, tensor)
        return tuple(box)

    def _range(self, unit: str, tensor: int) -> tuple[int, int]:
        count, size = self._counts[unit]
        cards = self.grid.tensor
        if unit == "vocab":
            if self.vocab == "replicated":
                return 0, count
            count = self.padded_vocab
        if unit == "kv_heads" and self.kv == "replicated":
            head = tensor // (cards // count)
            return head * size, (head + 1) * size
        each = count // cards
        return tensor * each * size, (tensor + 1) * each * size

    def layout(self, name: str, rank: int) -> Layout:
        """MindSpore's layout of a logical tensor of ``rank`` axes on one pipeline stage."""
        grid = self.grid
        tensor_map = [REPLICATED] * rank
        cut = rule(name)
        if cut is None or grid.tensor == 1:
            return Layout((grid.data, grid.tensor), tuple(tensor_map))
        axis, unit = cut
        if unit == "vocab" and self.vocab == "replicated":
            return Layout((grid.data, grid.tensor), tuple(tensor_map))
        if unit == "kv_heads" and self.kv == "replicated":
            tensor_map[axis] = 1
            return Layout((grid.data, self.spec.kv_heads, grid.tensor // self.spec.kv_heads), tuple(tensor_map))
        tensor_map[axis] = 0
        return Layout((grid.data, grid.tensor), tuple(tensor_map))


def shard_model(spec: DecoderSpec, grid: Grid, kv: str = "replicate", vocab: str = "pad") -> Sharding:
    """Place a model on a grid.

    ``kv``: what to do when there are fewer kv heads than tensor-parallel cards: ``replicate`` each over several cards, or
    ``refuse``. ``vocab``: what to do with a vocabulary that does not divide: ``pad`` with zero rows, ``replicate`` it on
    every card, or ``refuse``; ``whole`` keeps it on every card even if it does divide (MindFormers' vocab_emb_dp).
    Raises :class:`ConfigError` naming the widths that work when heads or FFN columns would be torn.
    """
    if kv not in KV_CHOICES:
        raise ConfigError(f"{kv!r} is not a choice", where="kv", hint=", ".join(KV_CHOICES))
    if vocab not in VOCAB_CHOICES:
        raise ConfigError(f"{vocab!r} is not a choice", where="vocab", hint=", ".join(VOCAB_CHOICES))
    grid.layers_per_stage(spec.layers)
    cards = grid.tensor
    problems = [problem for unit in unit_counts(spec) if (problem := _problem(spec, unit, cards, kv, vocab))]
    if problems:
        works = [n for n in range(2, max(cards, spec.heads) + 1) if _works(spec, n, kv, vocab)]
        hint = f"widths that work: {', '.join(map(str, works))}" if works else "no width above 1 works for this model"
        raise ConfigError(
            f"{cards} cards cannot share this model: " + "; ".join(problems), where=f"grid tp{cards}", hint=hint
        )
    sharding = Sharding(spec, grid, "replicated" if spec.kv_heads % cards else "split")
    if cards > 1 and (vocab == "whole" or (vocab == "replicate" and spec.vocab % cards)):
        return replace(sharding, vocab="replicated", padded_vocab=spec.vocab)
    padded = -(-spec.vocab // cards) * cards
    return replace(sharding, vocab="padded" if padded != spec.vocab else "split", padded_vocab=padded)


def _works(spec: DecoderSpec, cards: int, kv: str, vocab: str) -> bool:
    return not any(_problem(spec, unit, cards, kv, vocab) for unit in unit_counts(spec))


def _problem(spec: DecoderSpec, unit: str, cards: int, kv: str, vocab: str) -> str | None:
    count, _ = unit_counts(spec)[unit]
    if count % cards == 0:
        return None
    if unit == "vocab":
        return f"a vocabulary of {count} does not divide and vocab=refuse" if vocab == "refuse" else None
    if unit == "kv_heads":
        if cards % count:
            return f"{count} kv heads neither divide by {cards} nor into it"
        return f"{count} kv heads are fewer than the cards and kv=refuse" if kv == "refuse" else None
    return f"{count} {_UNIT_WORDS[unit]} do not divide by {cards}"


_UNIT_WORDS = {
    "heads": "attention heads",
    "ffn": "feed-forward columns",
    "expert_ffn": "columns of an expert",
    "shared_ffn": "columns of the shared expert",
}


# --- shards of stored tensors ---------------------------------------------------------------------------------------


def shard_stored(stored: Stored, sharding: Sharding, tensor: int, shapes: Mapping[str, Sequence[int]]) -> Stored:
    """A rank's part of a tensor in Hugging Face's layout, under the same name.

    The logical tensors inside it (Qwen v1's fused q, k, v rows) are cut one by one and laid together again in the same
    order. ``shapes``: logical shapes of the model. Rows past the vocabulary become padding.
    """
    blocks: list[Block] = []
    rows, width = 0, None
    for block in stored.blocks:
        assert block.axes == tuple(range(len(block.box))) and set(block.steps) == {1}, block
        box = sharding.box(block.name, shapes[block.name], tensor)
        clipped = tuple((min(low, end), min(high, end)) for (low, high), end in zip(box, shapes[block.name]))
        at = (rows, *(0 for _ in box[1:]))
        if all(low < high for low, high in clipped):
            blocks.append(Block(block.name, clipped, at, block.axes, block.steps))
        rows += box[0][1] - box[0][0]
        width = tuple(high - low for low, high in box[1:])
    return Stored(stored.name, (rows, *width), tuple(blocks))


def stage_tensors(stored: Sequence[Stored], sharding: Sharding, stage: int) -> list[Stored]:
    """The tensors of one pipeline stage."""
    return [tensor for tensor in stored if stage in sharding.stages(tensor.blocks[0].name)]
