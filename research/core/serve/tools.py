"""Tool calls in Qwen2.5's format: ``<tool_call>`` newline ``{"name": ..., "arguments": {...}}`` newline ``</tool_call>``."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from research.core.engine.api import Constraint
from research.core.serve.schema import Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """One call, its arguments as the JSON text that OpenAI's interface wants."""

    name: str
    arguments: str
    id: str

    def to_json(self, index: int | None = None) -> dict[str, Any]:
        call = {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return call if index is None else {"index": index} | call


class CallParser:
    """An answer's text as it comes, cut into content and calls.

    Text that could be the beginning of a mark is held back until more is known, and so is white space, which belongs to
    the content only when more content follows. A call is given out when it is whole; what stands between the marks
    and is no call to one of ``names`` stays text, marks included. ``inside``: the prompt ended with the opening mark.
    """

    def __init__(self, names: Collection[str], inside: bool = False):
        self._names = frozenset(names)
        self._held = ""
        self._space = ""  # what stood before the opening mark, and is shown only if no call follows
        self._inside = inside
        self.calls = 0

    def push(self, text: str) -> list[str | Call]:
        self._held += text
        found: list[str | Call] = []
        while True:
            mark = CLOSE if self._inside else OPEN
            at = self._held.find(mark)
            if at < 0:
                break
            before, self._held = self._held[:at], self._held[at + len(mark) :]
            if self._inside:
                found.append(self._call(before) or f"{self._space}{OPEN}{before}{CLOSE}")
            else:
                shown = before.rstrip()
                self._space = before[len(shown) :]
                if shown:
                    found.append(shown)
            self._inside = not self._inside
        if not self._inside:
            keep = _overlap(self._held, OPEN)
            shown = self._held[: len(self._held) - keep].rstrip()
            if shown:
                found.append(shown)
                self._held = self._held[len(shown) :]
        return self._counted(found)

    def end(self) -> list[str | Call]:
        """What was held back: an unfinished call that is a call all the same, or text."""
        rest, self._held = self._held, ""
        if not self._inside:
            return [rest] if rest and (rest.strip() or not self.calls) else []
        self._inside = False
        return self._counted([self._call(rest) or self._space + OPEN + rest])

    def _counted(self, found: list[str | Call]) -> list[str | Call]:
        self.calls += sum(isinstance(part, Call) for part in found)
        return found

    def _call(self, text: str) -> Call | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", {})
        if isinstance(arguments, str):  # written as OpenAI's interface has it
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(arguments, dict):
            return None
        return Call(value["name"], json.dumps(arguments, ensure_ascii=False), f"call_{secrets.token_hex(12)}")


def forced_call(tools: Sequence[Tool], name: str | None) -> Constraint:
    """What has to stand behind ``<tool_call>`` newline: a call to ``name``, or to any tool."""
    forms = []
    for tool in tools:
        if name is None or tool.function.name == name:
            parameters = tool.function.parameters or {"type": "object"}
            forms.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": tool.function.name}, "arguments": parameters},
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
            )
    return Constraint("json_schema", forms[0] if len(forms) == 1 else {"anyOf": forms})


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``mark``."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
