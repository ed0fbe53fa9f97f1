"""One process of a group: started here, or started by another member and adopted when that one has ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from research.core.launch.environment import LAUNCHER, NOTES
from research.core.launch.failure import NOISE, Notes

WORKER = Path(__file__).with_name("worker.py")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LONGEST_LINE = 1 << 20  # bytes that wait for the line's end
_START_S = 60  # a rank that has not written its first note by then is taken for lost


@dataclass
class Member:
    """What to start. ``env`` comes on top of this process's environment; ``command`` None: another member starts it."""

    name: str
    command: Sequence[str] | None
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    rank: int | None = None  # None: a helper; the group ends when its ranks have ended
    shown: bool = False  # its output also goes to this process's stdout and stderr
    prefix: str = ""  # before each line that is shown
    reads_input: bool = False  # it gets this process's standard input, unless that is a terminal
    reads_terminal: bool = False  # it gets that too: it is what the person at the terminal talks to
    note: str | None = None  # the name of its notes, where it runs under worker.py


class Running:
    """A member that this process started."""

    def __init__(self, member: Member, process: subprocess.Popen, copies: list[threading.Thread]):
        self.member, self.process, self.copies = member, process, copies
        self.why = ""

    def poll(self) -> int | None:
        """None while it runs, then its status; negative: ended by that signal."""
        return self.process.poll()

    def signal(self, number: int) -> None:
        """Send a signal to every process of its session."""
        _signal_group(self.process.pid, number)

    def finish(self) -> None:
        """Wait for the process, which has been ended, and for its output."""
        self.process.wait()
        for thread in self.copies:
            thread.join(timeout=5)


class Adopted(Running):
    """A rank that another member started, known by its start note; a child of this process once its parent has gone."""

    def __init__(self, member: Member, notes: Notes):
        self.member, self.notes = member, notes
        self.status: int | None = None
        self.why = ""
        self._since = time.monotonic()
        self._ended = threading.Event()
        self._shown = _follow(member.log, member.prefix, self._ended) if member.shown else None

    def poll(self) -> int | None:
        if self.status is None:
            self.status = self._look()
        return self.status

    def _look(self) -> int | None:
        pid = self.notes.pids().get(self.member.note)
        if pid is None:
            if time.monotonic() - self._since < _START_S:
                return None
            self.why = f"has not started within {_START_S} s"
            return 1
        try:
            found, raw = os.waitpid(pid, os.WNOHANG)
            return os.waitstatus_to_exitcode(raw) if found else None
        except ChildProcessError:
            pass
        try:
            os.kill(pid, 0)  # still its starter's child
        except ProcessLookupError:
            ending = self.notes.endings().get(self.member.note)
            return 1 if ending is None else ending.status
        return None

    def signal(self, number: int) -> None:
        pid = self.notes.pids().get(self.member.note)
        if pid is not None and self.status is None:
            _signal_group(pid, number)

    def finish(self) -> None:
        deadline = time.monotonic() + 5
        while self.member.note in self.notes.pids() and self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        self._ended.set()
        if self._shown is not None:
            self._shown.join(timeout=5)


def start(member: Member, notes: Notes) -> Running:
    """Start ``member`` in a session of its own; it ends when this process does (Linux)."""
    member.log.parent.mkdir(parents=True, exist_ok=True)
    if member.command is None:
        member.log.unlink(missing_ok=True)
        return Adopted(member, notes)
    env = {**os.environ, NOTES: str(notes.folder), LAUNCHER: str(os.getpid()), **member.env}
    if str(WORKER) not in member.command:
        env.setdefault("PYTHONUNBUFFERED", "1")  # worker.py shows whole lines as they are made
    with open(member.log, "wb", buffering=0) as log:
        process = subprocess.Popen(
            list(member.command),
            env=env,
            stdin=None if _gets_input(member) else subprocess.DEVNULL,
            stdout=subprocess.PIPE if member.shown else log,
            stderr=subprocess.PIPE if member.shown else subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    copies = []
    if member.shown:
        for source, out in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            copies.append(threading.Thread(target=_copy, args=(source, out, member.log, member.prefix), daemon=True))
            copies[-1].start()
    return Running(member, process, copies)


def _gets_input(member: Member) -> bool:
    """A rank in a session of its own may read the terminal of this one: it is nobody's background job there."""
    return member.reads_terminal or (member.reads_input and not sys.stdin.isatty())


def become_subreaper() -> None:
    """Make this process the parent of its descendants whose own parent ends (Linux)."""
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


if sys.platform == "linux":
    _libc = ctypes.CDLL(None, use_errno=True)

    def _end_with_parent() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

else:
    _end_with_parent = None


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


# --- output -----------------------------------------------------------------------------------------------------


def _copy(source: BinaryIO, out, log: Path, prefix: str) -> None:
    """Pass bytes on to the terminal as they come, without MindSpore's chatter and with a prefix line by line; to the log,
    where stdout and stderr meet, in whole lines (one that begins anew with a carriage return counts as whole)."""
    quiet, line = Quiet(prefix.encode()), b""
    with source, open(log, "ab", buffering=0) as file:
        for chunk in iter(lambda: source.read1(1 << 16), b""):
            line += chunk
            whole = max(line.rfind(b"\n"), line.rfind(b"\r")) + 1 or (len(line) if len(line) > _LONGEST_LINE else 0)
            if whole:
                file.write(line[:whole])
                line = line[whole:]
            _show(out, quiet.pass_on(chunk))
        file.write(line)
        _show(out, quiet.pass_on(b"", last=True))


class Quiet:
    """Leaves out lines like ``[WARNING] DISTRIBUTED(1234,...``; holds back no more of an unfinished line than it must."""

    def __init__(self, prefix: bytes = b""):
        self.prefix, self.rest = prefix, b""
        self.inside = False  # the beginning of the current line has been passed on

    def pass_on(self, chunk: bytes, last: bool = False) -> bytes:
        """What of ``chunk``, and of what was held back, is to be shown now."""
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        out = b""
        for line in lines:
            if self.inside:
                out += line + b"\n"
            elif not NOISE.match(line):
                out += self.prefix + line + b"\n"
            self.inside = False
        hold = self.rest.startswith(b"[") or (self.prefix and not last)
        if self.rest and (self.inside or last or not hold) and not (last and NOISE.match(self.rest)):
            out += self.rest if self.inside else self.prefix + self.rest
            self.inside, self.rest = True, b""
        return out


def _follow(path: Path, prefix: str, ended: threading.Event) -> threading.Thread:
    """Show what another process appends to ``path``, from its beginning."""

    def run() -> None:
        while not path.is_file():
            if ended.wait(0.1):
                return
        quiet = Quiet(prefix.encode())
        with open(path, "rb") as file:
            while True:
                last = ended.is_set()
                _show(sys.stdout, quiet.pass_on(file.read(), last))
                if last:
                    return
                ended.wait(0.1)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _show(out, chunk: bytes) -> None:
    if not chunk:
        return
    # A reader that went away (| head) must not stop the log.
    with contextlib.suppress(OSError, ValueError):
        binary = getattr(out, "buffer", None)
        if binary is None:
            out.write(chunk.decode(errors="replace"))
        else:
            out.flush()
            binary.write(chunk)
        out.flush()
