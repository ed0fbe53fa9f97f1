"""Dynamic loss scaling for fp16 (arXiv 1710.03740, section 3.2): gradients too small for fp16 are multiplied into its range.

The scale halves at an overflow, and the step is then computed again with it: no batch is left out and none is seen twice.
It doubles after ``window`` steps without one.
"""

from __future__ import annotations

from typing import Any

SMALLEST = 1.0
LARGEST = 2.0**24


class LossScale:
    """``value`` is what the loss is multiplied by. Without ``start`` it is 1 for ever: fp32 and bf16 need none."""

    def __init__(self, start: float | None = None, window: int = 1000):
        self.dynamic = start is not None
        self.value, self.window, self.good = start or 1.0, window, 0

    def overflow(self) -> bool:
        """Halve the scale; False when that is not possible any more, and the overflow is no matter of scale."""
        if not self.dynamic or self.value <= SMALLEST:
            return False
        self.value, self.good = max(SMALLEST, self.value / 2), 0
        return True

    def succeeded(self) -> None:
        """A step was made."""
        self.good += 1
        if self.dynamic and self.good >= self.window:
            self.value, self.good = min(LARGEST, self.value * 2), 0

    def state(self) -> dict[str, Any]:
        return {"loss_scale": self.value, "loss_scale_good": self.good} if self.dynamic else {}

    def restore(self, state: dict[str, Any]) -> None:
        if self.dynamic and "loss_scale" in state:
            self.value, self.good = state["loss_scale"], state["loss_scale_good"]
