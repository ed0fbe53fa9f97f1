"""The flags of the MindFormers scripts (run_qwen.py, run_qwen1_5.py, run_mindformer.py), translated to settings.

Every flag does something, or is announced with the reason why it changes nothing here. ``--config`` names a MindFormers YAML
or one of the documents' (:mod:`research.core.config.mindformers`); flags count over it, and plain settings over both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from research.core.config.flag_actions import FLAGS, PATCHING, RUN_MODES, SEVERAL, Command, patch, truth, yaml_value
from research.core.config.names import did_you_mean
from research.core.errors import ConfigError
from research.core.launch.environment import place

REPO = Path(__file__).resolve().parents[3]


@dataclass
class Translation:
    """Settings as words, and what to say about flags that change nothing."""

    words: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# --- translation ------------------------------------------------------------------------------------------------


def translate_flags(words: Sequence[str]) -> list[str]:
    """Replace ``--flag value`` and ``--flag=value`` by ``setting=value``; other words pass through.

    Raises :class:`ConfigError` for an unknown flag or value, naming the nearest known one.
    """
    return translate(words).words


def translate(words: Sequence[str], family: str | None = None, as_written: bool = False) -> Translation:
    """``words`` as settings, each key once: plain settings count over flags, flags over ``--config``.

    ``family`` is that of the script, None for ``run_mindformer.py``; ``as_written``: take dtypes and grid of a
    ``--config`` as it has them, whatever this machine and backend can do with them. Raises :class:`ConfigError`.
    """
    command = _taken_apart(words, family)
    if not command.flags:
        return Translation(command.plain)
    for name, values in command.flags.items():
        if "." in name:
            patch(command, name, values[0], f"--{name} {values[0]}")
        elif name in PATCHING:
            FLAGS[name](command, name, values)
    words, notes = _read_config(command, as_written) if "config" in command.flags else ([], [])
    command.config_task = next((word[5:] for word in words if word.startswith("task=")), None)
    for name, values in command.flags.items():
        if "." not in name and name not in PATCHING:
            FLAGS[name](command, name, values)
    return Translation(_each_once([words, command.words, command.plain]), [*notes, *command.notes])


def _taken_apart(words: Sequence[str], family: str | None) -> Command:
    command, words = Command({}, [], family), list(words)
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not word.startswith("--"):
            command.plain.append(word)
            continue
        name, given, value = word[2:].partition("=")
        name = name if "." in name else name.replace("-", "_")
        name = "config" if name == "config_path" else name  # one document's spelling
        if name not in FLAGS and "." not in name:
            raise ConfigError(f"no flag is called --{name}", hint=did_you_mean(name, FLAGS, prefix="--"))
        values = [value] if given else []
        while at < len(words) and not words[at].startswith("--"):
            if values and (name not in SEVERAL or (name != "options" and _is_setting(words[at]))):
                break
            values.append(words[at])
            at += 1
        if not values:
            raise ConfigError(f"--{name} needs a value")
        command.flags[name] = values
    return command


def _is_setting(word: str) -> bool:
    """Whether a word behind several values is no further value but a setting."""
    from research.core.config.compose import groups, setting_type

    key = re.match(r"\+{0,2}([a-z_]+(?:\.[A-Za-z0-9_]+)*)=", word)
    return key is not None and (key[1] in groups() or setting_type(key[1]) is not None)


def _each_once(layers: Sequence[Sequence[str]]) -> list[str]:
    """The words of all layers; of those with the same key only the last layer's."""
    keys = [[word.split("=", 1)[0].lstrip("+") if "=" in word else "task" for word in layer] for layer in layers]
    out = []
    for number, layer in enumerate(layers):
        later = {key for other in keys[number + 1 :] for key in other}
        later |= {"data.source"} if "data" in later else set()
        out += [word for word, key in zip(layer, keys[number]) if key not in later]
    return out


def _read_config(command: Command, as_written: bool) -> tuple[list[str], list[str]]:
    from research.core.config.mindformers.grid import Ranks
    from research.core.config.mindformers.models import family_of
    from research.core.config.mindformers.read import read_config
    from research.core.config.mindformers.yaml_file import Job
    from research.core.launch.host import npus

    backend, note = _backend(command)
    wanted = command.first("use_parallel")
    device = command.plain_value("device") or command.plain_value("device.kind") or command.first("device_target")
    here = device in ("npu", "cuda", "Ascend", "GPU") or (device in (None, "auto") and bool(npus()))
    hf = {
        word.split("=", 1)[0][9:]: yaml_value(word.split("=", 1)[1])
        for word in command.plain
        if word.startswith("model.hf.")
    }
    modes = {task: mode for mode, task in RUN_MODES.items()} | {"lora": "finetune"}
    job = Job(
        run_mode=command.first("run_mode") or modes.get(command.plain_value("task") or ""),
        model=command.plain_value("model") or command.first("model"),
        family=command.family,
        backend=backend,
        accelerator=as_written or here,
        splits_layers=as_written,
        ranks=Ranks(_cards(command), None if wanted is None else truth("use_parallel", wanted)),
        patches=command.patches,
        hf=hf,
    )
    reading = read_config(command.flags["config"][0], job, REPO)
    if "register_path" in command.flags and family_of(reading.words["model"]) != command.family:
        raise ConfigError(
            f"{reading.words['model']} is a model of the family {family_of(reading.words['model'])}",
            where=f"--register_path {command.flags['register_path'][0]}",
            hint=f"--register_path research/{family_of(reading.words['model'])}",
        )
    notes = list(reading.notes)
    words = reading.as_words()
    if not command.has("backend"):
        words.append(f"backend={backend}")
        notes += [note] if note else []
    return words, notes


def _cards(command: Command) -> int | None:
    """How many ranks there are or will be: the launcher's, or the settings'; None when nobody says."""
    here = place()
    if here is not None:
        return here.size
    cards, nodes = command.plain_value("parallel.cards"), command.plain_value("parallel.nodes") or "1"
    return int(cards) * int(nodes) if cards and cards.isdigit() and nodes.isdigit() else None


def _backend(command: Command) -> tuple[str, str | None]:
    """The backend of a --config: what is named, what the launcher started, else MindSpore where it is installed."""
    import importlib.util

    named, here = command.plain_value("backend"), place()
    if named is not None:
        return named, None
    if here is not None:
        return here.backend, None
    if importlib.util.find_spec("mindspore") is not None:
        return "mindspore", None
    return "torch", "MindSpore is not installed, so this runs on torch (backend=torch)"
