"""loss.png: training loss, held-out loss and learning rate of a run."""

from __future__ import annotations

import os
from pathlib import Path

from research.core.run.metrics import read_metrics

_INK, _GRID = "#2b2f36", "#e6e8ec"
_TRAIN, _EVAL, _RATE = "#4c78a8", "#e4572e", "#9aa2ad"


def plot_losses(folder: str | os.PathLike, title: str) -> Path | None:
    """Draw ``folder/loss.png`` from its metrics.jsonl; None when there is nothing to draw."""
    train = list(read_metrics(folder, "train"))
    held_out = list(read_metrics(folder, "eval"))
    if len(train) < 2:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display and no global state
    from matplotlib.figure import Figure

    steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
    figure = Figure(figsize=(8, 5), dpi=150)
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    top.plot(steps, losses, color=_TRAIN, linewidth=0.8, alpha=0.35)
    top.plot(steps, smooth(losses), color=_TRAIN, linewidth=1.8, label=f"training  {losses[-1]:.3f}")
    if held_out:
        x, y = [r["step"] for r in held_out], [r["loss"] for r in held_out]
        top.plot(x, y, color=_EVAL, marker="o", markersize=4, linewidth=1.4, label=f"held out  {y[-1]:.3f}")
    positive = [v for v in losses if v > 0]
    if positive and max(positive) / min(positive) > 20:
        top.set_yscale("log")
    top.set_ylabel("loss (nats per supervised token)", color=_INK)
    top.set_title(title, loc="left", fontsize=11, color=_INK)
    top.legend(frameon=False, loc="upper right")
    bottom.plot(steps, [r["lr"] for r in train], color=_RATE, linewidth=1.5)
    bottom.set_ylabel("learning rate", color=_INK)
    bottom.set_xlabel("step", color=_INK)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axis in (top, bottom):
        axis.grid(color=_GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=_INK, labelsize=9)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.tight_layout()
    path = Path(folder) / "loss.png"
    aside = path.with_name(".loss.partial.png")
    try:
        figure.savefig(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def smooth(values: list[float], window: float = 20.0) -> list[float]:
    """Exponential mean with its start-up bias removed, over about ``window`` values."""
    keep, total, weight, out = 1.0 - 1.0 / min(window, max(1.0, len(values) / 10)), 0.0, 0.0, []
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out.append(total / weight)
    return out
