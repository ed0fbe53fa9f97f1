"""Layout: which tokens of a batch see which, as arrays of fixed shape made on the host (numpy).

Shape letters: B batch rows, T time. A *document* is a run of tokens that see each other: a whole row, the real part of
a padded row, or one of several packed in a row. Positions count the real tokens of the document from 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from research.core.errors import ConfigError
from research.core.spec import DecoderSpec

SMALLEST_BLOCK = 16


@dataclass(frozen=True, eq=False)
class Layout:
    """``positions`` int32 [B, T]; ``documents`` int32 [B, T], numbered within the row, 0 for filling; ``lengths`` int32
    [B, T], the number of tokens of each position's document (1 at filling), which dynamic NTK reads."""

    positions: np.ndarray
    documents: np.ndarray
    lengths: np.ndarray

    @classmethod
    def full(cls, batch: int, time: int) -> Layout:
        """Every row is one document of ``time`` tokens."""
        positions = np.broadcast_to(np.arange(time, dtype=np.int32), (batch, time))
        return cls(
            np.ascontiguousarray(positions), np.ones((batch, time), np.int32), np.full((batch, time), time, np.int32)
        )

    @classmethod
    def padded(cls, attention_mask: np.ndarray) -> Layout:
        """Rows padded left or right: ``attention_mask`` [B, T], non-zero where a token is real."""
        real = np.asarray(attention_mask) != 0
        positions = np.maximum(np.cumsum(real, 1) - 1, 0)
        return cls.packed(positions, real)

    @classmethod
    def packed(cls, position_ids: np.ndarray, doc_ids: np.ndarray) -> Layout:
        """Several documents in a row: ``doc_ids`` [B, T] 1, 2, .. and 0 for filling; ``position_ids`` [B, T] restart
        with every document."""
        documents = np.asarray(doc_ids).astype(np.int32)
        width = int(documents.max(initial=0)) + 1
        counts = np.zeros((len(documents), width), np.int32)
        np.add.at(counts, (np.arange(len(documents))[:, None], documents), 1)
        lengths = np.take_along_axis(counts, documents, 1)
        lengths = np.where(documents == 0, 1, lengths).astype(np.int32)
        return cls(np.asarray(position_ids).astype(np.int32), documents, lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.lengths.max(initial=1))

    def last(self) -> np.ndarray:
        """int32 [B]: the place of each row's last real token (0 in a row of nothing but filling)."""
        return (np.arange(self.documents.shape[1]) * (self.documents != 0)).max(1).astype(np.int32)

    def ends(self, size: int) -> np.ndarray:
        """int64 [size]: where each document ends in the B * T tokens one row after another, for operators that take
        cumulative lengths. Filling counts as documents; the rest of the array repeats B * T.

        Raises :class:`ConfigError` when the batch has more documents than ``size``.
        """
        flat = self.documents.reshape(-1)
        change = np.flatnonzero(flat[1:] != flat[:-1]) + 1
        rows = np.arange(1, len(self.documents)) * self.documents.shape[1]
        ends = np.union1d(np.union1d(change, rows), [flat.size]).astype(np.int64)
        if len(ends) > size:
            raise ConfigError(
                f"{len(ends)} documents in one micro batch, room is made for {size}",
                where="train.micro_batch",
                hint="a smaller train.micro_batch",
            )
        return np.concatenate((ends, np.full(size - len(ends), flat.size, np.int64)))


def choose_block(longest: int, time: int) -> int | None:
    """The block of :func:`research.core.mindspore.attention.attend` for rows of ``time`` tokens whose documents have at
    most ``longest``: the smallest power of two that holds one; None where attending whole rows costs no more."""
    block = SMALLEST_BLOCK
    while block < longest:
        block *= 2
    return block if time % block == 0 and 2 * block < time else None


def ntk_alpha(lengths: np.ndarray | int, train_length: int) -> np.ndarray:
    """Qwen v1's ``2^ceil(log2(length / train_length) + 1) - 1``, at least 1; float64."""
    turns = np.log2(np.maximum(np.asarray(lengths, np.float64), 1) / train_length) + 1
    return np.maximum(np.exp2(np.ceil(turns)) - 1, 1)


def rope_base(spec: DecoderSpec, lengths: np.ndarray) -> np.ndarray | None:
    """The rotary base for each of ``lengths`` (of the prompts, or of each position's document), float32 of their shape:
    ``theta * alpha^(d/(d-2))``. None for models without dynamic NTK, whose decoder takes no such input."""
    if not spec.dynamic_ntk:
        return None
    alpha = ntk_alpha(lengths, spec.train_length)
    return (spec.rope_theta * alpha ** (spec.head_dim / (spec.head_dim - 2))).astype(np.float32)
