"""How fast a plain matmul runs in MindSpore here, and how much memory a process has used."""

from __future__ import annotations

import time
from functools import cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from research.core.mindspore import runtime
from research.core.run.roofline import best_known, peak_resident, processor


def gemm_flops(dtype) -> float:
    """Floating-point operations a second of a large square matmul: the best ever measured here, kept in a cache file. On a
    CPU the figure belongs to the number of threads in use."""
    return _gemm_flops(dtype, "Ascend" if runtime.on_ascend() else processor(runtime.threads()))


@cache
def _gemm_flops(dtype, where: str) -> float:
    return best_known(f"{where} | {dtype!s} | mindspore {ms.__version__}", lambda: measure_gemm(dtype))


def measure_gemm(dtype, seconds: float = 0.2) -> float:
    """Best rate of an n x n matmul within about ``seconds``, in floating-point operations a second."""
    n = 8192 if runtime.on_ascend() else 1024
    product = _Product()
    a, b = (Tensor(np.random.default_rng(seed).standard_normal((n, n), np.float32), dtype) for seed in (0, 1))
    product(a, b)[0, 0].asnumpy()  # compiled
    best, until = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < until:
        wait()
        start = time.perf_counter()
        product(a, b)
        wait()
        best = max(best, 2.0 * n**3 / (time.perf_counter() - start))
    return best


class _Product(nn.Cell):
    def __init__(self):
        super().__init__()
        self.matmul = ops.MatMul()

    def construct(self, a, b):
        return self.matmul(a, b)


def wait() -> None:
    """Until the device has done all it was given; a graph on the CPU returns when it has."""
    if runtime.on_ascend():
        ms.runtime.synchronize()


def peak_memory() -> int:
    """Most bytes in use so far: the device's allocator, or the process's resident set on a CPU."""
    return int(ms.runtime.max_memory_allocated()) if runtime.on_ascend() else peak_resident()
