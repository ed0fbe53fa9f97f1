"""Random initial weights without a framework: the values that torch draws for the same seed.

torch's CPU generator is the Mersenne Twister (numpy's MT19937 gives the same 32-bit numbers); from them torch makes
uniform floats of 24 bits and normal ones by Box and Muller, sixteen at a time. The values agree with torch's up to the
last bits of its vectorised logarithm and cosine, so that both backends start from one model.
"""

from __future__ import annotations

import math
import zlib

import numpy as np

from research.core.spec import DecoderSpec
from research.core.weights.keys import parameter_shapes

_BATCH = 16  # torch makes normal values in batches; fewer than one batch come from another formula


class Stream:
    """The numbers of one seeded generator, in torch's order."""

    def __init__(self, seed: int):
        self._bits = np.random.RandomState(np.random.MT19937())
        self._bits.seed(seed)

    def _words(self, count: int) -> np.ndarray:
        return self._bits.randint(0, 1 << 32, count, dtype=np.uint32)

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
        """float32 values in [low, high), as ``Tensor.uniform_``."""
        unit = self._unit(math.prod(shape))
        return (unit * np.float32(high - low) + np.float32(low)).reshape(shape)

    def _unit(self, count: int) -> np.ndarray:
        return (self._words(count) & np.uint32((1 << 24) - 1)).astype(np.float32) * np.float32(2.0**-24)

    def normal(self, shape: tuple[int, ...], deviation: float) -> np.ndarray:
        """float32 values around zero, as ``Tensor.normal_`` on a contiguous tensor."""
        count = math.prod(shape)
        if count < _BATCH:
            return self._few_normal(count, deviation).reshape(shape)
        unit = self._unit(count)
        whole = count // _BATCH * _BATCH
        unit[:whole] = _box_muller(unit[:whole], deviation)
        if whole < count:  # the last sixteen are drawn again
            unit[count - _BATCH :] = _box_muller(self._unit(_BATCH), deviation)
        return unit.reshape(shape)

    def _few_normal(self, count: int, deviation: float) -> np.ndarray:
        out: list[float] = []
        while len(out) < count:
            first, second = (self._double() for _ in range(2))
            radius, angle = math.sqrt(-2.0 * math.log1p(-second)), 2.0 * math.pi * first
            out += [radius * math.cos(angle) * deviation, radius * math.sin(angle) * deviation]
        return np.array(out[:count], np.float32)

    def _double(self) -> float:
        high, low = (int(word) for word in self._words(2))
        return (((high << 32) | low) & ((1 << 53) - 1)) * 2.0**-53


def _box_muller(unit: np.ndarray, deviation: float) -> np.ndarray:
    pairs = unit.reshape(-1, 2, _BATCH // 2)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - pairs[:, 0]))
    angle = np.float32(2.0 * math.pi) * pairs[:, 1]
    values = np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1) * np.float32(deviation)
    return values.reshape(-1)


def initial_value(spec: DecoderSpec, name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Normal(0, init_range) matrices, zero biases, norms of one; float32. Each parameter has a random stream of its own,
    named by seed and parameter name, so that the result depends neither on order nor on sharding."""
    if name.endswith("bias"):
        return np.zeros(shape, np.float32)
    if "norm" in name.rsplit(".", 2)[-2]:
        return np.ones(shape, np.float32)
    return Stream(zlib.crc32(f"{seed}/{name}".encode())).normal(shape, spec.init_range)


def initial_values(spec: DecoderSpec, seed: int = 0, head: bool = True):
    """Name and value of every parameter, one after the other."""
    return ((name, initial_value(spec, name, shape, seed)) for name, shape in parameter_shapes(spec, head).items())
