"""Which rank failed by itself, and what to show of it.

When one rank fails, the others soon fail too, with errors about the connection they lost. The cause is the first failure
that is not of this kind.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# What collectives and rendezvous of MindSpore, gloo, NCCL and HCCL say when another process is gone.
_SECONDARY = re.compile(
    r"connection (reset|closed|refused|lost)|closed by peer|broken pipe|peer.{0,40}(closed|gone|lost|exit)"
    r"|disconnect|heartbeat|unregister|timed? ?out|end of file|socket.{0,20}(error|closed)|remote (end|process)"
    r"|topolog|meta ?server|scheduler|all ?reduce.{0,60}fail|all ?gather.{0,60}fail|broadcast.{0,60}fail"
    r"|barrier|distnetworkerror|distbackenderror|hccl.{0,60}fail|nccl.{0,60}error|interrupted",
    re.IGNORECASE | re.DOTALL,
)
# What MindSpore says when the workers never came together.
_NEVER_MET = re.compile(
    r"not successfully spawned|Failed to (register|connect).{0,40}meta server|Topology build timed out|UpdateTopoState"
    r"|\d+/\d+ clients joined|DistStoreError|DistNetworkError"
)
# MindSpore's own log lines that are no errors.
NOISE = re.compile(rb"\[(INFO|WARNING|DEBUG)\] [A-Z_]+\(\d+")
_SHOWN_LINES = 30


@dataclass(frozen=True)
class Ending:
    """How one process ended. ``signed``: it said so itself, so ``at`` is when its error was raised."""

    name: str
    status: int
    at: float
    error: str
    log: Path | None
    rank: int | None = None
    signed: bool = False

    @property
    def secondary(self) -> bool:
        """Whether this looks like the consequence of another process's end."""
        if self.rank is None:
            return True  # the scheduler, or msrun: they report the ranks' failures
        if self.status > 128 and not self.signed:
            return self.status - 128 == signal.SIGTERM
        return bool(self.error and _SECONDARY.search(self.error))


@dataclass(frozen=True)
class Note:
    """What a rank under worker.py wrote of its end: when its error was raised, and which."""

    status: int
    at: float
    error: str


class Notes:
    """The folder in which ranks under worker.py note their start and end."""

    def __init__(self, folder: Path):
        self.folder = folder

    def endings(self) -> dict[str, Note]:
        """name -> :class:`Note` of those that have ended."""
        return {name: Note(note["status"], note["time"], note.get("error", "")) for name, note in self._read("end")}

    def pids(self) -> dict[str, int]:
        """name -> process id of those that have started."""
        return {name: note["pid"] for name, note in self._read("start")}

    def _read(self, kind: str) -> Iterable[tuple[str, dict]]:
        for path in sorted(self.folder.glob(f"*.{kind}.json")):
            try:
                yield path.name.removesuffix(f".{kind}.json"), json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue  # half a note: the next look has all of it


def cause(failed: list[Ending]) -> Ending:
    """The ending that brought the others about: the earliest that speaks of its own error."""
    own = [ending for ending in failed if not ending.secondary]
    ranks = [ending for ending in failed if ending.rank is not None]
    return min(own or ranks or failed, key=lambda ending: ending.at)


def report(
    first: Ending, failed: list[Ending], ranks: int, seconds: float, hint: str | None = None, shown: Iterable[Path] = ()
) -> str:
    """What to print about a failure: who, how, its last lines and where they are. ``hint``: for ranks that never met.

    ``shown``: logs that have been on the terminal; what stands in them already is not repeated.
    """
    lines = _last_lines(first.log) if first.log is not None else []
    met = not _NEVER_MET.search("\n".join(lines) or first.error)
    if any(set(lines) <= set(_last_lines(log)) for log in shown):
        lines = []
    others = ranks - 1 if first.rank is not None else ranks
    alike = sum(
        (ending.status, ending.error) == (first.status, first.error) for ending in failed if ending.rank is not None
    )
    if first.rank is not None and alike == ranks > 1:
        head = f"all {ranks} ranks {_how(first)} after {seconds:.0f} s; {first.name}:"
    else:
        ended = {0: "", 1: "; the other rank was ended"}.get(others, f"; the other {others} ranks were ended")
        head = f"{first.name} {_how(first)} after {seconds:.0f} s{ended}"
    out = ["", f"error: {head}"]
    if lines:
        out += ["", *("  | " + line for line in lines), ""]
    if first.log is not None:
        out.append(f"  log: {first.log}")
    if first.status == 128 + signal.SIGKILL and not first.signed:
        out.append(
            "  try: the kernel ends a process like this when memory runs out; `dmesg` says so. A smaller micro batch?"
        )
    elif hint and not met:
        out.append(f"  try: {hint}")
    return "\n".join(out)


def summary(first: Ending) -> str:
    """One line for other hosts."""
    error = first.error or next(reversed(_last_lines(first.log) if first.log is not None else []), "")
    return f"{first.name} {_how(first)}{': ' if error else ''}{error.strip().splitlines()[0] if error.strip() else ''}"


def _how(ending: Ending) -> str:
    number = ending.status - 128
    if number > 0 and not ending.signed and number in signal.Signals._value2member_map_:
        return f"was ended by {signal.Signals(number).name}"
    return f"ended with status {ending.status}"


def _last_lines(log: Path) -> list[str]:
    """The end of a log that says what happened: from its last traceback or ``error:``, without MindSpore's chatter."""
    try:
        with open(log, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - (64 << 10)))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    text = re.sub(r"-{20,}\n- C\+\+ Call Stack.*?(?=\n\S*Traceback|\Z)", "", text, flags=re.DOTALL)
    # A progress bar rewrites its line: what stands at its end is what was seen.
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    lines = [line for line in lines if line and not NOISE.match(line.encode())]
    begins = [at for at, line in enumerate(lines) if line.startswith(("Traceback (most recent", "error: "))]
    if begins:
        # An error that was raised while another was handled: the first of them is the cause.
        at = len(begins) - 1
        while at > 0 and _chained(lines[begins[at - 1] : begins[at]]):
            at -= 1
        lines = lines[begins[at] :]
    if len(lines) > _SHOWN_LINES:
        half = _SHOWN_LINES // 2
        lines = [*lines[:half], f"... {len(lines) - _SHOWN_LINES} lines ...", *lines[-half:]]
    return lines


def _chained(lines: list[str]) -> bool:
    return any(line.startswith(("During handling of the above", "The above exception was")) for line in lines)
