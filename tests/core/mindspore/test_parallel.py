"""Several workers under this repository's launcher train as one does, with the optimiser's state whole or in parts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from research.core.mindspore.optimizer import make_buckets
from research.core.run.metrics import read_metrics
from tests.core.mindspore.training_case import decoder, train
from tests.core.torch.training_case import config, write_data

SETTINGS = {"steps": 4, "lr": 1e-4, "eval_every": 2}

# Every worker runs this; the last line says why one of them ends early.
WORKER = """
import sys
from pathlib import Path
from research.core.mindspore import runtime
runtime.require_mindspore()
import numpy as np
from research.core.mindspore.parallel import World
from tests.core.mindspore.training_case import train
from tests.core.torch.training_case import config
folder, data, shard, name, rows, failing = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:7]
for steps, resume in ((2, False), (4, True)):
    cfg = config(**{settings}, micro_batch=int(rows))
    cfg.train.steps, cfg.train.resume, cfg.train.schedule, cfg.train.warmup_steps = steps, resume, "constant", 0
    cfg.device.kind, cfg.device.threads, cfg.parallel.shard = "cpu", 1, shard
    world = World.join(cfg) if steps == 2 else world
    world.folder = folder
    if failing == str(world.rank):
        raise SystemExit("this worker fails on purpose")
    _, weights = train(cfg, data, folder / name, world=world)
if world.main:
    np.savez(folder / f"{name}.npz", **weights)
world.leave()
"""

LAUNCHER = """
import sys
from pathlib import Path
from research.core.launch.host import free_port
from research.core.launch.msrun import Cluster, run_members, workers
count, folder = int(sys.argv[1]), Path(sys.argv[2])
cluster = Cluster(count, count, port=free_port(), timeout_s=200)
sys.exit(run_members(workers(cluster, [sys.executable, *sys.argv[3:]], folder / "logs", show_all=True)))
"""


def _launch(repo: Path, folder: Path, count: int, *words: str) -> subprocess.CompletedProcess:
    (folder / "worker.py").write_text(
        WORKER.replace("{settings}", repr({k: SETTINGS[k] for k in ("lr", "eval_every")}))
    )
    command = [sys.executable, "-c", LAUNCHER, str(count), str(folder), str(folder / "worker.py"), str(folder), *words]
    return subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=540)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "shard"), [(2, "optimizer"), (4, "none")])
def test_workers_train_as_one_and_go_on_from_their_checkpoint(tmp_path, repo, count, shard):
    data = write_data(tmp_path / "d", rows=30)
    cfg = config(**SETTINGS, micro_batch=4, schedule="constant", warmup_steps=0)
    _, expected = train(cfg, data, tmp_path / "one")
    done = _launch(repo, tmp_path, count, str(data), shard, "many", str(4 // count), "none")
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("train", "eval"):
        found, wanted = ({r["step"]: r["loss"] for r in read_metrics(tmp_path / x, kind)} for x in ("many", "one"))
        assert found == pytest.approx(wanted, abs=1e-5)
    weights = np.load(tmp_path / "many.npz")
    for name, value in expected.items():  # Adam magnifies rounding near zero, here to a tenth of lr * steps
        assert np.abs(weights[name] - value).max() < 1e-5 + 0.1 * SETTINGS["lr"] * SETTINGS["steps"], name
    # one worker goes on where many stopped
    cfg = config(**SETTINGS | {"steps": 5}, micro_batch=4, schedule="constant", warmup_steps=0, resume=True)
    summary, _ = train(cfg, data, tmp_path / "many")
    assert summary.steps == 5


@pytest.mark.slow
def test_worker_that_fails_ends_all_with_its_own_error(tmp_path, repo):
    data = write_data(tmp_path / "d", rows=30)
    done = _launch(repo, tmp_path, 2, str(data), "none", "many", "2", "1")
    assert done.returncode == 1 and "this worker fails on purpose" in done.stdout + done.stderr


def test_buckets_hold_every_parameter_once_and_divide_among_the_workers():
    parameters = list(decoder().get_parameters())
    for shards, limit in ((1, 1 << 30), (3, 4096)):
        buckets = make_buckets(parameters, 0.1, shards, limit)
        assert sorted(name for b in buckets for name in b.names) == sorted(p.name for p in parameters)
        assert all(b.length % shards == 0 and 0 <= b.filling < shards for b in buckets)
        assert all((b.decay > 0) == (len(shape) >= 2) for b in buckets for shape in b.shapes)
    assert len(buckets) > 4  # the small limit cuts
