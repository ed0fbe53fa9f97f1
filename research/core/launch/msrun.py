"""MindSpore on several workers: the processes that msrun starts, under this repository's supervision.

MindSpore's workers meet at a scheduler, a process of its own on node 0 (``MS_SCHED_HOST:MS_SCHED_PORT``). :class:`Cluster`
says who takes part; :func:`workers` gives this node's processes with the environment that MindSpore reads. msrun itself can
start them (:func:`by_msrun`), but is not left alone with them: with ``--join`` it needs more than half a minute to see
that a job has failed, and when it is stopped its workers live on.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from research.core.config.schema import Config, ParallelConfig
from research.core.errors import ConfigError
from research.core.launch.environment import LAUNCHED, is_scheduler, place
from research.core.launch.failure import Notes
from research.core.launch.host import check_port, free_port, is_local, is_loopback, npus, on_npu, resolve
from research.core.launch.member import WORKER, Member
from research.core.launch.peers import Peers, Share
from research.core.launch.processes import supervise

REPO = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Cluster:
    """``workers`` ranks in all, ``local`` of them on this node, which is number ``node_rank``; they meet at ``address``."""

    workers: int
    local: int
    address: str = "127.0.0.1"
    port: int = 8118
    node_rank: int = 0
    timeout_s: int = 7200

    @classmethod
    def of(cls, parallel: ParallelConfig) -> Cluster:
        """One rank per card. On one node they meet at a free port; several nodes meet at ``master_addr:master_port``."""
        single = parallel.nodes == 1
        return cls(
            workers=parallel.cards * parallel.nodes,
            local=parallel.cards,
            address="127.0.0.1" if single else parallel.master_addr,
            port=free_port() if single else parallel.master_port,
            node_rank=parallel.node_rank,
            timeout_s=parallel.timeout_s,
        )

    @property
    def first(self) -> int:
        """The rank of this node's first worker: all nodes have as many."""
        return self.node_rank * self.local

    @property
    def nodes(self) -> int:
        return -(-self.workers // self.local)

    def peers(self) -> Peers | None:
        """The launchers of the other nodes; None on one node. They use the port behind the workers'."""
        if self.nodes == 1:
            return None
        return Peers(Share(self.first, self.local, self.workers), self.address, self.port + 1, self.timeout_s)

    @property
    def missing(self) -> str:
        """What to try when the workers never met."""
        if self.nodes == 1:
            return f"a free port: {self.address}:{self.port} may be filtered"
        return (
            f"all {self.nodes} nodes must be started within {self.timeout_s} s with the same address and port "
            f"({self.address}:{self.port}) and a NODE_RANK of their own; this was NODE_RANK={self.node_rank}"
        )

    def check(self) -> None:
        """Raise :class:`ConfigError` for numbers that cannot meet."""
        if self.workers < 1 or self.local < 1:
            raise ConfigError("must be at least 1", where=f"WORKERS={self.workers} LOCAL={self.local}")
        if self.local > self.workers:
            raise ConfigError(
                f"this node cannot run {self.local} of {self.workers} workers",
                where=f"WORKERS={self.workers} LOCAL={self.local}",
                hint=f"WORKERS is the number over all nodes: {self.local} or a multiple of it",
            )
        if self.workers % self.local:
            raise ConfigError(
                f"{self.workers} workers are no whole number of nodes with {self.local} each",
                where=f"WORKERS={self.workers} LOCAL={self.local}",
                hint=f"WORKERS={self.workers // self.local * self.local}, or LOCAL=<a divisor of {self.workers}>",
            )
        if not 0 <= self.node_rank < self.nodes:
            raise ConfigError(
                f"must be between 0 and {self.nodes - 1}: {self.workers} workers, {self.local} on each node",
                where=f"NODE_RANK={self.node_rank}",
                hint=f"WORKERS={(self.node_rank + 1) * self.local}" if self.node_rank > 0 else "NODE_RANK=0",
            )
        if self.timeout_s < 1:
            raise ConfigError("must be at least 1 second", where=f"TIMEOUT={self.timeout_s}", hint="600")

    def meet(self) -> Cluster:
        """Check where the workers meet, as far as this node can tell; returns the cluster with the IP address."""
        where = f"ADDR={self.address}"
        address = resolve(self.address, where)
        if self.nodes > 1 and is_loopback(address):
            raise ConfigError(
                "several nodes cannot meet at a loopback address", where=where, hint="the address of node 0"
            )
        if self.node_rank == 0 and not is_local(address):
            raise ConfigError(
                "is not an address of this host, where node 0 and with it the meeting point are",
                where=where,
                hint="the address of this host (`hostname -I`), or this node's own NODE_RANK",
            )
        if self.node_rank == 0:
            check_port(address, self.port, f"PORT={self.port}", "PORT={}")
        return Cluster(self.workers, self.local, address, self.port, self.node_rank, self.timeout_s)


def check_devices(local: int, kind: bool | None = None) -> None:
    """Raise :class:`ConfigError` when this host has fewer NPUs than workers (on NPUs only; the CPU has no such limit)."""
    if not (on_npu() if kind is None else kind):
        return
    there = len(npus())
    if local > there:
        raise ConfigError(
            f"{local} workers need {local} NPUs, and {there} are visible on this host",
            where=f"LOCAL={local}",
            hint=f"{there} workers here, ASCEND_RT_VISIBLE_DEVICES, or DEVICE=cpu",
        )


def wrapped(words: Sequence[str]) -> list[str]:
    """``words`` with worker.py before the program, where a Python program is run; others as they are."""
    head, rest = words[0], list(words[1:])
    if Path(head).name.startswith("python"):
        flags = []
        while rest and rest[0] in ("-u", "-B", "-O", "-E", "-I", "-s"):
            flags.append(rest.pop(0))
        if rest and (rest[0].endswith(".py") or rest[0] == "-m"):
            return [head, *flags, str(WORKER), *rest]
    return list(words)


def cluster_environment(cluster: Cluster, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that are the same for the scheduler and every worker."""
    env = os.environ if env is None else env
    paths = [str(REPO), env.get("PYTHONPATH", "")]
    return {
        "MS_WORKER_NUM": str(cluster.workers),
        "MS_SCHED_HOST": cluster.address,
        "MS_SCHED_PORT": str(cluster.port),
        "MS_TOPO_TIMEOUT": str(cluster.timeout_s),
        "RANK_SIZE": str(cluster.workers),
        "LOCAL_WORLD_SIZE": str(cluster.local),
        LAUNCHED: "mindspore",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        # A worker that is a second early warns dozens of times that nobody is there yet.
        "GLOG_v": env.get("GLOG_v", "3"),
    }


def worker_environment(rank: int, device: int) -> dict[str, str]:
    """Variables of one worker."""
    return {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": str(rank), "RANK_ID": str(rank), "DEVICE_ID": str(device)}


def workers(
    cluster: Cluster,
    words: Sequence[str],
    logs: Path,
    *,
    worker_log: str = "worker_{rank}.log",
    show_all: bool = False,
    reads_input: bool = False,
) -> list[Member]:
    """This node's processes: on node 0 the scheduler, then the workers. ``words``: the program, with its interpreter."""
    shared, command = cluster_environment(cluster), wrapped(words)
    members = []
    if cluster.node_rank == 0:
        members.append(
            Member(
                "scheduler",
                [sys.executable, str(WORKER)],
                logs / "scheduler.log",
                {**shared, "MS_ROLE": "MS_SCHED", "RANK_ID": "0"},
                note="scheduler",
            )
        )
    for device in range(cluster.local):
        rank = cluster.first + device
        members.append(
            Member(
                f"rank {rank}",
                command,
                logs / worker_log.format(rank=rank),
                {**shared, **worker_environment(rank, device)},
                rank=rank,
                shown=show_all or device == 0,
                prefix=f"[rank {rank}] " if show_all else "",
                reads_input=reads_input and rank == 0,
                note=f"rank_{rank}",
            )
        )
    return members


def msrun_command(cluster: Cluster, words: Sequence[str], logs: str | os.PathLike = "output/msrun_log") -> list[str]:
    """The msrun command line that starts the same processes; ``words`` are a script and its arguments."""
    return [
        "msrun",
        f"--worker_num={cluster.workers}",
        f"--local_worker_num={cluster.local}",
        f"--master_addr={cluster.address}",
        f"--master_port={cluster.port}",
        f"--node_rank={cluster.node_rank}",
        f"--log_dir={os.fspath(logs)}",
        f"--cluster_time_out={cluster.timeout_s}",
        *words,
    ]


def find_msrun() -> str | None:
    """msrun of the Python that runs this, or None where MindSpore is not installed with it."""
    return shutil.which("msrun", path=str(Path(sys.executable).parent))


def by_msrun(msrun: str, cluster: Cluster, words: Sequence[str], logs: Path, *, show_all: bool = False) -> list[Member]:
    """The same processes started by msrun itself, with ``MSRUN_ARGS`` (``--bind_core=True`` and the like) added.

    msrun starts the scheduler wherever the address is local, so it cannot start a second node on the first one's host.
    """
    script = list(words[1:]) if Path(words[0]).name.startswith("python") else list(words)
    line = msrun_command(cluster, [str(WORKER), *script], logs)
    line[0:1] = [sys.executable, msrun, "--join=False", *shlex.split(os.environ.get("MSRUN_ARGS", ""))]
    shared = cluster_environment(cluster)
    # msrun runs "python": the one that this is.
    shared["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    members = [Member("msrun", line, logs / "msrun.log", shared)]
    if cluster.node_rank == 0:
        members.append(Member("scheduler", None, logs / "scheduler.log", note="scheduler"))
    for rank in range(cluster.first, cluster.first + cluster.local):
        members.append(
            Member(
                f"rank {rank}",
                None,
                logs / f"worker_{rank}.log",
                rank=rank,
                shown=show_all or rank == cluster.first,
                prefix=f"[rank {rank}] " if show_all else "",
                note=f"rank_{rank}",
            )
        )
    return members


def run_members(members: Sequence[Member], hint: str | None = None, peers: Peers | None = None) -> int:
    """Supervise ``members`` with a folder for their notes, which is removed afterwards, and with the other hosts' launchers."""
    with tempfile.TemporaryDirectory(prefix="launch-") as folder, peers or contextlib.nullcontext():
        return supervise(members, Notes(Path(folder)), hint=hint, peers=peers)


# --- make BACKEND=mindspore CARDS=N -----------------------------------------------------------------------------


def needs_launch(cfg: Config) -> bool:
    """Whether this process should start one worker per card instead of doing the work itself."""
    return cfg.parallel.cards * cfg.parallel.nodes > 1 and place() is None and not is_scheduler()


def launch(cfg: Config, words: Sequence[str] | None = None) -> int:
    """Run ``words`` (None: this program's own command line) once per card under MindSpore; returns the first failure's status."""
    parallel, words = cfg.parallel, list(sys.argv if words is None else words)
    cluster = Cluster.of(parallel)
    cluster.check()
    check_devices(cluster.local, None if cfg.device.kind == "auto" else cfg.device.kind == "npu")
    cluster = cluster.meet()
    logs = REPO / "runs" / "launch" / time.strftime(f"%Y-%m-%d_%H-%M-%S_{os.getpid()}")
    print(shlex.join(msrun_command(cluster, words, logs)), file=sys.stderr, flush=True)
    members = workers(cluster, [sys.executable, *words], logs, reads_input=True)
    return run_members(members, cluster.missing, cluster.peers())
