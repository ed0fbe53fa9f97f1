"""What can be known of this host before a job starts: its addresses, free ports, and NPUs."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from research.core.errors import ConfigError


def resolve(address: str, where: str) -> str:
    """The IP address of ``address``, which may be a name or ``[IPv6]``. Raises :class:`ConfigError`."""
    bare = address.strip().removeprefix("[").removesuffix("]")
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        pass
    try:
        return socket.getaddrinfo(bare, None, socket.AF_UNSPEC, socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise ConfigError(
            f"no address is known for this name: {error.strerror or error}",
            where=where,
            hint="the IP address of node 0, as `hostname -I` prints it there",
        ) from None


def is_loopback(address: str) -> bool:
    """Whether ``address`` (an IP address) can be reached from its own host only."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address in ("localhost", "ip6-localhost")
    return found.is_loopback or found.is_unspecified


def is_local(address: str) -> bool:
    """Whether ``address`` (an IP address) is one of this host's: a socket can be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
        return True
    except OSError:
        return False


def own_address() -> str | None:
    """An address by which other hosts may reach this one; None when there are only loopback ones.

    The source address of the default route: nothing is sent.
    """
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):  # reserved for examples
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((far, 9))
                found = probe.getsockname()[0]
        except OSError:
            continue
        if not is_loopback(found):
            return found
    try:
        found = socket.gethostbyname(socket.gethostname())
    except OSError:
        return None
    return None if is_loopback(found) else found


def port_is_free(address: str, port: int) -> bool:
    """Whether a server could listen at ``address`` (an IP address of this host) now."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def free_port(address: str = "127.0.0.1", first: int | None = None) -> int:
    """A free port at ``address``: the next one from ``first`` on, or any."""
    if first is not None:
        for port in range(first, min(first + 200, 65536)):
            if port_is_free(address, port):
                return port
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def check_port(address: str, port: int, where: str, spell: str = "{}") -> None:
    """Raise :class:`ConfigError` when ``port`` is out of range or taken; ``spell`` is how the user writes another."""
    if not 1024 <= port <= 65535:
        raise ConfigError("must be between 1024 and 65535", where=where, hint=spell.format(8118))
    if not port_is_free(address, port):
        raise ConfigError(
            f"another program listens at port {port} of {address}, an earlier job perhaps",
            where=where,
            hint=spell.format(free_port(address, port + 1)),
        )


def npus(env: Mapping[str, str] | None = None, devices: Path = Path("/dev")) -> list[int]:
    """Numbers of the NPUs that programs on this host may use; empty without the Ascend driver."""
    env = os.environ if env is None else env
    visible = env.get("ASCEND_RT_VISIBLE_DEVICES")
    there = sorted(
        int(found[1]) for path in devices.glob("davinci*") if (found := re.fullmatch(r"davinci(\d+)", path.name))
    )
    if not visible or not there:
        return there
    chosen = [int(part) for part in visible.split(",") if part.strip().isdigit()]
    return list(range(len([device for device in chosen if device in there])))


def on_npu(env: Mapping[str, str] | None = None) -> bool:
    """Whether ranks run on NPUs: ``DEVICE=cpu|npu`` of the environment, else whether there are any."""
    env = os.environ if env is None else env
    device = env.get("DEVICE", "auto") or "auto"
    if device not in ("auto", "cpu", "npu"):
        raise ConfigError(f"MindSpore runs on cpu or npu, not on {device}", where=f"DEVICE={device}", hint="DEVICE=cpu")
    there = npus(env)
    if device == "npu" and not there:
        raise ConfigError("there is no NPU on this host (/dev/davinci*)", where="DEVICE=npu", hint="DEVICE=cpu")
    return device == "npu" or (device == "auto" and bool(there))
