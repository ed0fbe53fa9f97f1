"""Two sets of weights, of any layouts, compared logical tensor by logical tensor, streaming."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from research.core.errors import WeightsError
from research.core.spec import spec_differences
from research.core.weights.blocks import Block, Stored, compose, crop, logical_shapes, plain
from research.core.weights.cast import cast, widen
from research.core.weights.opened import OpenWeights
from research.core.weights.tensors import NUMPY_DTYPES, Entry, Files, RowReader

SLAB_BYTES = 8 << 20
_WIDTH = {"F64": 3, "F32": 2, "BF16": 1, "F16": 1}

SAME, ROUNDED, DIFFERENT = "same", "rounded", "different"


@dataclass(frozen=True)
class Row:
    """One logical tensor. ``verdict``: the bits are the same; or one side is the other, rounded to its dtype; or neither.
    ``largest`` is the largest absolute difference, ``count`` how many values differ (NaN equals NaN)."""

    name: str
    dtypes: tuple[str, str]
    verdict: str
    largest: float
    count: int
    values: int


@dataclass(frozen=True)
class Comparison:
    rows: Sequence[Row]

    def counts(self) -> dict[str, int]:
        return {kind: sum(row.verdict == kind for row in self.rows) for kind in (SAME, ROUNDED, DIFFERENT)}

    @property
    def equal(self) -> bool:
        return not self.counts()[DIFFERENT]


def compare(
    a: OpenWeights, b: OpenWeights, progress: Callable[[int, int], None] = lambda done, total: None
) -> Comparison:
    """Compare every logical tensor; raises :class:`WeightsError` when the two are of different architectures."""
    differences = spec_differences(a.spec, b.spec)
    if differences:
        raise WeightsError(
            "the two are different models:\n    " + "\n    ".join(differences), where=f"{a.path} and {b.path}"
        )
    check_copies(a)
    check_copies(b)
    sources = a.sources(), b.sources()
    head = "lm_head.weight" in sources[0] or "lm_head.weight" in sources[1]
    shapes = logical_shapes(a.spec, head)
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    rows, done = [], 0
    with Files() as files:
        sides = tuple(_Side(files, opened.entries, source) for opened, source in zip((a, b), sources))
        for name, shape in shapes.items():
            rows.append(_compare_one(name, shape, sides))
            done += int(np.prod(shape))
            progress(done, total)
    return Comparison(rows)


class _Side:
    def __init__(self, files: Files, entries: Mapping[Hashable, Entry], sources: Mapping[str, Sequence]):
        self.reader, self.entries, self.sources = RowReader(files, entries, keep=2), entries, sources

    def dtype(self, name: str) -> str:
        if name not in self.sources:
            raise WeightsError(f"{name} is on one side only")
        return self.entries[self.sources[name][0][0]].dtype

    def rows(self, stored: Stored, dtype: str) -> np.ndarray:
        return read_stored(stored, self.sources, self.entries, self.reader, dtype)


def read_stored(
    stored: Stored,
    sources: Mapping[str, Sequence[tuple[Hashable, Block]]],
    entries: Mapping[Hashable, Entry],
    reader: RowReader,
    dtype: str,
) -> np.ndarray:
    """A stored tensor (or a crop of one) put together from ``sources``, as bits of ``dtype``. Padding is zero."""
    out = np.zeros(stored.shape, NUMPY_DTYPES[dtype])
    for copy in compose(stored, sources):
        part = reader.take(copy.source, copy.of).transpose(copy.order)
        place = out[copy.into]
        cast(part if part.shape == place.shape else part.reshape(place.shape), entries[copy.source].dtype, place, dtype)
    return out


def _compare_one(name: str, shape: tuple[int, ...], sides: tuple[_Side, _Side]) -> Row:
    kinds = sides[0].dtype(name), sides[1].dtype(name)
    stored = plain(name, shape)
    width = max(NUMPY_DTYPES[kind].itemsize for kind in kinds) * int(np.prod(shape[1:]))
    step = max(1, SLAB_BYTES // max(1, width))
    same, rounded, largest, count = True, True, 0.0, 0
    for low in range(0, shape[0], step):
        part = crop(stored, ((low, min(low + step, shape[0])), *((0, extent) for extent in shape[1:])))
        bits = [side.rows(part, kind) for side, kind in zip(sides, kinds)]
        if kinds[0] == kinds[1] and np.array_equal(bits[0].view(np.uint8), bits[1].view(np.uint8)):
            continue
        same = same and kinds[0] != kinds[1] and _values_equal(bits, kinds)
        rounded = rounded and kinds[0] != kinds[1] and _is_rounding(bits, kinds)
        big, number = _difference(widen(bits[0], kinds[0]), widen(bits[1], kinds[1]))
        largest, count = max(largest, big), count + number
    verdict = SAME if same else ROUNDED if rounded else DIFFERENT
    return Row(name, kinds, verdict, largest, count, int(np.prod(shape)))


def _values_equal(bits: Sequence[np.ndarray], kinds: Sequence[str]) -> bool:
    return np.array_equal(widen(bits[0], kinds[0]), widen(bits[1], kinds[1]), equal_nan=True)


def _is_rounding(bits: Sequence[np.ndarray], kinds: Sequence[str]) -> bool:
    """Whether casting the wider side gives the narrower one (between BF16 and F16: either way)."""
    for wide, narrow in ((0, 1), (1, 0)):
        if _WIDTH[kinds[wide]] < _WIDTH[kinds[narrow]]:
            continue
        made = np.empty(bits[narrow].shape, NUMPY_DTYPES[kinds[narrow]])
        cast(bits[wide], kinds[wide], made, kinds[narrow])
        if np.array_equal(made.view(np.uint8), bits[narrow].view(np.uint8)):
            return True
    return False


def _difference(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    unequal = (a != b) & ~(np.isnan(a) & np.isnan(b))
    number = int(np.count_nonzero(unequal))
    if not number:
        return 0.0, 0
    with np.errstate(invalid="ignore"):
        gap = np.abs(a[unequal].astype(np.float64) - b[unequal].astype(np.float64))
    return float(np.max(np.where(np.isnan(gap), np.inf, gap))), number


def check_copies(opened: OpenWeights, log: Callable[[str], None] = lambda line: None) -> None:
    """Tensors that are stored twice (a tied head beside its embedding) must hold the same values.

    Raises :class:`WeightsError` naming both and what to set when the head was trained apart.
    """
    with Files() as files:
        reader = RowReader(files, opened.entries)
        for first, second in opened.copies:
            a, b = opened.entries[first], opened.entries[second]
            equal = a.shape == b.shape
            step = max(1, SLAB_BYTES // max(1, a.bytes // max(1, a.shape[0])))
            for low in range(0, a.shape[0] if equal else 0, step):
                of = (slice(low, min(low + step, a.shape[0]), 1), *(slice(0, n, 1) for n in a.shape[1:]))
                equal = equal and np.array_equal(
                    widen(reader.take(first, of), a.dtype), widen(reader.take(second, of), b.dtype), equal_nan=True
                )
            if not equal:
                raise _unequal(opened, first, second)
            if second == "lm_head.weight":
                log(f"{second} is stored beside {first} with the same values: kept tied")


def _unequal(opened: OpenWeights, first: Hashable, second: Hashable) -> WeightsError:
    if opened.entries[second].name == "lm_head.weight" != opened.entries[first].name:
        return WeightsError(
            "config.json ties the output matrix to the embedding, but lm_head.weight holds other values than "
            + opened.entries[first].name,
            where=opened.path,
            hint='a config.json with "tie_word_embeddings": false, if the head was trained apart',
        )
    return WeightsError(
        f"{show(first)} and {show(second)} should be copies of one tensor but differ",
        where=opened.path,
        hint="are these the shards of one step of one run?",
    )


def show(handle: Hashable) -> str:
    """A stored tensor's handle in a message: its name, behind the rank or part that holds it."""
    return "/".join(map(str, handle)) if isinstance(handle, tuple) else str(handle)
