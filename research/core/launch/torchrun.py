"""Several cards: the same program once per card, under torchrun's agent."""

from __future__ import annotations

import os
import shlex
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from research.core.config.schema import Config, ParallelConfig
from research.core.launch.environment import place

REPO = Path(__file__).resolve().parents[3]


def needs_launch(cfg: Config) -> bool:
    """Whether this process should start one process per card instead of doing the work itself."""
    return cfg.parallel.cards * cfg.parallel.nodes > 1 and place() is None


def torchrun_command(parallel: ParallelConfig, words: Sequence[str]) -> list[str]:
    """The torchrun command line that does what :func:`launch` does; ``words`` are script and arguments."""
    where = ["--standalone"]
    if parallel.nodes > 1:
        where = [
            f"--nnodes={parallel.nodes}",
            f"--node-rank={parallel.node_rank}",
            f"--master-addr={parallel.master_addr}",
            f"--master-port={parallel.master_port}",
        ]
    return ["torchrun", *where, f"--nproc-per-node={parallel.cards}", *words]


def launch(cfg: Config, words: Sequence[str] | None = None) -> int:
    """Run ``words`` (None: this program's own command line) once per card; returns the first failure's exit status.

    On one node the cards meet at a free port; several nodes meet at ``master_addr:master_port``. When one rank fails,
    the others are ended; its own message has been printed by itself.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    parallel, words = cfg.parallel, list(sys.argv if words is None else words)
    print(shlex.join(torchrun_command(parallel, words)), file=sys.stderr, flush=True)
    several = parallel.nodes > 1
    settings = LaunchConfig(
        min_nodes=parallel.nodes,
        max_nodes=parallel.nodes,
        nproc_per_node=parallel.cards,
        run_id="workbench" if several else uuid.uuid4().hex,
        rdzv_backend="static" if several else "c10d",
        rdzv_endpoint=f"{parallel.master_addr}:{parallel.master_port}" if several else "localhost:0",
        rdzv_configs={"rank": parallel.node_rank, "timeout": parallel.timeout_s} if several else {},
        max_restarts=0,
        monitor_interval=0.2,
    )
    paths = [str(REPO), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    try:
        elastic_launch(settings, sys.executable)(*words)
        return 0
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        print(f"rank {rank} ended with status {failure.exitcode}; all ranks were ended", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
