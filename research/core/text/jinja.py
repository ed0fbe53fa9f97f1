"""Jinja chat templates as transformers runs them: the same environment, filters and functions.

The environment is the one documented under "chat templates" of transformers: sandboxed and immutable, ``trim_blocks``
and ``lstrip_blocks``, loop controls, ``tojson`` without HTML escaping, ``raise_exception``, ``strftime_now``, and the
``{% generation %}`` tag.
"""

from __future__ import annotations

import json
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
