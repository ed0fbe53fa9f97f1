"""Tokens to text while they come: no broken characters, no control tokens, nothing past a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from research.core.text.tokenizer import Tokenizer


class TextStream:
    """The text of one answer, token by token.

    ``hidden`` are token ids that never become text (the end-of-turn tokens). Text that could be the beginning of one of
    the ``stop`` strings is held back until the next tokens decide; from a stop string on nothing is shown, and
    :attr:`stopped` turns true.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: Collection[int] = (), stop: Sequence[str] = ()):
        self._decoder = tokenizer.stream(skip_special=True)
        self._hidden = frozenset(hidden)
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add one token; returns the text that can be shown now, often ''."""
        if self.stopped or token in self._hidden:
            return ""
        return self._show(self._held + self._decoder.push(token), final=False)

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        if self.stopped:
            return ""
        return self._show(self._held + self._decoder.flush(), final=True)

    def _show(self, text: str, final: bool) -> str:
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            shown, self._held = text[: min(found)], ""
        else:
            keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
            shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
