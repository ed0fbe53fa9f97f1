"""A MindFormers YAML by dotted key, what the command line adds to it, and what comes out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from research.core.config.mindformers.grid import Ranks
from research.core.errors import ConfigError

# Values that stand for "fill this in" in the released files.
_PLACEHOLDER = re.compile(
    r"(/?\{?path\}?|/?path/to|/?your.?path)(/.*)?|None|dataset_dir|model_dir|Please input.*", re.IGNORECASE
)
_ARCHES = {"LlamaForCausalLM": False, "ParallelLlamaForCausalLM": False, "QwenForCausalLM": True}


@dataclass
class Reading:
    """Settings in the order in which they were read, and what is to be said about the file."""

    words: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any) -> None:
        if isinstance(value, dict):  # as Hydra writes tables
            self.words[key] = "{" + ",".join(f"{name}:{item}" for name, item in value.items()) + "}"
        else:
            self.words[key] = value if isinstance(value, str) else json.dumps(value)

    def copy(self, value: Any, key: str) -> None:
        """Set ``key`` where there is a value."""
        if value is not None:
            self.set(key, value)

    def as_words(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.words.items()]


@dataclass(frozen=True)
class Job:
    """What the command line says besides the file.

    ``accelerator``: an NPU or GPU will compute, so 16-bit dtypes are taken as the file has them; ``splits_layers``: the backend's
    training can split layers over cards; ``patches``: dotted keys on top of the file; ``hf``: MODEL's keys that the command
    line changes.
    """

    run_mode: str | None = None
    model: str | None = None
    family: str | None = None
    backend: str = "mindspore"
    accelerator: bool = False
    splits_layers: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    patches: Mapping[str, Any] = field(default_factory=dict)
    hf: Mapping[str, Any] = field(default_factory=dict)


class YamlFile:
    """Nested content by dotted key; remembers which keys were taken. ``where`` names it in messages."""

    def __init__(self, content: dict, where: str):
        self.content, self.where = content, where
        self.taken: set[str] = set()

    def take(self, *keys: str) -> Any:
        """The value of the first of ``keys`` that is there and not empty; all of them count as taken."""
        found = None
        for key in keys:
            value, there = self._find(key)
            if there:
                self.taken.add(key)
                empty = isinstance(value, str) and value.strip() in ("", "None")
                found = value if found is None and not empty else found
        return found

    def path(self, *keys: str) -> str | None:
        """A path; None for what is to be filled in."""
        value = self.take(*keys)
        if not isinstance(value, str) or (_PLACEHOLDER.fullmatch(value.strip()) and not os.path.exists(value)):
            return None
        return value

    def number(self, *keys: str) -> float | None:
        """A number; YAML reads 1e-5, without a point, as a text."""
        value = self.take(*keys)
        if value is None or isinstance(value, bool):
            return None
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{value!r} is no number", where=f"{self.where}: {keys[0]}") from None

    def whole(self, *keys: str) -> int | None:
        value = self.number(*keys)
        if value is not None and value != int(value):
            raise ConfigError(f"{value} is no whole number", where=f"{self.where}: {keys[0]}")
        return None if value is None else int(value)

    def truth(self, *keys: str) -> bool | None:
        value = self.take(*keys)
        if isinstance(value, str):
            value = {"true": True, "false": False}.get(value.lower(), value)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{value!r} is neither True nor False", where=f"{self.where}: {keys[0]}")
        return value

    def section(self, key: str) -> dict:
        """The table at ``key``; {} where there is none."""
        value, there = self._find(key)
        return value if there and isinstance(value, dict) else {}

    def ignore(self, *keys: str) -> None:
        """Count these keys, and what is below them, as taken."""
        self.taken.update(keys)

    def left(self) -> list[str]:
        """Dotted keys that nobody took, each once; those of a list of tables too."""
        parents = tuple(f"{key}." for key in self.taken)
        return [
            key for key in dict.fromkeys(_leaves(self.content)) if key not in self.taken and not key.startswith(parents)
        ]

    def first_generation(self) -> bool | None:
        """Whether it describes a Qwen v1 model; None when it does not say. Raises :class:`ConfigError` for other models."""
        config, arch = self.section("model.model_config"), self.section("model.arch").get("type")
        if arch is not None and arch not in _ARCHES:
            raise ConfigError(
                f"{arch} is not a Qwen", where=f"{self.where}: model.arch.type", hint="a YAML of research/qwen*"
            )
        if config.get("type") == "QwenConfig" or _ARCHES.get(arch):
            return True
        return None if arch is None else False

    def whole_model(self) -> bool:
        """Whether it describes a model, and not only changes some keys of one."""
        config = self.section("model.model_config")
        return bool({"num_layers", "num_hidden_layers"} & config.keys() and "hidden_size" in config)

    def _find(self, key: str) -> tuple[Any, bool]:
        value: Any = self.content
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return None, False
            value = value[part]
        return value, True


def _leaves(value: dict, prefix: str = "") -> Iterator[str]:
    for name, item in value.items():
        if isinstance(item, dict) and item:
            yield from _leaves(item, f"{prefix}{name}.")
        elif isinstance(item, list) and item and all(isinstance(entry, dict) for entry in item):
            for entry in item:
                yield from _leaves(entry, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def load_yaml(path: Path) -> dict:
    """The content of a MindFormers YAML. Raises :class:`ConfigError` naming the line."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as bad:
        line = getattr(getattr(bad, "problem_mark", None), "line", None)
        where = path if line is None else f"{path}:{line + 1}"
        raise ConfigError(f"is not YAML: {getattr(bad, 'problem', bad)}", where=where) from None
    except (OSError, UnicodeDecodeError) as bad:
        raise ConfigError(f"cannot be read: {bad}", where=path) from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ConfigError(
            "is not a configuration of MindFormers: it has no section model",
            where=path,
            hint="a run folder's config.yaml is used by RUN=<folder>, not by --config",
        )
    if "base_config" in content:
        raise ConfigError("base_config is not followed", where=path, hint="a file that says everything itself")
    return content


def patched(content: dict, patches: Mapping[str, Any]) -> dict:
    """A copy of ``content`` with dotted keys set. Raises :class:`ConfigError` where a key has nothing below it."""
    content = json.loads(json.dumps(content, default=str))
    for key, value in patches.items():
        owner = content
        *path, last = key.split(".")
        for part in path:
            owner = owner.setdefault(part, {})
            if not isinstance(owner, dict):
                raise ConfigError(f"{part} has no keys below it", where=f"--{key}")
        owner[last] = value
    return content


def dump(content: dict[str, Any]) -> str:
    """``content`` as YAML text, laid out as MindFormers' own files: tables in lines, lists of values in brackets."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)


class _Dumper(yaml.SafeDumper):
    def generate_anchor(self, node: yaml.Node) -> str:
        return "dataset"  # the only part that is in the file twice


def _represent_list(dumper: yaml.SafeDumper, items: list) -> yaml.Node:
    return dumper.represent_sequence(
        "tag:yaml.org,2002:seq", items, flow_style=not any(isinstance(i, dict) for i in items)
    )


_Dumper.add_representer(list, _represent_list)
