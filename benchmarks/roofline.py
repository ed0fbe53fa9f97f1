"""What this machine can do at most: bytes read from memory and multiply-adds of a matrix product, each a second.

    python benchmarks/roofline.py [--seconds 2] [--threads 2]

Memory: a float32 maximum over 256 MB, which reads every byte once and keeps nothing; on 4 KB pages, as ordinary
allocations get them, and on 2 MB pages, where the processor finds addresses faster. Products: torch's own in the
shapes of a Qwen2.5-0.5B step. Every figure is the best of many short runs, and ``busy`` says which share of the
processor other programs had meanwhile: above 0.05 the best run is worth more than any other statistic.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

READ_BYTES = 256 << 20  # eight times the largest cache of the machines this was written on
HUGE_PAGE = 2 << 20
# rows, inputs, outputs: attention and feed-forward projections of Qwen2.5-0.5B for 2048 tokens, and a square
SHAPES = ((2048, 896, 896), (2048, 896, 4864), (2048, 4864, 896), (1024, 1024, 1024))


class Busy:
    """Share of the processor (all cores) that other programs used inside the ``with`` block; None off Linux."""

    def __enter__(self) -> Busy:
        self.share: float | None = None
        self._before = self._read()
        return self

    def __exit__(self, *exception) -> None:
        self.share = self.so_far()

    def so_far(self) -> float | None:
        """The share since the block began."""
        if self._before is None:
            return None
        now, before = self._read(), self._before
        everybody, idle, own = (a - b for a, b in zip(now, before))
        total = everybody + idle
        return max(0.0, min(1.0, (everybody - own) / total)) if total > 0 else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds that all programs, nobody, and this process with its finished children have used."""
        try:
            fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            return None
        user, nice, system, idle, wait, irq, softirq, steal = (x / os.sysconf("SC_CLK_TCK") for x in fields)
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return user + nice + system + irq + softirq + steal, idle + wait, own


@dataclass
class Roofline:
    """Bytes a second and floating-point operations a second, with the number of threads they were measured with."""

    threads: int
    read_4k: float
    read_2m: float | None  # None: this system has no such pages
    gemm_fp32: float
    gemm_bf16: float
    busy: float | None

    @property
    def read(self) -> float:
        """The better of the two kinds of pages."""
        return max(self.read_4k, self.read_2m or 0.0)

    def gemm(self, dtype: str) -> float:
        """Operations a second for ``fp32`` or ``bf16``."""
        return {"fp32": self.gemm_fp32, "bf16": self.gemm_bf16}[dtype]

    def best(self, other: Roofline | None) -> Roofline:
        """The better of two measurements, figure by figure; ``busy`` of the quieter one."""
        if other is None:
            return self
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        busy = pairs.pop("busy")
        best = {name: max(v for v in pair if v is not None) if any(pair) else None for name, pair in pairs.items()}
        return Roofline(**best, busy=None if None in busy else min(busy))

    def to_json(self) -> dict:
        def giga(x: float | None) -> float | None:
            return None if x is None else round(x / 1e9, 2)

        return {
            "threads": self.threads,
            "read_GB_s_4k_pages": giga(self.read_4k),
            "read_GB_s_2m_pages": giga(self.read_2m),
            "gemm_fp32_GFLOP_s": giga(self.gemm_fp32),
            "gemm_bf16_GFLOP_s": giga(self.gemm_bf16),
            "busy": None if self.busy is None else round(self.busy, 3),
        }


def measure(seconds: float = 2.0, threads: int | None = None) -> Roofline:
    """Measure everything in about ``seconds``, the kinds in turn so that a disturbance meets all alike."""
    import torch

    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        with Busy() as busy:
            reads = {"4k": _reader(_ordinary())}
            huge = _huge()
            if huge is not None:
                reads["2m"] = _reader(huge)
            products = {name: _products(getattr(torch, name)) for name in ("float32", "bfloat16")}
            work = {**reads, **{(name, i): f for name, fs in products.items() for i, f in enumerate(fs)}}
            best = _best_rates(work, seconds)
        gemm = {name: max(best[name, i] for i in range(len(SHAPES))) for name in products}
        return Roofline(
            torch.get_num_threads(), best["4k"], best.get("2m"), gemm["float32"], gemm["bfloat16"], busy.share
        )
    finally:
        torch.set_num_threads(before)


def _best_rates(work: dict, seconds: float) -> dict:
    """Best of at least three runs of each; ``work`` maps a name to (what it does a run, the run)."""
    best = dict.fromkeys(work, 0.0)
    until, rounds = time.perf_counter() + seconds, 0
    while rounds < 4 or time.perf_counter() < until:
        for name, (amount, run) in work.items():
            start = time.perf_counter()
            run()
            rate = amount / (time.perf_counter() - start)
            if rounds:  # the first run of each only warms up
                best[name] = max(best[name], rate)
        rounds += 1
    return best


def _reader(values) -> tuple[float, Callable[[], object]]:
    return values.nbytes, values.amax


def _ordinary():
    import torch

    region = mmap.mmap(-1, READ_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        try:
            region.madvise(mmap.MADV_NOHUGEPAGE)
        except OSError:  # a kernel without huge pages: all pages are small
            pass
    return torch.frombuffer(region, dtype=torch.float32).fill_(1.0)


def _huge():
    import torch

    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    region = mmap.mmap(-1, READ_BYTES + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        region.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return None
    offset = -torch.frombuffer(region, dtype=torch.uint8, count=1).data_ptr() % HUGE_PAGE
    return torch.frombuffer(region, dtype=torch.float32, count=READ_BYTES // 4, offset=offset).fill_(1.0)


def _products(dtype) -> list[tuple[float, Callable[[], object]]]:
    import torch
    import torch.nn.functional as F

    runs = []
    for rows, inputs, outputs in SHAPES:
        x, w = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        product = F.linear
        if dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            # some processors run oneDNN's float32 product faster than the BLAS library's: the roofline is the best
            def product(x, w):
                return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")

        runs.append((2.0 * rows * inputs * outputs, lambda p=product, x=x, w=w: p(x, w)))
    return runs


def machine() -> dict:
    """Processor, cores, memory, and the versions that matter."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        memory = None
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "memory_GB": None if memory is None else round(memory / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit() -> str | None:
    """The commit of this checkout, with + when files differ from it."""
    import subprocess

    def git(*words: str) -> str:
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    options = parser.parse_args()
    found = measure(options.seconds, options.threads)
    print(json.dumps({"benchmark": "roofline", "commit": commit(), **machine(), **found.to_json()}))


if __name__ == "__main__":
    main()
