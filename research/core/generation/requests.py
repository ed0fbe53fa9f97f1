"""What is asked of a model and what comes back, and the requests that cannot be run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from research.core.errors import UserError
from research.core.generation.sampling import Sampling

# Called with (request number, token) for every new token; a true result ends that request.
OnToken = Callable[[int, int], "bool | None"]


@dataclass(frozen=True)
class Request:
    """One prompt (token ids, at least one) and how to continue it."""

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256


@dataclass(frozen=True)
class Result:
    """New tokens (the end token included) and why they ended: ``eos``, ``length`` or ``stop`` (the callback said so)."""

    ids: list[int]
    reason: str


def as_requests(
    prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling] | None, max_new_tokens: int
) -> list[Request]:
    """One request per prompt; ``sampling`` is one for all or one per prompt (None: greedy)."""
    if not isinstance(sampling, Sequence):
        sampling = [sampling or Sampling()] * len(prompts)
    return [Request(p, s, max_new_tokens) for p, s in zip(prompts, sampling, strict=True)]


MODELS = "the model's"


def check_request(request: Request, vocab: int, limit: int, name: str, whose: str = MODELS) -> None:
    """Raise :class:`UserError` when a model of ``vocab`` ids and ``limit`` positions cannot run ``request``; ``name``
    says which one it is, ``whose`` the limit is."""
    if not request.prompt:
        raise UserError("is empty: a model continues at least one token", where=name, hint="give it some text")
    if request.max_new_tokens < 0:
        raise UserError(
            f"{request.max_new_tokens} new tokens cannot be generated", where=name, hint="a positive number"
        )
    wrong = [i for i in request.prompt if not 0 <= i < vocab]
    if wrong:
        raise UserError(
            f"token id {wrong[0]} is outside the model's vocabulary of {vocab}",
            where=name,
            hint="use the tokenizer that belongs to these weights",
        )
    check_room(len(request.prompt), request.max_new_tokens, limit, name, whose)


def check_room(prompt_tokens: int, new_tokens: int, limit: int, name: str, whose: str = MODELS) -> None:
    """Raise :class:`UserError` when prompt and new tokens together are more than ``limit``."""
    if prompt_tokens + new_tokens > limit:
        room = limit - prompt_tokens
        hint = f"at most {room} new tokens (generate.max_new_tokens={room})" if room > 0 else "a shorter prompt"
        raise UserError(
            f"{prompt_tokens} tokens and {new_tokens} new ones are more than {whose} {limit}", where=name, hint=hint
        )
