"""Which MODEL a YAML describes, and what in it contradicts one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import yaml

from research.core.config.mindformers.keys import SPEC_KEYS
from research.core.config.names import did_you_mean
from research.core.errors import ConfigError
from research.core.spec import DecoderSpec, spec_from_hf

if TYPE_CHECKING:
    from research.core.config.mindformers.yaml_file import Reading, YamlFile

# Sizes that a release may have otherwise than its MODEL: the file's value counts.
_FREE = {
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_range": "initializer_range",
}
# What only Qwen v1 reads; the others' files carry it along, in places with wrong values.
_FIRST_GENERATION = ("kv_channels", "rotary_emb_base")
_ANY_VOCAB = 1 << 20


@cache
def _presets() -> dict[str, tuple[str, dict]]:
    """MODEL -> (family, keys of its config.json)."""
    from research.core.config.compose import FAMILIES, REPO

    found = {}
    for family in FAMILIES:
        for path in sorted((REPO / "research" / family / "conf" / "model").glob("*.yaml")):
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            found[content["name"]] = (family, content["hf"])
    return found


def family_of(model: str) -> str:
    """The family of MODEL."""
    return _presets()[model][0]


def preset(model: str, hf: Mapping[str, Any] | None = None) -> DecoderSpec:
    """The architecture of MODEL with ``hf`` on top. A vocabulary that follows the tokenizer counts as ``_ANY_VOCAB``."""
    presets = _presets()
    if model not in presets:
        raise ConfigError(f"no model is called {model!r}", where=f"model={model}", hint=did_you_mean(model, presets))
    keys = {**presets[model][1], **(hf or {})}
    if keys.get("vocab_size") is None:
        keys["vocab_size"] = _ANY_VOCAB
    return spec_from_hf(keys, where=f"model={model}")


def check_model(model: str, file: YamlFile, hf: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` with every key of ``file`` that contradicts MODEL."""
    differing = _differences(preset(model, hf), file)
    if differing:
        raise ConfigError(
            f"does not describe {model}:\n    " + "\n    ".join(differing),
            where=file.where,
            hint=_other(file, hf, differing),
        )


def find_model(file: YamlFile, family: str | None, hint: str | None, hf: Mapping[str, Any]) -> str:
    """The MODEL whose sizes ``file`` has. Raises :class:`ConfigError` when there is none, or several and no name decides."""
    matching = [
        name
        for name, (of, _) in _presets().items()
        if family in (None, of) and not _differences(preset(name, hf), file)
    ]
    stem = re.sub(r"\.ya?ml$", "", file.where.rsplit("/", 1)[-1])
    for name in (_normal(hint), *(name for name in sorted(matching, key=len, reverse=True) if name in _normal(stem))):
        if name in matching:
            return name
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise ConfigError(
            f"these models have its sizes: {', '.join(matching)}", where=file.where, hint=f"model={matching[0]}"
        )
    named = next((name for name in (_normal(hint), *_presets()) if name in _presets() and name in _normal(stem)), None)
    candidates = [named] if named else [name for name, (of, _) in _presets().items() if family in (None, of)]
    near = min(candidates, key=lambda name: len(_differences(preset(name, hf), file)))
    rows = _differences(preset(near, hf), file)
    raise ConfigError(
        f"describes no model that is known here; it differs from {near} in\n    " + "\n    ".join(rows),
        where=file.where,
        hint=f"model={near} with model.hf.<key>=<value> for each of them, or these values in the file",
    )


def _other(file: YamlFile, hf: Mapping[str, Any], differing: list[str]) -> str:
    others = [name for name in _presets() if not _differences(preset(name, hf), file)]
    return f"model={others[0]}" if others else "model.hf.<key>=<value> for each of them, or MODEL's values in the file"


def _normal(name: str | None) -> str:
    return re.sub(r"[-. ]+", "_", (name or "").strip().lower())


def _differences(spec: DecoderSpec, file: YamlFile) -> list[str]:
    """``key: MODEL has X, the file says Y`` for every size that ``file`` names."""
    rows = []
    for key, name, found in _sizes(spec, file):
        expected = _value(spec, name)
        if name in _FREE or (name == "vocab" and expected == _ANY_VOCAB):
            continue
        if expected != found and not (isinstance(expected, float) and abs(expected - float(found)) <= 1e-9 * expected):
            rows.append(f"{key}: {_show(expected)} expected, the file says {_show(found)}")
    v1 = file.first_generation()
    if v1 is not None and v1 != (spec.model_type == "qwen"):
        rows.append(f"model.arch.type: a Qwen {'v1' if v1 else '1.5 or later'}")
    if file.whole_model() and bool(spec.moe) != bool(file.section("moe_config").get("expert_num", 1) > 1):
        rows.append(f"moe_config: {'missing' if spec.moe else 'of a model without experts'}")
    return rows


def _sizes(spec: DecoderSpec, file: YamlFile) -> list[tuple[str, str, Any]]:
    """(key, field, value) of what the file says; fields of a mixture of experts are called moe.*"""
    config, moe = file.section("model.model_config"), file.section("moe_config")
    at = "model.model_config."
    found = []
    for key, (name, other) in SPEC_KEYS.items():
        spelled = key if key in config else other if other in config else None
        if spelled is None or (key in _FIRST_GENERATION and spec.model_type != "qwen"):
            continue
        read = (
            file.truth
            if name in ("qkv_bias", "tied")
            else file.number
            if name in ("norm_eps", "rope_theta", "init_range")
            else file.whole
        )
        value = read(at + spelled)
        if value is None or (name == "qkv_bias" and spec.model_type == "qwen"):
            continue
        found.append((at + spelled, "moe.expert_ffn" if name == "ffn" and spec.moe else name, value))
    if "theta" not in config and spec.model_type == "qwen" and config.get("rotary_emb_base") is not None:
        found.append((at + "rotary_emb_base", "rope_theta", file.number(at + "rotary_emb_base")))
    if spec.moe and moe:
        for key, name in (("expert_num", "experts"), ("num_experts_chosen", "top_k"), ("norm_topk_prob", "norm_topk")):
            if moe.get(key) is not None:
                value = file.truth(f"moe_config.{key}") if name == "norm_topk" else file.whole(f"moe_config.{key}")
                found.append((f"moe_config.{key}", f"moe.{name}", value))
        shared = file.number("moe_config.shared_expert_num")
        if shared is not None:
            found.append(("moe_config.shared_expert_num", "moe.shared", shared))
    return found


def _value(spec: DecoderSpec, name: str) -> Any:
    if name == "moe.shared":
        return spec.moe.shared_ffn / spec.moe.expert_ffn
    if name.startswith("moe."):
        return getattr(spec.moe, name.removeprefix("moe."))
    return getattr(spec, name)


def set_free_sizes(model: str, file: YamlFile, out: Reading, hf: Mapping[str, Any]) -> None:
    """Settings for the sizes that may differ from MODEL's: positions, epsilon, a vocabulary that follows the tokenizer."""
    spec = preset(model, hf)
    v1 = spec.model_type == "qwen"
    for _, name, value in _sizes(spec, file):
        if name == "vocab" and spec.vocab == _ANY_VOCAB:
            out.set("model.hf.vocab_size", value)
        elif name in _FREE and value != _value(spec, name):
            out.set(f"model.hf.{'layer_norm_epsilon' if v1 and name == 'norm_eps' else _FREE[name]}", value)
    config = file.section("model.model_config")
    if spec.tied and file.whole_model() and "tie_word_embeddings" not in config:
        out.notes.append(
            f"{file.where}: tie_word_embeddings is missing; {model} ties its head to the embedding, and so it is here "
            "(MindFormers would begin with a random head)"
        )
    _set_rope_scaling(file, spec, out)


def _set_rope_scaling(file: YamlFile, spec: DecoderSpec, out: Reading) -> None:
    at = "model.model_config."
    method, factor = file.take(at + "extend_method"), file.take(at + "scaling_factor")
    if method in (None, "None"):
        return
    where = f"{file.where}: {at}extend_method"
    if (
        method == "YARN"
        and isinstance(factor, dict)
        and {"factor", "original_max_position_embeddings"} <= factor.keys()
    ):
        scaling = {"rope_type": "yarn", "factor": float(factor["factor"])}
        scaling["original_max_position_embeddings"] = int(factor["original_max_position_embeddings"])
        scaling["beta_fast"], scaling["beta_slow"] = factor.get("beta_fast", 32), factor.get("beta_slow", 1)
        if (float(factor.get("mscale", 1)), float(factor.get("mscale_all_dim", 0))) != (1.0, 0.0):
            raise ConfigError("YaRN with mscale other than 1 and mscale_all_dim other than 0 is no Qwen's", where=where)
    elif method in ("PI", "linear") and factor is not None:
        value = factor.get("factor") if isinstance(factor, dict) else factor
        scaling = {"rope_type": "linear", "factor": float(value)}
    else:
        raise ConfigError(
            f"{method} with scaling_factor {factor!r} is not had here",
            where=where,
            hint="None, YARN with a table, or PI",
        )
    if spec.model_type == "qwen":
        raise ConfigError("Qwen v1 has dynamic NTK of its own", where=where, hint='"None"')
    out.set("model.hf.rope_scaling", scaling)


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
