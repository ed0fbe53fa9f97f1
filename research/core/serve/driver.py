"""The engine's thread, and the way from asyncio to it and back.

The engine is not thread-safe: one thread submits, cancels and steps. Everything that HTTP asks of it is a command in a
queue, which that thread empties before each step; what a step brought goes back to the event loop in one call.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from research.core.engine.api import EmbedRequest, Engine, EngineRequest, Stats, Update

logger = logging.getLogger(__name__)
T = TypeVar("T")
Arrived = tuple[int, Update, float]  # which of an inbox's requests, what came, and when (time.perf_counter)

# Steps that fail one after another before the engine is given up; the requests of each have been ended with an error.
FAULTS = 3
STOPPING = "the server is stopping"
STATS_EVERY_S = 0.2


class EngineFailed(Exception):
    """The engine raised what no request can be blamed for; the message says what."""


class Driver:
    """Owns ``engine`` from construction to :meth:`close`. Create it inside the running event loop.

    ``stats`` and ``adapters`` are copies that any thread may read. ``failure`` is set, and ``on_failure`` called in the
    event loop, when the engine was given up.
    """

    def __init__(self, engine: Engine, on_failure: Callable[[], None] = lambda: None):
        self.engine, self._on_failure = engine, on_failure
        self.stats: Stats = engine.stats()
        self.adapters: tuple[str, ...] = tuple(engine.adapters)
        self.failure: str | None = None
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._places: dict[int, tuple[Inbox, int, int]] = {}  # engine's number: inbox, index, answers still to end
        self._closing = False
        self._faults = 0
        self._read_stats = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Run ``function(engine)`` between two steps; raises what it raises, :class:`EngineFailed` when none runs any more."""
        future: asyncio.Future[T] = self._loop.create_future()

        def command() -> None:
            try:
                if self.failure is not None:
                    raise EngineFailed(self.failure)
                result = function(self.engine)
            except Exception as error:  # whatever it is, it belongs to the caller
                self._tell(_settle, future, None, error)
            else:
                self.adapters = tuple(self.engine.adapters)
                self._tell(_settle, future, result, None)

        self._commands.put(command)
        return await future

    async def close(self) -> None:
        """End every request that still runs, close the engine and join the thread."""
        self._commands.put(self._close)
        await asyncio.to_thread(self._thread.join)

    def _close(self) -> None:
        self._closing = True

    # --- the engine's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._run_commands()
                if self.failure is None and not self._closing and self.engine.has_work():
                    self._step()
                if time.monotonic() - self._read_stats > STATS_EVERY_S or not self._places:
                    self._note_stats()
        finally:
            self._end_all(STOPPING)
            self.engine.close()

    def _run_commands(self) -> None:
        """All commands there are; without work to do, wait for one."""
        waits = self.failure is not None or not self.engine.has_work()
        while True:
            try:
                command = self._commands.get(block=waits)
            except queue.Empty:
                return
            waits = False
            command()

    def _step(self) -> None:
        try:
            updates = self.engine.step()
        except Exception as error:
            self._fault(error)
            return
        self._faults = 0
        ready: list[tuple[Inbox, int, Update, bool]] = []
        for update in updates:
            place = self._places.get(update.request)
            if place is None:
                continue
            inbox, index, left = place
            if update.finish is not None or update.embedding is not None:
                left -= 1
                if left:
                    self._places[update.request] = inbox, index, left
                else:
                    del self._places[update.request]
            ready.append((inbox, index, update, left == 0))
        if ready:
            self._tell(_deliver, ready)

    def _fault(self, error: Exception) -> None:
        """End what ran with an error, and go on: the next request may well work. Not for ever, though."""
        self._faults += 1
        what = f"{type(error).__name__}: {error}"
        logger.exception("the engine's step failed", exc_info=error)
        numbers = list(self._places)
        self._end_all(what)
        try:
            for number in numbers:
                self.engine.cancel(number)
        except Exception as second:
            self._faults, what = FAULTS, f"{type(second).__name__}: {second}"
        if self._faults >= FAULTS:
            self.failure = what
            self._tell(self._on_failure)

    def _end_all(self, what: str) -> None:
        ready = []
        for number, (inbox, index, _) in self._places.items():
            ready.append((inbox, index, Update(number, finish="error", error=what), True))
        self._places.clear()
        if ready:
            self._tell(_deliver, ready)

    def _note_stats(self) -> None:
        self._read_stats = time.monotonic()
        if self.failure is None:
            self.stats = self.engine.stats()

    def _tell(self, function: Callable, *arguments) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            pass

    # --- what an inbox asks for -----------------------------------------------------------------------------------

    def _submit(self, inbox: Inbox, index: int, request: EngineRequest | EmbedRequest) -> Callable[[Engine], None]:
        def submit(engine: Engine) -> None:
            if inbox.closed:
                return
            number = engine.submit(request)
            self._places[number] = inbox, index, getattr(request, "n", 1)

        return submit

    def _cancel(self, inbox: Inbox) -> None:
        def command() -> None:
            if self.failure is None:
                for number in [number for number, place in self._places.items() if place[0] is inbox]:
                    self.engine.cancel(number)

        self._commands.put(command)


class Inbox:
    """The engine's requests of one HTTP request, and what comes back for them, in order.

    Lives in the event loop. :meth:`close` cancels what still runs, and has to be called whatever happens.
    """

    def __init__(self, driver: Driver):
        self._driver = driver
        self._updates: list[Arrived] = []
        self._changed = asyncio.Event()
        self._only_the_end = False
        self._submitted = self._ended = 0
        self.closed = False

    async def submit(self, request: EngineRequest | EmbedRequest) -> None:
        """Put the next request into the engine. Raises :class:`UserError` for one that can never run."""
        index, self._submitted = self._submitted, self._submitted + 1
        await self._driver.call(self._driver._submit(self, index, request))

    async def batches(self) -> AsyncIterator[list[Arrived]]:
        """Updates of all requests, as many as have come since the last time, until every answer has ended."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            batch, self._updates = self._updates, []
            yield batch
            if self._ended == self._submitted and not self._updates:
                return

    async def all(self) -> list[Arrived]:
        """Every update, once all answers have ended. The event loop sleeps meanwhile."""
        self._only_the_end = True
        while self._ended < self._submitted:
            await self._changed.wait()
            self._changed.clear()
        return self._updates

    def close(self) -> None:
        self.closed = True
        if self._ended < self._submitted:
            self._driver._cancel(self)

    def put(self, index: int, update: Update, now: float, last: bool) -> None:
        self._updates.append((index, update, now))
        self._ended += last
        if self._ended == self._submitted or not self._only_the_end:
            self._changed.set()


def _deliver(ready: list[tuple[Inbox, int, Update, bool]]) -> None:
    now = time.perf_counter()
    for inbox, index, update, last in ready:
        inbox.put(index, update, now, last)


def _settle(future: asyncio.Future, result, error: Exception | None) -> None:
    if future.done():  # its caller was cancelled
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
