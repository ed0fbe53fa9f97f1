"""What a model's name says about weights: its family, and for released models every size."""

from __future__ import annotations

import re

from research.core.config.names import did_you_mean
from research.core.errors import WeightsError
from research.core.spec import DecoderSpec, spec_differences, spec_from_hf
from research.registry import model_config, model_files, model_spec

# Names of families as the documents' tools spell them -> model types of their config.json.
FAMILY_TYPES = {
    "qwen": ("qwen",),
    "qwen1_5": ("qwen2", "qwen2_moe"),
    "qwen2": ("qwen2", "qwen2_moe"),
    "qwen2_5": ("qwen2",),
    "qwen1_5_moe": ("qwen2_moe",),
    "qwen2_moe": ("qwen2_moe",),
    "gte": ("qwen2",),
    "codeqwen1_5": ("qwen2",),
}


def normal_name(name: str) -> str:
    """``Qwen2.5-7B`` and ``qwen2_5_7b`` are one."""
    return re.sub(r"[-. ]+", "_", name.strip().lower())


def preset(name: str) -> dict | None:
    """``config.json`` of a model with all its sizes known; None for the name of a family or a model that follows its tokenizer."""
    key = normal_name(name)
    if key not in model_files():
        return None
    hf = dict(model_config(key).hf)
    return hf if hf.get("vocab_size") is not None else None


def check_named(name: str, spec: DecoderSpec, where: str) -> None:
    """Raise :class:`WeightsError` when weights of ``spec`` (read at ``where``) are not of the model or family ``name``."""
    key = normal_name(name)
    if key in model_files():
        differing = spec_differences(model_spec(model_config(key), tokens=spec.vocab), spec)
        if preset(name) is None:
            differing = [row for row in differing if not row.startswith("vocab:")]
        if differing:
            raise WeightsError(
                f"these weights are not {key}:\n    " + "\n    ".join(differing), where=where, hint="their own --model"
            )
        return
    types = FAMILY_TYPES.get(key)
    if types is None:
        raise WeightsError(
            f"no model or family is called {name!r}",
            where="--model",
            hint=did_you_mean(key, [*FAMILY_TYPES, *model_files()]),
        )
    if spec.model_type not in types:
        raise WeightsError(
            f"these weights are of the model type {spec.model_type}, not of the family {key} ({', '.join(types)})",
            where=where,
            hint=f"--model {_family_of(spec)}",
        )


def check_adapter_named(name: str, v1: bool, where: str) -> None:
    """The same for an adapter, of which only the generation can be seen."""
    key = normal_name(name)
    types = FAMILY_TYPES.get(key) or (
        (spec_from_hf(model_config(key).hf | {"vocab_size": 1}).model_type,) if key in model_files() else None
    )
    if types is None:
        raise WeightsError(
            f"no model or family is called {name!r}",
            where="--model",
            hint=did_you_mean(key, [*FAMILY_TYPES, *model_files()]),
        )
    if v1 != (types == ("qwen",)):
        raise WeightsError(
            f"this adapter is for {'Qwen v1' if v1 else 'Qwen1.5 and later'}, not for {key}", where=where
        )


def _family_of(spec: DecoderSpec) -> str:
    return {"qwen": "qwen", "qwen2": "qwen2_5", "qwen2_moe": "qwen2_moe"}[spec.model_type]
