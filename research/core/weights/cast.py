"""Changing the dtype of weights, with what is lost counted.

Rounding is to nearest, ties to even, as in torch and MindSpore. numpy has no bfloat16: its bits are the upper half of
a float32's (uint16 here).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from research.core.errors import WeightsError
from research.core.weights.tensors import NUMPY_DTYPES

FLOATS = ("F64", "F32", "BF16", "F16")
_CHUNK = 1 << 16  # elements of one round: the intermediates stay in the cache
# dtypes whose every value the wider one has
_EXACT = {("BF16", "F32"), ("F16", "F32"), ("BF16", "F64"), ("F16", "F64"), ("F32", "F64")}


@dataclass
class Rounding:
    """What a cast did: ``overflowed`` finite values became infinite, ``zeroed`` others became zero, ``rounded`` changed at all
    (those two included), of ``values``."""

    values: int = 0
    rounded: int = 0
    overflowed: int = 0
    zeroed: int = 0

    def add(self, other: Rounding) -> None:
        self.values += other.values
        self.rounded += other.rounded
        self.overflowed += other.overflowed
        self.zeroed += other.zeroed

    def facts(self) -> dict[str, int]:
        return {"rounded": self.rounded, "overflowed": self.overflowed, "zeroed": self.zeroed}


def cast(source: np.ndarray, kind: str, target: np.ndarray, into: str, count: Rounding | None = None) -> None:
    """Write ``source`` (stored bits of dtype ``kind``) to ``target`` (of dtype ``into``, same shape, any strides).

    Raises :class:`WeightsError` for integers: those have no smaller brother here.
    """
    if kind == into:
        target[...] = source
        return
    if kind not in FLOATS or into not in FLOATS:
        raise WeightsError(f"weights of dtype {kind} cannot become {into}", hint="dtype=keep")
    if target.flags.c_contiguous and source.flags.c_contiguous:
        _cast_flat(source.reshape(-1), kind, target.reshape(-1), into, count)
        return
    whole = np.empty(source.shape, NUMPY_DTYPES[into])
    _cast_flat(np.ascontiguousarray(source).reshape(-1), kind, whole.reshape(-1), into, count)
    target[...] = whole


def _cast_flat(source: np.ndarray, kind: str, target: np.ndarray, into: str, count: Rounding | None) -> None:
    short = kind in ("BF16", "F16") and (kind, into) != ("BF16", "F32")
    for begin in range(0, source.size, _CHUNK):
        part, place = source[begin : begin + _CHUNK], target[begin : begin + _CHUNK]
        if short:
            _look_up(part, kind, place, into, count)
            continue
        wide = widen(part, kind)
        _narrow(wide, place, into)
        if count is not None and (kind, into) not in _EXACT:
            _count(wide, widen(place, into), count)
    if count is not None:
        count.values += source.size


def _look_up(bits: np.ndarray, kind: str, place: np.ndarray, into: str, count: Rounding | None) -> None:
    values, marks = _table(kind, into)
    np.take(values, bits.view(np.uint16), out=place.view(values.dtype), mode="clip")
    if count is not None and marks is not None:
        found = np.take(marks, bits.view(np.uint16), mode="clip")
        count.rounded += int(np.count_nonzero(found))
        count.overflowed += int(np.count_nonzero(found & 2))
        count.zeroed += int(np.count_nonzero(found & 4))


@functools.lru_cache
def _table(kind: str, into: str) -> tuple[np.ndarray, np.ndarray | None]:
    """What each of the 65,536 values of a 16-bit dtype becomes, and marks: 1 rounded, 2 overflowed, 4 became zero."""
    wide = widen(np.arange(1 << 16, dtype=np.uint16).view(NUMPY_DTYPES[kind]), kind)
    values = np.empty(1 << 16, NUMPY_DTYPES[into])
    _narrow(wide, values, into)
    if (kind, into) in _EXACT:
        return values, None
    back = widen(values, into)
    marks = ((wide != back) & ~np.isnan(wide)).astype(np.uint8)
    marks[np.isinf(back) & np.isfinite(wide)] |= 2
    marks[(back == 0) & (wide != 0)] |= 4
    return values, marks


def widen(bits: np.ndarray, kind: str) -> np.ndarray:
    """Stored bits as numbers: float64 for F64, else float32 (exact)."""
    if kind == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits if kind in ("F32", "F64") else bits.astype(np.float32)


def _narrow(wide: np.ndarray, place: np.ndarray, into: str) -> None:
    if into == "BF16":
        single = wide if wide.dtype == np.float32 else _to_odd(wide)
        bits = single.view(np.uint32)
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        nan = np.isnan(single)
        if nan.any():  # the carry would turn some into infinities
            rounded[nan] = (bits[nan] >> 16) | 0x40
        place[...] = rounded
        return
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        place[...] = wide


def _to_odd(wide: np.ndarray) -> np.ndarray:
    # float64 -> float32 rounded to odd, so that the rounding to bfloat16 afterwards is as if it were the only one.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        single = wide.astype(np.float32)
        inexact = np.isfinite(wide) & (single.astype(np.float64) != wide)
        toward_zero = np.where(
            np.abs(single.astype(np.float64)) > np.abs(wide), np.nextafter(single, np.float32(0)), single
        )
    odd = (toward_zero.view(np.uint32) | 1).view(np.float32)
    return np.where(inexact, odd, single)


def _count(wide: np.ndarray, back: np.ndarray, count: Rounding) -> None:
    count.rounded += int(np.count_nonzero(wide != back)) - int(np.count_nonzero(np.isnan(wide)))
    count.overflowed += int(np.count_nonzero(np.isinf(back))) - int(np.count_nonzero(np.isinf(wide)))
    count.zeroed += int(np.count_nonzero(back == 0)) - int(np.count_nonzero(wide == 0))
