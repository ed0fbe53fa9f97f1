"""MindRecord files as a source of training data: which files make up a set, whether they fit the run, their documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from research.core.data.json_stream import Record
from research.core.data.mindrecord.columns import ATTENTION, IDS, LABELS, label_column
from research.core.data.mindrecord.read import MindRecord, opened
from research.core.data.sources import OnBytes, Where
from research.core.errors import DataError

_TRUST = "data.format=mindrecord if its tokens are this model's all the same"
_BYTES_PER_CHARACTER = 8  # a guess that makes jobs of some 250 records


class Run(NamedTuple):
    """What a file has to fit. ``trusted``: the user says that its tokens are this model's, whatever it was made for."""

    seq_length: int
    family: str
    tokenizer: str  # fingerprint
    trusted: bool


def complete_set(path: Path) -> list[Path]:
    """Every file of the set that ``path`` is one of, in order, as MindSpore's own reader takes them.

    Raises :class:`DataError` when one of them is missing.
    """
    file = opened(path)
    if len(file.shards) < 2:
        return [path]
    if path.name not in file.shards:
        raise DataError(
            f"this is one of {len(file.shards)} files that were called {file.shards[0]}, {file.shards[1]}, ...; under"
            " another name the others cannot be found",
            where=path,
            hint="give the files their names back",
        )
    found = [path.with_name(name) for name in file.shards]
    missing = [other.name for other in found if not other.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(found)} files of this set are not beside it: {', '.join(missing[:5])}",
            where=path,
            hint="copy all files of the set, each with its .db",
        )
    return found


def check_fits(path: Path, run: Run) -> list[str]:
    """Raise :class:`DataError` for a file of another family, vocabulary or length; returns what is worth saying of it."""
    file = opened(path)
    names = ", ".join(file.columns) or "(none)"
    if IDS not in file.columns:
        raise DataError(
            f"the columns are {names}; training needs {IDS}",
            where=path,
            hint="a file of the documents' preprocess scripts, or of `make data` with data.mindrecord",
        )
    label, wanted = _label(file), label_column(run.family)
    if label is not None and label != wanted and not run.trusted:
        made_for = "Qwen v1" if label == LABELS[0] else "Qwen1.5 and later"
        raise DataError(
            f"the columns are {names}: made for {made_for}; {run.family} reads {wanted}",
            where=path,
            hint=f"a MODEL of {made_for}, the file made with research/{run.family}/{run.family}_preprocess.py, or {_TRUST}",
        )
    note = file.note
    if note is not None and note.tokenizer != run.tokenizer and not run.trusted:
        raise DataError(
            f"made with another vocabulary ({note.tokenizer[:12]}, the model's is {run.tokenizer[:12]})",
            where=path,
            hint=f"the MODEL and TOKENIZER that it was made for (family {note.family}), the file made again for this model,"
            f" or {_TRUST}",
        )
    first = next(file.index(), None)
    if first is None:
        raise DataError("the file holds no records", where=path)
    where = Where(str(path), None, 1)
    _check_length(file.length(IDS, file.blobs(first, where)[IDS]), run.seq_length, where)
    if len(file.shards) > 1 and path.name != file.shards[0]:
        return []  # said of the first file
    said = [f"{path}: the supervision is the file's; data.supervise and data.system have no effect on it"]
    if note is not None and note.packed:
        said.append(
            f"{path}: rows of several documents, which are read as one document each and see each other in training;"
            " made with data.packing=false each row is one document"
        )
    return said


def mindrecord_records(path: Path, on_bytes: OnBytes | None = None) -> Iterator[Record]:
    """A :class:`Record` per row whose ``raw`` says where the row lies; :func:`read_document` reads it, in a worker."""
    for number, row in enumerate(opened(path).index(), 1):
        yield Record(Where(str(path), None, number), row, (row.stop - row.start) // _BYTES_PER_CHARACTER)
        if on_bytes is not None and number % 64 == 0:
            on_bytes(row.stop)


def read_document(record: Record, seq_length: int, pad_id: int) -> np.ndarray:
    """The document in one row: int32 [length], ``~id`` where it is not supervised; empty when the row is all padding.

    What follows the last position of attention_mask is padding; positions before it count as they are labelled, whatever
    their id. Raises :class:`DataError` for a row that cannot be trained.
    """
    where = record.where
    file = opened(where.file)
    blobs = file.blobs(record.raw, where)
    label = _label(file)
    try:
        width = file.length(IDS, blobs[IDS])
        _check_length(width, seq_length, where)
        length = width
        if ATTENTION in blobs:
            length = _real(file.array(ATTENTION, blobs[ATTENTION]), width, where)
        ids = file.array(IDS, blobs[IDS], length)
        if label is None:
            labels = ids
        else:
            labels = file.array(label, blobs[label], length)
            if len(labels) != length:
                raise DataError(f"{label} has {len(labels)} values, {IDS} {width}", where=where)
    except ValueError as error:
        raise DataError(f"the record is damaged: {error}", where=where) from None
    if length and (ids.min() < 0 or ids.max() >= 1 << 31):
        raise DataError(f"{ids.min() if ids.min() < 0 else ids.max()} is no token id", where=where)
    supervised = labels >= 0
    if label is not None and not np.array_equal(labels[supervised], ids[supervised]):
        place = int(np.flatnonzero(supervised & (labels != ids))[0])
        raise DataError(
            f"{label}[{place}] is {labels[place]}, {IDS}[{place}] is {ids[place]}: a label is the token at its own place"
            " (the model shifts), or -100",
            where=where,
        )
    if ATTENTION not in blobs and label is not None:  # what nothing is learned from, at the end
        kept = np.flatnonzero(supervised | (ids != pad_id))
        length = int(kept[-1]) + 1 if len(kept) else 0
    tokens = np.where(supervised, ids, ~ids)[:length].astype(np.int32)
    if length and tokens[0] >= 0:
        tokens[0] = ~tokens[0]  # nothing precedes it
    return tokens


def _label(file: MindRecord) -> str | None:
    return next((name for name in LABELS if name in file.columns), None)


def _real(attention: np.ndarray, width: int, where: Where) -> int:
    """Tokens before the padding."""
    if len(attention) != width:
        raise DataError(f"{ATTENTION} has {len(attention)} values, {IDS} {width}", where=where)
    seen = np.flatnonzero(attention)
    if not len(seen):
        return 0
    if seen[0] > 0:
        raise DataError(
            f"{ATTENTION} begins with {seen[0]} zeros: padding before the text",
            where=where,
            hint="records padded at their end, as the documents' preprocess scripts write them",
        )
    return int(seen[-1]) + 1


def _check_length(width: int, seq_length: int, where: Where) -> None:
    if width not in (seq_length, seq_length + 1):
        raise DataError(
            f"a record of {width:,} tokens (made with --seq_length {width - 1}), data.seq_length is {seq_length}",
            where=where,
            hint=f"data.seq_length={width - 1}, or the file made again with --seq_length {seq_length}",
        )
