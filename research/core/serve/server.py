"""The process: its port, its signals, and the order in which things begin and end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from weakref import WeakKeyDictionary

import uvicorn

from research.core.engine.api import EmbedRequest, EngineRequest
from research.core.errors import UserError, require_file
from research.core.serve.app import create_app
from research.core.serve.service import Served, Service

logger = logging.getLogger(__name__)

KEYS_VARIABLE = "QWEN_API_KEYS"
_KEEP_ALIVE_S = 15
# For how long the event loop may keep the interpreter while the engine's thread, back from a step, waits for it. Python's
# own 5 ms are as long as a step of a small model: 64 streams were 8 to 33 % slower with them.
_SWITCH_S = 0.0005
_POLL_S = 0.05


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to ``host:port``, not listening yet. Raises :class:`UserError` when that cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except (OSError, UnicodeError) as error:
        raise UserError(f"no such address: {error}", where=f"serve.host={host}", hint="127.0.0.1, or 0.0.0.0") from None
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        where = f"serve.host={host} serve.port={port}"
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                "this port is in use", where=where, hint=f"PORT={port + 1}, or PORT=0 for any free one"
            ) from None
        raise UserError(
            f"cannot listen there: {error.strerror}", where=where, hint="another PORT, 1024 or above"
        ) from None
    return listener


def read_keys(path: str | None) -> tuple[str, ...]:
    """API keys of a file (a key a line, ``#`` begins a comment) and of the environment. Empty: everybody may ask."""
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    if path is not None:
        file: Path = require_file(path, "file of API keys", hint="a text file with a key on each line")
        keys += [line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
        if not any(keys):
            raise UserError("there is no key in it", where=file, hint="a key on each line, or leave serve.api_keys out")
    return tuple(dict.fromkeys(key for key in keys if key))


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def warm_up(served: Served) -> None:
    """Answer one small request, so that what the first one of a process compiles and allocates is there before anybody
    asks."""
    engine, prompt = served.engine, (served.engine.tokenizer.eos_id,)
    engine.submit(
        EmbedRequest(prompt) if served.embedding else EngineRequest(prompt, max_new_tokens=3, ignore_eos=True)
    )
    while engine.has_work():
        engine.step()


def serve(served: Served, listener: socket.socket, on_ready: Callable[[], None] = lambda: None) -> int:
    """Answer requests until SIGTERM or Ctrl-C; returns the exit status: 0, or 1 when the engine failed.

    On the first signal the server takes nothing new and ends what runs, within ``serve.drain_s``; a second one ends it at
    once. Closes the engine. Call it from the main thread.
    """
    sys.setswitchinterval(_SWITCH_S)
    return asyncio.run(_serve(served, listener, on_ready))


async def _serve(served: Served, listener: socket.socket, on_ready: Callable[[], None]) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    service = Service(served, on_failure=stop.set)
    server = web_server(service)
    running = asyncio.ensure_future(server.serve(sockets=[listener]))
    watching = asyncio.ensure_future(close_idle(server, served.settings.read_timeout_s))
    try:
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        if not running.done():
            on_ready()
            await asyncio.wait((running, asyncio.ensure_future(stop.wait())), return_when=asyncio.FIRST_COMPLETED)
            await drain(service, served.settings.drain_s, hurry)
    finally:
        watching.cancel()
        failure = service.driver.failure
        await service.close()  # ends what still runs, so that its streams end too
        server.should_exit = True
        await running
    if failure is not None:
        logger.error("the engine has failed, the server ends", extra={"cause": failure})
    return 0 if failure is None else 1


async def drain(service: Service, seconds: float, hurry: asyncio.Event) -> None:
    """Take nothing new, and wait until what runs has ended, for ``seconds`` at most or until ``hurry``."""
    service.drain()
    deadline = time.monotonic() + seconds
    logger.info("draining", extra={"open": service.open, "within_s": seconds})
    while service.open and time.monotonic() < deadline and not hurry.is_set() and service.driver.failure is None:
        await asyncio.sleep(_POLL_S)
    if service.open:
        logger.warning("ended before they were through", extra={"open": service.open})


def web_server(service: Service) -> uvicorn.Server:
    """uvicorn for ``service``; signals, logs and draining are ours."""
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # anybody could write them
        lifespan="off",
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext
    return server


async def close_idle(server: uvicorn.Server, seconds: float) -> None:
    """Close connections on which no request is answered and none has come whole for ``seconds``, however busily its head
    is being written. (Bodies have their own limit, and so have answers that nobody reads.)"""
    since: WeakKeyDictionary = WeakKeyDictionary()
    while True:
        await asyncio.sleep(min(1.0, seconds / 4))
        now = time.monotonic()
        for connection in list(server.server_state.connections):
            cycle = connection.cycle
            if cycle is not None and not cycle.response_complete:
                since.pop(connection, None)
                continue
            known, then = since.setdefault(connection, (cycle, now))
            if known is not cycle:
                since[connection] = cycle, now
            elif now - then > seconds:
                connection.transport.close()
