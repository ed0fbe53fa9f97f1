"""Where MindSpore computes: device, execution mode and threads, set in one place before the first tensor is made.

MindSpore keeps these for the whole process; the first call decides and a later one may not contradict it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from research.core.config.schema import DeviceConfig
from research.core.errors import ConfigError, UserError
from research.core.native.build import cache_folder

REQUIREMENTS = "requirements/mindspore.txt"
_started: Runtime | None = None


@dataclass(frozen=True)
class Runtime:
    """``target`` is MindSpore's name of the device (CPU or Ascend); ``graph``: GRAPH_MODE, else eager."""

    target: str
    graph: bool
    threads: int
    deterministic: bool

    @property
    def on_cpu(self) -> bool:
        return self.target == "CPU"


def require_mindspore() -> None:
    """Raise :class:`UserError` naming the file to install from when MindSpore is not there; to be called before it is
    imported."""
    os.environ.setdefault("GLOG_v", "3")  # its warnings tell of deprecations inside MindSpore itself
    # OpenMP's threads, which this repository's kernels run on, would otherwise spin for their next work and keep the cores
    # from MindSpore's own: a training step takes 1.8 times as long. Read when OpenMP is loaded, with MindSpore.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if importlib.util.find_spec("mindspore") is None:
        raise UserError(
            "MindSpore is not installed",
            where="backend=mindspore",
            hint=f".venv/bin/pip install -r {REQUIREMENTS}, or BACKEND=torch",
        )


def start(
    cfg: DeviceConfig | None = None, *, graph: bool = True, local_rank: int = 0, sharing: int = 1, deterministic=False
) -> Runtime:
    """Set MindSpore's context from ``device.kind`` (auto: Ascend where there is one, else CPU) and ``device.threads``.

    ``sharing`` processes of this node share its cores. ``graph=False`` is for tests of single functions: eager code is
    several times slower on the CPU. Raises :class:`ConfigError` for a device that is not there, and when this process
    already computes on another one. The Ascend branch is NOT RUN HERE.
    """
    global _started
    require_mindspore()
    cfg = DeviceConfig() if cfg is None else cfg
    # A graph that does not compile is dumped into the working directory otherwise.
    os.environ.setdefault("MS_OM_PATH", str(cache_folder().parent / "mindspore"))
    import mindspore as ms

    target = _target(cfg.kind)
    threads = cfg.threads or _cores(sharing)
    if _started is not None and target == "CPU":
        threads = _started.threads  # MindSpore takes the number once
    wanted = Runtime(target, graph, threads, deterministic)
    if _started is not None and _started.target != target:
        raise ConfigError(f"this process already computes on {_started.target}", where=f"device.kind={cfg.kind}")
    if _started is None:
        _set_device(target, local_rank)
    if wanted != _started:
        ms.set_context(mode=ms.GRAPH_MODE if graph else ms.PYNATIVE_MODE)
        if target == "CPU" and _started is None:
            with contextlib.suppress(RuntimeError):  # it may be set once in a process, and somebody may have
                ms.device_context.cpu.op_tuning.threads_num(threads)
        if deterministic:
            ms.set_deterministic(True)
    if not graph:
        # Without it the calls are queued, and on a CPU the queue costs more than the work.
        ms.runtime.launch_blocking()
    _started = wanted
    return wanted


def on_ascend() -> bool:
    """Whether :func:`start` chose an NPU; False before it."""
    return _started is not None and _started.target == "Ascend"


def threads() -> int:
    """CPU threads that :func:`start` gave this process."""
    return _cores(1) if _started is None else _started.threads


def _set_device(target: str, local_rank: int) -> None:
    import mindspore as ms

    try:
        if target == "Ascend":
            ms.set_device(target, local_rank)
        else:
            ms.set_device(target)
    except RuntimeError:
        # Somebody's code has computed with MindSpore in this process before; it may stay where it is.
        if ms.get_context("device_target") != target:
            raise ConfigError(
                f"this process already computes on {ms.get_context('device_target')}", where="device.kind"
            ) from None


def _target(kind: str) -> str:
    if kind == "cuda":
        raise ConfigError(
            "MindSpore 2.10 computes on Ascend and on the CPU",
            where="device.kind=cuda",
            hint="DEVICE=cpu, or BACKEND=torch",
        )
    if kind == "cpu":
        return "CPU"
    there = _has_ascend()
    if kind == "npu" and not there:
        raise ConfigError(
            "no Ascend NPU is visible here (its driver, CANN and MindSpore for Ascend are needed)",
            where="device.kind=npu",
            hint="DEVICE=cpu",
        )
    return "Ascend" if there else "CPU"


def _has_ascend() -> bool:
    import mindspore as ms

    # Asking the CPU package for the device prints a failed load; its missing plug-in says the same in silence.
    plugins = Path(ms.__file__).parent / "lib" / "plugin"
    return any(plugins.glob("libmindspore_ascend*")) and bool(ms.hal.is_available("Ascend"))


def _cores(sharing: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(limit)) if limit.isdigit() else cores // sharing)
