"""Which part of every parameter a worker holds where several share the layers or each layer, and back: parts to whole ones.

The rules are those of :mod:`research.core.weights.grid`, which cuts weight files as well: stages of whole layers, and in each
columns and rows by heads and feed-forward columns (arXiv 1909.08053), vocabulary rows, every expert's columns. The decoder,
optimiser, checkpoints, adapters and loaders ask here; the collectives are :mod:`research.core.mindspore.tensor_parallel`'s and
:mod:`research.core.mindspore.pipeline`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from research.core.mindspore.collectives import Group
from research.core.spec import DecoderSpec
from research.core.weights.blocks import Box, box_shape
from research.core.weights.grid import Sharding, rule

_STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
_ADAPTER = re.compile(r"(.*)\.lora_([AB])")


@dataclass(frozen=True)
class Cut:
    """A parameter lies along ``axis`` in ``segments`` runs of ``extent`` elements (gate above up: 2); a part has ``each``
    elements of every run. ``copies`` neighbouring workers hold the same part."""

    axis: int
    extent: int
    each: int
    segments: int = 1
    copies: int = 1

    def boxes(self, shape: Sequence[int], worker: int) -> list[Box]:
        """A worker's part of a whole of ``shape``, run by run; with a vocabulary that was filled up it may end past it."""
        low = worker // self.copies * self.each
        out = []
        for segment in range(self.segments):
            box = [(0, extent) for extent in shape]
            box[self.axis] = (segment * self.extent + low, segment * self.extent + low + self.each)
            out.append(tuple(box))
        return out

    def take(self, whole: np.ndarray, worker: int) -> np.ndarray:
        pieces = []
        for box in self.boxes(whole.shape, worker):
            piece = whole[tuple(slice(*side) for side in box)]
            if piece.shape != box_shape(box):
                filled = np.zeros(box_shape(box), whole.dtype)
                filled[tuple(slice(n) for n in piece.shape)] = piece
                piece = filled
            pieces.append(piece)
        return np.ascontiguousarray(np.concatenate(pieces, self.axis))

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """One part of every worker, in order -> the whole."""
        runs = [np.split(part, self.segments, self.axis) for part in parts[:: self.copies]]
        whole = [np.concatenate([run[segment] for run in runs], self.axis) for segment in range(self.segments)]
        keep = tuple(slice(None) for _ in range(self.axis)) + (slice(self.extent),)
        return np.concatenate([run[keep] for run in whole], self.axis)


@dataclass(frozen=True)
class Plan:
    """A model's layers over the stages of a pipeline, and each of a stage's layers over the workers of ``group``; this one is
    number ``index`` of them, at ``stage``."""

    sharding: Sharding
    group: Group
    stage: int = 0

    @property
    def index(self) -> int:
        return self.group.index

    @property
    def workers(self) -> int:
        return self.group.size

    @property
    def spec(self) -> DecoderSpec:
        """The whole model."""
        return self.sharding.spec

    @property
    def stages(self) -> int:
        return self.sharding.grid.pipeline

    @property
    def first(self) -> bool:
        """Whether this stage looks the tokens up."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether this stage has the final norm, the head and the loss."""
        return self.stage == self.stages - 1

    @property
    def layers(self) -> range:
        """The decoder layers of this stage, by their numbers in the whole model."""
        counts = self.sharding.grid.layers_per_stage(self.spec.layers)
        start = sum(counts[: self.stage])
        return range(start, start + counts[self.stage])

    def holders(self, name: str) -> tuple[int, ...]:
        """The stages that have a parameter: one, or first and last for an embedding that is the head as well."""
        return self.sharding.stages(name)

    def answers_for(self, name: str) -> bool:
        """Whether this stage's copy of a parameter is the one that is counted and saved."""
        return self.holders(name)[0] == self.stage

    @property
    def local(self) -> DecoderSpec:
        """A decoder layer of a worker's share: fewer heads, columns and vocabulary rows, all else as it is."""
        spec, workers = self.spec, self.workers
        moe = spec.moe
        if moe is not None:
            moe = replace(moe, expert_ffn=moe.expert_ffn // workers, shared_ffn=moe.shared_ffn // workers)
        return replace(
            spec,
            heads=spec.heads // workers,
            kv_heads=max(1, spec.kv_heads // workers),
            ffn=spec.ffn // workers,
            vocab=self.vocab_rows,
            moe=moe,
        )

    @property
    def vocab_rows(self) -> int:
        return self.sharding.padded_vocab // self.workers

    @property
    def vocab_start(self) -> int:
        return self.index * self.vocab_rows

    def cut(self, name: str) -> Cut | None:
        """How a parameter of the decoder (or of an adapter on it) is cut; None: every worker has all of it."""
        spec, workers = self.spec, self.workers
        if workers == 1:
            return None
        stacked, adapter = _STACKED.fullmatch(name), _ADAPTER.fullmatch(name)
        if stacked is not None:
            gate_up = stacked[2] == "gate_up_proj"
            return Cut(1 if gate_up else 2, spec.moe.expert_ffn, spec.moe.expert_ffn // workers, 2 if gate_up else 1)
        found = rule(name if adapter is None else f"{adapter[1]}.weight")
        if found is None:
            return None
        axis, unit = found
        if adapter is not None and axis != (1 if adapter[2] == "A" else 0):
            return None
        if unit == "vocab":
            return Cut(axis, spec.vocab, self.vocab_rows)
        counts = {"heads": spec.heads, "kv_heads": spec.kv_heads}
        if unit == "kv_heads" and self.sharding.kv == "replicated":
            return Cut(axis, spec.kv_heads * spec.head_dim, spec.head_dim, copies=workers // spec.kv_heads)
        if unit in counts:
            extent = counts[unit] * spec.head_dim
        else:
            extent = spec.moe.shared_ffn if unit == "shared_ffn" else spec.ffn
        return Cut(axis, extent, extent // workers)

    def copies(self, name: str) -> int:
        """Workers that hold the same values of a parameter."""
        cut = self.cut(name)
        return self.workers if cut is None else cut.copies

    def partial(self, name: str) -> bool:
        """Whether the gradients of those copies are parts of a sum: each was computed from other columns. Norms and routers
        work on what is the same everywhere, and so have the whole gradient."""
        return self.cut(name) is not None or _ADAPTER.fullmatch(name) is not None

    def take(self, name: str, whole: np.ndarray) -> np.ndarray:
        """This worker's part."""
        cut = self.cut(name)
        return whole if cut is None else cut.take(whole, self.index)

    def join(self, name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
        """One part of every worker, in order -> the whole."""
        cut = self.cut(name)
        return parts[0] if cut is None else cut.join(parts)

    def sample(self, name: str, part: np.ndarray | None, shape: Sequence[int], step: int) -> np.ndarray:
        """Every ``step``-th value of the flat whole of ``shape``; zeros where another worker has it (``part`` None: another
        stage). The sum over stages and workers is the sample of the whole."""
        if part is None or not self.answers_for(name):
            return np.zeros(len(range(0, math.prod(shape), step)), np.float32)
        places = list(np.unravel_index(np.arange(0, math.prod(shape), step), tuple(shape)))
        cut = self.cut(name)
        if cut is None:
            mine = np.full(len(places[0]), self.index == 0)
        else:
            segment, within = np.divmod(places[cut.axis], cut.extent)
            owner, inside = np.divmod(within, cut.each)
            mine = owner * cut.copies == self.index
            places[cut.axis] = segment * cut.each + inside
        out = np.zeros(len(mine), np.float32)
        out[mine] = part[tuple(place[mine] for place in places)]
        return out

    def whole_shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The whole's shape of a part of ``shape``."""
        cut, out = self.cut(name), list(shape)
        if cut is not None:
            out[cut.axis] = cut.segments * cut.extent
        return tuple(out)
