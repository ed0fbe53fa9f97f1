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
from research.core.mindspore.buckets import make_buckets
from research.core.mindspore.collectives import Group
from research.core.mindspore.decoder import Decoder
from research.core.mindspore.mindir import read_meta
from research.core.mindspore.parallel import World
from research.core.mindspore.plan import Plan
from research.core.run.metrics import read_metrics
from research.core.weights.grid import Grid, shard_model
from research.core.weights.keys import parameter_shapes
from research.tasks import predict
from tests import small_model
from tests.core.mindspore.parallel_case import DENSE, SPECS, config, train
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


def _curve(run: Path, kind: str, name: str = "loss") -> dict[int, float]:
    return {r["step"]: r[name] for r in read_metrics(run, kind) if name in r}


def _check_same(folder: Path, alone: str, name: str, expected: dict[str, np.ndarray], run: str | None = None) -> None:
    """The run's curves and the case's weights are those of the single worker."""
    one, many = folder / alone, folder / (run or name)
    for kind in ("train", "eval"):
        assert _curve(many, kind) == pytest.approx(_curve(one, kind), abs=1e-5), (name, kind)
    for number in ("grad_norm", "router_balance"):  # of gradients: what is cut counts once, so does what is on all
        assert _curve(many, "train", number) == pytest.approx(_curve(one, "train", number), rel=1e-4), (name, number)
    weights = np.load(folder / f"{name}.npz")
    assert set(weights.files) == set(expected)
    for parameter, value in expected.items():
        assert weights[parameter].shape == value.shape
        assert np.abs(weights[parameter] - value).max() < 1e-5, parameter


# --- four workers ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_workers_train_as_one_on_every_grid_from_its_neighbours_checkpoint(tmp_path, repo):
    """Two steps each on 4 rows: rows and columns, rows and stages, both with the optimiser's state in parts, columns and stages,
    and four workers that share all layers: kv heads on two of them each, a vocabulary that is filled up. Two stages have the
    embedding. Then four rows alone. A checkpoint of another grid is refused by name where that is asked for."""
    data = str(write_data(tmp_path / "d", rows=30))
    grids = [
        {"name": "dp2-tp2", "rows": 2, "tensor": 2, "shard": "optimizer", "checkpointing": "selective"},
        {"name": "dp2-pp2", "rows": 1, "accumulation": 2, "stages": [1, 1], "shard": "optimizer"},
        {"name": "tp2-pp2", "rows": 1, "accumulation": 4, "stages": [1, 1], "tensor": 2, "checkpointing": "full"},
        {"name": "tp4", "tensor": 4},
    ]
    last = len(grids) - 1
    cases = [
        grid | {"run": "many", "data": data, "steps": 2 * n + 2, "resume": n > 0, "evaluates": n == last}
        for n, grid in enumerate(grids)
    ]
    cases.insert(last, cases[last] | {"name": "strict", "strict": True})
    thin = {"kind": "thin", "evaluates": False}
    cases.append({"name": "dp4", "rows": 1, "shard": "optimizer", "data": data, **thin})
    done = _launch(repo, tmp_path, 4, cases)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    expected = train(config(steps=2 * len(grids)), Path(data), tmp_path / "one", World())
    _check_same(tmp_path, "one", "tp4", expected, run="many")
    expected = train(config(), Path(data), tmp_path / "alone", World(), **thin)
    _check_same(tmp_path, "alone", "dp4", expected)
    for rank in range(4):
        refused = (tmp_path / f"strict-{rank}.error").read_text()
        assert "the grid dp1-tp2-pp2, this run's is dp1-tp4-pp1" in refused and "step-00000006" in refused


# --- two workers ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_train_experts_and_adapters_as_one_and_end_together_when_one_fails(tmp_path, repo):
    """Over rows of data and columns; an adapter over columns, and one over stages with and without experts. A stage draws its
    dropout twice. At last a worker fails: its own error is shown, and the other does not wait for it."""
    data = str(write_data(tmp_path / "d", rows=30))
    two = {"rows": 2, "accumulation": 2, "data": data}
    cases = [
        {"name": "experts-dp", "kind": "moe", "rows": 2, "data": data, "evaluates": False},
        {"name": "experts-tp", "kind": "moe", "tensor": 2, "evaluates": False, **two},
        {"name": "adapter-tp", "kind": "thin", "lora": 0.0, "tensor": 2, "data": data, "evaluates": False},
        {"name": "adapter-pp", "kind": "mixed", "lora": 0.3, "stages": [1, 1], **two},
        {"name": "failing", "data": data, "rows": 2, "fails": 1},
    ]
    done = _launch(repo, tmp_path, 2, cases)
    assert done.returncode == 1 and "this worker fails on purpose" in done.stdout + done.stderr, done.stderr[-3000:]

    # The router's balance is that of each micro batch: two workers with one have what one worker has with two.
    settings = config(rows=2, accumulation=2)
    expected = train(settings, Path(data), tmp_path / "experts", World(), "moe", evaluates=False)
    for name in ("experts-dp", "experts-tp"):
        _check_same(tmp_path, "experts", name, expected)
    for name, cfg, kind, dropout in (("adapter-tp", config(), "thin", 0.0), ("adapter-pp", settings, "mixed", 0.3)):
        options = {"lora": dropout, "evaluates": kind == "mixed"}
        expected = train(cfg, Path(data), tmp_path / f"{name}-alone", World(), kind, **options)
        _check_same(tmp_path, f"{name}-alone", name, expected)


@pytest.mark.slow
def test_make_predict_export_and_lite_on_two_cards_answer_as_one(tmp_path, repo, capsys):
    """128 tokens of the decoder on two ranks, and of the graphs of two ranks, exported from parts of four with paged caches.
    Of both ranks' answers one is shown."""
    from research.tasks.cli import main

    weights, parts, graphs = (
        small_model.save(tmp_path / "weights", "qwen1_5_tiny", 1),
        tmp_path / "parts",
        tmp_path / "g",
    )
    assert main(["task=split", f"weights={weights}", f"output={parts}", "reshard.grid=tp4"]) == 0
    ask = ["generate.raw=true", "generate.max_new_tokens=128", "generate.temperature=0"]
    own = ["model=qwen1_5_tiny", "model.hf.num_hidden_layers=1"]
    given = {"MODEL": "qwen1_5_tiny", "CARDS": "2", "BACKEND": "mindspore", "DEVICE": "cpu", "OMP_NUM_THREADS": "1"}

    def make(task: str, *words: str, **variables: str | Path) -> str:
        """What the Makefile's target runs."""
        environment = os.environ | given | {"PY": sys.executable} | {k: str(v) for k, v in variables.items()}
        command = ["bash", "scripts/task.sh", task, own[1], "generate.raw=true", *words]
        done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    capsys.readouterr()
    assert predict.run(compose(["task=predict", *own, "device=cpu", f"weights={weights}", "prompt=Hello", *ask])) == 0
    answer = capsys.readouterr().out
    assert len(set(answer)) > 5, "the model repeats itself: nothing is proved"
    assert make("predict", *ask, WEIGHTS=weights, QWEN_PROMPT="Hello") == answer
    pages = ["mindir.seq_length=160", "mindir.paged=true", "mindir.block_size=16", "mindir.num_blocks=10"]
    make("export", *pages, WEIGHTS=parts, TOKENIZER=weights, OUTPUT=graphs)
    meta = read_meta(graphs)  # checks that the graphs of both ranks are there
    assert meta.ranks == 2 and meta.shapes.paged
    assert make("lite", *ask, WEIGHTS=graphs, QWEN_PROMPT="Hello") == answer


# --- one process ----------------------------------------------------------------------------------------------------


def test_workers_parts_make_up_every_parameter_and_its_samples():
    moe = SPECS["mixed"]
    for count in (2, 4):
        plans = [Plan(shard_model(moe, Grid(tensor=count)), Group("", count, i, True)) for i in range(count)]
        local = parameter_shapes(plans[0].local)
        for number, (name, shape) in enumerate(parameter_shapes(moe).items()):
            whole = np.random.default_rng(number).random(shape, np.float32)
            parts = [plan.take(name, whole) for plan in plans]
            assert all(part.shape == local[name] for part in parts), name
            assert np.array_equal(plans[0].join(name, parts), whole), name
            assert plans[0].whole_shape(name, local[name]) == shape
            samples = sum(plan.sample(name, part, shape, 3) for plan, part in zip(plans, parts))
            assert np.array_equal(samples, whole.reshape(-1)[::3]), name


def test_stages_hold_every_parameter_under_the_whole_models_name():
    for spec in (replace(DENSE, layers=4), replace(DENSE, layers=3, tied=False)):
        plans = [Plan(shard_model(spec, Grid(pipeline=3)), Group("", 1, 0, False), stage) for stage in range(3)]
        held = [{p.name: tuple(p.shape) for p in Decoder(spec, plan=plan).get_parameters()} for plan in plans]
        assert held[0] | held[1] | held[2] == parameter_shapes(spec)
        shared = held[0].keys() & held[2].keys()
        assert shared == ({"model.embed_tokens.weight"} if spec.tied else set())
        assert all(sum(plan.answers_for(name) for plan in plans) == 1 for name in parameter_shapes(spec))


def test_cards_that_cannot_share_a_models_heads_are_refused_before_anything_starts():
    words = ["backend=mindspore", "model=qwen2_5_tiny"]
    with pytest.raises(
        ConfigError, match=r"parallel.tensor=3[\s\S]*heads do not divide by 3[\s\S]*widths that work: 2"
    ):
        check_sharing(compose([*words, "task=finetune", "parallel.cards=3", "parallel.tensor=3"]))
    with pytest.raises(ConfigError, match=r"CARDS=3 with qwen2_5_tiny"):
        check_sharing(compose([*words, "task=predict", "parallel.cards=3", "prompt=x"]))
    check_sharing(compose([*words, "task=finetune", "parallel.cards=3"]))  # every worker has whole layers


def test_stages_that_the_layers_do_not_fill_are_refused_before_anything_starts():
    words = ["backend=mindspore", "model=qwen2_5_tiny", "task=finetune"]
    with pytest.raises(ConfigError, match=r"4 layers make no 8 stages[\s\S]*parallel.pipeline=4 or fewer"):
        check_sharing(compose([*words, "parallel.cards=8", "parallel.pipeline=8"]))
    two = [*words, "parallel.cards=4", "parallel.pipeline=2"]
    with pytest.raises(ConfigError, match=r"3\+2 layers in the stages, the model has 4[\s\S]*stage_layers=\[2,2\]"):
        check_sharing(compose([*two, "parallel.stage_layers=[3,2]"]))
    with pytest.raises(ConfigError, match=r"3 numbers of layers for 2 pipeline stages"):
        compose([*two, "parallel.stage_layers=[1,1,2]"])
    with pytest.raises(ConfigError, match="need a multiple of 2 cards, and there are 3"):
        compose([*words, "parallel.cards=3", "parallel.pipeline=2"])
    check_sharing(compose([*two, "parallel.stage_layers=[3,1]"]))


def test_buckets_hold_every_parameter_once_and_divide_among_the_workers():
    parameters = list(decoder().get_parameters())
    for shards, limit in ((1, 1 << 30), (3, 4096)):
        buckets = make_buckets(parameters, 0.1, shards, limit)
        assert sorted(name for b in buckets for name in b.names) == sorted(p.name for p in parameters)
        assert all(b.length % shards == 0 and 0 <= b.filling < shards for b in buckets)
        assert all((b.decay > 0) == (len(shape) >= 2) for b in buckets for shape in b.shapes)
    assert len(buckets) > 4  # the small limit cuts
