"""What a training was made with, and whether a checkpoint can go on with the settings of now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from research.core.data.dataset import META, TOKENS
from research.core.errors import UserError

# Parts of the identity whose change makes a checkpoint useless, and the setting that a user would look for.
_BREAKING = {
    "model": "model",
    "method": "task",
    "lora": "lora",
    "base": "weights",
    "data": "data",
    "seq_length": "data.seq_length",
    "shuffle": "data.seed / data.shuffle",
    "tokenizer": "tokenizer",
    "template": "model.template",
}
# Lora settings that do not change what the saved tensors mean.
_FREE_LORA = ("dropout", "adapter")
SAMPLES = 256  # values of each frozen parameter that its fingerprint reads


def check_identity(saved: dict[str, Any], now: dict[str, Any], where: str, say: Callable[[str], None]) -> None:
    """Refuse what a checkpoint cannot go on with; announce other changes."""
    wrong = []
    for key in sorted(saved.keys() | now.keys()):
        before, after = saved.get(key), now.get(key)
        if key == "lora" and before and after:
            before, after = ({k: v for k, v in table.items() if k not in _FREE_LORA} for table in (before, after))
        before, after = _plain(before), _plain(after)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            names = [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
            change = ", ".join(f"{key}.{k} was {before.get(k)}, is now {after.get(k)}" for k in sorted(names))
        else:
            change = f"{_BREAKING.get(key, key)} was {_short(before)}, is now {_short(after)}"
        if key in _BREAKING:
            wrong.append(change)
        else:
            say(f"note: {change}")
    if wrong:
        raise UserError(
            "the checkpoint cannot go on with these settings: " + "; ".join(wrong),
            where=where,
            hint="the settings of the first run (its config.yaml), or a new RUN",
        )


def _plain(value: Any) -> Any:
    """The value as JSON gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if isinstance(value, str) and len(text) == 64 else text


def data_fingerprint(folder: str | Path) -> str:
    """sha256 over a prepared dataset's counts and the first and last megabyte of its training tokens."""
    meta = json.loads((Path(folder) / META).read_text("utf-8"))
    digest = hashlib.sha256(json.dumps([meta["splits"], meta["seq_length"]], sort_keys=True).encode())
    tokens = Path(folder) / "train" / TOKENS
    with open(tokens, "rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, tokens.stat().st_size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()


def frozen_fingerprint(samples: Iterable[tuple[str, tuple[int, ...], np.ndarray]]) -> str:
    """sha256 over a sample of every frozen parameter: tells whether an adapter still sits on the base it was trained on.

    ``samples``: name, shape, and in float32 every n-th value of the flat parameter, n = :func:`sample_step`.
    """
    digest = hashlib.sha256()
    for name, shape, values in samples:
        digest.update(f"{name} {shape}".encode() + np.asarray(values, np.float32).tobytes())
    return digest.hexdigest()


def sample_step(elements: int) -> int:
    return max(1, elements // SAMPLES)
