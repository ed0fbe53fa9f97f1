"""A prepared dataset folder: memory-mapped arrays and the batches read from them.

One split (``train/`` or ``eval/``) holds
    tokens.bin      int32 [tokens]         token ids; ``~id`` (negative) where the token is not supervised
    documents.bin   int64 [documents + 1]  where each document starts in tokens.bin
    rows.bin        int64 [rows + 1]       the first document of each row
and ``meta.json`` beside the splits says what they were made from. One array carries ids and supervision because a
label is either the id or -100: half the bytes to read per step, and the two cannot disagree. Little-endian.

Shape letters: B rows of a batch, T = seq_length.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from research.core.errors import DataError

IGNORE = -100
META, AUDIT = "meta.json", "audit.json"
TOKENS, DOCUMENTS, ROWS = "tokens.bin", "documents.bin", "rows.bin"
FORMAT = 1
SPLITS = ("train", "eval")
_ROWS_AT_ONCE = 1 << 14


@dataclass
class Batch:
    """Rows ready for a step, all numpy.

    ``labels[b, t]`` is the id at ``t`` where it is supervised, else -100 (padding too): position t predicts
    ``labels[t + 1]``. ``position_ids`` restart at 0 with each document. ``doc_ids`` count documents 1, 2, ... within
    a row and are 0 on padding; padding holds the vocabulary's pad id and lies at the end of a row.
    """

    input_ids: np.ndarray  # [B, T] int64
    labels: np.ndarray  # [B, T] int64
    position_ids: np.ndarray  # [B, T] int64
    doc_ids: np.ndarray  # [B, T] int32

    @property
    def tokens(self) -> int:
        """Real tokens, padding left out."""
        return int(np.count_nonzero(self.doc_ids))

    @property
    def supervised(self) -> int:
        """Targets that the loss counts."""
        return int(np.count_nonzero(self.labels[:, 1:] != IGNORE))


def read_meta(folder: str | Path) -> dict[str, Any]:
    """``meta.json`` of a dataset folder. Raises :class:`DataError` when this is not a finished dataset folder."""
    path = Path(folder) / META
    try:
        meta = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"no {META}: this is not a finished dataset folder",
            where=folder,
            hint="make it with `make data DATA=<source> ARGS=data.output=<folder>`",
        ) from None
    except (ValueError, OSError) as error:
        raise DataError(f"cannot be read: {error}", where=path, hint="prepare the dataset again") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else None
        raise DataError(f"dataset format {found!r}, expected {FORMAT}", where=path, hint="prepare the dataset again")
    return meta


class PackedDataset:
    """One split of a dataset folder, memory-mapped: opening costs nothing, a row is read when it is asked for."""

    def __init__(self, split: str | Path):
        self.folder = Path(split)
        self.meta = read_meta(self.folder.parent)
        self.seq_length: int = self.meta["seq_length"]
        self.pad_id: int = self.meta["pad_id"]
        counts = self.meta["splits"].get(self.folder.name)
        if counts is None:
            raise DataError(f"the dataset has no {self.folder.name} split", where=self.folder.parent)
        self._tokens = _open(self.folder / TOKENS, np.int32, counts["tokens"])
        self._documents = _open(self.folder / DOCUMENTS, np.int64, counts["documents"] + 1)
        self._rows = _open(self.folder / ROWS, np.int64, counts["rows"] + 1)

    def __len__(self) -> int:
        return len(self._rows) - 1

    @property
    def tokens(self) -> int:
        """Real tokens in the split."""
        return len(self._tokens)

    @property
    def documents(self) -> int:
        return len(self._documents) - 1

    def lengths(self, indices: Sequence[int]) -> np.ndarray:
        """Real tokens in each of these rows, int64 [len(indices)]."""
        indices = np.asarray(indices, np.int64)
        return self._documents[self._rows[indices + 1]] - self._documents[self._rows[indices]]

    def targets(self) -> np.ndarray:
        """Supervised targets of every row, int64 [rows]: the first token of a row is nobody's. Reads all tokens once."""
        starts = np.asarray(self._documents[self._rows])
        counts = np.zeros(len(self), np.int64)
        for begin in range(0, len(self), _ROWS_AT_ONCE):
            cut = starts[begin : begin + _ROWS_AT_ONCE + 1]
            supervised = np.asarray(self._tokens[cut[0] : cut[-1]]) >= 0
            firsts = cut[:-1] - cut[0]
            counts[begin : begin + len(firsts)] = np.add.reduceat(supervised, firsts, dtype=np.int64)
            counts[begin : begin + len(firsts)] -= supervised[firsts]
        return counts

    def documents_of_rows(self) -> np.ndarray:
        """Documents in every row, int64 [rows]."""
        return np.diff(np.asarray(self._rows))

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(np.diff(np.asarray(self._documents)).max(initial=1))

    @property
    def stored(self) -> np.ndarray:
        """All tokens as they are stored: int32 [tokens], row after row, ``~id`` where not supervised."""
        return self._tokens

    def row_start(self, row: int) -> int:
        """Where a row begins in :attr:`stored`."""
        return int(self._documents[self._rows[row]])

    def document(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """``(ids, labels)`` of one document, int64 [length] each."""
        return _split_sign(self._tokens[self._documents[number] : self._documents[number + 1]])

    def rows(self, indices: Sequence[int], pad_to: int | None = None) -> Batch:
        """The rows ``indices`` as one :class:`Batch` of width ``pad_to``, or seq_length when it is None.

        ``pad_to=0`` pads to the longest of these rows.
        """
        indices = [int(i) for i in indices]
        width = self.seq_length if pad_to is None else pad_to
        longest = int(self.lengths(indices).max(initial=0))
        width = max(longest, 1) if pad_to == 0 else width
        if longest > width:
            raise ValueError(f"a row of {longest} tokens does not fit pad_to={width}")
        shape = (len(indices), width)
        batch = Batch(
            input_ids=np.full(shape, self.pad_id, np.int64),
            labels=np.full(shape, IGNORE, np.int64),
            position_ids=np.zeros(shape, np.int64),
            doc_ids=np.zeros(shape, np.int32),
        )
        for b, row in enumerate(indices):
            starts = self._documents[self._rows[row] : self._rows[row + 1] + 1]
            lengths = np.diff(starts)
            n = int(starts[-1] - starts[0])
            batch.input_ids[b, :n], batch.labels[b, :n] = _split_sign(self._tokens[starts[0] : starts[-1]])
            batch.position_ids[b, :n] = np.arange(n) - np.repeat(starts[:-1] - starts[0], lengths)
            batch.doc_ids[b, :n] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        return batch


def _split_sign(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    stored = np.asarray(stored, np.int64)
    return np.where(stored < 0, ~stored, stored), np.where(stored < 0, IGNORE, stored)


def _open(path: Path, dtype: type, count: int) -> np.ndarray:
    expected = count * np.dtype(dtype).itemsize
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise DataError("file is missing", where=path, hint="prepare the dataset again") from None
    if found != expected:
        raise DataError(f"{found} bytes, meta.json says {expected}", where=path, hint="prepare the dataset again")
    if count == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r", shape=(count,))


def check_dataset(
    folder: str | Path,
    *,
    tokenizer: str | None = None,
    template: str | None = None,
    seq_length: int | None = None,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """Compare a prepared folder with what the run uses and return its meta.

    ``tokenizer`` and ``template`` are fingerprints. Raises :class:`DataError` naming each thing that differs: tokens
    of another vocabulary would train without any error and teach nonsense.
    """
    meta = read_meta(folder)
    wrong = []
    if tokenizer is not None and meta["tokenizer"] != tokenizer:
        wrong.append(f"vocabulary (prepared with {meta['tokenizer'][:12]}, the model's is {tokenizer[:12]})")
    if template is not None and meta["template"] not in (None, template):
        wrong.append(f"chat template (prepared with {meta['template'][:12]}, now {template[:12]})")
    if seq_length is not None and meta["seq_length"] != seq_length:
        wrong.append(f"sequence length (prepared with {meta['seq_length']}, data.seq_length={seq_length})")
    if vocab_size is not None and meta["max_id"] >= vocab_size:
        wrong.append(f"ids (up to {meta['max_id']}, the model has {vocab_size})")
    if wrong:
        raise DataError(
            "the prepared dataset does not fit this run: " + "; ".join(wrong),
            where=folder,
            hint="prepare it again with `make data` and the same MODEL and settings, or drop data.folder",
        )
    return meta
