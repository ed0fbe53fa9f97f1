"""What the documents' inference programs (run_pa, run_fa, main.py) share: their flags, plain settings beside them, and the
environment variables that say where they run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from research.core.config.compose import groups, setting_type
from research.core.config.flag_actions import truth
from research.core.config.names import did_you_mean
from research.core.config.schema import Config
from research.core.errors import ConfigError
from research.core.launch.environment import place
from research.tasks.cli import configuration
from research.tasks.sources import say


class Flags(argparse.ArgumentParser):
    """argparse whose complaints are :class:`ConfigError`; ``setting=value`` words are set aside by :meth:`read`."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, hint="--help")

    def read(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """-> (the flags, the plain settings). Raises :class:`ConfigError` naming the nearest flag for an unknown one."""
        words = [word for word in argv if is_setting(word)]
        found, others = self.parse_known_args([word for word in argv if not is_setting(word)])
        if others:
            known = [name[2:] for action in self._actions for name in action.option_strings if name.startswith("--")]
            raise ConfigError(
                f"no flag is called {others[0]}", hint=did_you_mean(others[0].lstrip("-"), known, prefix="--")
            )
        return found, words


def is_setting(word: str) -> bool:
    """Whether a word is ``setting=value`` with a setting that exists."""
    key, given, _ = word.partition("=")
    return bool(given) and (key in groups() or setting_type(key) is not None)


def boolean(text: str) -> bool:
    """``True``, ``false``, ``1`` ... of a flag."""
    return truth("flag", text)


def weights_configuration(model_path: str, words: Sequence[str]) -> Config:
    """The configuration of a weight folder and plain settings; ``ENGINE`` in the environment is ``engine.mode``."""
    engine = os.environ.get("ENGINE")
    own = [f"engine.mode={engine}"] if engine and not any(word.startswith("engine.mode=") for word in words) else []
    return configuration(["task=predict", f"weights={model_path}", *own, *words])


def number(name: str, default: float | None = None) -> float | None:
    """An environment variable that is a number. Raises :class:`ConfigError` for another text."""
    text = os.environ.get(name)
    if not text:
        return default
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is no number", where=f"environment variable {name}") from None


def bind_cpu() -> None:
    """``BIND_CPU=1``: each rank of this host keeps to its own part of the cores, in order; a rank alone has them all."""
    here = place()
    if os.environ.get("BIND_CPU", "0") != "1" or here is None or here.local_size < 2:
        return
    if not hasattr(os, "sched_setaffinity"):
        say("note: BIND_CPU=1 has no effect on this operating system")
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < here.local_size:
        say(f"note: BIND_CPU=1 has no effect: {len(cores)} cores for {here.local_size} ranks")
        return
    first, last = (len(cores) * (here.local_rank + step) // here.local_size for step in (0, 1))
    os.sched_setaffinity(0, cores[first:last])


def reserve_memory(cfg: Config) -> None:
    """``RESERVED_MEMORY_GB``: so much less for the key/value cache. Raises :class:`ConfigError` when nothing is left."""
    reserved = number("RESERVED_MEMORY_GB")
    if not reserved or cfg.engine.num_blocks is not None:
        return
    from research.core.engine.memory import CARD_FRACTION, CPU_FRACTION, free_memory
    from research.core.torch.device import resolve_device

    device = resolve_device(cfg.device)
    fraction = cfg.engine.memory_fraction or (CPU_FRACTION if device.type == "cpu" else CARD_FRACTION)
    free = free_memory(device)
    cfg.engine.memory_fraction = fraction - reserved * 1e9 / free
    if cfg.engine.memory_fraction <= 0:
        raise ConfigError(
            f"{fraction:.0%} of the {free / 1e9:.1f} GB that are free, less {reserved:g} GB, leave nothing for the cache",
            where=f"RESERVED_MEMORY_GB={reserved:g}",
            hint="a smaller RESERVED_MEMORY_GB, or engine.num_blocks=<number>",
        )
