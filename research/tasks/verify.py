"""``make verify A= B=``: two sets of weights of any layouts, tensor by tensor, and on request their logits.

Exit status 0: equal (up to rounding between dtypes); 1: they differ; 2: something could not be read.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from research.core.config.schema import Config
from research.core.errors import ConfigError, UserError
from research.core.weights.cast import FLOATS
from research.core.weights.compare import DIFFERENT, Comparison, Row, compare
from research.core.weights.config_source import ConfigSource
from research.core.weights.meter import Meter
from research.core.weights.opened import OpenOptions, OpenWeights, open_weights
from research.tasks.convert import open_probed

# Largest difference of logits, relative to the largest logit, that is put down to arithmetic: the order of float32 sums;
# for 16-bit weights the rounding of each (2^-9 and 2^-12 relative), grown over the layers.
TOLERANCES = {"F32": 1e-4, "F16": 1e-2, "BF16": 1e-1}
SHOWN = 12


def run(cfg: Config) -> int:
    """Compare ``verify.a`` and ``verify.b``."""
    v = cfg.verify
    if not v.a or not v.b:
        raise ConfigError(
            "two sets of weights are needed", where="verify", hint="make verify A=folder B=folder-or-file"
        )
    a, b = _open_both(cfg)
    print(f"A {a.path}: {_words(a)}\nB {b.path}: {_words(b)}", flush=True)
    with Meter("compared") as meter:
        found = compare(a, b, meter)
    print("\n".join(tensor_lines(found)), flush=True)
    same = found.equal
    if v.logits:
        difference = compare_logits(a, b, cfg.backend, v.tokens)
        limit = TOLERANCES[_narrowest(found)] if v.tolerance is None else v.tolerance
        print(difference.line(limit), flush=True)
        same = same and difference.relative <= limit
    print("equal" if same else "DIFFERENT", flush=True)
    return 0 if same else 1


def _open_both(cfg: Config) -> tuple[OpenWeights, OpenWeights]:
    """A and B; a MindFormers file that does not say its architecture is read as the other side's."""
    v, opened = cfg.verify, {}
    sides = {"a": (v.a, v.a_concat), "b": (v.b, v.b_concat)}
    for side in sorted(sides, key=lambda side: not (Path(sides[side][0]) / "config.json").is_file()):
        path, concat = sides[side]
        other = next(iter(opened.values()), None)
        known = None if other is None else ConfigSource(other.config, str(other.path), other.sides)
        opening = OpenOptions(config=v.config, allow_pickle=cfg.allow_pickle, presets=known)
        if concat == "probe":
            opened[side] = open_probed(path, opening, cfg.tokenizer)
        else:
            opened[side] = open_weights(path, replace(opening, concat=concat))
    return opened["a"], opened["b"]


def _words(opened: OpenWeights) -> str:
    return " ".join(f"{key}={value}" for key, value in opened.facts.items())


def tensor_lines(found: Comparison) -> list[str]:
    """The counts, and each tensor that differs, the largest difference first."""
    counts = found.counts()
    lines = [
        f"tensors: {counts['same']} same, {counts['rounded']} equal after rounding, {counts['different']} different"
    ]
    worst = sorted((row for row in found.rows if row.verdict == DIFFERENT), key=lambda row: -row.largest)
    lines += [_line(row) for row in worst[:SHOWN]]
    return lines + ([f"  and {len(worst) - SHOWN} more"] if len(worst) > SHOWN else [])


def _line(row: Row) -> str:
    kinds = row.dtypes[0] if row.dtypes[0] == row.dtypes[1] else " / ".join(row.dtypes)
    return f"  {row.name}  {kinds}  {row.count} of {row.values} values, largest difference {row.largest:.3g}"


def _narrowest(found: Comparison) -> str:
    kinds = {kind for row in found.rows for kind in row.dtypes if row.dtypes[0] != row.dtypes[1]}
    order = [kind for kind in FLOATS if kind in TOLERANCES]
    return next((kind for kind in ("BF16", "F16") if kind in kinds), order[0])


@dataclass(frozen=True)
class LogitsDifference:
    """``largest`` absolute difference, ``scale`` the largest logit of A, ``agreeing`` positions with the same best token."""

    backend: str
    largest: float
    scale: float
    agreeing: int
    positions: int

    @property
    def relative(self) -> float:
        return self.largest / max(self.scale, 1e-12)

    def line(self, limit: float) -> str:
        return (
            f"logits (A torch, B {self.backend}): largest difference {self.largest:.3g} of {self.scale:.3g} "
            f"({self.relative:.2g}, allowed {limit:.2g}); best token equal at {self.agreeing} of {self.positions} positions"
        )


def compare_logits(a: OpenWeights, b: OpenWeights, backend: str, tokens: int) -> LogitsDifference:
    """Logits on the fixed prompt: of A in torch, of B in ``backend`` (torch | mindspore)."""
    from research.core.torch.probe import fixed_prompt, logits

    ids_BT = fixed_prompt(a.spec.vocab, min(tokens, a.spec.usable_length))
    first = logits(a, ids_BT)
    second = logits(b, ids_BT) if backend == "torch" else _mindspore_logits(b, ids_BT)
    return LogitsDifference(
        backend,
        float(np.abs(first - second).max()),
        float(np.abs(first).max()),
        int((first.argmax(-1) == second.argmax(-1)).sum()),
        ids_BT.size,
    )


def _mindspore_logits(opened: OpenWeights, ids_BT: np.ndarray) -> np.ndarray:
    """``research.core.mindspore.probe.logits(opened, ids_BT)``: float32 [B, T, V] of MindSpore's decoder."""
    try:
        module = importlib.import_module("research.core.mindspore.probe")
    except ModuleNotFoundError as absent:
        what = (
            "there is no MindSpore decoder in this version"
            if str(absent.name).startswith("research.")
            else f"{absent.name} is not installed"
        )
        raise UserError(what, where="backend=mindspore", hint="BACKEND=torch") from None
    return module.logits(opened, ids_BT)
