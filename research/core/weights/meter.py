"""Progress of bytes: GB/s and time left, one moving line on a terminal and a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

PLAIN_EVERY_S = 10.0
LIVE_EVERY_S = 0.25


class Meter:
    """Call it with (bytes done, bytes in all); use as a context so that the last line ends. Nothing is said of work that
    takes less than a second."""

    def __init__(self, what: str, stream: TextIO | None = None):
        self.what, self.stream = what, stream or sys.stderr
        self.live = self.stream.isatty()
        self.started = self.last = time.monotonic()
        self.first: int | None = None
        self.done = self.total = 0
        self.shown = False

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_) -> None:
        if self.live and self.shown:
            self._show()
            self.stream.write("\n")
        elif self.shown:
            self._show()
        self.stream.flush()

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        if self.first is None:  # what an earlier run left counts as done, not as speed
            self.first = done
        now = time.monotonic()
        if now - self.started > 1.0 and now - self.last >= (LIVE_EVERY_S if self.live else PLAIN_EVERY_S):
            self.last = now
            self._show()

    def _show(self) -> None:
        rate = (self.done - (self.first or 0)) / max(1e-9, time.monotonic() - self.started)
        left = _clock((self.total - self.done) / rate) if rate > 0 else "?"
        share = 100 * self.done / self.total if self.total else 100.0
        text = f"{self.what} {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB ({share:.0f} %)  {rate / 1e9:.2f} GB/s  left {left}"
        self.stream.write(f"\r\x1b[2K{text}" if self.live else text + "\n")
        self.stream.flush()
        self.shown = True


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
