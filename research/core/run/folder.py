"""The folder of one run: who holds it, what was asked, what was said, what came out.

``runs/<task>/<model>/<time>/`` holds config.yaml, command.txt, log.txt, metrics.jsonl, TensorBoard events, loss.png,
checkpoints/ and report.json. One process writes to it at a time: the lock is the operating system's (flock), so it
ends with its process, however that ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import socket
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from research.core.errors import Interrupted, UserError

LOCK = "lock"
RESULTS = ("checkpoints", "weights", "adapter")  # what a second run in the same folder would overwrite


class RunFolder:
    """Use as a context: takes the lock, copies what is printed to log.txt, and names the folder at start and end.

    ``path`` None makes ``<root>/<task>/<model>/<time>``. With ``resume`` the folder must exist; without it, a folder
    that already holds a result raises :class:`UserError`. ``main=False`` is for ranks above 0: they share the path
    and write nothing.
    """

    def __init__(
        self,
        path: str | os.PathLike | None,
        *,
        task: str,
        model: str,
        root: str | os.PathLike = "runs",
        resume: bool = False,
        main: bool = True,
    ):
        self.main, self.task = main, task
        self.path = Path(path).expanduser() if path else _new_path(Path(root) / task / model)
        self.resume = resume
        self.started = time.time()
        self._lock: int | None = None
        self._log: TextIO | None = None
        self._streams: tuple[TextIO, TextIO] | None = None
        self.bar = None  # a live progress bar: lines are printed above it

    def __enter__(self) -> RunFolder:
        if not self.main:
            return self
        self._check()
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            self._log = open(self.path / "log.txt", "a", encoding="utf-8")
            self.write_text("command.txt", shlex.join(sys.argv) + "\n")
            self._streams = (sys.stdout, sys.stderr)
            sys.stdout, sys.stderr = _Tee(sys.stdout, self), _Tee(sys.stderr, self)
            self._log.write(f"--- {datetime.now():%Y-%m-%d %H:%M:%S} {shlex.join(sys.argv)}\n")
            self.say(f"run folder: {self.path}")
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        if not self.main:
            return
        if isinstance(error, (UserError, Interrupted)) and self._log:
            self._log.write(f"{type(error).__name__}: {error}\n")  # printed by run_cli after the log is closed
        elif error is not None and self._log:
            import traceback

            self._log.write("".join(traceback.format_exception(kind, error, trace)))
        state = (
            ""
            if error is None
            else " (failed)"
            if not isinstance(error, (Interrupted, KeyboardInterrupt))
            else " (stopped)"
        )
        self.say(f"run folder: {self.path}{state}")
        self._release()

    def say(self, line: str = "") -> None:
        """Print one line on stderr and keep it in log.txt; ranks above 0 are silent."""
        if self.main:
            print(line, file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        """Keep one line in log.txt without printing it."""
        if self._log is not None:
            self._log.write(line + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """Write a small file that appears under its name only when it is complete."""
        return write_text(self.path / name, text)

    def write_report(self, report: dict[str, Any]) -> Path:
        """``report.json``: what the run came to, for programs."""
        return self.write_text("report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")

    @property
    def terminal(self) -> TextIO:
        """The stream a progress bar draws on, without the log."""
        return self._streams[1] if self._streams else sys.stderr

    # --- who holds the folder ---

    def _check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError("the run folder is a file", where=self.path, hint="RUN=<another folder>")
        if self.resume:
            if not self.path.is_dir():
                raise UserError("there is no such run to resume", where=self.path, hint=f"ls {self.path.parent}")
            return
        for name in RESULTS:
            if (self.path / name).is_dir() and any((self.path / name).iterdir()):
                raise UserError(
                    f"the folder already holds {name}/ of another run",
                    where=self.path,
                    hint="RUN=<another folder>, or ARGS=train.resume=true to go on with it",
                )

    def _take_lock(self) -> None:
        path = self.path / LOCK
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(handle, 4096).decode(errors="replace")
                os.close(handle)
                raise UserError(
                    f"the folder is in use by {_holder(holder)}", where=self.path, hint="RUN=<another folder>"
                ) from None
            # the former holder may have removed the file between our open and our lock
            try:
                same = os.fstat(handle).st_ino == os.stat(path).st_ino
            except FileNotFoundError:
                same = False
            if same:
                break
            os.close(handle)
        os.ftruncate(handle, 0)
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        os.write(handle, json.dumps(note).encode())
        self._lock = handle

    def _release(self) -> None:
        if self._streams:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            sys.stdout, sys.stderr = self._streams
            self._streams = None
        if self._log:
            self._log.close()
            self._log = None
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


class _Tee:
    """A text stream that also writes to the log, without colours, and prints above a live progress bar."""

    _CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

    def __init__(self, stream: TextIO, run: RunFolder):
        self._stream, self._run = stream, run
        self._pending = ""

    def write(self, text: str) -> int:
        if self._run._log is not None:
            self._run._log.write(self._CONTROL.sub("", text).replace("\r", ""))
        bar = self._run.bar
        if bar is None or not self._stream.isatty():
            return self._stream.write(text)
        self._pending += text
        *lines, self._pending = self._pending.split("\n")
        for line in lines:
            bar.print_above(line)
        return len(text)

    def flush(self) -> None:
        if self._run._log is not None:
            self._run._log.flush()
        self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write ``text`` aside, sync it to the disk and rename it to ``path``."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _new_path(parent: Path) -> Path:
    stamp = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    path = parent / stamp
    for n in range(2, 1000):
        if not path.exists():
            break
        path = parent / f"{stamp}-{n}"
    return path


def _holder(note: str) -> str:
    try:
        who = json.loads(note)
        return f"pid {who['pid']} on {who['host']} since {who['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
