"""Where a program without a run folder speaks: what :class:`~research.core.run.progress.Progress` needs, on stderr."""

from __future__ import annotations

import sys
from typing import Any, TextIO


class Terminal:
    """The side of a run folder that is seen: lines on stderr, above a progress bar while there is one."""

    main = True
    bar: Any = None

    @property
    def terminal(self) -> TextIO:
        return sys.stderr

    def say(self, line: str = "") -> None:
        if self.bar is not None:
            self.bar.print_above(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        """What only a log would keep."""
