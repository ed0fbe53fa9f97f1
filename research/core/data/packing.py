"""Exact packing: whole documents laid into rows of seq_length tokens, in a stream.

A row starts with the oldest document that waits; the space it leaves is filled with the subset of the next
:data:`WINDOW` documents that comes closest to it. That is the subset-sum problem, solved exactly with one big integer
whose bit s says whether a sum of s tokens can be reached, so that rows of ordinary data come out full to the last
token. No document is split, dropped or reordered within its row; the result depends on the order of the documents
alone. Which documents share a row changes nothing in training: they never see each other.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

WINDOW = 48  # C(48, 3) = 17,296 triples: enough sums to hit one length of a few thousand


class Packer:
    """Takes documents one by one, gives back rows (lists of documents) as they fill up.

    At most ``seq_length + WINDOW * seq_length`` tokens wait at any time.
    """

    def __init__(self, seq_length: int):
        if seq_length < 1:
            raise ValueError(f"seq_length must be positive, not {seq_length}")
        self.seq_length = seq_length
        self._waiting: list[np.ndarray] = []
        self._tokens = 0  # in all that wait
        self._early = 0  # in those before the last WINDOW

    def add(self, document: np.ndarray) -> list[np.ndarray] | None:
        """Queue one document of 1 .. seq_length tokens; returns a finished row when there is one."""
        length = len(document)
        if not 0 < length <= self.seq_length:
            raise ValueError(f"a document of {length} tokens does not fit a row of {self.seq_length}")
        self._waiting.append(document)
        self._tokens += length
        if len(self._waiting) <= WINDOW:
            return None
        self._early += len(self._waiting[-WINDOW - 1])
        # The oldest documents fill the row up to half of what the window holds; the window fills the rest.
        if (self._early + self._tokens) / 2 < self.seq_length:
            return None
        return self._build()

    def flush(self) -> Iterator[list[np.ndarray]]:
        """The rows of everything that still waits."""
        while self._waiting:
            yield self._build()

    def _build(self) -> list[np.ndarray]:
        waiting, gap, start = self._waiting, self.seq_length, 0
        certain = max(1, len(waiting) - WINDOW)
        while start < certain and len(waiting[start]) <= gap:
            gap -= len(waiting[start])
            start += 1
        chosen = _closest_subset([len(document) for document in waiting[start:]], gap)
        row = waiting[:start] + [waiting[start + i] for i in chosen]
        drop = set(chosen)
        self._waiting = [document for i, document in enumerate(waiting[start:]) if i not in drop]
        self._tokens -= sum(map(len, row))
        self._early = sum(map(len, self._waiting[:-WINDOW]))
        return row


def _closest_subset(lengths: list[int], gap: int) -> list[int]:
    """Indices, ascending, of the lengths whose sum is as near to ``gap`` from below as any subset's."""
    reachable, mask, steps = 1, (1 << (gap + 1)) - 1, []
    for i, length in enumerate(lengths):
        if reachable >> gap:
            break
        if length <= gap:
            steps.append((i, length, reachable))
            reachable |= (reachable << length) & mask
    total, chosen = reachable.bit_length() - 1, []
    for i, length, before in reversed(steps):
        if not before >> total & 1:
            chosen.append(i)
            total -= length
    return chosen[::-1]
