"""Casts against torch's, bit for bit, and the counts of what rounding did."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.errors import WeightsError
from research.core.weights.cast import Rounding, cast
from research.core.weights.tensors import NUMPY_DTYPES

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WORDS = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
PAIRS = [(a, b) for a in TORCH for b in TORCH]


def through_torch(bits: np.ndarray, kind: str, into: str) -> np.ndarray:
    signed = {8: np.int64, 4: np.int32, 2: np.int16}[bits.dtype.itemsize]
    value = torch.from_numpy(bits.view(signed).copy()).view(TORCH[kind]).to(TORCH[into])
    return value.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[value.element_size()]).numpy().view(WORDS[into])


def ours(bits: np.ndarray, kind: str, into: str, count: Rounding | None = None) -> np.ndarray:
    out = np.empty(bits.shape, NUMPY_DTYPES[into])
    cast(bits.view(NUMPY_DTYPES[kind]), kind, out, into, count)
    return out.view(WORDS[into])


def agree(a: np.ndarray, b: np.ndarray, kind: str) -> bool:
    """Equal bits; a NaN may carry any payload."""
    nan_a, nan_b = (np.isnan(ours(x, kind, "F64").view(np.float64)) for x in (a, b))
    return np.array_equal(nan_a, nan_b) and np.array_equal(a[~nan_a], b[~nan_b])


@pytest.mark.parametrize(("kind", "into"), PAIRS)
def test_random_bits_are_cast_as_torch_does(kind, into):
    random = np.random.default_rng(3)
    words = random.integers(0, np.iinfo(WORDS[kind]).max, 70_000, dtype=WORDS[kind], endpoint=True)
    with np.errstate(all="ignore"):
        expected = through_torch(words, kind, into)
        if (kind, into) in (("F64", "BF16"), ("F64", "F16")):
            # torch rounds twice (by way of float32); values in float32's own grid have one answer
            words = ours(ours(words, "F64", "F32"), "F32", "F64")
            expected = through_torch(words, kind, into)
    assert agree(ours(words, kind, into), expected, into)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_every_16_bit_value_survives_widening_and_back(kind):
    every = np.arange(1 << 16, dtype=np.uint16)
    for wide in ("F32", "F64"):
        assert agree(ours(ours(every, kind, wide), wide, kind), every, kind)


@settings(max_examples=200, deadline=None)
@given(st.floats(width=64, allow_nan=False))
def test_double_is_rounded_to_bfloat16_once(value):
    """The nearest bfloat16 by exact arithmetic, ties to even."""
    from fractions import Fraction

    got = ours(np.array([value]).view(np.uint64), "F64", "BF16")
    if not np.isfinite(value):
        assert ours(got, "BF16", "F64").view(np.float64)[0] == value
        return
    numbers = [got[0] + step for step in (-1, 0, 1) if 0 <= int(got[0]) + step < 1 << 16]
    values = [float(ours(np.array([n], np.uint16), "BF16", "F64").view(np.float64)[0]) for n in numbers]
    mine = float(ours(got, "BF16", "F64").view(np.float64)[0])
    if np.isinf(mine):  # from half a step above the largest on
        assert abs(value) >= 3.3953138949259995e38
        return
    best = min(abs(Fraction(v) - Fraction(value)) for v in values if np.isfinite(v))
    gap = abs(Fraction(mine) - Fraction(value))
    assert gap == best
    ties = [n for n, v in zip(numbers, values) if np.isfinite(v) and abs(Fraction(v) - Fraction(value)) == best]
    assert len(ties) == 1 or int(got[0]) % 2 == 0 or mine == 0


def test_counts_say_what_was_lost():
    values = np.array([1.0, 1.0 + 2**-12, 1e5, -1e6, 1e-12, 0.0, np.inf, np.nan, 65504.0], np.float32)
    count = Rounding()
    ours(values.view(np.uint32), "F32", "F16", count)
    assert count == Rounding(values=9, rounded=4, overflowed=2, zeroed=1)
    count = Rounding()
    ours(values.view(np.uint32), "F32", "F64", count)
    assert count == Rounding(values=9)


def test_strided_places_are_filled():
    source = np.arange(12, dtype=np.float32).reshape(3, 4)
    target = np.zeros((6, 4), np.uint16)
    cast(source, "F32", target[::2], "BF16")
    assert np.array_equal(target[::2], through_torch(source.view(np.uint32), "F32", "BF16"))
    assert not target[1::2].any()


def test_integers_are_not_cast():
    with pytest.raises(WeightsError, match="I32 cannot become"):
        cast(np.zeros(2, np.int32), "I32", np.zeros(2, np.float32), "F32")
