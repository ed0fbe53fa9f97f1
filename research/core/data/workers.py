"""An ordered map over worker processes that holds only a few jobs at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from typing import Any

from research.core.errors import DataError

_function: Callable | None = None


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(function: Callable[[Any], Any], jobs: Iterator[Any], workers: int = 0) -> Iterator[Any]:
    """``map(function, jobs)`` in ``workers`` processes (0: one per core); results come in the order of the jobs.

    One worker, or a single job, runs here without a process. At most two jobs per worker are held. An exception in a
    worker is raised here; a worker that is killed (out of memory) raises :class:`DataError`.
    """
    workers = workers or cores()
    first, second = next(jobs, None), next(jobs, None)
    if first is None:
        return
    if workers == 1 or second is None:
        yield function(first)
        if second is not None:
            yield function(second)
        yield from map(function, jobs)
        return
    # Forked workers share the vocabulary's memory; elsewhere it is pickled into each.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(function,)) as pool:
        waiting: deque = deque()
        try:
            for job in chain((first, second), jobs):
                waiting.append(pool.submit(_run, job))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed, most likely because memory ran out",
                where="data.workers",
                hint="data.workers=1",
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start(function: Callable) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _run(job: Any) -> Any:
    return _function(job)
