"""From command-line words to one checked :class:`Config`.

Words are Hydra overrides (``train.lr=1e-5``), group choices (``model=qwen2_5_7b``) or flags of the MindFormers
scripts (:mod:`research.core.config.flags`). Each is checked by name before Hydra sees it, so that a typo costs a
second and names its nearest neighbour.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import types
import typing
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from research.core.config.checks import check
from research.core.config.flags import translate_flags
from research.core.config.names import did_you_mean
from research.core.config.schema import Config
from research.core.errors import ConfigError
from research.core.launch.environment import place

REPO = Path(__file__).resolve().parents[3]
FAMILIES = ("qwen", "qwen1_5", "qwen2", "qwen2_5")
CONF_DIRS = (REPO / "conf", *(REPO / "research" / family / "conf" for family in FAMILIES))


def compose(words: Sequence[str] = ()) -> Config:
    """Compose the configuration of ``words``; raises :class:`ConfigError` naming the setting and the nearest known one."""
    overrides = _with_data_source([_override(word) for word in translate_flags(words)])
    config = _to_dataclass(_hydra_compose([override for override in overrides if not override.literal]))
    for override in overrides:
        if override.literal:
            _set(config, override.key, override.text)
    _join_ranks(config, {override.key for override in overrides})
    check(config)
    return config


def compose_resumed(words: Sequence[str], folder: str | os.PathLike) -> Config:
    """The configuration of the run in ``folder`` with what ``words`` name on top.

    Settings, ``parallel=`` and ``device=`` count; the run keeps its own model and data, so naming them again changes
    nothing. Raises :class:`ConfigError` for another model or task.
    """
    composed, saved = compose(words), from_yaml(Path(folder) / "config.yaml")
    overrides = [_override(word) for word in translate_flags(words)]
    for override in overrides:
        if override.key == "model" and composed.model.name != saved.model.name:
            raise ConfigError(
                f"the run trains {saved.model.name}", where=f"model={composed.model.name}", hint="leave MODEL out"
            )
        if override.group and override.key in ("parallel", "device"):
            setattr(saved, override.key, getattr(composed, override.key))
        elif not override.group and override.key != "data.source":
            _set(saved, override.key, _get(composed, override.key))
    if composed.task.name != saved.task.name:
        raise ConfigError(
            f"the run is a {saved.task.name}", where=f"task={composed.task.name}", hint=f"make {saved.task.name}"
        )
    _join_ranks(saved, {override.key for override in overrides})
    check(saved)
    return saved


def group_options(group: str) -> list[str]:
    """Names that ``group=`` accepts (``model``, ``data``, ``task``, ...), from the files there are."""
    return sorted(path.stem for folder in CONF_DIRS for path in (folder / group).glob("*.yaml"))


def groups() -> list[str]:
    """Configuration groups, from the folders there are."""
    return sorted({path.name for folder in CONF_DIRS if folder.is_dir() for path in folder.iterdir() if path.is_dir()})


def to_yaml(config: Config) -> str:
    """The resolved configuration as written to ``config.yaml`` in the run folder; :func:`from_yaml` reads it back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def from_yaml(path: str | os.PathLike) -> Config:
    """Read a ``config.yaml`` of a run folder."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError("configuration file not found", where=path)
    try:
        return _to_dataclass(OmegaConf.create(_no_interpolation(yaml.safe_load(path.read_text(encoding="utf-8")))))
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as bad:
        raise ConfigError(f"cannot be read as a configuration: {bad}", where=path) from None


def _join_ranks(config: Config, named: set[str]) -> None:
    """Under a launcher, the number of cards and the backend are what it started; naming others is an error."""
    here = place()
    if here is None:
        return
    parallel = config.parallel
    if not named & {"parallel.cards", "parallel.nodes"}:
        parallel.cards = here.size
    elif parallel.cards * parallel.nodes != here.size:
        raise ConfigError(
            f"the launcher started {here.size} ranks, the settings ask for {parallel.cards * parallel.nodes} cards",
            where=f"parallel.cards={parallel.cards} parallel.nodes={parallel.nodes}",
            hint="leave parallel.cards and parallel.nodes out: the launcher's number counts",
        )
    if here.meet_s is not None and "parallel.timeout_s" not in named:
        parallel.timeout_s = here.meet_s
    if "backend" not in named:
        config.backend = here.backend
    elif config.backend != here.backend:
        raise ConfigError(
            f"the launcher started ranks for {here.backend}",
            where=f"backend={config.backend}",
            hint=f"scripts/{'torchrun_launcher.sh' if config.backend == 'torch' else 'msrun_launcher.sh'}",
        )


def _no_interpolation(value):
    # A prompt may hold "${": escaped, so that OmegaConf reads it as text.
    if isinstance(value, dict):
        return {key: _no_interpolation(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_no_interpolation(item) for item in value]
    return re.sub(r"(\\*)\$\{", lambda run: run[1] * 2 + "\\${", value) if isinstance(value, str) else value


def _set(config: Config, key: str, value: Any) -> None:
    *path, last = key.split(".")
    owner = _get(config, ".".join(path)) if path else config
    if isinstance(owner, dict):
        owner[last] = value
    else:
        setattr(owner, last, value)


def _get(config: Config, key: str) -> Any:
    value = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


# --- words ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Override:
    key: str
    value: str
    group: bool

    @property
    def literal(self) -> bool:
        """Text is taken to the letter: prompts and paths may hold brackets, quotes or ${ that Hydra would parse.

        So is a list of texts that is written as JSON.
        """
        if self.group or self.value == "null":
            return False
        kind = setting_type(self.key)
        return kind is str or (kind is list and _json_texts(self.value) is not None)

    @property
    def text(self) -> str | list[str]:
        """What a literal sets."""
        return self.value if setting_type(self.key) is str else _json_texts(self.value)

    def for_hydra(self) -> str:
        if self.group and self.value == "null":
            return f"~{self.key}"
        return f"{'' if self.group else '++'}{self.key}={self.value}"


def _json_texts(value: str) -> list[str] | None:
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, list) and all(isinstance(item, str) for item in found) else None


def _override(word: str) -> Override:
    if "=" not in word:
        if word in group_options("task"):
            return Override("task", word, group=True)
        raise ConfigError(f"{word!r} is not of the form setting=value", hint="for example train.lr=1e-5")
    key, value = word.split("=", 1)
    key = key.strip().lstrip("+")
    if key == "data" and value not in group_options("data"):
        return Override("data.source", _data_source(value), group=False)
    if key in groups():
        options = group_options(key)
        if value not in options and not (key in ("debug", "recipe") and value == "null"):
            hint = did_you_mean(value, options)
            raise ConfigError(f"no {key} is called {value!r}", where=f"{key}={value}", hint=hint)
        return Override(key, value, group=True)
    if setting_type(key) is None:
        raise ConfigError(f"no setting is called {key!r}", where=word, hint=did_you_mean(key, [*settings(), *groups()]))
    return Override(key, value, group=False)


def _data_source(value: str) -> str:
    paths = [Path(part).expanduser() for part in value.split(",")]
    # x.mindrecord may be cut into x.mindrecord0, x.mindrecord1, ...
    if any(path.exists() or Path(f"{path}0").exists() for path in paths) or any(ch in value for ch in "*?/"):
        return value
    names = [name for name in group_options("data") if name != "file"]
    raise ConfigError(
        f"{value!r} is neither a file or folder nor a built-in data set",
        where=f"data={value}",
        hint=did_you_mean(value, names),
    )


def _with_data_source(overrides: list[Override]) -> list[Override]:
    # A file named after a preset's settings must not inherit the preset (skills has its own sequence length).
    if any(o.key == "data.source" for o in overrides) and not any(o.key == "data" for o in overrides):
        return [Override("data", "file", group=True), *overrides]
    return overrides


# --- the schema as names ----------------------------------------------------------------------------------------


def settings(cls: type = Config, prefix: str = "") -> list[str]:
    """Every dotted setting name of the schema."""
    names = []
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            names += settings(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def setting_type(key: str) -> type | None:
    """``str`` for text settings, ``list`` for lists of texts, ``dict`` for a key inside a free table, ``object`` for the
    rest, None when unknown."""
    cls: type = Config
    parts = key.split(".")
    for at, part in enumerate(parts):
        kind = typing.get_type_hints(cls).get(part)
        if kind is None:
            return None
        if dataclasses.is_dataclass(kind):
            cls = kind
            continue
        rest = parts[at + 1 :]
        if typing.get_origin(kind) is dict:
            return dict
        if rest:
            return None
        if kind == list[str]:
            return list
        return str if _is_text(kind) else object
    return None


def _is_text(kind) -> bool:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return set(typing.get_args(kind)) == {str, type(None)}
    return kind is str


# --- Hydra ------------------------------------------------------------------------------------------------------


def _hydra_compose(overrides: list[Override]) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    search = ",".join(f"file://{folder}" for folder in CONF_DIRS[1:])
    words = [f"hydra.searchpath=[{search}]", *(override.for_hydra() for override in overrides)]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF_DIRS[0]), version_base="1.3"):
            return hydra_compose("config", overrides=words)
    except (HydraException, OmegaConfBaseException) as bad:
        raise ConfigError(str(bad).strip().splitlines()[0], hint="run `make help` for the form of ARGS") from None


def _to_dataclass(composed: DictConfig) -> Config:
    try:
        merged = OmegaConf.merge(_schema(), composed)  # copies the schema
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as bad:
        key = getattr(bad, "full_key", None) or "configuration"
        if "not in" in str(bad):
            raise ConfigError(f"no setting is called {key!r}", hint=did_you_mean(key, settings())) from None
        raise ConfigError(str(bad).splitlines()[0], where=key, hint=_type_hint(key)) from None


@cache
def _schema() -> DictConfig:
    return OmegaConf.structured(Config)


def _type_hint(key: str) -> str | None:
    cls: type = Config
    kind = None
    for part in key.split("."):
        kind = typing.get_type_hints(cls).get(part)
        if dataclasses.is_dataclass(kind):
            cls = kind
    return None if kind is None else f"a value of type {getattr(kind, '__name__', None) or kind}"
