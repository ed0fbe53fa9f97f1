"""The adapters that an engine serves: names, slots, who uses them, and ``lora_adapter.json``.

No framework: the weights lie with the runner (:class:`research.core.torch.multi_lora.AdapterSlots`), by slot number.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from research.core.config.names import did_you_mean
from research.core.errors import ConfigError, WeightsError

TABLE = "lora_adapter.json"
BASE = "base"  # the documents' name of the model without an adapter


class Slots(Protocol):
    """What holds the weights; with tensor parallelism, of all ranks."""

    def load(self, slot: int, folder: Path) -> None: ...

    def clear(self, slot: int) -> None: ...


@dataclass
class Adapter:
    """``slot`` counts from 1. ``generation`` is never given twice, so that what was computed with an adapter is not taken for the work of another
    one that was loaded later under its name. ``users``: requests under way."""

    name: str
    folder: Path
    slot: int
    generation: int
    users: int = 0


class Adapters:
    """The loaded adapters by name. ``None`` and ``base`` mean the model alone everywhere."""

    def __init__(self, slots: Slots):
        self._slots = slots
        self._loaded: dict[str, Adapter] = {}
        self._generation = 0

    @property
    def names(self) -> list[str]:
        return list(self._loaded)

    def find(self, name: str | None) -> Adapter | None:
        """None for the model alone. Raises :class:`ConfigError` for a name that is not loaded."""
        if name is None or name == BASE:
            return None
        if name not in self._loaded:
            hint = did_you_mean(name, self._loaded) if self._loaded else "none is loaded: list it in " + TABLE
            raise ConfigError(f"{name!r} is not a loaded adapter", where="adapter", hint=hint)
        return self._loaded[name]

    def load(self, name: str, folder: Path) -> Adapter:
        """Raises :class:`UserError` for a name that is taken or reserved and for a folder that does not fit the model."""
        if not name or name == BASE or name != name.strip():
            raise ConfigError(f"{name!r} cannot be an adapter's name", where="adapter", hint=f"not empty, not {BASE!r}")
        if name in self._loaded:
            raise ConfigError(
                f"{name!r} is loaded already, from {self._loaded[name].folder}",
                where="adapter",
                hint="unload it first, or choose another name",
            )
        taken = {adapter.slot for adapter in self._loaded.values()}
        slot = next(number for number in range(1, len(taken) + 2) if number not in taken)
        folder = Path(folder).expanduser()
        self._slots.load(slot, folder)
        self._generation += 1
        self._loaded[name] = Adapter(name, folder, slot, self._generation)
        return self._loaded[name]

    def unload(self, name: str) -> None:
        """Raises :class:`ConfigError` when it is unknown or in use."""
        adapter = self.find(name)
        if adapter is None:
            raise ConfigError("the model itself cannot be unloaded", where="adapter", hint="an adapter's name")
        if adapter.users:
            raise ConfigError(
                f"{name!r} is in use by {adapter.users} request{'s' if adapter.users > 1 else ''}",
                where="adapter",
                hint="unload it when they have ended, or cancel them",
            )
        self._slots.clear(adapter.slot)
        del self._loaded[name]


def read_table(weights: Path) -> dict[str, Path]:
    """``lora_adapter.json`` of a weight folder, ``{"name": "folder", ..}`` -> name to folder; empty without the file.

    Folders may be relative to it. Raises :class:`WeightsError` for anything else, a name that stands twice, ``base``.
    """
    path = Path(weights) / TABLE
    if not path.is_file():
        return {}

    def once(pairs: list[tuple[str, object]]) -> dict:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise WeightsError(f"{twice[0]!r} stands in it twice", where=path, hint="one name for one adapter")
        return dict(pairs)

    try:
        table = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError) as bad:
        raise WeightsError(f"not valid JSON: {bad}", where=path) from None
    if not isinstance(table, dict) or not all(isinstance(folder, str) for folder in table.values()):
        raise WeightsError("must hold one JSON object of names and folders", where=path, hint='{"name": "folder"}')
    if BASE in table:
        raise WeightsError(f"{BASE!r} is the model without an adapter", where=path, hint="another name")
    found = {name: path.parent / Path(folder).expanduser() for name, folder in table.items()}
    for name, folder in found.items():
        if not folder.is_dir():
            raise WeightsError(f"the folder of {name!r} is not there: {folder}", where=path)
    return found
