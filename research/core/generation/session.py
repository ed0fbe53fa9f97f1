"""One conversation with a chat model: its history, its key/value cache, and what still fits the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from research.core.errors import UserError
from research.core.generation.loop import Cache, Runner, continue_from
from research.core.generation.requests import OnToken, Request, Result, check_room
from research.core.generation.sampling import Sampling
from research.core.generation.stream import TextStream
from research.core.text.template import ChatTemplate
from research.core.text.tokenizer import Tokenizer

_CACHE_STEP = 1024  # positions by which the conversation's cache grows


@dataclass(frozen=True)
class Reply:
    """An answer; ``reason`` is eos, stop, length or interrupted, ``reused`` counts prompt tokens found in the cache."""

    text: str
    reason: str
    prompt_tokens: int
    new_tokens: int
    reused: int


class ChatSession:
    """History and cache of one conversation.

    Each reply renders the whole conversation with the template. The tokens that the new prompt shares with what the
    cache already holds are not computed again. When prompt and answer no longer fit the model's context, the oldest
    turns are left out of the prompt (they stay in :attr:`messages`, and thus in a saved conversation).
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        sampling: Sampling,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        stop: Sequence[str] = (),
        system: str | None = None,
        allow_special: bool = False,
        remember: bool = True,
        limit: int | None = None,
    ):
        """``remember=False``: every message begins a new conversation. ``limit``: prompt and answer together have at most
        so many tokens (None: what the model is made for)."""
        self.runner, self.tokenizer, self.template = runner, tokenizer, template
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.eos_ids, self.stop = tuple(eos_ids), tuple(stop)
        self.system, self.allow_special, self.remember = system, allow_special, remember
        self.limit = runner.length_limit if limit is None else min(limit, runner.length_limit)
        self.messages: list[dict] = []
        self._first = 0  # messages before this one are out of the context
        self._turn = 0
        self._cache: Cache | None = None
        self._cached: list[int] = []
        self._prompt: list[int] = []

    @property
    def shown_prompt(self) -> str:
        """What the model was given for the last answer, control tokens included."""
        return self.tokenizer.decode(self._prompt)

    @property
    def shown_system(self) -> str:
        return self.template.default_system or "" if self.system is None else self.system

    def record(self) -> list[dict]:
        """The conversation as messages, the system prompt first when one was set."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages

    def close(self) -> None:
        """Give the cache's memory back."""
        self._cache = None

    def clear(self) -> None:
        """Forget the conversation; the system prompt and the cache's memory stay."""
        self.messages, self._first, self._turn = [], 0, 0

    def reply(
        self,
        message: str,
        on_text: Callable[[str], None],
        stopped: Sequence = (),
        on_trim: Callable[[int, int], None] | None = None,
    ) -> Reply:
        """Answer ``message``; ``on_text`` gets the answer's text as it comes.

        The answer ends early, and is kept as it stands, when ``stopped`` becomes non-empty. ``on_trim(turns, length)``
        hears of turns that had to be left out. Raises :class:`UserError` when the message alone is too long; the
        history is then as before.
        """
        if not self.remember:
            self.clear()
        self.messages.append({"role": "user", "content": message})
        try:
            prompt = self._prompt = self._fit(on_trim)
        except UserError:
            self.messages.pop()
            raise
        stream = TextStream(self.tokenizer, hidden=self.eos_ids, stop=self.stop)

        def on_token(row: int, token: int) -> bool:
            on_text(stream.push(token))
            return stream.stopped or len(stopped) > 0

        # Another stream of random numbers for each turn, the same one when the conversation is repeated.
        sampling = replace(self.sampling, seed=self.sampling.seed + self._turn)
        result, reused = self._generate(Request(prompt, sampling, self.max_new_tokens), on_token)
        on_text(stream.flush())
        self._turn += 1
        self.messages.append({"role": "assistant", "content": stream.text})
        reason = "interrupted" if result.reason == "stop" and not stream.stopped else result.reason
        return Reply(stream.text, reason, len(prompt), len(result.ids), reused)

    def _generate(self, request: Request, on_token: OnToken) -> tuple[Result, int]:
        """-> (the answer, how many tokens of the prompt were not computed anew)."""
        prompt = list(request.prompt)
        cache, reused, logits = self._prefill(prompt)
        result = continue_from(self.runner, cache, logits, [request], self.eos_ids, on_token)[0]
        self._cached = (prompt + result.ids)[: cache.used]
        return result, reused

    def _fit(self, on_trim: Callable[[int, int], None] | None) -> list[int]:
        limit = self.limit
        first = self._first
        while True:
            prompt = self._encode(first)
            if len(prompt) + self.max_new_tokens <= limit:
                break
            # A turn is a user message and what follows it up to the next one.
            following = [i for i in range(first + 1, len(self.messages)) if self.messages[i]["role"] == "user"]
            if not following:
                check_room(len(prompt), self.max_new_tokens, limit, "this message")
            first = following[0]
        if first > self._first and on_trim is not None:
            turns = sum(m["role"] == "user" for m in self.messages[self._first : first])
            on_trim(turns, limit)
        self._first = first
        return prompt

    def _encode(self, first: int) -> list[int]:
        encoded = self.template.encode(
            self.tokenizer,
            self.messages[first:],
            add_generation_prompt=True,
            allow_special=self.allow_special,
            system=self.system,
        )
        return list(encoded.ids)

    def _prefill(self, prompt: list[int]):
        need = len(prompt) + self.max_new_tokens
        cache = self._cache
        if cache is None or cache.length < need:
            length = min(-(-need // _CACHE_STEP) * _CACHE_STEP, max(need, self.limit))
            cache = self._cache = self.runner.new_cache(1, length) if cache is None else cache.grown(length)
        shared = _shared_prefix(self._cached, prompt)
        reused = min(shared, len(prompt) - 1)  # the last token has to be computed for its logits
        if not self.runner.can_extend(cache, reused, len(prompt)):
            reused = 0
        cache.truncate(reused)
        self._cached = []  # not valid while it is being written
        return cache, reused, self.runner.prefill(cache, [prompt[reused:]])


def _shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))
