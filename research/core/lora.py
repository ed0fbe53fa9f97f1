"""Low-rank adapters (arXiv 2106.09685) without a framework: which modules, which settings, and PEFT's file format.

PEFT's folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` with keys
``base_model.model.<module>.lora_A.weight``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from research.core.config.names import did_you_mean
from research.core.config.schema import LoraConfig
from research.core.errors import ConfigError, WeightsError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


def scaling(rank: int, alpha: float, rslora: bool) -> float:
    """The factor on B A x."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


# --- choosing the modules ---------------------------------------------------------------------------------------


def choose_targets(names: Sequence[str], targets: str | list[str]) -> list[str]:
    """The linear modules of ``names`` that ``targets`` selects, by PEFT's rules: ``all-linear``, a full-match expression, or a list of suffixes.

    ``all-linear`` leaves out the routers of an MoE, which are no Linears in transformers; they can be named. Raises :class:`ConfigError` for an entry that selects nothing.
    """
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    where = "lora.target_modules"
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return [name for name in names if not name.endswith(".mlp.gate")]
    if isinstance(targets, str):
        try:
            found = [name for name in names if re.fullmatch(targets, name)]
        except re.error as bad:
            raise ConfigError(f"{targets!r} is not a regular expression: {bad}", where=where) from None
        if not found:
            raise ConfigError(
                f"the expression {targets!r} matches no linear module as a whole (such as {names[0]})",
                where=where,
                hint=f"'.*({'|'.join(leaves)})', a list of these names, or all-linear",
            )
        return found
    if not targets:
        raise ConfigError("no target modules are given", where=where, hint="all-linear")
    chosen = set()
    for target in targets:
        found = [name for name in names if name == target or name.endswith("." + target)]
        if not found:
            raise ConfigError(
                f"{target!r} names no linear module of this model", where=where, hint=did_you_mean(target, leaves)
            )
        chosen.update(found)
    return [name for name in names if name in chosen]


def pattern_value(patterns: dict, name: str, default):
    """PEFT's rank_pattern / alpha_pattern: the first key that is a regular expression for the end of ``name``."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def check_lora(cfg: LoraConfig, names: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for settings that make no adapter on the chosen modules ``names``."""
    if cfg.rank < 1:
        raise ConfigError(f"the rank must be at least 1, not {cfg.rank}", where="lora.rank", hint="lora.rank=8")
    if not 0 <= cfg.dropout < 1:
        raise ConfigError(
            f"dropout must lie in [0, 1), not {cfg.dropout}", where="lora.dropout", hint="lora.dropout=0.05"
        )
    for setting in ("rank_pattern", "alpha_pattern"):
        for key, value in getattr(cfg, setting).items():
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in names):
                leaves = {name.rsplit(".", 1)[-1] for name in names}
                raise ConfigError(
                    f"{key!r} matches none of the adapted modules",
                    where=f"lora.{setting}",
                    hint=did_you_mean(key, leaves),
                )
            if setting == "rank_pattern" and value < 1:
                raise ConfigError(f"the rank of {key!r} must be at least 1, not {value}", where=f"lora.{setting}")


# --- PEFT files -------------------------------------------------------------------------------------------------


def tensor_key(name: str, part: str) -> str:
    """PEFT's key of a module's A or B."""
    return f"{PREFIX}{name}.lora_{part}.weight"


def adapter_config(cfg: LoraConfig, names: Sequence[str], every: Sequence[str], base: str | None = None) -> dict:
    """``adapter_config.json`` for adapters on the modules ``names`` out of ``every`` linear one, both in model order."""
    names = list(names)
    targets = cfg.target_modules
    if not isinstance(targets, str) or targets.lower() == "all-linear":
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
        # the short names where they select exactly these modules, else every name in full
        short = [n for n in every if n.rsplit(".", 1)[-1] in leaves]
        targets = leaves if short == names else names
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": cfg.rank,
        "lora_alpha": cfg.alpha,
        "lora_dropout": cfg.dropout,
        "target_modules": targets,
        "rank_pattern": dict(cfg.rank_pattern),
        "alpha_pattern": dict(cfg.alpha_pattern),
        "use_rslora": cfg.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def read_adapter_config(folder: str | os.PathLike) -> LoraConfig:
    """The settings of a PEFT folder. Raises :class:`WeightsError` for a kind of adapter that this repository does not run."""
    path = Path(folder) / CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(
            f"no {CONFIG_FILE}: not a PEFT adapter folder", where=folder, hint="the adapter/ folder of a LoRA run"
        ) from None
    except ValueError as bad:
        raise WeightsError(f"malformed JSON: {bad}", where=path) from None
    if raw.get("peft_type", "LORA") != "LORA":
        raise WeightsError(f"peft_type {raw['peft_type']!r} is not supported, only LORA", where=path)
    for key in (
        "use_dora",
        "fan_in_fan_out",
        "modules_to_save",
        "lora_bias",
        "trainable_token_indices",
        "target_parameters",
    ):
        if raw.get(key):
            raise WeightsError(f"{key}={raw[key]!r} is not supported", where=path, hint="a plain LoRA adapter")
    if raw.get("bias", "none") != "none":
        raise WeightsError(f"bias={raw['bias']!r} is not supported, only 'none'", where=path)
    if "r" not in raw or "lora_alpha" not in raw:
        raise WeightsError("r or lora_alpha is missing", where=path)
    return LoraConfig(
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        dropout=raw.get("lora_dropout") or 0.0,
        target_modules=raw.get("target_modules") or "all-linear",
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        rslora=bool(raw.get("use_rslora")),
    )


_KEY = re.compile(r"(?:base_model\.model\.)?(?P<name>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")


def write_adapter(folder: str | os.PathLike, config: dict, save: Callable[[Path], None]) -> None:
    """Write an adapter folder; ``save`` writes the tensors to the path it is given. Each file appears under its name only
    when it is complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / (WEIGHTS_FILE + ".partial")
    try:
        save(aside)
        os.replace(aside, folder / WEIGHTS_FILE)
        aside = folder / (CONFIG_FILE + ".partial")
        aside.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, folder / CONFIG_FILE)
    finally:
        aside.unlink(missing_ok=True)


def weights_path(folder: str | os.PathLike, allow_pickle: bool) -> Path:
    """The file of an adapter's tensors. Raises :class:`WeightsError` where there is none, or only a pickle and no leave."""
    path = Path(folder) / WEIGHTS_FILE
    if path.is_file():
        return path
    pickled = Path(folder) / "adapter_model.bin"
    if not pickled.is_file():
        raise WeightsError(f"no {WEIGHTS_FILE}", where=folder)
    if not allow_pickle:
        raise WeightsError(
            "only a pickle file is there, and pickles can run code",
            where=pickled,
            hint=f"save the adapter as {WEIGHTS_FILE}",
        )
    return pickled


def pairs_of(keys: Sequence[str], path: str | os.PathLike) -> dict[str, dict[str, str]]:
    """Module -> part (A, B) -> key, of the keys of an adapter's file. Raises :class:`WeightsError` for another key."""
    pairs: dict[str, dict[str, str]] = {}
    for key in keys:
        match = _KEY.fullmatch(key)
        if match is None:
            raise WeightsError(f"tensor {key} is not part of a plain LoRA adapter", where=path)
        pairs.setdefault(match["name"], {})[match["part"]] = key
    return pairs


def check_shapes(
    shapes: Mapping[str, Mapping[str, Sequence[int]]],
    linears: Mapping[str, tuple[int, int]],
    cfg: LoraConfig,
    folder: str | os.PathLike,
) -> None:
    """Raise :class:`WeightsError` naming the tensor and both shapes when an adapter was made for another model.

    ``shapes``: module -> part -> shape in the file; ``linears``: module -> (in, out) features of the model.
    """
    for name, found in shapes.items():
        if name not in linears:
            raise WeightsError(
                f"tensor {tensor_key(name, 'A')} belongs to a module that this model does not have",
                where=folder,
                hint=f"{did_you_mean(name, linears)} Otherwise the adapter is for another model",
            )
        in_features, out_features = linears[name]
        rank = pattern_value(cfg.rank_pattern, name, cfg.rank)
        for part, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            there = tuple(found[part]) if part in found else None
            if there != shape:
                raise WeightsError(
                    f"tensor {tensor_key(name, part)} is {_shape(there)}, this model needs {_shape(shape)}",
                    where=folder,
                    hint="the base model that the adapter was trained on",
                )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))
