"""The launch scripts: what is wrong is found before anything starts, and what is started gets the documented variables.

The ranks are small Python programs here; test_msrun.py runs MindSpore in them.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from research.core.errors import ConfigError
from research.core.launch import scripts
from research.core.launch.host import free_port, own_address
from research.core.launch.msrun import Cluster, msrun_command, wrapped
from research.core.launch.scripts import Positional, range_launcher
from tests.core.launch.test_ranktable import content, write

SHOW = """
import json, os, sys
keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "RANK_ID", "DEVICE_ID", "RANK_SIZE", "RANK_TABLE_FILE",
        "LOG_MF_PATH", "ASCEND_PROCESS_LOG_PATH", "EXTRA", "QWEN_LAUNCHED", "MS_ROLE")
rank = os.environ.get("RANK") or os.environ["RANK_ID"]
with open(f"rank_{rank}.json", "w") as file:
    json.dump({"argv": sys.argv[1:], **{key: os.environ.get(key) for key in keys}}, file)
print("rank", rank)
"""


@pytest.fixture
def script(repo, tmp_path):
    """Run a launcher in a folder that has show.py."""
    (tmp_path / "show.py").write_text(SHOW)

    def run(name, *args, **env):
        command = ["bash", str(repo / name), *map(str, args)]
        full = {**os.environ, "PY": sys.executable, "DEVICE": "cpu", **env}
        return subprocess.run(command, cwd=tmp_path, env=full, capture_output=True, text=True, timeout=120)

    return run


def told(folder: Path, rank: int) -> dict:
    return json.loads((folder / f"rank_{rank}.json").read_text())


# --- torchrun_launcher.sh: real ranks without a framework -------------------------------------------------------


def test_torch_ranks_get_their_variables_and_words(script, tmp_path):
    done = script(
        "scripts/torchrun_launcher.sh", "EXTRA=x show.py 'a b' --predict_data 你好", 2, free_port(first=20000)
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found = told(tmp_path, rank)
        assert found["argv"] == ["a b", "--predict_data", "你好"] and found["EXTRA"] == "x"
        assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert found["QWEN_LAUNCHED"] == "torch"
    assert done.stdout == "rank 0\n", "the first rank is shown, the others have logs"
    assert (tmp_path / "output/torchrun_log/worker_1.log").read_text() == "rank 1\n"
    assert "+ torchrun --nnodes=1" in done.stderr


def test_join_shows_every_rank_with_its_number(script, tmp_path):
    port = free_port(first=20100)
    done = script(
        "scripts/torchrun_launcher.sh", "show.py", 2, 2, "127.0.0.1", port, 0, "logs", True, MF_LOG_SUFFIX="s"
    )
    assert sorted(done.stdout.splitlines()) == ["[rank 0] rank 0", "[rank 1] rank 1"], done.stderr
    assert (tmp_path / "logs_s" / "worker_0.log").is_file()
    assert told(tmp_path, 0)["LOG_MF_PATH"] == str(tmp_path / "output/log_s")


def test_the_ascend_logs_are_redirected_on_request(script, tmp_path):
    port = free_port(first=20200)
    script("scripts/torchrun_launcher.sh", "show.py", 1, port, PLOG_REDIRECT_TO_OUTPUT="True", LOG_MF_PATH="/x/y")
    found = told(tmp_path, 0)
    assert found["ASCEND_PROCESS_LOG_PATH"] == str(tmp_path / "output/plog") and found["LOG_MF_PATH"] == "/x/y"
    script("scripts/torchrun_launcher.sh", "show.py", 1, port, PLOG_REDIRECT_TO_OUTPUT="False")
    assert told(tmp_path, 0)["ASCEND_PROCESS_LOG_PATH"] is None


def test_a_second_torch_node_has_the_following_ranks(script, tmp_path):
    address = own_address()
    if address is None:
        pytest.skip("this machine has a loopback address only")
    done = script("scripts/torchrun_launcher.sh", "show.py", 4, 2, address, free_port(first=20300), 1)
    assert done.returncode == 0, done.stderr
    assert (told(tmp_path, 2)["LOCAL_RANK"], told(tmp_path, 3)["LOCAL_RANK"]) == ("0", "1")
    assert told(tmp_path, 3)["MASTER_ADDR"] == address


def test_exit_status_of_the_failed_rank_comes_through(script, tmp_path):
    (tmp_path / "fail.py").write_text(
        "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(600)"
    )
    done = script("scripts/torchrun_launcher.sh", "fail.py", 2, free_port(first=20400))
    assert done.returncode == 7 and "rank 1 ended with status 7" in done.stderr


def test_programs_that_are_not_python_run_too(script, tmp_path):
    done = script("scripts/torchrun_launcher.sh", "sh -c 'echo rank $RANK; exit $RANK'", 2, free_port(first=20500))
    assert done.returncode == 1 and "rank 1 ended with status 1" in done.stderr


# --- arguments --------------------------------------------------------------------------------------------------


def positional(*args) -> Positional:
    return Positional("msrun_launcher.sh", ["x.py", *map(str, args)], 8118, "output/msrun_log", 7200)


@pytest.mark.parametrize(
    ("args", "cluster", "log", "join"),
    [
        ((), Cluster(8, 8), "output/msrun_log", False),
        ((4,), Cluster(4, 4), "output/msrun_log", False),
        ((4, 8119), Cluster(4, 4, port=8119), "output/msrun_log", False),
        ((4, 8119, "logs", "True", 300), Cluster(4, 4, port=8119, timeout_s=300), "logs", True),
        ((4, 4), Cluster(4, 4), "output/msrun_log", False),
        ((16, 8, "192.168.1.1"), Cluster(16, 8, "192.168.1.1"), "output/msrun_log", False),
        ((16, 8, "192.168.1.1", 8118), Cluster(16, 8, "192.168.1.1"), "output/msrun_log", False),
        ((16, 8, "192.168.1.1", 8118, 1), Cluster(16, 8, "192.168.1.1", 8118, 1), "output/msrun_log", False),
        ((16, 8, "192.168.1.1", 8118, 1, "l"), Cluster(16, 8, "192.168.1.1", 8118, 1), "l", False),
        ((16, 8, "192.168.1.1", 8118, 1, "l", "False"), Cluster(16, 8, "192.168.1.1", 8118, 1), "l", False),
        (
            (16, 8, "192.168.1.1", 8118, 0, "output/msrun_log", "False", 3000),
            Cluster(16, 8, "192.168.1.1", 8118, 0, 3000),
            "output/msrun_log",
            False,
        ),
    ],
)
def test_every_number_of_arguments_is_taken(args, cluster, log, join):
    given = positional(*args)
    assert (given.cluster, str(given.logs), given.show_all) == (cluster, log, join)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("x",), "WORKERS=x"),
        ((0,), "at least 1"),
        ((4, 8), "WORKERS is the number over all nodes"),
        ((12, 8, "10.0.0.1"), "WORKERS=8"),
        ((16, 8, "10.0.0.1", 8118, 2), "between 0 and 1"),
        ((8, 8, "127.0.0.1", 8118, 0, "l", "maybe"), "JOIN"),
        ((8, 8, "127.0.0.1", 8118, 0, "l", "True", 0), "TIMEOUT"),
        ((1, 2, 3, 4, 5, 6, 7, 8, 9), "1 to 9 arguments"),
    ],
)
def test_numbers_that_cannot_meet_are_refused_before_anything_starts(args, says):
    with pytest.raises(ConfigError, match=says):
        positional(*args)


def test_where_workers_meet_is_checked_before_anything_starts():
    with pytest.raises(ConfigError, match="loopback"):
        Cluster(4, 2, "localhost").meet()
    with pytest.raises(ConfigError, match="no address is known"):
        Cluster(4, 2, "no-such-host.invalid").meet()
    with pytest.raises(ConfigError, match="not an address of this host"):
        Cluster(4, 2, "192.0.2.77").meet()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"listens at port {port}"):
            Cluster(2, 2, port=port).meet()
    with pytest.raises(ConfigError, match="1024"):
        Cluster(2, 2, port=80).meet()


def test_more_workers_than_npus_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("research.core.launch.msrun.npus", lambda: [0, 1])
    from research.core.launch.msrun import check_devices

    check_devices(2, True)
    with pytest.raises(ConfigError, match="2 are visible"):
        check_devices(4, True)


def test_visible_npus_are_counted_as_the_driver_does(tmp_path):
    from research.core.launch.host import npus

    for name in ("davinci0", "davinci1", "davinci2", "davinci_manager"):
        (tmp_path / name).touch()
    assert npus({}, tmp_path) == [0, 1, 2]
    assert npus({"ASCEND_RT_VISIBLE_DEVICES": "2,1"}, tmp_path) == [0, 1]
    assert npus({}, tmp_path / "none") == []


def test_the_msrun_line_is_msruns():
    line = msrun_command(Cluster(16, 8, "10.0.0.1", 8118, 1, 3000), ["run.py", "a b"], "logs")
    assert line == [
        "msrun", "--worker_num=16", "--local_worker_num=8", "--master_addr=10.0.0.1", "--master_port=8118",
        "--node_rank=1", "--log_dir=logs", "--cluster_time_out=3000", "run.py", "a b",
    ]  # fmt: skip


def test_only_python_programs_are_wrapped():
    assert wrapped(["python", "-u", "x.py", "a"])[2].endswith("worker.py")
    assert wrapped(["python", "-m", "x"])[1].endswith("worker.py")
    assert wrapped(["python", "-c", "1"]) == ["python", "-c", "1"] and wrapped(["bash", "x.py"]) == ["bash", "x.py"]


# --- run_singlenode.sh, run_multinode.sh ------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """The members that a range launcher would run, as if this host had eight NPUs."""
    (tmp_path / "job.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scripts, "on_npu", lambda: True)
    monkeypatch.setattr("research.core.launch.msrun.npus", lambda: list(range(8)))
    found = []
    monkeypatch.setattr(scripts, "run_members", lambda members, hint, peers: found.extend(members) or 0)

    def plan(script, *args):
        found.clear()
        assert range_launcher(script, ["python job.py", *map(str, args)]) == 0
        return found

    return plan


def _ids(members):
    return [(m.env["RANK_ID"], m.env["DEVICE_ID"], m.env["RANK_SIZE"]) for m in members]


def test_ranks_by_rank_table_get_the_documented_variables(planned, tmp_path):
    table = write(tmp_path, content(1))
    members = planned("run_singlenode.sh", table, "[0,8]", 8)
    assert _ids(members) == [(str(r), str(r), "8") for r in range(8)]
    assert all(m.env["RANK_TABLE_FILE"] == str(table) for m in members)
    assert [str(m.log) for m in members][7] == "output/log/rank_7/mindformer.log"
    assert [m.shown for m in members] == [True] + [False] * 7
    assert not any("MS_ROLE" in m.env for m in members), "a rank table needs no scheduler"


def test_the_second_host_takes_its_devices_from_the_table(planned, tmp_path):
    table = write(tmp_path, content(2))
    assert _ids(planned("run_multinode.sh", table, "[8,16]", 16)) == [(str(8 + d), str(d), "16") for d in range(8)]
    assert _ids(planned("run_singlenode.sh", table, "[0,8]", 16)) == [(str(d), str(d), "16") for d in range(8)]


def test_the_second_half_of_a_host_runs_its_own_job(planned, tmp_path):
    table = content(1, devices=4)
    for device in table["server_list"][0]["device"]:
        device["device_id"] = str(int(device["device_id"]) + 4)
    path = write(tmp_path, table)
    assert _ids(planned("run_singlenode.sh", path, "[4,8]", 4)) == [(str(r), str(4 + r), "4") for r in range(4)]
    with pytest.raises(ConfigError, match=r"\[4,8\]"):
        planned("run_singlenode.sh", path, "[0,4]", 4)


def test_the_documents_second_node_is_explained(planned, tmp_path):
    with pytest.raises(ConfigError) as caught:
        planned("run_singlenode.sh", write(tmp_path, content(2)), "[8,16]", 16)
    assert "run_multinode.sh" in str(caught.value) and "[8,16] 16" in str(caught.value)


@pytest.mark.parametrize(
    ("launcher", "args", "says"),
    [
        ("run_singlenode.sh", ("[0,8]", 4), "RANK_SIZE=8"),
        ("run_multinode.sh", ("[8,24]", 16), r"\[0,16\] on the last node"),
        ("run_multinode.sh", ("[4,12]", 16), "2 servers"),
        ("run_singlenode.sh", ("0-8", 8), "range of devices"),
        ("run_singlenode.sh", ("[0,8]", "eight"), "RANK_SIZE=eight"),
        ("run_singlenode.sh", ("[0,8]", 8), "RANK_SIZE=16"),
    ],
)
def test_ranges_that_do_not_fit_name_the_ones_that_do(planned, tmp_path, launcher, args, says):
    with pytest.raises(ConfigError, match=says):
        planned(launcher, write(tmp_path, content(2)), *args)


def test_usage_is_shown_for_a_wrong_number_of_arguments(script):
    done = script("research/run_singlenode.sh", "python show.py", "table")
    assert done.returncode == 2 and '"COMMAND" RANK_TABLE_FILE [START,END] RANK_SIZE' in done.stderr
    assert script("scripts/run_multinode.sh", "--help").returncode == 0


def test_ranks_of_other_hosts_need_an_address_to_meet_at(script):
    done = script("scripts/run_multinode.sh", "python show.py", "none", "[0,2]", 4)
    assert done.returncode == 2 and "MASTER_ADDR=<address of the host of rank 0>" in done.stderr


def test_an_npu_that_is_not_there_is_told(script):
    done = script("scripts/run_singlenode.sh", "python show.py", "none", "[0,2]", 2, DEVICE="npu")
    assert done.returncode == 2 and "DEVICE=cpu" in done.stderr
