"""Learning-rate schedules as pure functions of progress: nothing to save, nothing to restore.

``progress`` is the share of the training that is done before the step (0 at the first step). It comes from the step
number, or from the clock when ``train.max_minutes`` is what ends the run; the shape is the same.
"""

from __future__ import annotations

import math

from research.core.config.names import did_you_mean
from research.core.errors import ConfigError

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def lr_factor(kind: str, progress: float, min_ratio: float = 0.0, decay_ratio: float = 0.2) -> float:
    """Factor on the peak learning rate at ``progress`` in [0, 1], without warm-up.

    cosine: half a period down to ``min_ratio`` (arXiv 1608.03983). linear: a straight line to ``min_ratio``.
    wsd: constant, then linear to ``min_ratio`` over the last ``decay_ratio`` (arXiv 2404.06395).
    """
    progress = min(max(progress, 0.0), 1.0)
    if kind == "constant":
        return 1.0
    if kind == "cosine":
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif kind == "linear":
        shape = 1.0 - progress
    elif kind == "wsd":
        shape = 1.0 if decay_ratio <= 0 else min(1.0, (1.0 - progress) / decay_ratio)
    else:
        raise ConfigError(
            f"unknown schedule {kind!r}", where="train.schedule", hint=did_you_mean(kind, SCHEDULES, "train.schedule=")
        )
    return min_ratio + (1.0 - min_ratio) * shape


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Linear warm-up: 1/warmup at step 0, 1 from step ``warmup_steps - 1`` on."""
    return 1.0 if warmup_steps <= 0 else min(1.0, (step + 1) / warmup_steps)


def default_warmup(steps: int, ratio: float = 0.03) -> int:
    """``ratio`` of the steps, at least one unless it is 0."""
    return max(1, math.ceil(ratio * steps)) if ratio else 0


def learning_rate(
    step: int,
    *,
    peak: float,
    kind: str,
    steps: int | None,
    warmup_steps: int | None,
    min_ratio: float,
    decay_ratio: float = 0.2,
    time_share: float = 0.0,
    warmup_ratio: float = 0.03,
) -> float:
    """Learning rate of optimiser step ``step`` (from 0).

    With ``steps``, progress counts from the end of the warm-up to the last step, which reaches the minimum.
    ``time_share`` is the share of ``max_minutes`` that is used up; whichever is further along decides, so a slow
    machine still ends its decay in time. Without ``steps`` the warm-up too is a part of the time (``warmup_ratio``).
    """
    if steps is None:
        if warmup_steps is not None:
            warm = warmup_factor(step, warmup_steps)
        else:
            warm = min(1.0, max(time_share, 1e-3) / warmup_ratio) if warmup_ratio else 1.0
        return peak * warm * lr_factor(kind, time_share, min_ratio, decay_ratio)
    warmup = default_warmup(steps, warmup_ratio) if warmup_steps is None else warmup_steps
    by_step = (step - warmup + 1) / max(1, steps - warmup) if step >= warmup else 0.0
    return peak * warmup_factor(step, warmup) * lr_factor(kind, max(by_step, time_share), min_ratio, decay_ratio)
