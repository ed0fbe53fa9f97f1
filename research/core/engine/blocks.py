"""The blocks of the key/value cache: who uses which, and which hold a prefix that may be used again.

A full block is known by the tokens in it and the block before it. The hash of both, chained from block to block, only
finds a candidate: a block is shared after its tokens and its predecessor have been compared, so equal hashes of different
texts do no harm.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cached:
    """What a full block holds. ``number`` is given once and never again; ``before`` is that of the block in front, or
    the root's: a block whose predecessor has been thrown away is found by nobody, even where its place is used anew."""

    number: int
    hash: int
    before: Hashable
    tokens: tuple[int, ...]


def hash_block(before: int, tokens: tuple[int, ...]) -> int:
    """The hash of a block's tokens behind a chain that hashes to ``before``."""
    return hash((before, tokens))


class BlockPool:
    """Reference counts of all blocks, the free ones in the order in which they are given out, and the index of prefixes.

    A free block keeps its prefix until it is given out again; those without one go first, then the longest unused.
    """

    def __init__(self, blocks: int, block_size: int, prefix_cache: bool = True, hasher: Callable = hash_block):
        self.blocks, self.block_size, self.prefix_cache = blocks, block_size, prefix_cache
        self.references = [0] * blocks
        self._hasher = hasher
        self._cached: list[Cached | None] = [None] * blocks
        self._index: dict[int, int] = {}  # hash -> block
        self._blank = list(range(blocks - 1, -1, -1))  # free and without a prefix
        self._kept: OrderedDict[int, None] = OrderedDict()  # free with one, the longest unused first
        self._numbers = 0

    @property
    def free(self) -> int:
        """Blocks that nobody uses, those with a prefix included."""
        return len(self._blank) + len(self._kept)

    @property
    def cached(self) -> int:
        """Blocks that nobody uses and that hold a prefix."""
        return len(self._kept)

    def take(self) -> int | None:
        """One block for the caller alone; None when there is none."""
        if self._blank:
            block = self._blank.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            del self._index[self._cached[block].hash]
            self._cached[block] = None
        else:
            return None
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more user of a block."""
        if self.references[block] == 0:
            del self._kept[block]
        self.references[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """One user less of each; the last of a table is the first to go, because prefixes are found from the front."""
        for block in reversed(blocks):
            self.references[block] -= 1
            assert self.references[block] >= 0
            if self.references[block] == 0:
                if self._cached[block] is None:
                    self._blank.append(block)
                else:
                    self._kept[block] = None

    def find(self, root: Hashable, tokens: Sequence[int]) -> tuple[list[int], Chain]:
        """The longest known prefix of ``tokens`` under ``root`` in whole blocks, without the last token.

        ``root`` says what else the keys and values depend on (adapter, rotary factor). -> the blocks, one more user
        each, and the chain that goes on behind them.
        """
        chain, found, size = Chain(root, hash(root)), [], self.block_size
        if self.prefix_cache:
            for begin in range(0, len(tokens) - size, size):
                block = self._match(chain, tuple(tokens[begin : begin + size]))
                if block is None:
                    break
                self.share(block)
                found.append(block)
        return found, chain

    def _match(self, chain: Chain, part: tuple[int, ...]) -> int | None:
        key = self._hasher(chain.hash, part)
        block = self._index.get(key)
        if block is None:
            return None
        cached = self._cached[block]
        if cached.tokens != part or cached.before != chain.last:
            return None
        chain.follow(cached)
        return block

    def remember(self, chain: Chain, block: int, tokens: Sequence[int]) -> None:
        """``block`` is full of ``tokens`` behind ``chain``: let others find it."""
        if not self.prefix_cache or chain.broken:
            return
        part = tuple(tokens)
        key = self._hasher(chain.hash, part)
        known = self._index.get(key)
        if known is not None:
            # Computed twice at the same time, or another text of the same hash, behind which nothing can be found.
            cached = self._cached[known]
            if cached.tokens == part and cached.before == chain.last:
                chain.follow(cached)
            else:
                chain.broken = True
            return
        self._numbers += 1
        cached = Cached(self._numbers, key, chain.last, part)
        self._cached[block], self._index[key] = cached, block
        chain.follow(cached)

    def forget(self) -> None:
        """Throw away every prefix (the weights have changed); blocks in use stay with their users."""
        self._blank += self._kept
        self._kept.clear()
        self._index.clear()
        self._cached = [None] * self.blocks


class Chain:
    """How far an answer's blocks are known: the last one's number (at first the root) and hash, and how many they are."""

    __slots__ = ("broken", "hash", "last", "length")

    def __init__(self, root: Hashable, root_hash: int):
        self.last: Hashable = ("root", root)
        self.hash, self.length, self.broken = root_hash, 0, False

    def follow(self, cached: Cached) -> None:
        self.last, self.hash = cached.number, cached.hash
        self.length += 1

    def copy(self) -> Chain:
        twin = Chain(None, self.hash)
        twin.last, twin.length, twin.broken = self.last, self.length, self.broken
        return twin
