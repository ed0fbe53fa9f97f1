"""torch on several cards: the same program once per card, with the variables that torchrun sets.

The ranks meet at a store, a process of its own on node 0, so that it outlives whichever rank ends first. They are supervised
as MindSpore's are (:mod:`research.core.launch.processes`): one failed rank ends all of them, on every node.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from research.core.config.schema import Config, ParallelConfig
from research.core.launch.environment import LAUNCHED, MEET_S, place
from research.core.launch.member import Member
from research.core.launch.msrun import REPO, Cluster, run_members, wrapped

STORE = Path(__file__).with_name("torch_store.py")


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


def torch_workers(
    cluster: Cluster,
    words: Sequence[str],
    logs: Path,
    *,
    show_all: bool = False,
    reads_input: bool = False,
    reads_terminal: bool = False,
) -> list[Member]:
    """This node's ranks, and on node 0 the store at which all meet. ``words``: the program, with its interpreter.
    ``reads_input`` and ``reads_terminal`` are rank 0's."""
    shared = {
        "WORLD_SIZE": str(cluster.workers),
        "LOCAL_WORLD_SIZE": str(cluster.local),
        "GROUP_RANK": str(cluster.node_rank),
        "MASTER_ADDR": cluster.address,
        "MASTER_PORT": str(cluster.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there already: no rank opens one
        LAUNCHED: "torch",
        MEET_S: str(cluster.timeout_s),
        "PYTHONPATH": os.pathsep.join(path for path in (str(REPO), os.environ.get("PYTHONPATH", "")) if path),
    }
    members = []
    if cluster.node_rank == 0:
        members.append(
            Member("store", [sys.executable, str(STORE), cluster.address, str(cluster.port)], logs / "store.log")
        )
    for local in range(cluster.local):
        rank = cluster.first + local
        members.append(
            Member(
                f"rank {rank}",
                wrapped(words),
                logs / f"worker_{rank}.log",
                {**shared, "RANK": str(rank), "LOCAL_RANK": str(local)},
                rank=rank,
                shown=show_all or local == 0,
                prefix=f"[rank {rank}] " if show_all else "",
                reads_input=reads_input and rank == 0,
                reads_terminal=reads_terminal and rank == 0,
                note=f"rank_{rank}",
            )
        )
    return members


def launch(cfg: Config, words: Sequence[str] | None = None) -> int:
    """Run ``words`` (None: this program's own command line) once per card; returns the first failure's exit status."""
    parallel, words = cfg.parallel, list(sys.argv if words is None else words)
    print(shlex.join(torchrun_command(parallel, words)), file=sys.stderr, flush=True)
    cluster = Cluster.of(parallel).meet()
    logs = REPO / "runs" / "launch" / time.strftime(f"%Y-%m-%d_%H-%M-%S_{os.getpid()}")
    members = torch_workers(
        cluster, [sys.executable, *words], logs, reads_input=True, reads_terminal=cfg.task.name == "chat"
    )
    return run_members(members, cluster.missing, cluster.peers())
