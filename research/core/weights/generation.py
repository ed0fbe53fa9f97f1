"""What a weight folder says about generation: its end tokens and sampling defaults."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.core.errors import WeightsError

FILE = "generation_config.json"


@dataclass(frozen=True)
class GenerationDefaults:
    """``temperature`` 0 means greedy; ``top_k`` 0 and ``top_p`` 1 filter nothing."""

    eos_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


def read_generation_defaults(folder: str | os.PathLike) -> GenerationDefaults:
    """Read ``generation_config.json`` and, for end tokens that it does not name, ``config.json``.

    As in transformers, ``do_sample`` decides between greedy and the file's temperature (1 when it names none). Raises
    :class:`WeightsError` with file and line for JSON that cannot be read, and for values of a wrong type.
    """
    folder = Path(folder)
    path = folder / FILE
    own = _read(path)
    eos = own.get("eos_token_id")
    eos_path = path
    if eos is None:
        eos_path = folder / "config.json"
        eos = _read(eos_path).get("eos_token_id")
    sampled = bool(own.get("do_sample", False))
    return GenerationDefaults(
        eos_ids=_ids(eos, eos_path),
        temperature=_number(own, "temperature", 1.0, path) if sampled else 0.0,
        top_k=int(_number(own, "top_k", 0, path)),
        top_p=_number(own, "top_p", 1.0, path),
        repetition_penalty=_number(own, "repetition_penalty", 1.0, path),
    )


def _read(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as bad:
        raise WeightsError(f"not valid JSON: {bad}", where=f"{path}:{getattr(bad, 'lineno', 1)}") from None
    if not isinstance(value, dict):
        raise WeightsError("not a JSON object", where=path)
    return value


def _ids(value: Any, path: Path) -> tuple[int, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise WeightsError(f"eos_token_id is {value!r}, not a token id or a list of them", where=path)
    return tuple(values)


def _number(config: dict, key: str, default: float, path: Path) -> float:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WeightsError(f"{key} is {value!r}, not a number", where=path)
    return value
