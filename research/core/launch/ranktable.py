"""Rank tables (RANK_TABLE_FILE): which rank is which NPU of which server, read, checked, written and merged.

The format is HCCL's version 1.0: ``server_list`` of ``{server_id, device: [{device_id, device_ip, rank_id}]}``, every value a
text. A table that is wrong makes all ranks wait for each other without a word, so everything that can be wrong is found here.
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from research.core.errors import ConfigError, UserError
from research.core.launch.host import is_local, is_loopback

VERSION = "1.0"
_MAKE = "make ranktable on every node, then tools/merge_hccl.py hccl_*.json"


@dataclass(frozen=True)
class Device:
    """One NPU: its number on the server, the address of its network port, and its rank."""

    device_id: int
    device_ip: str
    rank_id: int


@dataclass(frozen=True)
class Server:
    """One host and its NPUs. ``server_id`` is its address."""

    server_id: str
    devices: tuple[Device, ...]
    host_nic_ip: str = "reserve"


@dataclass(frozen=True)
class RankTable:
    """The NPUs of one job. ``path``: the file it was read from."""

    servers: tuple[Server, ...]
    path: Path | None = None

    @property
    def ranks(self) -> dict[int, tuple[Server, Device]]:
        return {device.rank_id: (server, device) for server in self.servers for device in server.devices}

    def device_of(self, rank: int) -> int:
        return self.ranks[rank][1].device_id

    def server_address(self, rank: int) -> str | None:
        """The address of the server of ``rank``; None when the table names it otherwise."""
        server_id = self.ranks[rank][0].server_id
        try:
            return str(ipaddress.ip_address(server_id))
        except ValueError:
            return None

    def check(self) -> None:
        """Raise :class:`ConfigError` for what would make the ranks wait for each other for ever."""
        where = self.path
        if not self.servers or not all(server.devices for server in self.servers):
            raise ConfigError("a server without devices, or no server at all", where=where, hint=_MAKE)
        seen: dict[int, str] = {}
        places: dict[tuple[str, int], int] = {}
        for server in self.servers:
            for device in server.devices:
                name = f"device {device.device_id} of {server.server_id}"
                if device.rank_id in seen:
                    raise ConfigError(
                        f"rank_id {device.rank_id} is given to {seen[device.rank_id]} and to {name}",
                        where=where,
                        hint="tools/merge_hccl.py numbers the ranks of all servers anew",
                    )
                if (server.server_id, device.device_id) in places:
                    raise ConfigError(f"{name} is listed twice", where=where, hint=_MAKE)
                seen[device.rank_id], places[server.server_id, device.device_id] = name, device.rank_id
        if sorted(seen) != list(range(len(seen))):
            missing = sorted(set(range(len(seen))) - set(seen))
            raise ConfigError(
                f"rank_ids must be 0 to {len(seen) - 1}; missing: {', '.join(map(str, missing))}",
                where=where,
                hint=_MAKE,
            )
        if len({server.server_id for server in self.servers}) < len(self.servers):
            raise ConfigError("two servers have the same server_id", where=where, hint=_MAKE)
        # Cards with the same number of two servers are in one network; so are those of one server.
        addresses = [(server.server_id, d.device_ip) for server in self.servers for d in server.devices if d.device_ip]
        addresses += [(d.device_id, d.device_ip) for server in self.servers for d in server.devices if d.device_ip]
        twice = {ip for at, (group, ip) in enumerate(addresses) if (group, ip) in addresses[:at]}
        if twice:
            raise ConfigError(
                f"the same device_ip for two devices: {', '.join(sorted(twice))}",
                where=where,
                hint="hccn_tool -i N -ip -g on every node: each NPU needs an address of its own",
            )
        for server in self.servers:
            if len(self.servers) > 1 and is_loopback(server.server_id):
                raise ConfigError(
                    f"server_id {server.server_id} cannot be reached from the other {len(self.servers) - 1} servers",
                    where=where,
                    hint="tools/hccl_tools.py --server_ip <address of that server> there, then merge again",
                )

    def check_job(self, size: int, ranks: Sequence[int]) -> None:
        """Raise :class:`ConfigError` unless the table is for ``size`` ranks, ``ranks`` of them on one server."""
        if size != len(self.ranks):
            raise ConfigError(
                f"the table has {len(self.ranks)} devices, RANK_SIZE is {size}",
                where=self.path,
                hint=f"RANK_SIZE={len(self.ranks)}, or a table for {size} devices: {_MAKE}",
            )
        servers = {self.ranks[rank][0].server_id for rank in ranks}
        if len(servers) > 1:
            first = next(server for server in self.servers if server.server_id == self.ranks[ranks[0]][0].server_id)
            own = sorted(device.rank_id for device in first.devices)
            raise ConfigError(
                f"the ranks {ranks[0]} to {ranks[-1]} are on {len(servers)} servers: {', '.join(sorted(servers))}",
                where=self.path,
                hint=f"[{own[0]},{own[-1] + 1}] on {first.server_id}",
            )
        server = servers.pop()
        try:
            known = is_local(str(ipaddress.ip_address(server)))
        except ValueError:
            return
        if not known:
            mine = next((s for s in self.servers if is_local(s.server_id)), None)
            if mine is not None:
                own = sorted(device.rank_id for device in mine.devices)
                raise ConfigError(
                    f"the ranks {ranks[0]} to {ranks[-1]} belong to {server}, and this host is {mine.server_id}",
                    where=self.path,
                    hint=f"[{own[0]},{own[-1] + 1}] here",
                )

    def to_json(self) -> dict:
        """The file's content, keys in the documents' order."""
        return {
            "version": VERSION,
            "server_count": str(len(self.servers)),
            "server_list": [
                {
                    "server_id": server.server_id,
                    "device": [
                        {"device_id": str(d.device_id), "device_ip": d.device_ip, "rank_id": str(d.rank_id)}
                        for d in server.devices
                    ],
                    "host_nic_ip": server.host_nic_ip,
                }
                for server in self.servers
            ],
            "status": "completed",
        }


def read_rank_table(path: str | os.PathLike, check: bool = True) -> RankTable:
    """Read and check a rank table. Raises :class:`ConfigError` naming the file and the entry."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError("rank table not found", where=path, hint=_MAKE)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        table = _parse(content, path.resolve())
    except (UnicodeDecodeError, json.JSONDecodeError) as bad:
        raise ConfigError(f"is not JSON: {bad}", where=path, hint=_MAKE) from None
    except (KeyError, TypeError, ValueError, AttributeError) as bad:
        raise ConfigError(f"is not a rank table: {type(bad).__name__} {bad}", where=path, hint=_MAKE) from None
    count = str(content.get("server_count"))
    if count != str(len(table.servers)):
        raise ConfigError(
            f"server_count is {count}, server_list has {len(table.servers)}",
            where=path,
            hint=f'"server_count": "{len(table.servers)}", or the missing servers',
        )
    if str(content.get("version")) != VERSION:
        raise ConfigError(f"version is {content.get('version')!r}", where=path, hint=f'a table of version "{VERSION}"')
    if content.get("status") != "completed":
        raise ConfigError(
            f"status is {content.get('status')!r}: the cluster has not filled this table yet",
            where=path,
            hint='wait until it says "completed"',
        )
    if check:
        table.check()
    return table


def _parse(content: dict, path: Path) -> RankTable:
    servers = []
    for server in content["server_list"]:
        devices = tuple(
            Device(int(one["device_id"]), str(one.get("device_ip", "")), int(one["rank_id"]))
            for one in server["device"]
        )
        servers.append(Server(str(server["server_id"]), devices, str(server.get("host_nic_ip", "reserve"))))
    return RankTable(tuple(servers), path)


def merge_rank_tables(tables: Sequence[RankTable]) -> RankTable:
    """One table of several, ranks numbered anew in the given order. Raises :class:`ConfigError` when they do not fit."""
    servers, first_seen, rank = [], {}, 0
    for table in tables:
        for server in table.servers:
            if is_loopback(server.server_id):
                raise ConfigError(
                    f"server_id {server.server_id} cannot be reached from other servers",
                    where=table.path,
                    hint="tools/hccl_tools.py --server_ip <address of that server> there",
                )
            if server.server_id in first_seen:
                raise ConfigError(
                    f"server {server.server_id} is in {first_seen[server.server_id]} already",
                    where=table.path,
                    hint="one table of each server",
                )
            first_seen[server.server_id] = table.path
            devices = []
            for device in server.devices:
                devices.append(Device(device.device_id, device.device_ip, rank))
                rank += 1
            servers.append(Server(server.server_id, tuple(devices), server.host_nic_ip))
    counts = sorted({len(server.devices) for server in servers})
    if len(counts) > 1:
        raise ConfigError(
            f"servers with {' and '.join(map(str, counts))} devices cannot form one job",
            where=", ".join(str(table.path) for table in tables),
            hint="tables with the same --device_num",
        )
    merged = RankTable(tuple(servers))
    merged.check()
    return merged


def write_rank_table(table: RankTable, path: str | os.PathLike) -> Path:
    """Write ``table``, aside and renamed."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(table.to_json(), indent=4) + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"cannot be written: {error.strerror}", where=path) from None
    return path
