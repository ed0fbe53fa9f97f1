"""Rates of a training: tokens a second, share of the GEMM roofline, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from research.core.run.flops import step_flops
from research.core.spec import DecoderSpec


@dataclass
class Window:
    """What happened in some steps; ``seconds`` is the time spent in the steps themselves."""

    tokens: int = 0
    targets: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def add(self, other: Window) -> None:
        self.tokens, self.targets = self.tokens + other.tokens, self.targets + other.targets
        self.flops, self.seconds = self.flops + other.flops, self.seconds + other.seconds


class Meter:
    """Counts steps; ``rates`` gives the rates since it was last asked and starts anew."""

    def __init__(self, spec: DecoderSpec, roofline: float, peak_memory: Callable[[], int], adapter: int | None):
        """``roofline``: measured operations a second of a plain matmul, over all cards. ``peak_memory``: most bytes in use
        so far. ``adapter`` is the number of adapter parameters, None when all weights train."""
        self.spec, self.roofline, self.peak_memory, self.adapter = spec, roofline, peak_memory, adapter
        self.window, self.total = Window(), Window()

    def add(self, tokens: int, targets: int, pairs: int, seconds: float) -> None:
        """One step of the global batch; ``pairs`` is the sum over documents of length^2."""
        flops = step_flops(
            self.spec,
            tokens=tokens,
            targets=targets,
            pairs=pairs,
            frozen=self.adapter is not None,
            adapter=self.adapter or 0,
        )
        step = Window(tokens, targets, flops, seconds)
        self.window.add(step)
        self.total.add(step)

    def rates(self) -> dict[str, float]:
        """``tokens_per_second``, ``supervised_per_second``, ``mfu`` (share of the roofline), ``memory`` (peak bytes)."""
        rates = self.of(self.window)
        self.window = Window()
        return rates

    def speed(self) -> float:
        """Tokens a second since the last rates."""
        return self.window.tokens / max(self.window.seconds, 1e-9)

    def of(self, window: Window) -> dict[str, float]:
        seconds = max(window.seconds, 1e-9)
        return {
            "tokens_per_second": window.tokens / seconds,
            "supervised_per_second": window.targets / seconds,
            "mfu": window.flops / seconds / self.roofline,
            "memory": self.peak_memory(),
        }
