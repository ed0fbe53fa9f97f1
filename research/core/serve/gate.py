"""What every request passes first: its id, its key, its rate, its size and the time it takes. Plain ASGI."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

from research.core.config.schema import ServeConfig
from research.core.serve import errors
from research.core.serve.errors import ApiError, ClientGone
from research.core.serve.journal import Entry
from research.core.serve.metrics import Metrics

# Answered without a key: whether the server lives, and the page, which asks for the key itself.
OPEN_PATHS = ("/health", "/", "/favicon.ico")

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]
_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
# A body that is too large is read and thrown away up to so many times the limit: a client that is still writing does not
# see an answer, only that the connection was closed.
_DISCARDED = 8


class Gate:
    """ASGI middleware around the whole application. Writes the log line of each request and counts it.

    ``scope["state"]["entry"]`` is the request's :class:`Entry`, to which endpoints add.
    """

    def __init__(self, app, settings: ServeConfig, keys: Sequence[str], metrics: Metrics, paths: frozenset[str]):
        self.app, self.settings, self.metrics = app, settings, metrics
        self._digests = [_digest(key.encode()) for key in keys]
        self._rates = Rates(settings.requests_per_minute)
        self._paths = paths
        self._max_body = int(settings.max_body_mb * 1e6)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        entry = Entry(given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})["entry"] = entry
        client = scope["client"][0] if scope.get("client") else None
        writer = _Writer(send, entry.id, self.settings.write_timeout_s)
        try:
            try:
                self._admit(scope, headers, entry, client, writer)
                await self._within_limits(scope, headers, receive, writer)
            except ApiError as error:
                await errors.response(scope["path"], error)(scope, receive, writer.send)
        except ClientGone as gone:
            entry.note(cause=str(gone))
        except Exception as error:
            # Starlette has answered with 500 already, if nothing had been sent; here it is only kept from uvicorn's log.
            if writer.status is None:
                await errors.response(scope["path"], errors.translate(error))(scope, receive, writer.send)
        finally:
            status = writer.status if writer.complete else 499
            path = scope["path"] if scope["path"] in self._paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - entry.started)
            entry.write(scope["method"], scope["path"][:200], status, client)

    def _admit(self, scope, headers: dict[bytes, bytes], entry: Entry, client: str | None, writer: _Writer) -> None:
        path = scope["path"]
        if scope["method"] in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith("/page/")):
            return
        who = client or "unix"
        if self._digests:
            who = self._key(headers)
            entry.note(key=who[:8])
        if scope["method"] == "POST":
            wait = self._rates.take(who)
            writer.extra += self._rates.headers(who)
            if wait > 0:
                raise ApiError(
                    429,
                    f"more than {self.settings.requests_per_minute} requests a minute; come back in {wait:.0f} s",
                    code="rate_limit_exceeded",
                    headers={"Retry-After": str(math.ceil(wait))},
                )

    def _key(self, headers: dict[bytes, bytes]) -> str:
        """Digest of the key that came with the request; all known ones are compared, in the same time."""
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        key = key.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        digest = _digest(key)
        if sum(hmac.compare_digest(digest, known) for known in self._digests) == 0:
            what = "this API key is not known" if key else "an API key is needed: Authorization: Bearer <key>"
            raise ApiError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return digest

    async def _within_limits(self, scope, headers: dict[bytes, bytes], receive, writer: _Writer) -> None:
        """Read the body whole, in time and within the size, then run the application on it."""
        size = headers.get(b"content-length", b"0")
        if size.isdigit() and int(size) > _DISCARDED * self._max_body:
            raise self._too_large()
        body = b""
        if scope["method"] not in ("GET", "HEAD") and (size != b"0" or b"transfer-encoding" in headers):
            try:
                body = await asyncio.wait_for(self._body(receive), self.settings.read_timeout_s)
            except (TimeoutError, asyncio.TimeoutError):
                raise ApiError(
                    408,
                    f"the body did not come within {self.settings.read_timeout_s:g} s",
                    code="timeout",
                    headers={"Connection": "close"},
                ) from None
        replayed = False

        async def replay():
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, writer.send)

    async def _body(self, receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone("left before its request was whole")
            part = message.get("body", b"")
            size += len(part)
            if size <= self._max_body:
                parts.append(part)
            elif size > _DISCARDED * self._max_body or not message.get("more_body"):
                raise self._too_large()
            if not message.get("more_body"):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self.settings.max_body_mb:g} MB (serve.max_body_mb)",
            code="request_too_large",
            headers={"Connection": "close"},
        )


class _Writer:
    """``send`` with this server's headers, watched: a client that takes nothing of its answer is dropped in the end."""

    def __init__(self, send: Callable[[dict], Awaitable[None]], id: str, patience_s: float):
        self._send, self._patience_s = send, patience_s
        self.extra: list[tuple[bytes, bytes]] = [(b"x-request-id", id.encode())]
        self.status: int | None = None
        self.complete = False

    async def send(self, message: dict) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = message | {"headers": [*message.get("headers", ()), *_HEADERS, *self.extra]}
        task, expired = asyncio.current_task(), []
        timer = asyncio.get_running_loop().call_later(self._patience_s, lambda: expired.append(True) or task.cancel())
        try:
            await self._send(message)
        except asyncio.CancelledError:
            if expired:
                raise ClientGone("took nothing of its answer") from None
            raise
        finally:
            timer.cancel()
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.complete = True


class Rates:
    """Requests per minute of each client, as token buckets: a whole minute's worth at once, then a steady flow."""

    CLIENTS = 10_000  # the least recent are forgotten: their buckets are full again, or nearly

    def __init__(self, per_minute: int):
        self.per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what is left, and when

    def take(self, who: str) -> float:
        """Take one; returns the seconds until there is one, 0 when it was taken."""
        if self.per_minute == 0:
            return 0.0
        now = time.monotonic()
        left, then = self._buckets.pop(who, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - then) * self.per_minute / 60)
        wait = 0.0 if left >= 1 else (1 - left) * 60 / self.per_minute
        self._buckets[who] = (left - 1 if wait == 0 else left, now)
        while len(self._buckets) > self.CLIENTS:
            self._buckets.popitem(last=False)
        return wait

    def headers(self, who: str) -> list[tuple[bytes, bytes]]:
        """OpenAI's headers about the limit."""
        if self.per_minute == 0:
            return []
        left = int(self._buckets[who][0])
        return [
            (b"x-ratelimit-limit-requests", str(self.per_minute).encode()),
            (b"x-ratelimit-remaining-requests", str(left).encode()),
        ]


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()
