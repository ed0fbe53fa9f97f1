"""Ctrl-C and SIGTERM as a wish to stop in good order."""

from __future__ import annotations

import signal
import threading
import time


class StopRequest:
    """Use as a context: afterwards ``requested`` says whether SIGINT or SIGTERM came.

    A second Ctrl-C, at least a second later (torchrun passes the first one on again), interrupts at once.
    """

    def __init__(self):
        self.requested = False
        self._first = 0.0
        self._former: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        now = time.monotonic()
        if self.requested and number == signal.SIGINT and now - self._first > 1.0:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._first = True, now
