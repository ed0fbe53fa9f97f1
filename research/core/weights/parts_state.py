"""Whether parts that were cut before are of the weights and the cut that are wanted now."""

from __future__ import annotations

import json
from pathlib import Path

from research.core.errors import WeightsError
from research.core.weights.opened import NOTHING_SAID, OpenWeights
from research.core.weights.record import file_mark
from research.core.weights.reshard import ReshardOptions
from research.core.weights.sharded import open_parts

CUT_FILE = "cut.json"


def cut_facts(opened: OpenWeights, options: ReshardOptions) -> dict:
    """What decides a cut: the source's files by contents (size, first and last 64 KiB) and the choices."""
    files = {segment.path for handle, _ in opened.tensors for segment in opened.entries[handle].segments}
    config = opened.path / "config.json"
    return {
        "source": {path.name: file_mark(path) for path in sorted({*files, *([config] if config.is_file() else [])})},
        "world_size": options.grid.tensor,
        "kv": options.kv,
        "vocab": options.vocab,
        "dtype": options.dtype,
    }


def stale_reasons(parts: Path, wanted: dict) -> list[str]:
    """Why the folder ``parts`` is not what ``wanted`` (:func:`cut_facts`) describes, in words; empty when it is."""
    try:
        found = json.loads((parts / CUT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [f"it has no readable {CUT_FILE}"]
    reasons = []
    if found.get("source") != wanted["source"]:
        old, new = found.get("source") or {}, wanted["source"]
        names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        reasons.append(f"the model's files have changed ({', '.join(names[:3])}{', ..' if len(names) > 3 else ''})")
    for key, value in wanted.items():
        if key != "source" and found.get(key) != value:
            reasons.append(f"cut with {key}={found.get(key)}, wanted {value}")
    if not reasons:
        try:
            open_parts(parts, NOTHING_SAID)  # names, shapes and sizes of every part
        except WeightsError as damage:
            reasons.append(f"{damage.where}: {damage.what}")
    return reasons
