"""The best rate of a plain matmul ever measured on a machine, kept in a cache file.

Each process measures once more, because a busy machine gives too low a figure.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

from research.core.run.folder import write_text


def best_known(key: str, measure: Callable[[], float]) -> float:
    """The larger of what ``measure`` finds now and the best that the cache has under ``key``; the cache keeps it."""
    path = cache_folder() / "gemm.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    best = max(measure(), known.get(key, 0.0))
    if best > known.get(key, 0.0):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(known | {key: best}, indent=2) + "\n")
        except OSError:  # a read-only home: measured again next time
            pass
    return best


def cache_folder() -> Path:
    """``$QWEN_CACHE``, or ``.cache`` in the repository."""
    return Path(os.environ.get("QWEN_CACHE") or Path(__file__).resolve().parents[3] / ".cache")


def processor(threads: int) -> str:
    """The CPU's name and how many threads compute on it: what a figure belongs to."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {threads} threads"


def peak_resident() -> int:
    """Most bytes that this process has had in memory."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
