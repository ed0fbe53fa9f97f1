"""OpenAI's fields as the engine's: sampling, constraints, ends."""

from __future__ import annotations

import json
from typing import Any

from research.core.engine.api import Constraint
from research.core.generation.sampling import Sampling
from research.core.serve.errors import bad
from research.core.serve.schema import Sampled
from research.core.serve.service import Service, with_seed

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def sampling_of(body: Sampled, defaults: Sampling) -> Sampling:
    """The model's defaults with what the request names on top. ``top_k=-1`` is none."""
    named = {name: getattr(body, name) for name in _SAMPLING if getattr(body, name) is not None}
    if named.get("top_k") == -1:
        named["top_k"] = 0
    return with_seed(Sampling(**{**vars(defaults), **named}), body.seed)


def bias_of(body: Sampled, service: Service) -> tuple[tuple[int, float], ...]:
    bias = tuple((int(token), value) for token, value in (body.logit_bias or {}).items())
    service.check_ids([token for token, _ in bias], "logit_bias")
    return bias


def stop_of(body: Sampled) -> tuple[str, ...]:
    stop = body.stop
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


def choices_of(body: Sampled, service: Service) -> int:
    """How many answers to each prompt."""
    n, most = body.n or 1, service.settings.max_choices
    if n > most:
        raise bad("n", f"at most {most} here (serve.max_choices)")
    return n


def constraint_of(body: Sampled) -> Constraint | None:
    """What the answer has to match: ``response_format``, or one of vLLM's ``guided_`` fields."""
    found: dict[str, Constraint] = {}
    form = body.response_format
    if form is not None and form.type == "json_object":
        found["response_format"] = Constraint("json_object")
    elif form is not None and form.type == "json_schema":
        found["response_format"] = Constraint("json_schema", form.json_schema.schema_)
    if body.guided_json is not None:
        found["guided_json"] = Constraint("json_schema", _schema(body.guided_json, "guided_json"))
    if body.guided_regex is not None:
        found["guided_regex"] = Constraint("regex", body.guided_regex)
    if body.guided_choice is not None:
        found["guided_choice"] = Constraint("choice", tuple(body.guided_choice))
    if len(found) > 1:
        names = list(found)
        raise bad(names[1], f"an answer can follow one form, and {names[0]} names another")
    return next(iter(found.values()), None)


def _schema(value: dict[str, Any] | str, field: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise bad(field, "is not valid JSON") from None
    if not isinstance(value, dict):
        raise bad(field, "a JSON schema is an object")
    return value
