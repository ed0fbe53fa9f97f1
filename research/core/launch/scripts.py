"""The launch scripts of the documents: singlenode, multinode, msrun and torchrun.

``scripts/*.sh`` call this with their own arguments, which are positional as in MindFormers. All of them check what can be
checked before anything starts, wait for the ranks, show the first one's output, and end with the status of the first failure.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from research.core.errors import ConfigError
from research.core.launch.environment import LAUNCHED
from research.core.launch.host import free_port, is_local, is_loopback, on_npu, port_is_free
from research.core.launch.member import Member
from research.core.launch.msrun import (
    REPO,
    Cluster,
    by_msrun,
    check_devices,
    cluster_environment,
    find_msrun,
    msrun_command,
    run_members,
    worker_environment,
    workers,
    wrapped,
)
from research.core.launch.peers import Peers, Share
from research.core.launch.ranktable import RankTable, read_rank_table
from research.core.launch.torchrun import torch_workers
from research.core.launch.words import number, parse_range, python_command, split_command, truth

# Seconds in which the workers of the older scripts, which have no argument for it, must have met.
_MEET_S = 600


def main(argv: Sequence[str]) -> int:
    which: dict[str, Callable[[Sequence[str]], int]] = {
        "singlenode": lambda args: range_launcher("run_singlenode.sh", args),
        "multinode": lambda args: range_launcher("run_multinode.sh", args),
        "msrun": msrun_launcher,
        "torchrun": torchrun_launcher,
    }
    if not argv or argv[0] not in which:
        raise ConfigError("which launcher?", hint=" | ".join(which))
    return which[argv[0]](argv[1:])


# --- run_singlenode.sh, run_multinode.sh ------------------------------------------------------------------------

_RANGE_USAGE = """usage: bash {script} "COMMAND" RANK_TABLE_FILE [START,END] RANK_SIZE
  COMMAND          what every rank runs, as one argument: "python qwen/run_qwen.py --config ..."
  RANK_TABLE_FILE  of `make ranktable`; none: the ranks meet at MASTER_ADDR:MASTER_PORT (always so on a CPU)
  [START,END]      {range}; END is not included
  RANK_SIZE        ranks over all nodes
logs: output/log/rank_N/mindformer.log; environment: DEVICE=cpu|npu|auto MASTER_ADDR MASTER_PORT LOG_MF_PATH LAUNCH_GRACE_S"""


def range_launcher(script: str, args: Sequence[str]) -> int:
    """``run_singlenode.sh`` (a range of this host's devices) and ``run_multinode.sh`` (a range of ranks of the whole job)."""
    single = script == "run_singlenode.sh"
    usage = _RANGE_USAGE.format(
        script=script, range="this host's devices" if single else "this host's ranks of the job"
    )
    if args and args[0] in ("-h", "--help"):
        print(usage)
        return 0
    if len(args) != 4:
        raise ConfigError(f"4 arguments are needed, {len(args)} were given\n{usage}")
    words, extra = split_command(args[0])
    here, size = parse_range(args[2]), number(args[3], "RANK_SIZE")
    ranks = _ranks_of_range(single, here, size, args)
    words = python_command(words, sys.executable)
    npu = on_npu()
    table = _table(args[1], npu)
    if table is not None and npu:
        members = _with_table(table, words, ranks, here if single else None, size, args)
        hint = "the same rank table on every node, and all nodes started at the same time"
        address, port = table.server_address(0), number(os.environ.get("MASTER_PORT") or "8118", "MASTER_PORT")
    else:
        cluster, members = _with_cluster(words, ranks, here if single else range(len(here)), size, table)
        hint, address, port = cluster.missing, cluster.address, cluster.port
    for member in members:
        member.env = {**extra, **member.env}
    print(
        f"{len(ranks)} of {size} ranks on this host: {', '.join(m.name for m in members if m.rank is not None)}; "
        f"logs: {_log_folder()}/rank_*/mindformer.log",
        file=sys.stderr,
        flush=True,
    )
    several = len(ranks) < size and address is not None
    peers = Peers(Share(ranks.start, len(ranks), size), address, port + 1, _MEET_S) if several else None
    return run_members(members, hint, peers)


def _ranks_of_range(single: bool, here: range, size: int, args: Sequence[str]) -> range:
    """The ranks that a range stands for. Raises :class:`ConfigError` with the script and range that fit."""
    shown, table = args[2].replace(" ", ""), args[1]
    if not single:
        if here.stop > size:
            raise ConfigError(
                f"ranks of a job with RANK_SIZE={size} end at {size}",
                where=f"[START,END]={shown}",
                hint=f"[{max(0, size - len(here))},{size}] on the last node, or RANK_SIZE={here.stop}",
            )
        return here
    if len(here) == size:
        return range(size)
    if len(here) > size:
        raise ConfigError(
            f"{len(here)} devices for {size} ranks", where=f"[START,END]={shown}", hint=f"RANK_SIZE={len(here)}"
        )
    if here.start == 0:
        print(
            f"note: this host runs the ranks 0 to {here.stop - 1} of {size}; on the other hosts: "
            f'bash run_multinode.sh "..." {table} [{here.stop},{2 * here.stop}] {size}',
            file=sys.stderr,
        )
        return here
    raise ConfigError(
        f"run_singlenode.sh counts this host's devices ({here.start} to {here.stop - 1}) and its ranks from 0, so these "
        f"would be the ranks of the first host once more; the ranks {here.start} to {here.stop - 1} of a job of {size} are "
        "the second script's",
        where=f"[START,END]={shown} RANK_SIZE={size}",
        hint=f'bash run_multinode.sh "..." {table} {shown} {size}   (devices 0 to {len(here) - 1} of this host)',
    )


def _log_folder() -> Path:
    return Path(os.environ.get("LOG_MF_PATH") or "output/log")


def _table(text: str, npu: bool) -> RankTable | None:
    if text.lower() in ("none", "", "-"):
        return None
    if npu or Path(text).is_file():
        return read_rank_table(text)
    print(f"note: {text} is not a file; on the CPU no rank table is needed", file=sys.stderr)
    return None


def _with_table(
    table: RankTable, words: Sequence[str], ranks: range, devices: range | None, size: int, args: Sequence[str]
) -> list[Member]:
    """Ranks that find each other by the rank table (Ascend). NOT RUN HERE."""
    table.check_job(size, ranks)
    members = []
    for at, rank in enumerate(ranks):
        device = table.device_of(rank)
        if devices is not None and device != devices[at]:
            first = table.device_of(ranks[0])
            raise ConfigError(
                f"rank {rank} is device {device} in {table.path}, and device {devices[at]} in the range",
                where=f"[START,END]={args[2]}",
                hint=f"[{first},{first + len(ranks)}]",
            )
        members.append(_rank_member(rank, size, len(ranks), device, words, at == 0, table))
    check_devices(len(ranks), True)
    return members


def _with_cluster(
    words: Sequence[str], ranks: range, devices: range, size: int, table: RankTable | None
) -> tuple[Cluster, list[Member]]:
    """Ranks that meet at a scheduler, which the host of rank 0 runs: on the CPU, and on Ascend without a rank table."""
    alone = len(ranks) == size
    address = os.environ.get("MASTER_ADDR") or (table.server_address(0) if table is not None else None) or "127.0.0.1"
    given = os.environ.get("MASTER_PORT")
    port = number(given, "MASTER_PORT") if given else 8118
    if alone and not given and is_local(address) and not port_is_free(address, port):
        port = free_port(address, port)
    if not alone and is_loopback(address):
        raise ConfigError(
            f"{size - len(ranks)} of the {size} ranks run on other hosts, which cannot meet at {address}",
            where="MASTER_ADDR",
            hint="MASTER_ADDR=<address of the host of rank 0>, the same on every host",
        )
    nodes = Cluster(size, len(ranks), address, port, ranks.start // len(ranks), _MEET_S)
    if ranks.start % len(ranks) and ranks.start:
        nodes = Cluster(size, size, address, port, 1, _MEET_S)  # nodes of different sizes: only "not the first" counts
    else:
        nodes.check()
    check_devices(len(ranks))
    cluster = nodes.meet()
    shared = cluster_environment(cluster)
    members = []
    if ranks.start == 0:
        members += [one for one in workers(cluster, words, _log_folder()) if one.rank is None]
    for at, rank in enumerate(ranks):
        member = _rank_member(rank, size, len(ranks), devices[at], words, at == 0, table)
        member.env = {**member.env, **shared, **worker_environment(rank, devices[at])}
        members.append(member)
    return cluster, members


def _rank_member(
    rank: int, size: int, local: int, device: int, words: Sequence[str], shown: bool, table: RankTable | None
) -> Member:
    env = {
        "RANK_ID": str(rank),
        "DEVICE_ID": str(device),
        "RANK_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(local),
        LAUNCHED: "mindspore",
        "GLOG_v": os.environ.get("GLOG_v", "3"),  # noqa: SIM112 (the library's own spelling)
        "PYTHONPATH": os.pathsep.join(path for path in (str(REPO), os.environ.get("PYTHONPATH", "")) if path),
    }
    if table is not None:
        env["RANK_TABLE_FILE"] = str(table.path)
    log = _log_folder() / f"rank_{rank}" / "mindformer.log"
    return Member(f"rank {rank}", wrapped(words), log, env, rank=rank, shown=shown, note=f"rank_{rank}")


# --- msrun_launcher.sh, torchrun_launcher.sh --------------------------------------------------------------------

_LAUNCHER_USAGE = """usage: bash {script} "COMMAND" [WORKERS 8] [LOCAL] [ADDR 127.0.0.1] [PORT {port}] [NODE_RANK 0] [LOG {log}] [JOIN False] [TIMEOUT {timeout}]
   or: bash {script} "COMMAND" WORKERS PORT [LOG] [JOIN] [TIMEOUT]     on one node
  COMMAND    a script and its arguments, as one argument: "run_mindformer.py --config ..."
  WORKERS    over all nodes; LOCAL: on this one (default: all)
  ADDR PORT  of node 0, the same on every node; NODE_RANK: this node's number
  JOIN       True: show the output of every rank; False: of the first. The launcher waits for the ranks in any case
  TIMEOUT    seconds within which all workers must have met
environment: MF_LOG_SUFFIX, LOG_MF_PATH, PLOG_REDIRECT_TO_OUTPUT, MSRUN_ARGS, LAUNCH_GRACE_S"""


class Positional:
    """The arguments of ``msrun_launcher.sh``, in either of its two orders."""

    def __init__(self, script: str, args: Sequence[str], port: int, log: str, timeout_s: int):
        self.usage = _LAUNCHER_USAGE.format(script=script, port=port, log=log, timeout=timeout_s)
        if not 1 <= len(args) <= 9:
            raise ConfigError(f"1 to 9 arguments are taken, {len(args)} were given\n{self.usage}")
        args = list(args)
        # Nobody has a thousand devices in one host: a third argument of this size is a port.
        if 3 <= len(args) <= 6 and args[2].strip().isdigit() and int(args[2]) >= 1024:
            args = [args[0], args[1], args[1], "127.0.0.1", args[2], "0", *args[3:]]
        names = ("WORKERS", "LOCAL", "ADDR", "PORT", "NODE_RANK", "LOG", "JOIN", "TIMEOUT")
        given = dict(zip(names, args[1:]))
        self.words, self.extra = split_command(args[0])
        self.timeout_given = "TIMEOUT" in given
        count = number(given.get("WORKERS", "8"), "WORKERS")
        self.cluster = Cluster(
            workers=count,
            local=number(given.get("LOCAL", str(count)), "LOCAL"),
            address=given.get("ADDR", "127.0.0.1"),
            port=number(given.get("PORT", str(port)), "PORT"),
            node_rank=number(given.get("NODE_RANK", "0"), "NODE_RANK"),
            timeout_s=number(given.get("TIMEOUT", str(timeout_s)), "TIMEOUT"),
        )
        suffix = os.environ.get("MF_LOG_SUFFIX", "")
        self.suffix = f"_{suffix}" if suffix else ""
        self.logs = Path(given.get("LOG", log) + self.suffix)
        self.show_all = truth(given.get("JOIN", "False"), "JOIN")
        self.cluster.check()

    def exports(self) -> dict[str, str]:
        """What MindFormers' launcher sets for its own logger and for the Ascend runtime's logs."""
        env = {"LOG_MF_PATH": os.environ.get("LOG_MF_PATH") or str(Path(f"output/log{self.suffix}").resolve())}
        redirect = os.environ.get("PLOG_REDIRECT_TO_OUTPUT", "")
        if redirect and truth(redirect, "PLOG_REDIRECT_TO_OUTPUT"):
            env["ASCEND_PROCESS_LOG_PATH"] = str(Path(f"output/plog{self.suffix}").resolve())
        return env


def msrun_launcher(args: Sequence[str]) -> int:
    """``msrun_launcher.sh``: through msrun where it is installed, else the same processes without it."""
    given = Positional("msrun_launcher.sh", args or ["--help"], 8118, "output/msrun_log", 7200)
    if given.words[0] in ("-h", "--help"):
        print(given.usage)
        return 0
    check_devices(given.cluster.local)
    words = python_command(given.words, sys.executable)
    cluster, logs = given.cluster.meet(), given.logs
    msrun = find_msrun()
    # msrun makes the host with the address of node 0 node 0, whatever its NODE_RANK.
    second_on_one_host = cluster.node_rank > 0 and is_local(cluster.address)
    python = wrapped(words) != words
    if msrun is not None and python and not second_on_one_host:
        members = by_msrun(msrun, cluster, words, logs, show_all=given.show_all)
    else:
        members = workers(cluster, words, logs, show_all=given.show_all)
    _tell(shlex.join(msrun_command(cluster, words[1:] if python else words, logs)), members, logs)
    return _run(members, given, cluster)


def torchrun_launcher(args: Sequence[str]) -> int:
    """``torchrun_launcher.sh``: one process per card with the variables that torch.distributed reads."""
    given = Positional("torchrun_launcher.sh", args or ["--help"], 29500, "output/torchrun_log", 600)
    if given.words[0] in ("-h", "--help"):
        print(given.usage)
        return 0
    words = python_command(given.words, sys.executable)
    cluster = given.cluster.meet()
    members = torch_workers(cluster, words, given.logs, show_all=given.show_all)
    line = ["torchrun", f"--nnodes={cluster.nodes}", f"--node-rank={cluster.node_rank}"]
    line += [f"--master-addr={cluster.address}", f"--master-port={cluster.port}", f"--nproc-per-node={cluster.local}"]
    _tell(shlex.join([*line, *(words[1:] if wrapped(words) != words else words)]), members, given.logs)
    return _run(members, given, cluster)


def _tell(line: str, members: Sequence[Member], logs: Path) -> None:
    ranks = [member.name for member in members if member.rank is not None]
    print(f"+ {line}\n{', '.join(ranks)} on this host; logs: {logs}/worker_*.log", file=sys.stderr, flush=True)


def _run(members: Sequence[Member], given: Positional, cluster: Cluster) -> int:
    for member in members:
        member.env = {**given.exports(), **given.extra, **member.env}
    return run_members(members, cluster.missing, cluster.peers())
