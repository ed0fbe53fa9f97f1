"""A group of processes that lives and dies together.

Every member runs in a session of its own, with its output in a log of its own. The first one that fails ends all others
at once (SIGKILL: a rank that went on would compute with wrong sums, and might save them), and its own error is shown.
Ctrl-C and SIGTERM are passed on, and whoever has not left in good order after ``patience_s`` is ended. Nothing of the group
outlives :func:`supervise`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence

from research.core.launch.failure import Ending, Notes, cause, report, summary
from research.core.launch.member import Adopted, Member, Running, become_subreaper, start
from research.core.launch.peers import Heard, Peers

_POLL_S = 0.05
_PRINTING_S = 5


def supervise(
    members: Sequence[Member],
    notes: Notes,
    *,
    patience_s: float | None = None,
    hint: str | None = None,
    peers: Peers | None = None,
) -> int:
    """Run ``members`` to their end; returns 0, the failed rank's status, or 128 + signal.

    Members without a command are ranks that another member starts; they make themselves known in ``notes``.
    ``hint``: what to try when the ranks never met. ``peers``: the launchers of the other hosts, whose failures end this host's
    ranks too. Call it from the main thread, which gets the signals.
    """
    patience_s = float(os.environ.get("LAUNCH_GRACE_S", 60)) if patience_s is None else patience_s
    began = time.time()
    if any(member.command is None for member in members):
        become_subreaper()
    running: list[Running] = []
    try:
        with _StopSignals() as stop:
            for member in members:
                running.append(start(member, notes))
            failed = _watch(running, notes, stop, patience_s, peers)
            heard = failed if isinstance(failed, Heard) else None
            first = cause(failed) if failed and heard is None else None
            if first is not None and peers is not None:
                peers.failed(summary(first), first.status)
            _end_group(running, notes)
        if stop.number is not None:
            return 128 + stop.number
        if heard is not None:
            _say(f"\nerror: on another host: {heard.text}; the ranks of this host were ended")
            return heard.status
        if first is None:
            if peers is not None:
                peers.done()
            return 0
        ranks = sum(1 for member in members if member.rank is not None)
        shown = [member.log for member in members if member.shown]
        absent = peers.missing() if peers is not None else None
        _say(report(first, failed, ranks, time.time() - began, f"{hint} ({absent})" if absent else hint, shown))
        return first.status
    finally:
        _end_group(running, notes)


class _StopSignals:
    """SIGINT, SIGTERM and SIGHUP as wishes, SIGQUIT as a question; restored on leaving."""

    def __init__(self):
        self.number: int | None = None  # the first one that came
        self.times = 0
        self.asked = False
        self._former: dict[int, object] = {}

    def __enter__(self) -> _StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGTERM:  # nohup; `&` in a script
                self._former[number] = signal.signal(number, self._note)
        self._former[signal.SIGQUIT] = signal.signal(signal.SIGQUIT, self._ask)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self.number = number if self.number is None else self.number
        self.times += 1

    def come(self, number: int) -> None:
        """As if the signal had come."""
        if self.number is None:
            self._note(number, None)

    def _ask(self, _number: int, _frame) -> None:
        self.asked = True


def _watch(
    running: list[Running], notes: Notes, stop: _StopSignals, patience_s: float, peers: Peers | None
) -> list[Ending] | Heard:
    """Wait until all ranks have ended well (then []), some have failed (their endings), another host says that its ranks have,
    or a stop is through ([])."""
    ranks = [one for one in running if one.member.rank is not None]
    lonely = _Lonely(ranks)
    passed_on, deadline = 0, float("inf")
    while True:
        failed = list(_failures(running, notes))
        if failed and stop.number is None:
            return _settled(running, notes, failed, peers)
        heard = peers.heard() if peers is not None else None
        if heard is not None and stop.number is None:
            if heard.kind != "stopped":
                return heard
            _say(heard.text)
            stop.come(signal.SIGTERM)
        if all(one.poll() is not None for one in ranks):
            return []
        if stop.asked:
            stop.asked = False
            _ask_where(notes)
        if stop.times > passed_on:
            passed_on = stop.times
            if passed_on > 1:
                return []
            deadline = time.monotonic() + patience_s
            if peers is not None and peers.heard() is None:
                peers.stopped(128 + stop.number)
            _say(f"stopping: the ranks have {patience_s:g} s to end in good order; once more ends them at once")
            for one in ranks:
                one.signal(signal.SIGINT if stop.number == signal.SIGINT else signal.SIGTERM)
        if time.monotonic() > deadline:
            left = ", ".join(one.member.name for one in ranks if one.poll() is None)
            _say(f"{left} did not end within {patience_s:g} s of the stop, and was ended")
            return []
        lonely.look()
        time.sleep(_POLL_S)


def _failures(running: list[Running], notes: Notes) -> Iterator[Ending]:
    """Endings with a status other than 0. A rank that has noted its error counts before its process is gone."""
    told = notes.endings()
    for one in running:
        member, status, note = one.member, one.poll(), told.get(one.member.note or "")
        if note is not None and note.status:
            yield Ending(member.name, note.status, note.at, note.error, member.log, member.rank, signed=True)
        elif status:
            status = status if status > 0 else 128 - status
            yield Ending(member.name, status, time.time(), one.why, member.log, member.rank)


def _settled(running: list[Running], notes: Notes, failed: list[Ending], peers: Peers | None) -> list[Ending] | Heard:
    """Another look when all that failed so far speak of a lost connection: the rank that was lost is about to show, here or
    on another host."""
    deadline = time.monotonic() + 1.0
    while all(ending.secondary for ending in failed) and time.monotonic() < deadline:
        if peers is not None and peers.heard() is not None:
            return peers.heard()
        time.sleep(_POLL_S)
        failed = list(_failures(running, notes))
    return failed


class _Lonely:
    """Says once when some ranks ended well two minutes ago and others have not: they may wait for them in vain."""

    def __init__(self, ranks: list[Running], after_s: float = 120):
        self.ranks, self.after_s = ranks, after_s
        self.since: float | None = None
        self.told = False

    def look(self) -> None:
        ended = [one.member.name for one in self.ranks if one.poll() is not None]
        if not ended or self.told:
            return
        self.since = time.monotonic() if self.since is None else self.since
        if time.monotonic() - self.since > self.after_s:
            self.told = True
            going = [one.member.name for one in self.ranks if one.poll() is None]
            _say(
                f"note: {', '.join(ended)} ended {self.after_s / 60:.0f} minutes ago, {', '.join(going)} did not; "
                "Ctrl-\\ makes them write to their logs where they are"
            )


def _ask_where(notes: Notes) -> None:
    _say("each rank writes the stack of its threads to its log")
    for pid in notes.pids().values():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGUSR1)


def _end_group(running: list[Running], notes: Notes) -> None:
    """SIGKILL to every session of the group, and their logs shown to the end; done once."""
    failing = {name for name, note in notes.endings().items() if note.status}
    leaving = [one for one in running if one.member.note in failing]
    for one in running:
        if one not in leaving:
            one.signal(signal.SIGKILL)
    # Who has noted an error is still printing it.
    deadline = time.monotonic() + _PRINTING_S
    while any(one.poll() is None for one in leaving) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for one in leaving:
        one.signal(signal.SIGKILL)
    # Ranks before who started them: nobody else may wait for them while they are ours.
    for one in sorted(running, key=lambda one: isinstance(one, Adopted), reverse=True):
        one.finish()
    running.clear()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
