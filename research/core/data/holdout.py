"""Choosing the held-out documents in one pass, without knowing how many documents there will be."""

from __future__ import annotations

import heapq
from typing import Any


class HeldOut:
    """Keeps the ``limit`` documents with the smallest keys seen so far and lets all others go.

    Keys are hashes of the content (:func:`research.core.data.encode.content_key`), so the choice is a seeded random
    sample that depends neither on the order nor on the number of workers, and copies of a held-out document are never
    trained.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._heap: list[tuple[int, int, Any]] = []  # (-key, -number, document): the largest key on top
        self._bound: int | None = 0 if limit < 1 else None  # keys from here on are trained
        self._number = 0

    def offer(self, key: int, document: Any) -> list[Any]:
        """Take one document (an array); returns those that are certain to be trained."""
        if self._bound is not None and key >= self._bound:
            return [document]
        heapq.heappush(self._heap, (-key, -self._number, document.copy()))  # not a view that keeps its block alive
        self._number += 1
        return self._shrink(self.limit)

    def finish(self, at_most: int) -> tuple[list[Any], list[Any]]:
        """``(held out, to train)``: what is kept, in source order, once it is cut to ``at_most``."""
        trained = self._shrink(min(self.limit, at_most))
        held = [document for _, _, document in sorted(self._heap, key=lambda item: -item[1])]
        self._heap = []
        return held, trained

    def _shrink(self, size: int) -> list[Any]:
        freed = []
        while len(self._heap) > size:
            self._bound = -self._heap[0][0]
            while self._heap and -self._heap[0][0] == self._bound:  # copies leave together
                _, number, document = heapq.heappop(self._heap)
                freed.append((-number, document))
        return [document for _, document in sorted(freed, key=lambda item: item[0])]
