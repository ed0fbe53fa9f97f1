"""The order in which rows are trained on: a permutation that can be read at any position at once.

A shuffled list of a billion rows takes 8 GB and has to be built again on every resume. Instead each epoch's order is
a keyed Feistel network over the next power of four, walked until it lands inside the range (format-preserving
encryption: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Reading position p costs the
same for p = 0 and p = 10^12, so the state to save is the position alone.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6
_MIX = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
_SHIFT = np.uint64(33)


class SeekableSampler:
    """Row indices for positions 0, 1, 2, ... over endless epochs of ``n`` rows.

    Every epoch visits each row exactly once; ``shuffle`` gives each epoch its own order, fixed by ``seed`` and the
    epoch's number. The object has no state: whoever trains keeps the position.
    """

    def __init__(self, n: int, seed: int = 0, shuffle: bool = True):
        if n < 1:
            raise ValueError(f"a sampler needs at least one row, not {n}")
        self.n, self.seed, self.shuffle = int(n), int(seed), bool(shuffle)
        self._half_bits = max(1, (max(self.n - 1, 1).bit_length() + 1) // 2)
        self._epoch_keys: tuple[int, np.ndarray] | None = None

    def index(self, position: int) -> int:
        """The row at ``position`` (0-based, counted over all epochs)."""
        return int(self.take(position, 1)[0])

    def take(self, position: int, count: int) -> np.ndarray:
        """Rows at ``position .. position + count - 1`` as int64 [count]; may run over the end of an epoch."""
        if position < 0 or count < 0:
            raise ValueError(f"position {position} and count {count} must not be negative")
        parts, end = [], position + count
        while position < end:
            epoch, offset = divmod(position, self.n)
            length = min(end - position, self.n - offset)
            parts.append(self._permute(np.arange(offset, offset + length, dtype=np.uint64), epoch))
            position += length
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def epoch(self, position: int) -> int:
        """The epoch (0-based) that ``position`` lies in."""
        return position // self.n

    def _permute(self, values: np.ndarray, epoch: int) -> np.ndarray:
        if not self.shuffle or self.n == 1:
            return values.astype(np.int64)
        keys = self._keys(epoch)
        values = self._feistel(values, keys)
        while True:  # cycle walking: outside [0, n) the permutation is applied again
            outside = values >= self.n
            if not outside.any():
                return values.astype(np.int64)
            values[outside] = self._feistel(values[outside], keys)

    def _feistel(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        bits = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in keys:
            mixed = right ^ key
            for factor in _MIX:
                mixed = (mixed ^ (mixed >> _SHIFT)) * factor  # wraps modulo 2^64
            left, right = right, left ^ ((mixed ^ (mixed >> _SHIFT)) & mask)
        return (left << bits) | right

    def _keys(self, epoch: int) -> np.ndarray:
        if self._epoch_keys is None or self._epoch_keys[0] != epoch:
            text = f"qwen-workbench rows {self.seed} {epoch}".encode()
            digest = hashlib.blake2b(text, digest_size=8 * _ROUNDS).digest()
            self._epoch_keys = (epoch, np.frombuffer(digest, "<u8"))
        return self._epoch_keys[1]
