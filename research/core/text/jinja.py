"""Jinja chat templates as transformers runs them: the same environment, filters and functions.

The environment is the one documented under "chat templates" of transformers: sandboxed and immutable, ``trim_blocks``
and ``lstrip_blocks``, loop controls, ``tojson`` without HTML escaping, ``raise_exception``, ``strftime_now``, and the
``{% generation %}`` tag.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from research.core.errors import DataError


class GenerationTag(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks the assistant's text for training; it renders as its content."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def compile_template(source: str, where: str = "chat template") -> Callable[..., str]:
    """A function of the template's variables that returns the text; raises :class:`DataError` on its faults."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        compiled = environment.from_string(source)
    except jinja2.TemplateSyntaxError as bad:
        raise DataError(f"not a Jinja template: {bad.message}", where=f"{where}:{bad.lineno}") from None

    def render(**variables: Any) -> str:
        try:
            return compiled.render(**variables)
        except jinja2.TemplateError as bad:
            raise DataError(f"the template refuses this conversation: {bad.message}", where=where) from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as bad:
            raise DataError(f"the template cannot render this conversation: {bad}", where=where) from None

    return render


class Stand:
    """Stand-ins for control tokens written by a user, so that they can be told from the template's own.

    Each control token inside the conversation is replaced by a word of letters and digits that occurs nowhere else; after
    rendering the words are text that must not become control tokens. ``ends`` also replaces the first or last letters of
    a text where they could complete a control token with the template's text beside them.
    """

    def __init__(self, controls: re.Pattern, names: frozenset[str], texts: str, ends: bool):
        self._controls, self._ends, self._names = controls, ends, names
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

    def put(self, value: Any) -> Any:
        """``value`` with control tokens in its texts (keys included) replaced; roles are left for the template."""
        if isinstance(value, str):
            return self._put_text(value)
        if isinstance(value, dict):
            return {self.put(key): item if key == "role" else self.put(item) for key, item in value.items()}
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
