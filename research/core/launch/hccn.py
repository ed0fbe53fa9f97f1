"""Network addresses of this host's NPUs: from hccn_tool, or from /etc/hccn.conf. NOT RUN HERE with real NPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from research.core.errors import ConfigError

CONF = "/etc/hccn.conf"  # HCCN_CONF of the environment names another


def device_addresses(devices: Sequence[int]) -> dict[int, str]:
    """device -> address of its network port. Raises :class:`ConfigError` naming the devices that have none."""
    tool, conf = shutil.which("hccn_tool"), Path(os.environ.get("HCCN_CONF", CONF))
    if tool is None and not conf.is_file():
        raise ConfigError(
            f"neither hccn_tool nor {conf} is on this host, so the NPUs' addresses are not known",
            where="--device_num",
            hint=(
                "run it where the Ascend driver is installed (in a container: mount /etc/hccn.conf and the driver), take "
                "/user/config/jobstart_hccl.json on ModelArts, or use scripts/msrun_launcher.sh, which needs no rank table"
            ),
        )
    found = _ask(tool, devices) if tool is not None else {}
    if conf.is_file() and set(devices) - found.keys():
        found = _read(conf) | found
    missing = sorted(set(devices) - found.keys())
    if missing:
        raise ConfigError(
            f"no address is known of {', '.join(f'device {device}' for device in missing)}",
            where=f"{tool or 'no hccn_tool'}, {conf if conf.is_file() else f'no {conf}'}",
            hint=f"hccn_tool -i {missing[0]} -ip -s address <address> netmask <mask> (as root), or fewer devices",
        )
    return {device: found[device] for device in devices}


def _ask(tool: str, devices: Sequence[int]) -> dict[int, str]:
    found = {}
    for device in devices:
        try:
            told = subprocess.run(
                [tool, "-i", str(device), "-ip", "-g"], capture_output=True, text=True, timeout=30, check=False
            ).stdout
        except (OSError, subprocess.TimeoutExpired):
            continue
        line = re.search(r"^\s*ipaddr\s*:\s*(\S+)", told, re.MULTILINE)
        if line:
            found[device] = line[1]
    return found


def _read(conf: Path) -> dict[int, str]:
    try:
        text = conf.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=conf) from None
    return {int(number): ip for number, ip in re.findall(r"^\s*address_(\d+)\s*=\s*(\S+)", text, re.MULTILINE)}
