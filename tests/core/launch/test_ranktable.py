"""Rank tables: the documents' example is read, every fault that would hang a job is found, and tables merge."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from research.core.errors import ConfigError
from research.core.launch.host import own_address
from research.core.launch.ranktable import (
    Device,
    RankTable,
    Server,
    merge_rank_tables,
    read_rank_table,
    write_rank_table,
)


def content(servers=1, devices=8, **changes) -> dict:
    """A table as in the documents, with addresses filled in."""
    table = {
        "version": "1.0",
        "server_count": str(servers),
        "server_list": [
            {
                "server_id": f"198.51.100.{s + 1}",
                "device": [
                    {"device_id": str(d), "device_ip": f"192.{s}.{d % 4}.{d + 1}", "rank_id": str(s * devices + d)}
                    for d in range(devices)
                ],
                "host_nic_ip": "reserve",
            }
            for s in range(servers)
        ],
        "status": "completed",
    }
    return table | changes


def write(tmp_path, table: dict, name="hccl.json"):
    path = tmp_path / name
    path.write_text(json.dumps(table))
    return path


def test_the_documents_table_is_read_and_written_back_the_same(tmp_path):
    path = write(tmp_path, content(2))
    table = read_rank_table(path)
    assert table.device_of(9) == 1 and table.server_address(9) == "198.51.100.2"
    assert json.loads(write_rank_table(table, tmp_path / "again.json").read_text()) == content(2)
    assert table.to_json() == content(2)


def _device(table, server, device):
    return table["server_list"][server]["device"][device]


FAULTS = {
    "duplicate rank": (lambda t: _device(t, 0, 1).update(rank_id="0"), "rank_id 0 is given to device 0"),
    "hole in the ranks": (lambda t: _device(t, 1, 7).update(rank_id="20"), "missing: 15"),
    "same device twice": (lambda t: _device(t, 0, 1).update(device_id="0"), "device 0 of 198.51.100.1 is listed twice"),
    "same address twice": (lambda t: _device(t, 0, 1).update(device_ip="192.0.0.1"), "192.0.0.1"),
    "same server twice": (lambda t: t["server_list"][1].update(server_id="198.51.100.1"), "listed twice"),
    "loopback server": (lambda t: t["server_list"][1].update(server_id="127.0.0.1"), "--server_ip"),
    "loopback IPv6 server": (lambda t: t["server_list"][1].update(server_id="::1"), "--server_ip"),
    "wrong server_count": (lambda t: t.update(server_count="1"), "server_count is 1, server_list has 2"),
    "unfinished": (lambda t: t.update(status="initializing"), "initializing"),
    "other version": (lambda t: t.update(version="2.0"), "2.0"),
    "no devices": (lambda t: t["server_list"][1].update(device=[]), "without devices"),
    "not a table": (lambda t: t.pop("server_list"), "not a rank table"),
    "number that is none": (lambda t: _device(t, 0, 0).update(rank_id="zero"), "not a rank table"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_table_that_would_hang_the_job_is_refused(tmp_path, fault):
    change, says = FAULTS[fault]
    table = content(2)
    change(table)
    path = write(tmp_path, table)
    with pytest.raises(ConfigError) as caught:
        read_rank_table(path)
    assert says in str(caught.value) and str(path) in str(caught.value) and "try:" in str(caught.value)


def test_a_missing_or_broken_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match="make ranktable"):
        read_rank_table(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_rank_table(tmp_path / "bad.json")


def test_a_job_of_another_size_or_over_two_servers_is_refused(tmp_path):
    table = read_rank_table(write(tmp_path, content(2)))
    table.check_job(16, range(8, 16))
    with pytest.raises(ConfigError, match="RANK_SIZE=16"):
        table.check_job(8, range(8))
    with pytest.raises(ConfigError, match=r"\[0,8\] on 198.51.100.1"):
        table.check_job(16, range(4, 12))


def test_ranks_of_another_host_are_refused_on_this_one(tmp_path):
    address = own_address()
    if address is None:
        pytest.skip("this machine has a loopback address only")
    table = content(2)
    table["server_list"][1]["server_id"] = address
    read_rank_table(write(tmp_path, table)).check_job(16, range(8, 16))
    with pytest.raises(ConfigError, match=r"\[8,16\] here"):
        read_rank_table(write(tmp_path, table)).check_job(16, range(8))


def test_merging_numbers_ranks_in_the_given_order(tmp_path):
    a, b = content(1), content(1)
    b["server_list"][0]["server_id"] = "198.51.100.9"
    for device in b["server_list"][0]["device"]:
        device["device_ip"] = "10." + device["device_ip"][4:]
    first, second = write(tmp_path, a, "a.json"), write(tmp_path, b, "b.json")
    merged = merge_rank_tables([read_rank_table(second), read_rank_table(first)])
    assert [server.server_id for server in merged.servers] == ["198.51.100.9", "198.51.100.1"]
    assert sorted(merged.ranks) == list(range(16)) and merged.device_of(8) == 0
    with pytest.raises(ConfigError, match="already"):
        merge_rank_tables([read_rank_table(first), read_rank_table(first)])
    b["server_list"][0]["server_id"] = "127.0.0.1"
    with pytest.raises(ConfigError, match="--server_ip"):
        merge_rank_tables([read_rank_table(first), read_rank_table(write(tmp_path, b, "c.json"))])
    fewer = content(1, devices=4)
    fewer["server_list"][0]["server_id"] = "198.51.100.7"
    with pytest.raises(ConfigError, match="4 and 8 devices"):
        merge_rank_tables([read_rank_table(first), read_rank_table(write(tmp_path, fewer, "d.json"))])


# --- tools/hccl_tools.py, tools/merge_hccl.py -------------------------------------------------------------------


@pytest.fixture
def tool(repo, tmp_path):
    def run(name, *args, conf=None, path=None):
        env = {"PATH": path or "/nonexistent", "HCCN_CONF": str(conf or tmp_path / "none.conf")}
        command = [sys.executable, str(repo / "tools" / name), *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


@pytest.fixture
def conf(tmp_path):
    path = tmp_path / "hccn.conf"
    path.write_text("".join(f"address_{d}=192.168.{d}.10\nnetmask_{d}=255.255.255.0\n" for d in range(16)))
    return path


def test_a_table_of_this_host_gets_the_documents_name(tool, conf, tmp_path):
    done = tool("hccl_tools.py", "--device_num", "[0,8)", "--server_ip", "198.51.100.1", conf=conf)
    assert done.returncode == 0, done.stderr
    table = read_rank_table(tmp_path / "hccl_8p_01234567_198.51.100.1.json")
    assert [d.device_ip for d in table.servers[0].devices] == [f"192.168.{d}.10" for d in range(8)]


def test_ranges_with_two_digits_and_visible_devices(tool, conf, tmp_path):
    done = tool(
        "hccl_tools.py", "--device_num", "[8,16)", "--device_num_per_node", 16, "--server_ip", "fe80::1", conf=conf
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path / "hccl_8p_8-9-10-11-12-13-14-15_fe80--1.json"
    assert [d.device_id for d in read_rank_table(path).servers[0].devices] == list(range(8, 16))
    done = tool(
        "hccl_tools.py",
        "--device_num",
        "[0,4)",
        "--visible_devices",
        "4,5,6,7",
        "--server_ip",
        "198.51.100.1",
        conf=conf,
    )
    devices = read_rank_table(tmp_path / "hccl_4p_4567_198.51.100.1.json").servers[0].devices
    assert (devices[0].device_id, devices[0].rank_id, devices[0].device_ip) == (4, 0, "192.168.4.10")


def test_hccn_tool_is_asked_before_the_file(tool, conf, tmp_path):
    program = tmp_path / "bin" / "hccn_tool"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "ipaddr:10.1.1.$2"\necho "netmask:255.255.255.0"\n')
    program.chmod(0o755)
    tool(
        "hccl_tools.py",
        "--device_num",
        "[0,2)",
        "--server_ip",
        "198.51.100.1",
        conf=conf,
        path=f"{program.parent}:/bin:/usr/bin",
    )
    devices = read_rank_table(tmp_path / "hccl_2p_01_198.51.100.1.json").servers[0].devices
    assert [d.device_ip for d in devices] == ["10.1.1.0", "10.1.1.1"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--device_num", "[0,9)"], "--device_num_per_node"),
        (["--device_num", "0-8"], "range of devices"),
        (["--device_num", "[0,2)", "--server_ip", "127.0.0.1"], "loopback"),
        (["--device_num", "[0,2)", "--visible_devices", "3"], "--visible_devices"),
        (["--device_num", "[0,2)", "--visible_devices", "3,x"], "--visible_devices"),
        (["--device_num", "[0,20)", "--device_num_per_node", "20", "--visible_devices", "0"], "--visible_devices"),
        (["--device_num", "[0,18)", "--device_num_per_node", "18"], "device 16"),
    ],
)
def test_wrong_arguments_are_refused_and_leave_no_file(tool, conf, tmp_path, args, says):
    extra = [] if "--server_ip" in args else ["--server_ip", "198.51.100.1"]
    done = tool("hccl_tools.py", *args, *extra, conf=conf)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert list(tmp_path.glob("hccl_*.json")) == []


def test_without_any_source_of_addresses_it_says_what_to_do(tool):
    done = tool("hccl_tools.py", "--device_num", "[0,8)", "--server_ip", "198.51.100.1")
    assert done.returncode == 2
    for word in ("hccn_tool", "hccn.conf", "jobstart_hccl.json"):
        assert word in done.stderr


def test_merge_writes_the_documents_name_and_refuses_what_does_not_fit(tool, tmp_path):
    one, two = content(1), content(1)
    two["server_list"][0]["server_id"] = "198.51.100.2"
    for device in two["server_list"][0]["device"]:
        device["device_ip"] = "10." + device["device_ip"][4:]
    a, b = write(tmp_path, one, "hccl_a.json"), write(tmp_path, two, "hccl_b.json")
    done = tool("merge_hccl.py", a, b)
    assert done.returncode == 0, done.stderr
    table = read_rank_table(tmp_path / "hccl_2s_16p.json")
    assert [table.ranks[r][0].server_id for r in (0, 8)] == ["198.51.100.1", "198.51.100.2"]
    done = tool("merge_hccl.py", a, a)
    assert done.returncode == 2 and "already" in done.stderr
    assert tool("merge_hccl.py", a, write(tmp_path, one | {"status": "x"}, "hccl_c.json")).returncode == 2


def test_two_servers_given_in_code_are_checked_too():
    table = RankTable((Server("198.51.100.1", (Device(0, "", 0),)), Server("198.51.100.1", (Device(1, "", 1),))))
    with pytest.raises(ConfigError, match="same server_id"):
        table.check()
