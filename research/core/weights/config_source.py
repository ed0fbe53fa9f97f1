"""Where the architecture of a MindFormers file comes from: the file itself does not say it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from research.core.errors import WeightsError
from research.core.weights.folder import read_config
from research.core.weights.record import RecordedLayout


@dataclass(frozen=True)
class ConfigSource:
    """A ``config.json`` dictionary, where it was read, and the folder whose other files belong to it."""

    config: dict
    where: str
    folder: Path | None = None


def find_config(
    path: Path, given: str | None, record: RecordedLayout | None, presets: Mapping | ConfigSource | None = None
) -> ConfigSource:
    """The config.json that ``given`` names; else the one beside the weights; else the one that our record of them kept;
    else ``presets`` (of the output folder, or of the named MODEL). Raises :class:`WeightsError` when there is none."""
    if given is not None:
        return _given(Path(given).expanduser())
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent) if folder.name.startswith("rank_") else (folder,):
        if (place / "config.json").is_file():
            return ConfigSource(read_config(place), str(place / "config.json"), place)
    if record is not None and record.config:
        return ConfigSource(dict(record.config), str(record.where))
    if isinstance(presets, ConfigSource):
        return presets
    if presets:
        return ConfigSource(dict(presets), "the chosen MODEL")
    raise WeightsError(
        "a MindFormers file does not say its architecture",
        where=path,
        hint="convert.config=<config.json or Hugging Face folder of the model> (--config), or put config.json beside it",
    )


def _given(path: Path) -> ConfigSource:
    if path.is_dir():
        return ConfigSource(read_config(path), str(path / "config.json"), path)
    if not path.is_file():
        raise WeightsError("no such config.json", where=path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as bad:
        raise WeightsError(f"not valid JSON: {bad}", where=path) from None
    if not isinstance(config, dict):
        raise WeightsError("must hold one JSON object", where=path)
    return ConfigSource(config, str(path), path.parent)
