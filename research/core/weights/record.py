"""``conversion.json``: how each tensor of a target was made, and what a later reader can know from it.

Beside a single file it is called ``conversion.json`` too; when one of another file is there already,
``<file>.conversion.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from research.core.errors import WeightsError
from research.core.weights import checksum
from research.core.weights.cast import Rounding
from research.core.weights.staging import Written

NAME = "conversion.json"
VERSION = 1


@dataclass(frozen=True)
class RecordedLayout:
    """What a record says of a MindFormers file."""

    where: Path
    concat: str | None
    gmm: bool | None
    config: dict | None


def record_name(target: Path, single_file: bool) -> str:
    """Name of the record to write for ``target``, without touching another file's record."""
    if not single_file:
        return NAME
    there = target.parent / NAME
    if there.is_file() and _read(there).get("target", {}).get("file") != target.name:
        return f"{target.name}.{NAME}"
    return NAME


def make_record(
    *,
    source: Mapping,
    target: Mapping,
    options: Mapping,
    written: Sequence[Written],
    made_from: Mapping[str, Sequence[str]],
    unused: Sequence[str],
    missing: Sequence[str],
    tied: Sequence[str],
    config: Mapping,
) -> dict:
    """The record as a dictionary. ``made_from``: target name -> names of the source's tensors."""
    rounding = Rounding()
    rows = []
    for item in written:
        rounding.add(item.rounding)
        row = {
            "file": item.file,
            "name": item.target.name,
            "dtype": item.target.dtype,
            "shape": list(item.target.shape),
            checksum.NAME: item.checksum,
            "how": item.target.how,
            "from": list(made_from[item.target.name]),
        }
        if item.rounding.rounded:
            row |= item.rounding.facts()
        rows.append(row)
    return {
        "version": VERSION,
        "source": dict(source),
        "target": dict(target),
        "options": dict(options),
        "dtypes": dict(Counter(item.target.dtype for item in written)),
        "rounding": rounding.facts(),
        "mapped": len(written),
        "unused": list(unused),
        "missing": list(missing),
        "tied": list(tied),
        "config": dict(config),
        "tensors": rows,
    }


def to_bytes(record: Mapping) -> bytes:
    """JSON with one tensor per line: large models have thousands."""
    rows = record.get("tensors", [])
    head = json.dumps({key: value for key, value in record.items() if key != "tensors"}, indent=2, ensure_ascii=False)
    lines = ",\n    ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return (head.removesuffix("\n}") + f',\n  "tensors": [\n    {lines}\n  ]\n}}\n').encode()


def find_record(file: Path) -> Path | None:
    """The record of a single file or of the folder (or ``rank_0/``'s parent) that it lies in."""
    own = file.parent / f"{file.name}.{NAME}"
    if own.is_file():
        return own
    beside = file.parent / NAME
    if beside.is_file() and _read(beside).get("target", {}).get("file") in (file.name, None):
        return beside
    above = file.parent.parent / NAME
    if file.parent.name.startswith("rank_") and above.is_file():
        return above
    return None


def recorded_layout(file: Path) -> RecordedLayout | None:
    """What was recorded of ``file`` when it was written here; None when there is no record or it is of other contents."""
    path = find_record(file)
    if path is None:
        return None
    record = _read(path)
    layout = record.get("target", {}).get("layout")
    if not isinstance(layout, dict) or not _still_true(record, file):
        return None
    return RecordedLayout(path, layout.get("qkv_concat"), layout.get("use_gmm"), record.get("config"))


def _still_true(record: Mapping, file: Path) -> bool:
    """Whether the file still is the one that was written: its size, and the hash of its header and end."""
    marks = record.get("target", {}).get("marks", {})
    return marks.get(file.name) == file_mark(file)


def file_mark(file: Path) -> str:
    """Size and a hash of the first and last 64 KiB: enough to notice that a file was replaced or written again."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(1 << 16))
        stream.seek(max(0, size - (1 << 16)))
        digest.update(stream.read(1 << 16))
    return f"{size}:{digest.hexdigest()[:32]}"


def _read(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as bad:
        raise WeightsError(f"not a readable record: {bad}", where=path, hint="remove it") from None
    return value if isinstance(value, dict) else {}
