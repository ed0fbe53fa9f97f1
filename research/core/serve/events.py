"""Server-sent events, and the end of them when the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from research.core.engine.api import Update
from research.core.serve.driver import Arrived
from research.core.serve.errors import ApiError, ClientGone, payload, translate
from research.core.serve.service import Work, disconnected

DONE = b"data: [DONE]\n\n"


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event(data: Any) -> bytes:
    return b"data: " + _encode(data).encode("utf-8", "replace") + b"\n\n"


def merged(batch: Sequence[Arrived]) -> Iterator[tuple[int, Update]]:
    """The updates of each answer in ``batch`` as one. There are several when the engine is faster than this connection."""
    found: dict[tuple[int, int], list[Update]] = {}
    for index, update, _ in batch:
        found.setdefault((index, update.choice), []).append(update)
    for (index, _), updates in found.items():
        if len(updates) == 1:
            yield index, updates[0]
            continue
        yield (
            index,
            replace(
                updates[-1],
                tokens=tuple(token for update in updates for token in update.tokens),
                text="".join([update.text for update in updates]),
                logprobs=tuple(one for update in updates for one in update.logprobs),
                prompt_logprobs=updates[0].prompt_logprobs,
            ),
        )


class EventStream(Response):
    """Sends ``events`` as they come and closes ``work`` at the end, however it ends. An error becomes the last event."""

    media_type = "text/event-stream"

    def __init__(
        self, work: Work, events: AsyncGenerator[bytes, None], say: Callable[[ApiError], dict[str, Any]] = payload
    ):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._work, self._events, self._say = work, events, say

    async def __call__(self, scope, receive, send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(disconnected(Request(scope, receive)))
        try:
            await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                raise ClientGone("left in the middle of its answer")
            writing.result()
        finally:
            leaving.cancel()
            writing.cancel()
            await asyncio.wait((writing, leaving))
            await self._events.aclose()
            self._work.close()

    async def _write(self, send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except ClientGone:
            raise
        except Exception as error:
            chunk = event(self._say(translate(error)))
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
