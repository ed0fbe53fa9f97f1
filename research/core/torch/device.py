"""Where and how to compute: device, dtype, threads, and how fast a plain matmul runs here (the roofline)."""

from __future__ import annotations

import os
import time
from functools import cache

import torch

from research.core.config.schema import DeviceConfig
from research.core.errors import ConfigError
from research.core.run.roofline import best_known, peak_resident, processor
from research.core.torch.malloc import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve_device(cfg: DeviceConfig, local_rank: int = 0, sharing: int = 1) -> torch.device:
    """The device of ``device.kind`` (auto: npu, cuda, cpu, the first that is there), and the number of CPU threads set.

    ``sharing`` processes of this node share its cores. Raises :class:`ConfigError` for a device that this machine does not have. The NPU branch needs torch_npu and CANN
    and runs on such a machine only.
    """
    kind = cfg.kind
    if kind == "auto":
        kind = "npu" if _has_npu() else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device is visible here", where="device.kind=cuda", hint="DEVICE=cpu")
    if kind == "npu" and not _has_npu():
        raise ConfigError(
            "no NPU is visible here (torch_npu and CANN are needed)", where="device.kind=npu", hint="DEVICE=cpu"
        )
    if kind == "cpu":
        threads = cfg.threads or cpu_count(sharing)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        keep_freed_memory()
        return torch.device("cpu")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    there = getattr(torch, kind).device_count()
    if sharing == 1 and cfg.index is not None:
        local_rank = cfg.index
        if local_rank >= there:
            raise ConfigError(
                f"only {there} {kind} devices are visible here",
                where=f"device.index={local_rank}",
                hint=f"device.index=0 to {there - 1}",
            )
    if local_rank >= there:
        raise ConfigError(
            f"only {there} {kind} devices are visible here", where="parallel.cards", hint=f"CARDS={there}"
        )
    getattr(torch, kind).set_device(local_rank)
    return torch.device(kind, local_rank)


def _has_npu() -> bool:
    import importlib.util

    if importlib.util.find_spec("torch_npu") is None:
        return False
    import torch_npu  # noqa: F401 (registers torch.npu)

    return torch.npu.is_available()


def cpu_count(sharing: int = 1) -> int:
    """Threads for this process: ``OMP_NUM_THREADS``, or its part of the cores that ``sharing`` processes may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(limit)) if limit.isdigit() else cores // sharing)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``fp32``, ``bf16``, or for ``auto`` the one whose matmul runs faster on ``device`` (measured once, cached)."""
    if name != "auto":
        return DTYPES[name]
    if device.type != "cpu":
        return torch.bfloat16
    faster = gemm_flops(device, torch.bfloat16) > 1.2 * gemm_flops(device, torch.float32)
    return torch.bfloat16 if faster else torch.float32


# --- the roofline -----------------------------------------------------------------------------------------------


def gemm_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matmul: the best ever measured here, kept in a cache file.

    Each process measures once more, because a busy machine gives too low a figure. On a CPU the figure belongs to the
    number of threads in use.
    """
    return _gemm_flops(device, dtype, torch.get_num_threads())


@cache
def _gemm_flops(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    key = f"{_machine(device, threads)} | {str(dtype).removeprefix('torch.')} | torch {torch.__version__}"
    return best_known(key, lambda: measure_gemm(device, dtype))


def measure_gemm(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Best rate of an n x n matmul within about ``seconds``, in floating-point operations a second."""
    n = 8192 if device.type != "cpu" else 1024
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    best, until = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < until:
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2.0 * n**3 / (time.perf_counter() - start))
    return best


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue; nothing on a CPU."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: the device's allocator, or the process's resident set on a CPU."""
    if device.type != "cpu":
        return getattr(torch, device.type).max_memory_allocated(device)
    return peak_resident()


def _machine(device: torch.device, threads: int) -> str:
    if device.type != "cpu":
        return getattr(torch, device.type).get_device_name(device)
    return processor(threads)
