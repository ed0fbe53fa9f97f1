"""Workers under this repository's launcher train and answer as one does: data and tensor parallel, the optimiser's state whole
or in parts. Starting workers is dear, so each cluster of them does all its cases before the tests look at them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from research.core.config.backends import check_sharing
from research.core.config.compose import compose
from research.core.errors import ConfigError
from research.core.mindspore.collectives import Group
from research.core.mindspore.mindir import read_meta
from research.core.mindspore.optimizer import make_buckets
from research.core.mindspore.parallel import World
from research.core.mindspore.tensor_plan import TensorPlan
from research.core.run.metrics import read_metrics
from research.core.spec import MoeSpec
from research.core.weights.grid import Grid, shard_model
from research.core.weights.keys import parameter_shapes
from research.tasks import predict
from tests import small_model
from tests.core.mindspore.parallel_case import DENSE, config, train
from tests.core.mindspore.training_case import decoder
from tests.core.torch.training_case import write_data

LAUNCHER = """
import sys
from pathlib import Path
from research.core.launch.host import free_port
from research.core.launch.msrun import Cluster, run_members, workers
count, folder = int(sys.argv[1]), Path(sys.argv[2])
cluster = Cluster(count, count, port=free_port(), timeout_s=400)
program = [sys.executable, "-m", "tests.core.mindspore.parallel_case", str(folder)]
sys.exit(run_members(workers(cluster, program, folder / "logs", show_all=True)))
"""


def _launch(repo: Path, folder: Path, count: int, cases: list[dict]) -> subprocess.CompletedProcess:
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-c", LAUNCHER, str(count), str(folder)]
    # With a thread each: several per worker would wait for each other on few cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, timeout=540)


def _losses(run: Path, kind: str) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(run, kind)}


def _check_same(folder: Path, run: str, name: str, expected: dict[str, np.ndarray]) -> None:
    """The run's curves and the case's weights are those of the single worker in ``one``."""
    for kind in ("train", "eval"):
        assert _losses(folder / run, kind) == pytest.approx(_losses(folder / "one", kind), abs=1e-5), kind
    norms = [{r["step"]: r["grad_norm"] for r in read_metrics(folder / x, "train")} for x in (run, "one")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # what is cut counts once, so does what is on all
    weights = np.load(folder / f"{name}.npz")
    assert set(weights.files) == set(expected)
    for parameter, value in expected.items():
        assert weights[parameter].shape == value.shape
        # Adam magnifies the rounding of gradients near zero: here up to a tenth of lr * steps.
        assert np.abs(weights[parameter] - value).max() < 1e-5 + 0.1 * 1e-4 * 4, parameter


# --- four workers ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_workers_train_as_one_on_a_grid_and_go_on_on_another(tmp_path, repo):
    """2 x 2 with the optimiser's state in parts, then from its checkpoint all four share the layers: kv heads on two workers
    each, a vocabulary that is filled up. A checkpoint of another grid is refused by name where that is asked for."""
    data = str(write_data(tmp_path / "d", rows=30))
    cases = [
        {"name": "grid", "run": "many", "tensor": 2, "shard": "optimizer", "rows": 2, "steps": 2, "data": data},
        {"name": "strict", "run": "many", "tensor": 4, "steps": 4, "resume": True, "strict": True, "data": data},
        {"name": "share", "run": "many", "tensor": 4, "steps": 4, "resume": True, "data": data},
    ]
    done = _launch(repo, tmp_path, 4, cases)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    expected = train(config(steps=4), Path(data), tmp_path / "one", World())
    _check_same(tmp_path, "many", "share", expected)
    for rank in range(4):
        refused = (tmp_path / f"strict-{rank}.error").read_text()
        assert "the grid dp2-tp2-pp1, this run's is dp1-tp4-pp1" in refused and "step-00000002" in refused


# --- two workers ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_train_experts_and_adapters_answer_and_run_their_graphs_as_one(tmp_path, repo, capsys):
    """A mixture of experts and an adapter with the layers shared; 128 tokens of the decoder on two ranks, and of the graphs of
    two ranks, exported from whole weights and from parts of four."""
    from research.tasks.cli import main

    data, parts = str(write_data(tmp_path / "d", rows=30)), tmp_path / "parts"
    weights = small_model.save(tmp_path / "weights", "qwen1_5_tiny", 1)
    assert main(["task=split", f"weights={weights}", f"output={parts}", "reshard.grid=tp4"]) == 0
    own = ["model=qwen1_5_tiny", "model.hf.num_hidden_layers=1", "backend=mindspore", "device=cpu", "parallel.cards=2"]
    ask = ["prompt=Hello", "generate.raw=true", "generate.max_new_tokens=128", "generate.temperature=0"]
    make = ["task=export", *own, "mindir.seq_length=160", "generate.raw=true"]
    cases = [
        {"name": "experts", "kind": "moe", "tensor": 2, "data": data},
        {"name": "adapter", "lora": True, "tensor": 2, "data": data},
        {"name": "predict", "words": ["task=predict", *own, f"weights={weights}", *ask]},
        {"name": "export", "words": [*make, f"weights={weights}", f"output={tmp_path / 'graphs'}"]},
        {"name": "lite", "words": ["task=lite", *own, f"weights={tmp_path / 'graphs'}", *ask]},
        {
            "name": "again",
            "words": [*make, f"weights={parts}", f"tokenizer={weights}", f"output={tmp_path / 'parted'}"],
        },
        {"name": "parted", "words": ["task=lite", *own, f"weights={tmp_path / 'parted'}", *ask]},
    ]
    done = _launch(repo, tmp_path, 2, cases)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]

    expected = train(config(), Path(data), tmp_path / "one", World(), "moe")
    _check_same(tmp_path, "experts", "experts", expected)
    (tmp_path / "one").rename(tmp_path / "one-moe")
    expected = train(config(), Path(data), tmp_path / "one", World(), lora=True)
    _check_same(tmp_path, "adapter", "adapter", expected)
    capsys.readouterr()
    assert predict.run(compose(["task=predict", *own[:2], "device=cpu", f"weights={weights}", *ask])) == 0
    answer = capsys.readouterr().out
    assert len(set(answer)) > 5, "the model repeats itself: nothing is proved"
    for name in ("predict-0", "predict-1", "lite-0", "lite-1", "parted-0", "parted-1"):
        assert (tmp_path / f"{name}.out").read_text(encoding="utf-8") == answer, name
    for folder in ("graphs", "parted"):
        meta = read_meta(tmp_path / folder)  # checks that the graphs of both ranks are there
        assert meta.ranks == 2


@pytest.mark.slow
def test_worker_that_fails_ends_all_with_its_own_error(tmp_path, repo):
    data = str(write_data(tmp_path / "d", rows=30))
    done = _launch(repo, tmp_path, 2, [{"name": "many", "data": data, "rows": 2, "fails": 1}])
    assert done.returncode == 1 and "this worker fails on purpose" in done.stdout + done.stderr


# --- one process ----------------------------------------------------------------------------------------------------


def test_workers_parts_make_up_every_parameter_and_its_samples():
    moe = replace(DENSE, layers=2, model_type="qwen2_moe", moe=MoeSpec(4, 2, 16, 24, dense_layers=(1,)), tied=False)
    for count in (2, 4):
        plans = [TensorPlan(shard_model(moe, Grid(tensor=count)), Group("", count, i, True)) for i in range(count)]
        local = parameter_shapes(plans[0].local)
        for number, (name, shape) in enumerate(parameter_shapes(moe).items()):
            whole = np.random.default_rng(number).random(shape, np.float32)
            parts = [plan.take(name, whole) for plan in plans]
            assert all(part.shape == local[name] for part in parts), name
            assert np.array_equal(plans[0].join(name, parts), whole), name
            assert plans[0].whole_shape(name, local[name]) == shape
            samples = sum(plan.sample(name, part, shape, 3) for plan, part in zip(plans, parts))
            assert np.array_equal(samples, whole.reshape(-1)[::3]), name


def test_cards_that_cannot_share_a_models_heads_are_refused_before_anything_starts():
    words = ["backend=mindspore", "model=qwen2_5_tiny"]
    with pytest.raises(
        ConfigError, match=r"parallel.tensor=3[\s\S]*heads do not divide by 3[\s\S]*widths that work: 2"
    ):
        check_sharing(compose([*words, "task=finetune", "parallel.cards=3", "parallel.tensor=3"]))
    with pytest.raises(ConfigError, match=r"CARDS=3 with qwen2_5_tiny"):
        check_sharing(compose([*words, "task=predict", "parallel.cards=3", "prompt=x"]))
    check_sharing(compose([*words, "task=finetune", "parallel.cards=3"]))  # every worker has whole layers


def test_buckets_hold_every_parameter_once_and_divide_among_the_workers():
    parameters = list(decoder().get_parameters())
    for shards, limit in ((1, 1 << 30), (3, 4096)):
        buckets = make_buckets(parameters, 0.1, shards, limit)
        assert sorted(name for b in buckets for name in b.names) == sorted(p.name for p in parameters)
        assert all(b.length % shards == 0 and 0 <= b.filling < shards for b in buckets)
        assert all((b.decay > 0) == (len(shape) >= 2) for b in buckets for shape in b.shapes)
    assert len(buckets) > 4  # the small limit cuts
