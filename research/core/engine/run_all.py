"""Requests that are all there from the start, run to their ends: what commands do, where a server steps by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from research.core.engine.api import EmbedRequest, Engine, EngineRequest, TokenLogprob, Update
from research.core.errors import UserError

# Called with (number of the request in the list, update); a true result ends that request.
OnUpdate = Callable[[int, Update], "bool | None"]


@dataclass
class Answered:
    """One answer (the first of a request's ``n``), an end token included; ``reason`` as in :class:`Update`."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    embedding: Sequence[float] | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0


def run_all(
    engine: Engine,
    requests: Sequence[EngineRequest | EmbedRequest],
    on_update: OnUpdate | None = None,
    on_end: Callable[[int, Answered], None] = lambda place, answer: None,
) -> list[Answered]:
    """Run all ``requests``, as many at a time as the engine takes; -> their answers in order. ``on_end`` hears of each.

    All are submitted first, so that one which can never run is refused before anything is computed. A request that
    ``on_update`` ended has the reason ``stop``. When anything is raised, the rest
    is cancelled.
    """
    numbers: dict[int, int] = {}
    answers = [Answered() for _ in requests]
    try:
        for place, request in enumerate(requests):
            numbers[engine.submit(request)] = place
        while engine.has_work():
            for update in engine.step():
                place = numbers.get(update.request)
                if place is not None and update.choice == 0 and _take(answers[place], update):
                    told = on_update is not None and on_update(place, update)
                    if told and update.finish is None:
                        answers[place].reason = "stop"
                        engine.cancel(update.request)
                    if answers[place].reason is not None:
                        on_end(place, answers[place])
    finally:
        for number, place in numbers.items():
            if answers[place].reason is None:
                engine.cancel(number)
    return answers


def _take(answer: Answered, update: Update) -> bool:
    """Add what a step brought; False when the answer had ended before (the last word of a cancelled one)."""
    if answer.reason is not None:
        return False
    answer.ids += update.tokens
    answer.text += update.text
    answer.logprobs += update.logprobs
    answer.prompt_logprobs += update.prompt_logprobs
    answer.embedding = update.embedding or answer.embedding
    answer.prompt_tokens, answer.cached_tokens = update.prompt_tokens, update.cached_tokens
    if update.finish == "error":
        raise UserError(update.error or "the engine failed at this request", where="the request")
    answer.reason = update.finish
    return True
