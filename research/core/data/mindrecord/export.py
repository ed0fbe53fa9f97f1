"""A dataset folder -> MindRecord files with the documents' columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from research.core.data.dataset import IGNORE, PackedDataset
from research.core.data.mindrecord.columns import ATTENTION, IDS, Note, columns_of
from research.core.data.mindrecord.format import pack_rows
from research.core.data.mindrecord.write import MindRecordWriter, Written
from research.core.errors import DataError

_BATCH_TOKENS = 1 << 20  # positions that are packed at a time
OnRows = Callable[[int, int], None]


def write_rows(
    split: Path,
    output: Path,
    family: str,
    width: int,
    *,
    first_label: bool = False,
    repeat: int = 1,
    shards: int = 1,
    overwrite: bool = False,
    option: str = "--overwrite",
    progress: OnRows | None = None,
) -> Written:
    """Every row of a split as a record of ``width`` positions, padded at its end; ``repeat`` times the whole.

    input_ids end with the pad id, labels (target_ids) with -100, attention_mask with 0; all are int32. With
    ``first_label`` the first token of a record is labelled too, as the MindFormers scripts did (no position predicts it).
    """
    data = PackedDataset(split)
    rows = len(data) * repeat
    if not rows:
        raise DataError("no records to write", where=split)
    columns = columns_of(family, text=False)
    with MindRecordWriter(
        output, columns, rows, width, shards=shards, note=_note(data, width), overwrite=overwrite, option=option
    ) as writer:
        for stored, lengths in _batches(data, width, repeat):
            for row in _conversation_rows(stored, lengths, width, data.pad_id, columns[1], writer.columns, first_label):
                writer.add(row)
            if progress is not None:
                progress(writer.added, rows)
    return writer.written


def write_blocks(
    split: Path,
    output: Path,
    width: int,
    *,
    repeat: int = 1,
    shards: int = 1,
    overwrite: bool = False,
    option: str = "--overwrite",
    progress: OnRows | None = None,
) -> tuple[Written, int]:
    """All tokens of a split of plain text, ``repeat`` times in a row, cut into records of ``width`` input_ids.

    Returns also how many tokens were left over: less than one record, which is not written.
    """
    data = PackedDataset(split)
    total = data.tokens * repeat
    rows, left = divmod(total, width)
    if not rows:
        raise DataError(
            f"{total:,} tokens are less than one record of {width:,}",
            where=output.name,
            hint=f"--seq_length {max(total - 1, 1)} (data.seq_length), or more text",
        )
    each = max(1, _BATCH_TOKENS // width)
    with MindRecordWriter(
        output,
        columns_of("", text=True),
        rows,
        width,
        shards=shards,
        note=_note(data, width),
        overwrite=overwrite,
        option=option,
    ) as writer:
        for first in range(0, rows, each):
            count = min(each, rows - first)
            flat = np.take(data.stored, np.arange(first * width, (first + count) * width) % data.tokens)
            ids = np.where(flat < 0, ~flat, flat)
            for row in pack_rows(ids, np.full(count, width), width, 0):
                writer.add([row])
            if progress is not None:
                progress(writer.added, rows)
    return writer.written, left


def _note(data: PackedDataset, width: int) -> str:
    meta = data.meta
    return Note(
        seq_length=width - 1,
        family=meta["family"],
        tokenizer=meta["tokenizer"],
        supervise=meta["settings"]["supervise"],
        packed=data.documents > len(data),
    ).to_text()


def _batches(data: PackedDataset, width: int, repeat: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``(stored tokens, length of each row)`` of rows in order, some at a time."""
    each = max(1, _BATCH_TOKENS // width)
    for _ in range(repeat):
        for first in range(0, len(data), each):
            lengths = data.lengths(range(first, min(first + each, len(data))))
            start = data.row_start(first)
            yield data.stored[start : start + int(lengths.sum())], lengths


def _conversation_rows(
    stored: np.ndarray,
    lengths: np.ndarray,
    width: int,
    pad_id: int,
    label: str,
    order: list[str],
    first_label: bool,
) -> Iterator[list[bytes]]:
    """The packed columns of each row, in ``order``."""
    ids = np.where(stored < 0, ~stored, stored).astype(np.int32)
    labels = np.where(stored < 0, IGNORE, stored).astype(np.int32)
    if first_label:
        starts = np.cumsum(lengths) - lengths
        labels[starts] = np.where(ids[starts] == pad_id, IGNORE, ids[starts])
    packed = {
        IDS: pack_rows(ids, lengths, width, pad_id),
        label: pack_rows(labels, lengths, width, IGNORE),
        ATTENTION: pack_rows(np.ones(len(ids), np.int32), lengths, width, 0),
    }
    return ([packed[name][row] for name in order] for row in range(len(lengths)))
