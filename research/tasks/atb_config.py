"""``config.ini`` of the document qwen_7b_atb_pytorch."""

from __future__ import annotations

import configparser
import json
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

from research.core.config.names import did_you_mean
from research.core.errors import ConfigError, require_file


@dataclass
class ModelSection:
    model_path: str = ""  # weight folder; of several cards the folder that part_model lies in
    device_ids: str = ""  # which cards: 0,1; empty: the first ones
    parallel_backend: str = "hccl"  # what the ranks talk over; follows from the device
    log_dir: str = ""  # folder of device<rank>.log; empty: none
    bind_cpu: int = 1  # each rank keeps to its part of the host's cores


@dataclass
class PrecisionSection:
    mode: str = "ceval"
    work_dir: str = ""  # folder of the exam; test_result is written into it
    batch: int = 1  # questions at a time
    shot: int = 5  # examples in front of a question
    seq_len_out: int = 32  # new tokens of an answer


@dataclass
class PerformanceSection:
    model_name: str = ""  # part of the result file's name; empty: the weight folder's
    batch_size: list[int] = field(default_factory=lambda: [1])  # one, or several with commas
    max_len_exp: int = 10  # lengths 2^min_len_exp .. 2^max_len_exp of prompts and answers,
    min_len_exp: int = 5
    case_pair: list[list[int]] = field(default_factory=list)  # or these: [[256, 256], [512, 512]]
    save_file_name: str = ""  # result file; empty: performance_test_<device>_<model_name>_<time>.csv
    perf_mode: str = "normal"  # normal: two runs, t(n) - t(1); detail (with TIMEIT=1): the parts of every step
    skip_decode: int = 0  # 1: the first token only


@dataclass
class AtbConfig:
    model: ModelSection = field(default_factory=ModelSection)
    precision: PrecisionSection = field(default_factory=PrecisionSection)
    performance: PerformanceSection = field(default_factory=PerformanceSection)


_CHOICES = {
    "model.parallel_backend": ("hccl", "nccl", "gloo"),
    "model.bind_cpu": (0, 1),
    "precision.mode": ("ceval",),
    "performance.perf_mode": ("normal", "detail"),
    "performance.skip_decode": (0, 1),
}
_LOWEST = {"precision.batch": 1, "precision.shot": 0, "precision.seq_len_out": 1, "performance.min_len_exp": 0}


def read_config(path: str | Path) -> AtbConfig:
    """Read a file; relative paths in it count from its folder. Raises :class:`ConfigError` naming section and key."""
    path = require_file(path, "configuration", hint="--config <config.ini>")
    parser = configparser.ConfigParser(inline_comment_prefixes=("#", ";"), interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8"), source=str(path))
    except (configparser.Error, UnicodeDecodeError) as bad:
        raise ConfigError(f"cannot be read: {str(bad).splitlines()[0]}", where=path) from None
    config = AtbConfig()
    for section in parser.sections():
        own = getattr(config, section, None)
        if own is None:
            hint = did_you_mean(section, [f.name for f in fields(config)])
            raise ConfigError(f"there is no section [{section}]", where=path, hint=hint)
        kinds = typing.get_type_hints(type(own))
        for key, text in parser.items(section):
            if key not in kinds:
                raise ConfigError(
                    f"no key is called {key!r}", where=f"{path} [{section}]", hint=did_you_mean(key, kinds)
                )
            if text:
                setattr(own, key, _value(kinds[key], text, f"{path} [{section}] {key}={text}"))
    _check(config, path)
    for own, key in ((config.model, "model_path"), (config.model, "log_dir"), (config.precision, "work_dir")):
        value = getattr(own, key)
        if value:
            setattr(own, key, str(path.resolve().parent / Path(value).expanduser()))
    return config


def _value(kind, text: str, where: str):
    if kind is str:
        return text
    try:
        if kind is int:
            return int(text)
        value = json.loads(text if text.startswith("[") else f"[{text}]")
        rows = value if kind == list[int] else [number for row in value for number in row]
        pairs = kind == list[int] or all(len(row) == 2 for row in value)
        if value and pairs and all(type(number) is int and number > 0 for number in rows):
            return value
    except (ValueError, TypeError):
        pass
    hint = {int: "a whole number", list[int]: "1, or 1,2,4"}.get(kind, "[[256,256],[512,512]]")
    raise ConfigError("is not possible", where=where, hint=hint)


def _check(config: AtbConfig, path: Path) -> None:
    for name, allowed in _CHOICES.items():
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        if value not in allowed:
            raise ConfigError(
                f"{value!r} is not a choice in this version",
                where=f"{path} [{section}] {key}={value}",
                hint=" or ".join(map(str, allowed)),
            )
    for name, low in _LOWEST.items():
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        if value < low:
            raise ConfigError(f"must be at least {low}", where=f"{path} [{section}] {key}={value}")
    speed = config.performance
    if not speed.min_len_exp <= speed.max_len_exp <= 20:
        raise ConfigError(
            f"lengths from 2^{speed.min_len_exp} to 2^{speed.max_len_exp} are not possible",
            where=f"{path} [performance]",
            hint="min_len_exp=5 max_len_exp=10",
        )
