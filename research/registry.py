"""From the names users type to families, settings and architectures."""

from __future__ import annotations

import importlib
from pathlib import Path

import yaml

from research.core.config.compose import FAMILIES, REPO
from research.core.config.names import did_you_mean
from research.core.config.schema import ModelConfig
from research.core.errors import ConfigError
from research.core.family import Family
from research.core.spec import DecoderSpec, spec_from_hf

# A vocabulary that follows the tokenizer is rounded up to this, so that the head's rows split over 2, 4 and 8 cards.
VOCAB_MULTIPLE = 128


def family(name: str) -> Family:
    """The :class:`Family` called ``name``."""
    if name not in FAMILIES:
        raise ConfigError(f"no family is called {name!r}", hint=did_you_mean(name, FAMILIES))
    return importlib.import_module(f"research.{name}.family").FAMILY


def model_files() -> dict[str, Path]:
    """Model name -> its YAML file, over all families."""
    return {
        path.stem: path
        for name in FAMILIES
        for path in sorted((REPO / "research" / name / "conf" / "model").glob("*.yaml"))
    }


def model_config(name: str) -> ModelConfig:
    """The settings of the model called ``name``, as ``model=name`` composes them."""
    files = model_files()
    if name not in files:
        raise ConfigError(f"no model is called {name!r}", where=f"model={name}", hint=did_you_mean(name, files))
    return ModelConfig(**yaml.safe_load(files[name].read_text(encoding="utf-8")))


def model_spec(model: ModelConfig, tokens: int | None = None) -> DecoderSpec:
    """The architecture of ``model``. The tiny models take their vocabulary from the tokenizer's ``tokens`` ids."""
    hf = dict(model.hf)
    if hf.get("vocab_size") is None:
        if tokens is None:
            raise ConfigError(
                "this model's vocabulary follows its tokenizer, which is not known here",
                where=f"model={model.name}",
                hint="model.hf.vocab_size=2048",
            )
        hf["vocab_size"] = -(-tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return spec_from_hf(hf, where=f"model={model.name}")
