"""What the endpoints share: the model, room for requests, their fields as engine requests, and what is counted."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from fastapi import Request

from research.core.config.names import did_you_mean
from research.core.config.schema import ServeConfig
from research.core.engine.api import EmbedRequest, Engine, EngineRequest, Update
from research.core.errors import UserError
from research.core.generation.sampling import Sampling
from research.core.serve.driver import Arrived, Driver, Inbox
from research.core.serve.errors import ApiError, ClientGone, bad, engine_trouble
from research.core.serve.journal import Entry
from research.core.serve.metrics import Metrics
from research.core.text.template import ChatTemplate

T = TypeVar("T")

BASE = "base"  # the model without an adapter, as lora_adapter.json's readers call it

# Texts up to this length are tokenised at once; longer ones in a thread, while others are answered.
_INLINE_CHARS = 20_000
# Retry-After: how far back the rate of ended requests looks, and the longest wait that is asked for.
_RECENT_S, _LONGEST_WAIT_S = 30.0, 60


@dataclass(frozen=True)
class Served:
    """What is served: ``name`` is the model's in requests, ``sampling`` its defaults."""

    name: str
    engine: Engine
    template: ChatTemplate
    sampling: Sampling
    settings: ServeConfig
    adapter: str | None = None  # used by requests that name no model
    embedding: bool = False
    system: str | None = None
    api_keys: tuple[str, ...] = ()
    info: tuple[tuple[str, str], ...] = ()  # dtype, device ... for /info


class Service:
    """One model behind HTTP. Created inside the event loop, closed with :meth:`close`."""

    def __init__(self, served: Served, on_failure: Callable[[], None] = lambda: None):
        self.served, self.settings = served, served.settings
        self.tokenizer, self.template = served.engine.tokenizer, served.template
        self.length_limit = served.engine.length_limit
        self.driver = Driver(served.engine, on_failure)
        self.metrics = Metrics(lambda: self.driver.stats)
        self.created = int(time.time())
        self.draining = False
        self.open = 0
        self._ended: deque[float] = deque(maxlen=256)
        self._texts = ThreadPoolExecutor(1, "text")
        self._adapter_changes = asyncio.Lock()

    async def close(self) -> None:
        await self.driver.close()
        self._texts.shutdown()

    @property
    def ready(self) -> bool:
        return not self.draining and self.driver.failure is None

    def drain(self) -> None:
        """From now on nothing new is taken."""
        self.draining = True
        self.metrics.draining.set(1)

    # --- names ----------------------------------------------------------------------------------------------------

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter that the field ``model`` names, None for the model itself. Without a name: the one that the server
        was started with. 404 for any other name."""
        if model is None:
            return self.served.adapter if self.served.adapter in self.driver.adapters else None
        if model in (self.served.name, BASE):
            return None
        if model in self.driver.adapters:
            return model
        raise ApiError(
            404,
            f"model: there is no model or adapter {model[:200]!r} here; {did_you_mean(model[:200], self.names)}",
            param="model",
            code="model_not_found",
        )

    @property
    def names(self) -> list[str]:
        """What ``model`` may be, the one that is meant without a name first."""
        first = self.adapter_of(None) or self.served.name
        return sorted((self.served.name, *self.driver.adapters), key=lambda name: name != first)

    async def load_adapter(self, name: str, path: str) -> None:
        """Load an adapter from inside ``serve.adapter_folder``."""
        root = self.settings.adapter_folder
        if root is None:
            raise ApiError(403, "adapters are loaded at start only; serve.adapter_folder=<folder> allows more")
        root, folder = Path(root).expanduser().resolve(), Path(path)
        folder = (root / folder).resolve()
        if not folder.is_relative_to(root):
            raise ApiError(403, "lora_path: outside of serve.adapter_folder", param="lora_path")
        if name == self.served.name:
            raise bad("lora_name", "this is the model's own name")
        async with self._adapter_changes:
            await self.driver.call(lambda engine: engine.load_adapter(name, folder))

    async def unload_adapter(self, name: str) -> None:
        if name not in self.driver.adapters:
            raise ApiError(404, f"there is no adapter {name[:200]!r}", param="lora_name", code="model_not_found")
        async with self._adapter_changes:
            await self.driver.call(lambda engine: engine.unload_adapter(name))

    # --- prompts --------------------------------------------------------------------------------------------------

    async def in_thread(self, size: int, function: Callable[[], T]) -> T:
        """``function()``, which handles ``size`` characters: here when they are few, else in the text thread."""
        if size <= _INLINE_CHARS:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._texts, function)

    async def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of plain texts; control tokens in them stay text."""
        return await self.in_thread(sum(map(len, texts)), lambda: self.tokenizer.encode_batch(texts))

    async def rows(
        self, given: str | list[str] | list[int] | list[list[int]], field: str
    ) -> tuple[list[str] | None, list[list[int]]]:
        """OpenAI's four ways to give one or more texts -> (the texts, or None where ids were given; the ids of each)."""
        several = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        if len(several) > self.settings.max_prompts:
            raise bad(field, f"at most {self.settings.max_prompts} in one request here (serve.max_prompts)")
        if isinstance(several[0], str):
            return several, await self.encode(several)
        for ids in several:
            self.check_ids(ids, field)
        return None, several

    def check_ids(self, ids: Sequence[int], field: str) -> None:
        vocab = self.served.engine.spec.vocab
        wrong = next((index for index in ids if index >= vocab), None)
        if wrong is not None:
            raise bad(field, f"token id {wrong} is outside the model's vocabulary of {vocab}")

    def new_tokens(
        self, prompt_tokens: int, wanted: int | None, field: str, limit_field: str, default: int | None
    ) -> int:
        """How many tokens an answer may have: what was asked for, else ``default``, else what the context leaves.

        Raises a 400 for a prompt, or a prompt and an answer, that the context does not hold.
        """
        limit, most = self.length_limit, self.settings.max_new_tokens
        if prompt_tokens == 0:
            raise bad(field, "is empty: a model continues at least one token")
        if prompt_tokens + (wanted or 1) > limit:
            asked = f" and {wanted} new ones" if wanted else ""
            room = limit - prompt_tokens
            hint = f"; at most {room} new ones fit" if room > 0 else ""
            name = limit_field if wanted and room > 0 else field
            raise bad(
                name,
                f"{prompt_tokens} tokens{asked} are more than the {limit} that fit{hint}",
                "context_length_exceeded",
            )
        if wanted is not None and most is not None and wanted > most:
            raise bad(limit_field, f"at most {most} here (serve.max_new_tokens)")
        room = min(limit - prompt_tokens, most or limit)
        return wanted if wanted is not None else min(default or room, room)

    # --- the engine -----------------------------------------------------------------------------------------------

    def check_can_generate(self) -> None:
        if self.served.embedding:
            raise bad("model", f"{self.served.name} makes embeddings and answers nothing; POST /v1/embeddings")

    async def submit(self, request: Request, requests: Sequence[EngineRequest | EmbedRequest]) -> Work:
        """Put ``requests`` into the engine, if there is room. The caller closes what it gets, whatever happens."""
        self._check_room(len(requests))
        entry: Entry = request.state.entry
        entry.note(adapter=requests[0].adapter, prompts=len(requests) if len(requests) > 1 else None)
        work = Work(self, entry, requests)
        try:
            for one in requests:
                await work.inbox.submit(one)
        except UserError:
            work.close("refused")
            raise
        except BaseException:
            work.close()
            raise
        return work

    def _check_room(self, count: int) -> None:
        if self.draining:
            raise ApiError(503, "the server is stopping", code="draining", headers={"Retry-After": "5"})
        if self.driver.failure is not None:
            raise ApiError(503, f"the engine has failed: {self.driver.failure}", code="engine_failed")
        most = self.settings.max_requests
        if count > most:
            raise ApiError(400, f"{count} prompts in one request; {most} can run or wait here at a time")
        if self.open + count > most:
            wait = self._wait_s(self.open + count - most)
            raise ApiError(
                429,
                f"{self.open} requests run or wait already; come back in {wait} s",
                code="overloaded",
                headers={"Retry-After": str(wait)},
            )

    def _wait_s(self, needed: int) -> int:
        """Seconds until ``needed`` more requests have probably ended, from the rate at which they did lately."""
        now = time.monotonic()
        recent = [then for then in self._ended if now - then < _RECENT_S]
        if not recent:
            return 5
        rate = len(recent) / max(now - recent[0], 1.0)
        return max(1, min(_LONGEST_WAIT_S, round(needed / rate)))

    def took(self, count: int) -> None:
        self.open += count
        self.metrics.open.set(self.open)

    def gave_back(self, count: int) -> None:
        self.open -= count
        self.metrics.open.set(self.open)
        self._ended.extend([time.monotonic()] * count)


class Work:
    """The engine's requests of one HTTP request, and what is counted of them."""

    def __init__(self, service: Service, entry: Entry, requests: Sequence[EngineRequest | EmbedRequest]):
        self.service, self.entry, self.count = service, entry, len(requests)
        self.inbox = Inbox(service.driver)
        self.prompt_tokens = sum(len(request.prompt) for request in requests)
        self.cached_tokens = self.new_tokens = 0
        self._last: dict[tuple[int, int], tuple[float, int]] = {}  # answer: when its last token came, how many
        self._closed = False
        self._finishes: list[str] = []
        service.took(self.count)
        for request in requests:
            service.metrics.prompt_tokens.observe(len(request.prompt))

    async def batches(self) -> AsyncIterator[list[Arrived]]:
        """Updates as they come. Raises :class:`ApiError` when the engine gave a request up."""
        async for batch in self.inbox.batches():
            for index, update, now in batch:
                self._count(now, index, update)
            yield batch

    async def all(self, request: Request) -> list[Arrived]:
        """Every update, when all answers have ended. Raises :class:`ClientGone` when the client does not wait for it."""
        waiting = asyncio.ensure_future(self._all())
        leaving = asyncio.ensure_future(disconnected(request))
        try:
            await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ClientGone("left before its answer was there")
            return waiting.result()
        finally:
            waiting.cancel()
            leaving.cancel()
            self.close()

    async def _all(self) -> list[Arrived]:
        updates = await self.inbox.all()
        for index, update, now in updates:
            self._count(now, index, update)
        return updates

    def _count(self, now: float, index: int, update: Update) -> None:
        if update.finish == "error":
            self._finishes.append("error")
            raise engine_trouble(update.error)
        metrics, answer = self.service.metrics, (index, update.choice)
        if update.tokens:
            then, before = self._last.get(answer, (None, 0))
            if then is None:
                self.entry.note(first_token_s=round(now - self.entry.started, 4) if not self._last else None)
                metrics.first_token.observe(now - self.entry.started)
            else:
                for _ in update.tokens:
                    metrics.between_tokens.observe((now - then) / len(update.tokens))
            self._last[answer] = now, before + len(update.tokens)
            self.new_tokens += len(update.tokens)
        if update.finish is not None:
            self._finishes.append(update.finish)
            if update.choice == 0:
                self.cached_tokens += update.cached_tokens

    def close(self, finish: str = "cancelled") -> None:
        """Cancel what still runs and note what came, ``finish`` where nothing did; more calls do nothing."""
        if self._closed:
            return
        self._closed = True
        self.inbox.close()
        service, metrics = self.service, self.service.metrics
        service.gave_back(self.count)
        for one in self._finishes or [finish]:
            metrics.finished.labels(one).inc()
        for _, tokens in self._last.values():
            metrics.answer_tokens.observe(tokens)
        self.entry.note(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens or None,
            new_tokens=self.new_tokens,
            finish=",".join(dict.fromkeys(self._finishes)) or finish,
        )

    def usage(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


async def disconnected(request: Request) -> None:
    """Return when the client has closed the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def with_seed(sampling: Sampling, seed: int | None) -> Sampling:
    """A request that names no seed gets one that nobody has had."""
    return replace(sampling, seed=secrets.randbits(32) if seed is None else seed)
