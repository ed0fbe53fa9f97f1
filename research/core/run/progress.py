"""Progress of long work: a bar with rate and ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from research.core.run.folder import RunFolder


class Progress:
    """Use as a context around ``total`` units of work.

    ``update(done, note)`` moves it to ``done``; ``line(text)`` reports as a printed line, above the bar on a terminal;
    with ``routine`` the bar says enough and the line only goes to log.txt. ``total`` None shows the rate only.
    """

    def __init__(self, run: RunFolder, total: int | None, what: str, unit: str = "step", done: int = 0):
        self.run, self.total, self.what, self.unit = run, total, what, unit
        self.first = self.done = done
        self.live = run.main and run.terminal.isatty()

    def __enter__(self) -> Progress:
        self.started = time.monotonic()
        if self.live:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._console = Console(file=self.run.terminal)
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                redirect_stdout=False,
                redirect_stderr=False,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.done, note="")
            self._bar.start()
            self.run.bar = self
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self.run.bar = None
            self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        self.done = done
        if self.live:
            self._bar.update(self._task, completed=done, note=note or f"{self.rate():.3g} {self.unit}/s")

    def line(self, text: str, routine: bool = False) -> None:
        """One plain line with the position and the time left."""
        of = f"{self.done}/{self.total}" if self.total else f"{self.done}"
        line = f"{self.what} {self.unit} {of}  {text}  left {self.left()}"
        if routine and self.live:
            self.run.note(line)
        else:
            self.run.say(line)

    def rate(self) -> float:
        """Units a second since the start of this process's work."""
        return (self.done - self.first) / max(1e-9, time.monotonic() - self.started)

    def left(self) -> str:
        if not self.total or self.done <= self.first:
            return "?"
        return clock((self.total - self.done) / self.rate())

    def print_above(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """``1:02:03`` or ``4:05``."""
    seconds = round(max(0.0, seconds))
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
