"""Learning-rate schedules."""

from __future__ import annotations

import itertools
import math

import pytest

from research.core.errors import ConfigError
from research.core.run.schedule import default_warmup, learning_rate, lr_factor

COMMON = {"peak": 2.0, "min_ratio": 0.1, "decay_ratio": 0.2}


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_schedule_warms_up_to_peak_and_ends_at_the_minimum(kind):
    rates = [learning_rate(s, kind=kind, steps=100, warmup_steps=10, **COMMON) for s in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates[9:]))


def test_cosine_is_half_way_between_peak_and_minimum_in_the_middle():
    assert lr_factor("cosine", 0.5, 0.1) == pytest.approx(0.55)
    assert lr_factor("cosine", 0.25, 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_wsd_is_flat_until_its_last_fifth():
    rates = [learning_rate(s, kind="wsd", steps=100, warmup_steps=0, **COMMON) for s in range(100)]
    assert all(r == 2.0 for r in rates[:79]) and rates[90] < 2.0


def test_constant_never_decays():
    assert {learning_rate(s, kind="constant", steps=50, warmup_steps=0, **COMMON) for s in range(50)} == {2.0}


def test_clock_overtakes_steps_when_the_machine_is_slow():
    slow = learning_rate(10, kind="linear", steps=1000, warmup_steps=0, time_share=0.99, **COMMON)
    assert slow == pytest.approx(2.0 * (0.1 + 0.9 * 0.01))


def test_default_warmup_is_three_percent_and_never_zero():
    assert default_warmup(1000) == 30 and default_warmup(5) == 1
    assert default_warmup(1000, 0.01) == 10 and default_warmup(1000, 0.0) == 0
    no_warmup = learning_rate(0, kind="linear", steps=100, warmup_steps=None, warmup_ratio=0.0, **COMMON)
    assert no_warmup == learning_rate(0, kind="linear", steps=100, warmup_steps=0, **COMMON)


def test_unknown_schedule_names_the_nearest():
    with pytest.raises(ConfigError, match="cosine"):
        lr_factor("cosin", 0.1)
