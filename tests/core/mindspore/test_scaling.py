"""The rule of fp16's loss scale; that a training with it is the training without is shown in test_trainer.py."""

from __future__ import annotations

from research.core.mindspore.scaling import LARGEST, LossScale


def test_scale_halves_at_an_overflow_down_to_1_and_doubles_after_a_window_without_one():
    scale = LossScale(8.0, window=3)
    for _ in range(2):
        scale.succeeded()
    assert scale.value == 8.0
    assert scale.overflow() and scale.value == 4.0
    values = []
    for _ in range(7):  # the window begins anew after an overflow and after a doubling
        scale.succeeded()
        values.append(scale.value)
    assert values == [4.0, 4.0, 8.0, 8.0, 8.0, 16.0, 16.0]
    assert [scale.overflow() for _ in range(5)] == [True, True, True, True, False] and scale.value == 1.0


def test_scale_goes_on_from_a_checkpoint_and_never_beyond_its_largest():
    scale = LossScale(LARGEST, window=2)
    scale.succeeded()
    again = LossScale(16.0, window=2)
    again.restore(scale.state())
    again.succeeded()
    assert again.value == LARGEST and again.good == 0


def test_other_dtypes_have_none():
    scale = LossScale()
    scale.succeeded()
    assert scale.value == 1.0 and not scale.overflow() and scale.state() == {}
    scale.restore({"loss_scale": 64.0, "loss_scale_good": 1})
    assert scale.value == 1.0
