"""Blocks: where the rectangles of one tensor lie in another, the arithmetic under every split, merge and reshard.

Each stored tensor, of whatever layout and grid, is described by :class:`Block`: a rectangle of it equals a rectangle of
a *logical* tensor. The logical tensors are the common ground: Hugging Face's Qwen2 names and shapes, one per expert.
:func:`compose` intersects the rectangles of a target with those of the sources and returns the copies to make, so
that any layout and grid goes to any other in one step. A rectangle (``Box``) is ``((start, stop), ..)``, one per axis.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from research.core.errors import WeightsError
from research.core.spec import DecoderSpec
from research.core.weights.keys import StoredTensor, stored_tensors

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Block:
    """``stored[..] == logical[box]``.

    For every axis of the stored tensor: ``axes`` names the logical axis that runs along it (None: a fixed index, as
    the expert in a stack), ``at`` where the block starts, ``steps`` the distance between neighbours (2 where gate and
    up rows alternate). Logical axes that no stored axis names have extent 1 in ``box``.
    """

    name: str
    box: Box
    at: tuple[int, ...]
    axes: tuple[int | None, ...]
    steps: tuple[int, ...]

    @property
    def elements(self) -> int:
        return box_elements(self.box)


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: name, shape, and the blocks that fill it; what no block covers is padding (zeros)."""

    name: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Copy:
    """``target[into] = source[of]`` after ordering the source's axes by ``order``. ``source`` is the caller's handle."""

    source: object
    of: tuple[slice, ...]
    order: tuple[int, ...]
    into: tuple[slice, ...]


# --- boxes --------------------------------------------------------------------------------------------------------


def full_box(shape: Sequence[int]) -> Box:
    return tuple((0, extent) for extent in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def box_elements(box: Box) -> int:
    count = 1
    for start, stop in box:
        count *= stop - start
    return count


def intersect(a: Box, b: Box) -> Box | None:
    """The common rectangle, or None where there is none."""
    out = []
    for (low_a, high_a), (low_b, high_b) in zip(a, b, strict=True):
        low, high = max(low_a, low_b), min(high_a, high_b)
        if low >= high:
            return None
        out.append((low, high))
    return tuple(out)


def subtract(a: Box, b: Box) -> list[Box]:
    """``a`` without ``b``, as disjoint rectangles."""
    common = intersect(a, b)
    if common is None:
        return [a]
    rest, core = [], list(a)
    for axis, ((low, high), (cut_low, cut_high)) in enumerate(zip(a, common)):
        if low < cut_low:
            rest.append((*core[:axis], (low, cut_low), *a[axis + 1 :]))
        if cut_high < high:
            rest.append((*core[:axis], (cut_high, high), *a[axis + 1 :]))
        core[axis] = (cut_low, cut_high)
    return rest


# --- blocks -------------------------------------------------------------------------------------------------------


def plain(name: str, shape: Sequence[int]) -> Stored:
    """A stored tensor that is the logical tensor of the same name."""
    return Stored(name, tuple(shape), (whole_block(name, shape),))


def whole_block(name: str, shape: Sequence[int], at: Sequence[int] | None = None) -> Block:
    """The whole of a logical tensor, lying at ``at`` (default: the origin) in a stored one of as many axes."""
    axes = tuple(range(len(shape)))
    return Block(name, full_box(shape), tuple(at or (0,) * len(shape)), axes, (1,) * len(shape))


def crop(stored: Stored, box: Box, name: str | None = None) -> Stored:
    """The part of a stored tensor inside ``box``, as a stored tensor of its own (``box`` may reach past the shape:
    those elements are padding). This is how a rank's shard is described."""
    blocks = tuple(part for block in stored.blocks if (part := _crop_block(block, box)) is not None)
    return Stored(name or stored.name, box_shape(box), blocks)


def _crop_block(block: Block, box: Box) -> Block | None:
    logical, at = list(block.box), []
    for axis, (low, high) in enumerate(box):
        start, step, of = block.at[axis], block.steps[axis], block.axes[axis]
        if of is None:
            if not low <= start < high:
                return None
            at.append(start - low)
            continue
        first, last = logical[of]
        skip = max(0, -((start - low) // step))  # elements of the block before the box: ceil((low - start) / step)
        end = min(last - first, -((start - high) // step))
        if skip >= end:
            return None
        logical[of] = (first + skip, first + end)
        at.append(start + skip * step - low)
    return Block(block.name, tuple(logical), tuple(at), block.axes, block.steps)


def _slices(block: Block, box: Box) -> tuple[slice, ...]:
    """The stored elements of ``block`` that hold the logical rectangle ``box`` (a part of ``block.box``)."""
    out = []
    for start, of, step in zip(block.at, block.axes, block.steps):
        if of is None:
            out.append(slice(start, start + 1, 1))
            continue
        begin = start + (box[of][0] - block.box[of][0]) * step
        count = box[of][1] - box[of][0]
        out.append(slice(begin, begin + (count - 1) * step + 1, step))
    return tuple(out)


def compose(target: Stored, sources: Mapping[str, Sequence[tuple[object, Block]]]) -> list[Copy]:
    """The copies that fill ``target``. ``sources``: for each logical name, (handle, block) in order of preference.

    Raises :class:`WeightsError` naming the tensor of which a part is in no source.
    """
    copies = []
    for block in target.blocks:
        wanted = [block.box]
        for handle, source in sources.get(block.name, ()):
            left = []
            for box in wanted:
                common = intersect(box, source.box)
                if common is None:
                    left.append(box)
                    continue
                copies.append(Copy(handle, _slices(source, common), _order(source, block), _slices(block, common)))
                left.extend(subtract(box, common))
            wanted = left
            if not wanted:
                break
        if wanted:
            raise WeightsError(
                f"no source holds {_describe(wanted[0])} of {block.name}, needed for {target.name}",
                hint="is a shard missing, or do its strategy files belong to another run?",
            )
    return copies


def _order(source: Block, target: Block) -> tuple[int, ...]:
    """Permutation of the source's stored axes that lines them up with the target's (fixed axes fill the gaps)."""
    if source.axes == target.axes:
        return tuple(range(len(source.axes)))
    places = [source.axes.index(axis) for axis in target.axes if axis is not None]
    places += [i for i in range(len(source.axes)) if i not in places]
    return tuple(places)


def apply_copy(copy: Copy, source: np.ndarray, target: np.ndarray) -> None:
    """Make one copy. Axes of extent 1 that only one side has are dropped or added by the final reshape."""
    part = source[copy.of].transpose(copy.order)
    place = target[copy.into]
    place[...] = part if part.shape == place.shape else part.reshape(place.shape)


def _describe(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


def covers(stored: Stored) -> bool:
    """Whether the blocks fill the tensor, so that nothing of it is padding (blocks never overlap)."""
    return sum(block.elements for block in stored.blocks) == box_elements(full_box(stored.shape))


# --- Hugging Face's layouts as blocks -----------------------------------------------------------------------------


def logical_shapes(spec: DecoderSpec, head: bool = True) -> dict[str, tuple[int, ...]]:
    """Shape of every logical tensor of a model, in module order; a tied head is the embedding and left out."""
    shapes: dict[str, tuple[int, ...]] = {}
    for stored in hf_layout(spec, head):
        for block in stored.blocks:
            shape = box_shape(block.box)
            old = shapes.get(block.name)
            shapes[block.name] = shape if old is None else tuple(map(max, shape, old))
    return shapes


def hf_layout(spec: DecoderSpec, head: bool = True, stacked_experts: bool = False) -> list[Stored]:
    """The tensors of the Hugging Face folder of ``spec`` as blocks; ``stacked_experts``: as the decoder in memory."""
    tensors = stored_tensors(spec, head and not spec.tied, stacked_experts)
    return [_from_pieces(tensor) for tensor in tensors]


def _from_pieces(tensor: StoredTensor) -> Stored:
    stacked = re.match(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)$", tensor.name)
    if stacked:
        return _stacked(tensor, stacked[1], stacked[2])
    blocks = []
    for piece in tensor.pieces:
        name, (low, high) = piece.parameter, piece.rows_parameter
        if piece.expert is not None:  # one expert's tensor is logical itself
            name, low, high = tensor.name, 0, high - low
        rest = tuple((0, extent) for extent in tensor.shape[1:])
        rank = len(tensor.shape)
        at = (piece.rows_stored[0], *(0 for _ in rest))
        blocks.append(Block(name, ((low, high), *rest), at, tuple(range(rank)), (1,) * rank))
    return Stored(tensor.name, tensor.shape, tuple(blocks))


def _stacked(tensor: StoredTensor, prefix: str, kind: str) -> Stored:
    experts, rows, width = tensor.shape
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    height = rows // len(parts)
    blocks = tuple(
        Block(
            f"{prefix}.{expert}.{part}.weight",
            ((0, height), (0, width)),
            (expert, number * height, 0),
            (None, 0, 1),
            (1, 1, 1),
        )
        for expert in range(experts)
        for number, part in enumerate(parts)
    )
    return Stored(tensor.name, tensor.shape, blocks)


def index_sources(tensors: Iterable[tuple[object, Stored]]) -> dict[str, list[tuple[object, Block]]]:
    """``sources`` of :func:`compose` from (handle, stored tensor) pairs."""
    out: dict[str, list[tuple[object, Block]]] = {}
    for handle, stored in tensors:
        for block in stored.blocks:
            out.setdefault(block.name, []).append((handle, block))
    return out
