"""Launchers on several hosts: a failure or stop on one ends the ranks of all, and hosts that do not fit are told at once.

The hosts are processes with this machine's own address; their ranks are small Python programs.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from research.core.launch.host import free_port, own_address
from research.core.launch.peers import Peers, Share
from tests.core.launch.test_processes import left_over, wait_for

RANK = """
import os, signal, sys, time
from pathlib import Path
here, rank = Path(__file__).parent, int(os.environ["RANK"])
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
(here / f"ready_{rank}").touch()
what = sys.argv[1]
if what == "fail" and rank == 1:
    while not all((here / f"ready_{r}").exists() for r in range(2)):
        time.sleep(0.02)
    raise ValueError("the own error of rank 1")
if what == "lose" and rank == 0:
    while not (here / "gone").exists():
        time.sleep(0.02)
    raise RuntimeError("Connection closed by peer")
while what != "end" and not stop:
    time.sleep(0.02)
if stop:
    (here / f"saved_{rank}").touch()
"""


@pytest.fixture
def hosts(tmp_path, repo):
    """Start the launcher of node 0 and of node 1, one rank on each; every process is gone afterwards."""
    address = own_address()
    if address is None:
        pytest.skip("this machine has a loopback address only")
    (tmp_path / "rank.py").write_text(RANK)
    port = free_port(address, 24000 + os.getpid() % 1000)
    started = []

    def start(node: int, what: str, workers: int = 2) -> subprocess.Popen:
        command = [
            "bash",
            str(repo / "scripts/torchrun_launcher.sh"),
            f"rank.py {what}",
            str(workers),
            "1",
            address,
            str(port),
        ]
        command += [str(node), f"logs_{node}", "False", "20"]
        env = {**os.environ, "PY": sys.executable, "GROUP_MARK": str(tmp_path)}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=env, **streams))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_until(holds) -> None:
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)


def until_met(first: subprocess.Popen) -> None:
    """Read what the first launcher says until all hosts are there."""
    for line in first.stderr:
        if "hosts are there" in line:
            return
    raise AssertionError("the hosts never met")


def test_a_failure_on_one_host_ends_the_ranks_of_the_other(hosts, tmp_path):
    first, second = hosts(0, "fail"), hosts(1, "fail")
    begin = time.monotonic()
    _, there = second.communicate(timeout=60)
    _, here = first.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    assert (first.returncode, second.returncode) == (1, 1)
    assert "rank 1 ended with status 1" in there and "the own error of rank 1" in there
    assert "on another host: rank 1 ended with status 1: ValueError: the own error of rank 1" in here
    assert left_over(tmp_path) == []


def test_a_stop_on_one_host_lets_the_ranks_of_both_save(hosts, tmp_path):
    first, second = hosts(0, "wait"), hosts(1, "wait")
    for rank in range(2):
        wait_for(tmp_path / f"ready_{rank}")
    until_met(first)
    second.send_signal(signal.SIGTERM)
    _, here = first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (143, 143)
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()
    assert "the host of ranks 1 to 1 of 2 was stopped" in here
    assert left_over(tmp_path) == []


def test_a_host_that_dies_ends_the_other(hosts, tmp_path):
    first, second = hosts(0, "wait"), hosts(1, "wait")
    for rank in range(2):
        wait_for(tmp_path / f"ready_{rank}")
    until_met(first)
    second.kill()
    _, here = first.communicate(timeout=60)
    assert first.returncode == 1 and "is gone" in here and "ranks 1 to 1 of 2" in here
    assert left_over(tmp_path) == []


def test_hosts_that_end_well_do_not_miss_each_other(hosts):
    first, second = hosts(0, "end"), hosts(1, "end")
    assert second.wait(60) == 0 and first.wait(60) == 0
    assert "another host" not in first.stderr.read() + second.stderr.read()


def test_a_node_that_is_started_twice_is_told_at_once(hosts):
    first = hosts(0, "wait")
    second, again = hosts(1, "wait"), hosts(1, "wait")
    for process in (first, second, again):
        _, said = process.communicate(timeout=60)
        assert process.returncode == 2 and "each needs a NODE_RANK" in said


def test_other_numbers_of_workers_are_told_at_once(hosts):
    first, second = hosts(0, "wait"), hosts(1, "wait", workers=4)
    for process in (first, second):
        _, said = process.communicate(timeout=60)
        assert process.returncode == 2 and "4 ranks in all, the first one with 2" in said


def test_the_first_host_knows_who_never_came():
    port = free_port()
    with Peers(Share(0, 2, 8), "127.0.0.1", port) as first:
        assert first.missing() == "the hosts of the ranks 2 to 7 never came"
        with Peers(Share(2, 6, 8), "127.0.0.1", port) as second:
            wait_until(lambda: first.missing() is None)
            assert first.missing() is None and second.missing() is None
            second.done()
        time.sleep(0.2)
        assert first.heard() is None


def test_a_failure_before_the_launchers_have_met_is_not_lost():
    port = free_port()
    with Peers(Share(1, 1, 2), "127.0.0.1", port) as second:
        telling = threading.Thread(target=second.failed, args=("rank 1 ended", 7))
        telling.start()
        with Peers(Share(0, 1, 2), "127.0.0.1", port) as first:
            telling.join(20)
            wait_until(lambda: first.heard() is not None)
            assert (first.heard().kind, first.heard().status) == ("failed", 7)


def test_a_first_host_that_ended_before_it_saw_another_is_no_failure():
    with (
        socket.create_server(("127.0.0.1", 0)) as ending,
        Peers(Share(1, 1, 2), "127.0.0.1", ending.getsockname()[1]) as second,
    ):
        for _ in range(2):  # it tries again
            connection, _ = ending.accept()
            assert connection.makefile().readline().startswith('{"kind": "hello"')
            connection.close()
        assert second.heard() is None


def test_what_is_no_message_of_a_launcher_does_no_harm():
    port = free_port()
    with Peers(Share(0, 1, 2), "127.0.0.1", port) as first:
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"kind": "hello"}\n', b"\xff\xfe\n"):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(noise)
        time.sleep(0.2)
        assert first.heard() is None and first.missing() is not None
