"""The life of a batch of requests, whatever computes it: prefill, then one step per token until each has ended.

A :class:`Runner` is a model that can prefill and step: torch's, MindSpore's, or an exported graph's. Shape letters:
B rows of the running batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from research.core.errors import UserError
from research.core.generation.requests import OnToken, Request, Result, check_request
from research.core.generation.sampling import Sampling
from research.core.spec import DecoderSpec


class Cache(Protocol):
    """Keys and values of B rows. ``length``: room per row; ``used``: tokens of the longest row."""

    @property
    def length(self) -> int: ...

    @property
    def used(self) -> int: ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with ``rows`` (rising numbers) only."""

    def truncate(self, length: int) -> None:
        """Forget what lies behind the first ``length`` tokens of the only row."""

    def grown(self, length: int) -> Cache:
        """A copy with room for ``length`` tokens per row."""


class Runner(Protocol):
    """Prefill and decode steps of one model. What :meth:`prefill` and :meth:`step` return is what the sampler of
    :meth:`sampler` takes: logits [B, V] of any array library, or the tokens [B] themselves."""

    fixed_rows: bool  # a batch keeps its rows when some have ended

    @property
    def spec(self) -> DecoderSpec: ...

    @property
    def length_limit(self) -> int:
        """Prompt and answer together may not be longer, in tokens."""

    def evaluating(self) -> AbstractContextManager:
        """In evaluation mode inside, as before after it."""

    def new_cache(self, batch: int, length: int) -> Cache: ...

    def can_extend(self, cache: Cache, kept: int, length: int) -> bool:
        """Whether row 0, cut to ``kept`` tokens, may become a prompt of ``length`` tokens without computing all anew."""

    def prefill(self, cache: Cache, prompts: Sequence[Sequence[int]]) -> Any:
        """Put one prompt (or its rest) behind each row of ``cache`` -> float32 logits [B, V] after the last token."""

    def step(self, cache: Cache, tokens: Sequence[int], greedy: bool) -> Any:
        """One more token in every row. ``greedy``: the sampler wants nothing but the largest logit's place."""

    def finite(self, logits_BV: Any) -> bool: ...

    def sampler(self, samplings: Sequence[Sampling], prompts: Sequence[Sequence[int]]) -> Callable: ...


def run_requests(
    runner: Runner,
    requests: Sequence[Request],
    eos_ids: Collection[int] = (),
    on_token: OnToken | None = None,
    batch: int = 8,
) -> list[Result]:
    """Run all ``requests``, at most ``batch`` at a time, those of like length together; -> their results in order.

    Raises :class:`UserError` before anything is computed when a prompt is empty, has an id outside the vocabulary, or
    does not leave room for its new tokens.
    """
    for number, request in enumerate(requests):
        check_request(request, runner.spec.vocab, runner.length_limit, f"prompt {number}")
    with runner.evaluating():  # Qwen v1's length rules act in evaluation mode only
        results: list[Result | None] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        for begin in range(0, len(order), batch):
            chosen = order[begin : begin + batch]
            part = [requests[i] for i in chosen]
            for i, result in zip(chosen, _run_batch(runner, part, eos_ids, _renumbered(on_token, chosen))):
                results[i] = result
        return results


def _renumbered(on_token: OnToken | None, numbers: Sequence[int]) -> OnToken | None:
    return None if on_token is None else lambda row, token: on_token(numbers[row], token)


def _run_batch(
    runner: Runner, requests: Sequence[Request], eos_ids: Collection[int], on_token: OnToken | None
) -> list[Result]:
    length = max(len(r.prompt) for r in requests) + max(r.max_new_tokens for r in requests)
    cache = runner.new_cache(len(requests), length)
    logits_BV = runner.prefill(cache, [r.prompt for r in requests])
    return continue_from(runner, cache, logits_BV, requests, eos_ids, on_token)


def continue_from(
    runner: Runner,
    cache: Cache,
    logits_BV: Any,
    requests: Sequence[Request],
    eos_ids: Collection[int] = (),
    on_token: OnToken | None = None,
) -> list[Result]:
    """Sample and step until every request has ended. ``cache`` holds the prompts, ``logits_BV`` what follows them.

    Afterwards the cache holds, for a single request, its prompt and its answer without the last token.
    """
    if not runner.finite(logits_BV):
        raise UserError(
            "the model's logits are not finite",
            where="the prompt's last token",
            hint="generate.dtype=fp32, or check the weights",
        )
    eos = frozenset(eos_ids)
    sampler = runner.sampler([r.sampling for r in requests], [r.prompt for r in requests])
    answers: list[list[int]] = [[] for _ in requests]
    reasons = ["length"] * len(requests)
    rows = list(range(len(requests)))  # the request in each row of the cache
    going = [row for row in rows if requests[row].max_new_tokens > 0]  # rows of the cache that still run
    while going:
        chosen = sampler(logits_BV if len(going) == len(rows) else logits_BV[going], [rows[place] for place in going])
        tokens, still = [0] * len(rows), []
        for place, token in zip(going, chosen):
            row = rows[place]
            answers[row].append(token)
            told_to_stop = on_token is not None and bool(on_token(row, token))
            if token in eos:
                reasons[row] = "eos"
            elif told_to_stop:
                reasons[row] = "stop"
            elif len(answers[row]) < requests[row].max_new_tokens:
                tokens[place] = token
                still.append(place)
        if still and len(still) < len(rows) and not runner.fixed_rows:
            cache.keep(still)
            rows, tokens = [rows[place] for place in still], [tokens[place] for place in still]
            still = list(range(len(rows)))
        going = still
        if going:
            logits_BV = runner.step(cache, tokens, sampler.plain_greedy)
    return [Result(ids, reason) for ids, reason in zip(answers, reasons)]
