#!/usr/bin/env python
"""The rank table (RANK_TABLE_FILE) of this host's NPUs: python tools/hccl_tools.py --device_num "[0,8)".

Writes hccl_{n}p_{devices}_{server}.json into the current folder. On several hosts: run it on each, collect the files, and
join them with tools/merge_hccl.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from research.core.errors import ConfigError, run_cli
from research.core.launch.hccn import device_addresses
from research.core.launch.host import is_loopback, own_address, resolve
from research.core.launch.ranktable import Device, RankTable, Server, write_rank_table
from research.core.launch.words import parse_range


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device_num", default="[0,8)", help='logical devices, "[0,8)": 0 to 7 (the default)')
    parser.add_argument(
        "--visible_devices", help="physical number of each logical device, 4,5,6,7; default: logical 0 is physical 0"
    )
    parser.add_argument(
        "--server_ip", default="", help="this host's address as other hosts reach it; default: found out"
    )
    parser.add_argument("--device_num_per_node", type=int, default=8, help="devices of this host (8)")
    parser.add_argument("--output", help="file to write instead of hccl_{n}p_{devices}_{server}.json")
    args = parser.parse_args(argv)
    devices = chosen(parse_range(args.device_num), args.visible_devices, args.device_num_per_node)
    server = server_address(args.server_ip)
    addresses = device_addresses(devices)
    table = RankTable((Server(server, tuple(Device(d, addresses[d], rank) for rank, d in enumerate(devices))),))
    table.check()
    path = write_rank_table(table, args.output or file_name(devices, server))
    for device in table.servers[0].devices:
        print(f"rank {device.rank_id}: device {device.device_id}, {device.device_ip}", file=sys.stderr)
    print(path.resolve())
    return 0


def chosen(logical: range, visible: str | None, per_node: int) -> list[int]:
    """Physical numbers of the devices in ``logical``. Raises :class:`ConfigError`."""
    if logical.stop > per_node:
        raise ConfigError(
            f"this host has {per_node} devices",
            where=f"--device_num [{logical.start},{logical.stop})",
            hint=f"--device_num [0,{per_node}), or --device_num_per_node {logical.stop}",
        )
    if visible is None:
        return list(logical)
    parts = [part.strip() for part in visible.split(",")]
    if not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError("must be numbers, each once", where=f"--visible_devices {visible}", hint="0,1,2,3")
    if logical.stop > len(parts):
        raise ConfigError(
            f"{len(parts)} devices are visible, --device_num needs {logical.stop}", where=f"--visible_devices {visible}"
        )
    return [int(parts[device]) for device in logical]


def server_address(given: str) -> str:
    """The address to write as ``server_id``, which other hosts can reach. Raises :class:`ConfigError`."""
    if given:
        address = resolve(given, f"--server_ip {given}")
        if is_loopback(address):
            raise ConfigError(
                "a loopback address means another host on every host",
                where=f"--server_ip {given}",
                hint="the address that `hostname -I` prints",
            )
        return address
    address = own_address()
    if address is None:
        raise ConfigError("only loopback addresses are known here", where="--server_ip", hint="--server_ip <address>")
    return address


def file_name(devices: Sequence[int], server: str) -> str:
    """``hccl_8p_01234567_198.51.100.1.json``; numbers of two digits and IPv6 addresses are written with dashes."""
    digits = "" if all(device < 10 for device in devices) else "-"
    return f"hccl_{len(devices)}p_{digits.join(map(str, devices))}_{server.replace(':', '-')}.json"


if __name__ == "__main__":
    sys.exit(run_cli(main))
