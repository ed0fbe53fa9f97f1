"""Keeping control tokens that stand inside a conversation apart from those of a Jinja template's own text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from research.core.text.messages import Message


class StandIns:
    """Stand-ins for control tokens written by a user, so that they can be told from the template's own.

    Each control token inside the conversation is replaced by a word of letters and digits that occurs nowhere else; after
    rendering the words are text that must not become control tokens. ``ends`` also replaces the first or last letters of
    a text where they could complete a control token with the template's text beside them.
    """

    def __init__(self, controls: re.Pattern, names: frozenset[str], texts: str, ends: bool):
        self._controls, self._ends = controls, ends
        self._words: dict[str, str] = {}
        salt = 0
        while f"Stand{salt}In" in texts:
            salt += 1
        self._stem = f"Stand{salt}In"
        self._heads = {name[at:] for name in names for at in range(1, len(name))}
        self._tails = {name[:at] for name in names for at in range(1, len(name))}
        self._longest = max(map(len, names), default=1)

    def _word(self, text: str) -> str:
        return self._words.setdefault(text, f"{self._stem}{len(self._words)}dnE")

    def put_messages(self, messages: Sequence[Message]) -> list[Message]:
        """:meth:`put` of everything but the messages' own keys and roles, which are the template's business."""
        return [
            {key: item if key == "role" else self.put(item) for key, item in message.items()} for message in messages
        ]

    def put(self, value: Any) -> Any:
        """``value`` with the control tokens in its texts, keys included, replaced."""
        if isinstance(value, str):
            return self._put_text(value)
        if isinstance(value, dict):
            return {self.put(key): self.put(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.put(item) for item in value]
        return value

    def _put_text(self, text: str) -> str:
        head = tail = ""
        if self._ends:
            reach = range(min(self._longest, len(text)), 0, -1)
            tail = next((text[-size:] for size in reach if text[-size:] in self._tails), "")
            text = text[: len(text) - len(tail)]
            reach = range(min(self._longest, len(text)), 0, -1)
            head = next((text[:size] for size in reach if text[:size] in self._heads), "")
            text = text[len(head) :]
        text = self._controls.sub(lambda match: self._word(match[0]), text)
        return (self._word(head) if head else "") + text + (self._word(tail) if tail else "")

    @property
    def used(self) -> bool:
        return bool(self._words)

    def back(self, text: str) -> str:
        """``text`` with the words replaced by what they stand for."""
        if not self._words:
            return text
        back = {word: original for original, word in self._words.items()}
        return re.sub(f"{self._stem}[0-9]+dnE", lambda match: back[match[0]], text)
