"""What a launcher tells a rank through the environment, read in one place.

Known: this repository's own launchers, torchrun, msrun (MindSpore's dynamic cluster) and the older start with a rank table
(``RANK_TABLE_FILE``, ``RANK_ID``, ``RANK_SIZE``). Variables that a cluster sets for other purposes (a bare ``WORLD_SIZE``)
make nobody a rank.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from research.core.errors import ConfigError

# Set for every process that our launchers start: torch or mindspore.
LAUNCHED = "QWEN_LAUNCHED"
# The folder in which a rank notes that it started and how it ended (research/core/launch/worker.py).
NOTES = "QWEN_LAUNCH_NOTES"
# The launcher's process id: whose end ends the ranks.
LAUNCHER = "QWEN_LAUNCHER_PID"
# Seconds within which the ranks must have met (torch; MindSpore has MS_TOPO_TIMEOUT).
MEET_S = "QWEN_MEET_S"


@dataclass(frozen=True)
class Place:
    """This process among the ranks of one job."""

    backend: str  # torch | mindspore
    rank: int
    size: int
    local_rank: int
    local_size: int
    meet_s: int | None = None  # within which the ranks must have met


def place(env: Mapping[str, str] | None = None) -> Place | None:
    """The place that a launcher gave this process; None for a process that was started alone.

    Raises :class:`ConfigError` for a variable that is no number. A rank of msrun without ``--node_rank`` learns its number
    from MindSpore later; it is -1 here.
    """
    env = os.environ if env is None else env
    if env.get("MS_ROLE") in ("MS_WORKER", "MS_SCHED"):
        size = _number(env, "MS_WORKER_NUM")
        rank = _number(env, "MS_NODE_ID", -1)
        local = _number(env, "DEVICE_ID", max(rank, 0))
        return Place("mindspore", rank, size, local, _number(env, "LOCAL_WORLD_SIZE", size))
    if env.get("RANK_TABLE_FILE") and "RANK_ID" in env:
        size = _number(env, "RANK_SIZE")
        if size > 1:
            rank = _number(env, "RANK_ID")
            local = _number(env, "DEVICE_ID", rank)
            return Place("mindspore", rank, size, local, _number(env, "LOCAL_WORLD_SIZE", size))
    if "TORCHELASTIC_RUN_ID" in env or env.get(LAUNCHED) == "torch":
        size, rank = _number(env, "WORLD_SIZE", 1), _number(env, "RANK", 0)
        meet_s = _number(env, MEET_S) if env.get(MEET_S) else None
        local, local_size = _number(env, "LOCAL_RANK", rank), _number(env, "LOCAL_WORLD_SIZE", size)
        return Place("torch", rank, size, local, local_size, meet_s)
    return None


def is_scheduler(env: Mapping[str, str] | None = None) -> bool:
    """Whether this process only brings MindSpore's workers together."""
    return (os.environ if env is None else env).get("MS_ROLE") == "MS_SCHED"


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None or text == "":
        if default is None:
            raise ConfigError(
                f"{name} is not set, though this process was started as one of several ranks",
                where="environment",
                hint="start it through scripts/msrun_launcher.sh, or alone",
            )
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{text!r} is no number", where=f"environment variable {name}") from None
