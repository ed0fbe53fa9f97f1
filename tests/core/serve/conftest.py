"""A server on a free port, in a thread of its own, over any engine."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest

from research.core.config.schema import ServeConfig
from research.core.generation.sampling import Sampling
from research.core.serve.server import bind, url, warm_up, web_server
from research.core.serve.service import Served, Service
from research.core.text.template import get_template


class Running:
    """A server that answers at ``url``; ``service`` is its own, which lives in ``loop``."""

    def __init__(self, served: Served):
        warm_up(served)  # a first step may have to compile kernels, which takes longer than clients wait
        self.served, self.service, self.loop = served, None, None
        self._started = threading.Event()
        self._listener = bind("127.0.0.1", 0)
        self.url = url(self._listener)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._started.wait(30)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.service = Service(self.served)
        self._server = web_server(self.service)
        task = asyncio.ensure_future(self._server.serve(sockets=[self._listener]))
        while not self._server.started:
            await asyncio.sleep(0.005)
        self._started.set()
        await task
        await self.service.close()

    def call(self, function, *arguments):
        """``function(*arguments)`` in the server's event loop."""
        done = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (function(*arguments), done.set()))
        assert done.wait(10)

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


@contextmanager
def running(engine, settings: ServeConfig | None = None, **served):
    """A :class:`Running` server over ``engine``; ``served`` are fields of :class:`Served`."""
    template = served.pop("template", None) or get_template("qwen2_5")
    fields = Served("qwen2_5_tiny", engine, template, Sampling(), settings or ServeConfig())
    server = Running(replace(fields, **served))
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def start():
    return running
