"""MindRecord files written by hand for tests: by our writer, column by column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from research.core.data.mindrecord.format import pack_rows
from research.core.data.mindrecord.write import MindRecordWriter


def write_file(
    path: Path, rows: Sequence[Mapping[str, Sequence[int]]], shards: int = 1, note: str = "", **more
) -> Path:
    """Each row is ``{column: values}``; all values of one file are equally many. Returns ``path``."""
    width = len(next(iter(rows[0].values())))
    with MindRecordWriter(path, list(rows[0]), len(rows), width, shards=shards, note=note, **more) as writer:
        for row in rows:
            packed = [
                pack_rows(np.array(row[name], np.int32), np.array([len(row[name])]), len(row[name]), 0)[0]
                for name in writer.columns
            ]
            writer.add(packed)
    return path


def padded(ids: Sequence[int], labels: Sequence[int], width: int, label: str = "target_ids", pad: int = 0) -> dict:
    """A conversation's row as the documents' scripts lay it out; ``pad`` is also the padding's id."""
    rest = width - len(ids)
    return {
        "input_ids": [*ids, *[pad] * rest],
        label: [*labels, *[-100] * rest],
        "attention_mask": [1] * len(ids) + [0] * rest,
    }
