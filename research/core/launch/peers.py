"""The launchers of one job on several hosts, who tell each other of failures and stops.

The launcher of rank 0 listens beside the ranks' own meeting point (its port + 1); the others connect. Each says which ranks it
runs, so that hosts started with different numbers, or twice the same ranks, are found at once and not by a time limit. When
one has failed or been stopped, or is gone without having ended, the others end their ranks too. A launcher that cannot
reach the first one says so and goes on by itself: the ranks may meet all the same.

Messages are JSON objects, one a line: ``{"kind": "hello" | "welcome" | "failed" | "stopped" | "refused" | "done", ...}``. A
connection counts from its welcome on: the first launcher may have ended, with all well, before it saw who came.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from research.core.errors import ConfigError

_LONGEST = 64 << 10  # bytes of a message
_REACH_S = 10  # a failure waits so long for a connection that is still being made


@dataclass(frozen=True)
class Share:
    """The ranks of one host: ``count`` from ``first`` on, of ``size``."""

    first: int
    count: int
    size: int

    def __str__(self) -> str:
        return f"ranks {self.first} to {self.first + self.count - 1} of {self.size}"


@dataclass(frozen=True)
class Heard:
    """What another host said: ``kind`` is failed, stopped or refused."""

    kind: str
    text: str
    status: int


@dataclass
class Peers:
    """This launcher among those of the other hosts. ``meet_s``: how long it may take until all are there."""

    share: Share
    address: str
    port: int
    meet_s: float = 600
    _heard: Heard | None = None
    _links: list[_Link] = field(default_factory=list)
    _shares: list[Share] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _closed: threading.Event = field(default_factory=threading.Event)
    _linked: threading.Event = field(default_factory=threading.Event)
    _server: socket.socket | None = None

    @property
    def first(self) -> bool:
        return self.share.first == 0

    def __enter__(self) -> Peers:
        if self.first:
            family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
            self._server = socket.socket(family, socket.SOCK_STREAM)
            self._server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                self._server.bind((self.address, self.port))
                self._server.listen()
            except OSError as error:
                self._server.close()
                raise ConfigError(
                    f"the hosts cannot tell each other of failures here: {error.strerror}",
                    where=f"port {self.port} of {self.address}, the one behind PORT",
                    hint=f"another PORT: {self.port + 1} and {self.port + 2} are used then",
                ) from None
            self._shares.append(self.share)
            target = self._accept
        else:
            target = self._connect
        threading.Thread(target=target, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        if self._server is not None:
            self._server.close()
        with self._lock:
            for link in self._links:
                link.close()

    # --- what the supervisor asks and says ---

    def heard(self) -> Heard | None:
        """What another host said that ends this one's ranks too; None while all is well."""
        return self._heard

    def missing(self) -> str | None:
        """On the first host: the ranks whose host has not come; None when all have, and elsewhere."""
        if not self.first:
            return None
        with self._lock:
            there = {rank for share in self._shares for rank in range(share.first, share.first + share.count)}
        absent = [rank for rank in range(self.share.size) if rank not in there]
        if not absent:
            return None
        runs = [absent[0], absent[-1]]
        return f"the hosts of {'rank' if len(absent) == 1 else 'the ranks'} {' to '.join(map(str, sorted(set(runs))))} never came"

    def failed(self, text: str, status: int) -> None:
        """Tell the others that a rank of this host has failed."""
        self._reach()
        self._send({"kind": "failed", "text": text[:4000], "status": status})

    def stopped(self, status: int) -> None:
        """Tell the others that this host was stopped."""
        self._reach()
        self._send({"kind": "stopped", "text": f"the host of {self.share} was stopped", "status": status})

    def done(self) -> None:
        """Tell the others that the ranks of this host have ended well."""
        self._send({"kind": "done"})

    # --- connections ---

    def _reach(self) -> None:
        """A rank may fail before the launchers have met: what it says would be lost, and the others would wait for it."""
        if not self.first:
            self._linked.wait(_REACH_S)

    def _send(self, message: dict[str, Any], but: _Link | None = None) -> None:
        with self._lock:
            for link in self._links:
                if link is not but:
                    link.send(message)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, (host, *_) = self._server.accept()
            except OSError:
                return
            link = _Link(connection, str(host))
            threading.Thread(target=self._listen, args=(link,), daemon=True).start()

    def _connect(self) -> None:
        deadline = time.monotonic() + self.meet_s
        while not self._closed.is_set():
            try:
                connection = socket.create_connection((self.address, self.port), timeout=5)
                connection.settimeout(None)
                if self._meet(_Link(connection, self.address)):
                    return
                why = "it answers nothing"
            except OSError as error:
                why = str(error)
            if time.monotonic() > deadline:
                print(
                    f"note: {self.address}:{self.port} cannot be reached ({why}), so this host will not hear of failures of others",
                    file=sys.stderr,
                    flush=True,
                )
                return
            self._closed.wait(0.2)

    def _meet(self, link: _Link) -> bool:
        """Say who this is and listen until the connection ends -> whether the first launcher answered."""
        with self._lock:
            self._links.append(link)
        link.send({"kind": "hello", **asdict(self.share)})
        self._linked.set()
        answered = self._listen(link)
        if not answered:
            self._linked.clear()
            with self._lock:
                self._links.remove(link)
        return answered

    def _listen(self, link: _Link) -> bool:
        """Read what comes over one connection until it ends -> whether anything came."""
        who, ended, answered = f"the host {link.host}", False, False
        for message in link.messages():
            kind, answered = message.get("kind"), True
            if kind == "hello":
                who = self._welcome(link, message) or who
            elif kind == "done":
                ended = True
            elif kind in ("failed", "stopped", "refused"):
                ended = True
                self._hear(Heard(kind, f"{message.get('text', '')}", int(message.get("status", 1))), link)
        if answered and not ended and not self._closed.is_set() and link in self._links:
            self._hear(Heard("failed", f"{who} is gone: its launcher was killed, or the network is down", 1), link)
        return answered

    def _welcome(self, link: _Link, message: dict[str, Any]) -> str | None:
        try:
            share = Share(int(message["first"]), int(message["count"]), int(message["size"]))
        except (KeyError, TypeError, ValueError):
            link.close()
            return None
        with self._lock:
            wrong = self._contradiction(share)
            if wrong is None:
                self._shares.append(share)
                self._links.append(link)
                link.send({"kind": "welcome"})
                if self.missing() is None:
                    print(f"all {len(self._shares)} hosts are there", file=sys.stderr, flush=True)
        if wrong is not None:
            link.send({"kind": "refused", "text": wrong, "status": 2})
            self._hear(Heard("refused", wrong, 2), link)
        return f"the host {link.host} with the {share}"

    def _contradiction(self, share: Share) -> str | None:
        if share.size != self.share.size:
            return f"a host was started with {share.size} ranks in all, the first one with {self.share.size}"
        for other in self._shares:
            if share.first < other.first + other.count and other.first < share.first + share.count:
                return f"two hosts were started with the {share}: each needs a NODE_RANK, or a range, of its own"
        return None

    def _hear(self, heard: Heard, link: _Link) -> None:
        with self._lock:
            if self._heard is None:
                self._heard = heard
        if self.first:  # the others are connected to this host only
            self._send({"kind": heard.kind, "text": heard.text, "status": heard.status}, but=link)


class _Link:
    """One connection to another launcher."""

    def __init__(self, connection: socket.socket, host: str):
        self.connection, self.host = connection, host

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def messages(self):
        """What arrives, until the other side closes; what is no message ends the connection."""
        with contextlib.suppress(OSError, ValueError), self.connection.makefile("rb") as stream:
            while line := stream.readline(_LONGEST):
                message = json.loads(line)
                if not isinstance(message, dict):
                    return
                yield message

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
