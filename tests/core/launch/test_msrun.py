"""MindSpore's workers under the launchers: they meet, compute together, and end together.

Every launch imports MindSpore three times, so there are few of them and each checks several things.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from research.core.launch.host import free_port
from tests.core.launch.test_processes import left_over

pytest.importorskip("mindspore", reason="needs MindSpore: requirements/mindspore.txt")
pytestmark = pytest.mark.slow

# Sums its rank + 1 over all ranks, then does what its first argument says.
RANK = """
import os, sys, time
import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.communication import get_group_size, get_rank, init
ms.set_context(mode=ms.GRAPH_MODE)
ms.set_device("CPU")
init()
rank, size = get_rank(), get_group_size()

class Sum(nn.Cell):
    def __init__(self):
        super().__init__()
        self.all_reduce = ops.AllReduce()
    def construct(self, x):
        return self.all_reduce(x)

total = float(Sum()(Tensor([rank + 1.0]))[0])
print(f"rank {rank} of {size}: sum {total:g}", os.environ["RANK_ID"], os.environ["DEVICE_ID"], os.environ["RANK_SIZE"], sys.argv[1:])
if sys.argv[1:] == ["fail"] and rank == 1:
    raise ValueError("the own error of rank 1")
if sys.argv[1:] == ["wait"] or sys.argv[1:] == ["fail"]:
    open(f"ready_{rank}", "w").close()
    while True:
        Sum()(Tensor([1.0]))
        time.sleep(0.05)
"""

LAUNCH = """
import sys
from research.core.config.compose import compose
from research.core.launch.msrun import launch, needs_launch
cfg = compose([])
cfg.backend, cfg.parallel.cards, cfg.device.kind = "mindspore", 2, "cpu"
assert needs_launch(cfg)
sys.exit(launch(cfg, sys.argv[1:]))
"""


@pytest.fixture
def start(repo, tmp_path):
    """Start a command in a folder that has job.py; every process of it is ended afterwards."""
    (tmp_path / "job.py").write_text(RANK)
    started = []

    def run(*command) -> subprocess.Popen:
        env = {
            **os.environ,
            "PY": sys.executable,
            "DEVICE": "cpu",
            "PYTHONPATH": str(repo),
            "GROUP_MARK": str(tmp_path),
        }
        env.pop("MASTER_ADDR", None)
        command = [str(word) for word in command]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=env, text=True, **streams))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def test_two_workers_of_run_singlenode_compute_together(start, repo, tmp_path):
    done = start("bash", repo / "scripts/run_singlenode.sh", "python job.py 'a b'", "RANK_TABLE_FILE", "[0,2]", "2")
    out, err = done.communicate(timeout=180)
    assert done.returncode == 0, err
    assert out == "rank 0 of 2: sum 3 0 0 2 ['a b']\n"
    assert "rank 1 of 2: sum 3 1 1 2" in (tmp_path / "output/log/rank_1/mindformer.log").read_text()
    assert "no rank table is needed" in err


def test_msrun_launcher_shows_the_failed_workers_own_error_within_seconds(start, repo, tmp_path):
    done = start("bash", repo / "scripts/msrun_launcher.sh", "job.py fail", "2", free_port(first=21000))
    wait_for_failure = tmp_path / "output/msrun_log/worker_1.log"
    deadline = time.monotonic() + 150
    while "own error" not in (wait_for_failure.read_text() if wait_for_failure.exists() else ""):
        assert time.monotonic() < deadline and (done.poll() is None or done.returncode == 1)
        time.sleep(0.1)
    failed = time.monotonic()
    _, err = done.communicate(timeout=60)
    assert time.monotonic() - failed < 10, "msrun alone takes half a minute"
    assert done.returncode == 1 and "rank 1 ended with status 1" in err
    assert "ValueError: the own error of rank 1" in err and "output/msrun_log/worker_1.log" in err
    assert (tmp_path / "output/msrun_log/msrun.log").read_text().count("Start worker process") == 2, (
        "msrun started them"
    )
    assert left_over(tmp_path) == []


def test_stopping_a_task_on_two_cards_leaves_no_process(start, tmp_path):
    done = start(sys.executable, "-c", LAUNCH, "job.py", "wait")
    for rank in range(2):
        _wait_long(tmp_path / f"ready_{rank}", done)
    done.send_signal(signal.SIGTERM)
    out, err = done.communicate(timeout=90)
    assert done.returncode == 128 + signal.SIGTERM, err
    assert out.startswith("rank 0 of 2: sum 3") and re.match(r"msrun --worker_num=2 .* job\.py wait\n", err)
    assert left_over(tmp_path) == []


def test_a_worker_that_never_comes_is_told_within_the_time_limit(start, repo):
    from research.core.launch.host import own_address

    address = own_address()
    if address is None:
        pytest.skip("this machine has a loopback address only")
    port = free_port(address, 22000)
    done = start("bash", repo / "scripts/msrun_launcher.sh", "job.py", 2, 1, address, port, 0, "logs", "False", 5)
    _, err = done.communicate(timeout=180)
    assert done.returncode == 1
    assert "all 2 nodes must be started within 5 s" in err and "NODE_RANK=0" in err


def _wait_long(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 150
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
