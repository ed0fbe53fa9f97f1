"""auto_trans_ckpt: any checkpoint on any run's grid, made once, by whoever comes first, and never at another's cost."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from research.core.errors import WeightsError
from research.core.weights.auto_transform import MARK, auto_transform
from research.core.weights.formats import mindspore
from research.core.weights.opened import OpenOptions
from research.core.weights.strategy import MERGED_FILE, Layout, Strategy, read_strategy, strategy_files
from research.core.weights.tensors import Files, read_tensor
from tests.core.weights.grids import SPECS, assert_same_tensors, go, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "gqa", SPECS["gqa"])


def ranks_of(folder: Path) -> list[dict[str, np.ndarray]]:
    out = []
    for rank in range(len(list(folder.glob("rank_*")))):
        (file,) = (folder / f"rank_{rank}").glob("*.ckpt")
        with Files() as files:
            out.append({name: read_tensor(files, entry) for name, entry in mindspore.read_entries(file)[0].items()})
    return out


def assert_same_ranks(a: Path, b: Path) -> None:
    first, second = ranks_of(a), ranks_of(b)
    assert len(first) == len(second)
    for x, y in zip(first, second):
        assert x.keys() == y.keys()
        assert all(np.array_equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("source", ["hf", "file", "rank_0", "tp4-pp3", "parts", "dcp"])
def test_any_checkpoint_loads_on_the_grid_of_the_run(model, tmp_path, source):
    target = go(model, tmp_path / "direct", "ranks", "dp2-tp2")
    opening = None
    if source == "hf":
        path = model
    elif source in ("parts", "dcp"):
        path = go(model, tmp_path / "ckpt", source, "tp4")
    else:
        path = go(model, tmp_path / "ckpt", "ranks", "tp1" if source != "tp4-pp3" else source)
        path = path / "rank_0" / "checkpoint_0.ckpt" if source == "file" else path
    made = auto_transform(path, target / "strategy", output=tmp_path / "output", opening=opening)
    name = "checkpoint_0" if source == "file" else "gqa" if source == "hf" else "ckpt"
    assert made.made and made.folder == tmp_path / "output" / "transformed_checkpoint" / name
    assert made.file(3) == made.folder / "rank_3" / "checkpoint_3.ckpt"
    assert (made.folder / "transform_succeed_rank_0.txt").is_file()
    assert_same_ranks(made.folder, target)


def test_a_second_call_uses_the_first_ones_result_and_a_changed_checkpoint_does_not(model, tmp_path):
    source = go(model, tmp_path / "ckpt", "ranks", "tp4")
    target = go(model, tmp_path / "target", "ranks", "tp2")
    first = auto_transform(source, target / "strategy", output=tmp_path / "out")
    file = first.file(0)
    before = file.stat().st_ino
    assert not auto_transform(source, target / "strategy", output=tmp_path / "out", rank=1).made
    assert file.stat().st_ino == before
    other = write_model(tmp_path / "other", SPECS["gqa"], seed=2)
    import shutil

    shutil.rmtree(source)
    go(other, source, "ranks", "tp4")
    again = auto_transform(source, target / "strategy", output=tmp_path / "out", rank=1)
    assert again.made and file.stat().st_ino != before
    assert (again.folder / "transform_succeed_rank_1.txt").is_file()
    assert not (again.folder / "transform_succeed_rank_0.txt").exists()
    assert_same_tensors(
        other,
        go(
            again.folder,
            tmp_path / "back",
            "hf",
            opening=OpenOptions(strategy=str(target / "strategy"), config=str(other)),
        ),
    )


def test_a_checkpoint_on_the_right_grid_is_loaded_as_it_is(model, tmp_path):
    source = go(model, tmp_path / "ckpt", "ranks", "tp2-pp3")
    target = go(model, tmp_path / "target", "ranks", "tp2-pp3")
    found = auto_transform(source, target / "strategy" / MERGED_FILE, output=tmp_path / "out")
    assert not found.made and found.folder == source
    assert not (tmp_path / "out").exists()


def _one_rank(rank: int, source: str, strategy: str, output: str, results) -> None:
    found = auto_transform(source, strategy, output=output, rank=rank)
    results.put((rank, found.made, sorted(ranks_of(found.folder)[rank])))


def test_ranks_that_start_at_once_make_it_once(model, tmp_path):
    source = go(model, tmp_path / "ckpt", "ranks", "tp4")
    target = go(model, tmp_path / "target", "ranks", "tp2")
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    words = (str(source), str(target / "strategy"), str(tmp_path / "out"), results)
    ranks = [context.Process(target=_one_rank, args=(rank, *words)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = [results.get() for _ in ranks]
    for process in ranks:
        process.join()
    assert sorted(made for _, made, _ in found) == [False, True]
    markers = list((tmp_path / "out" / "transformed_checkpoint" / "ckpt").glob("transform_*_rank_*.txt"))
    assert len(markers) == 1


def test_what_others_made_is_never_touched(model, tmp_path):
    target = go(model, tmp_path / "target", "ranks", "tp2")
    place = tmp_path / "out" / "transformed_checkpoint"
    (place / "elsewhere").mkdir(parents=True)
    (place / "elsewhere" / "precious").write_text("x")
    (tmp_path / "out" / "strategy").mkdir()
    auto_transform(model, target / "strategy", output=tmp_path / "out")
    assert (place / "elsewhere" / "precious").is_file() and (tmp_path / "out" / "strategy").is_dir()
    (place / "gqa" / MARK).unlink()
    with pytest.raises(WeightsError, match="not written here"):
        auto_transform(model, target / "strategy", output=tmp_path / "out")
    assert (place / "gqa" / "rank_1" / "checkpoint_1.ckpt").is_file()


def test_transforming_a_transformed_checkpoint_again_leaves_it_in_place(model, tmp_path):
    """The documents' case B: load_checkpoint is a former output/transformed_checkpoint/<name>."""
    two, four = (go(model, tmp_path / grid, "ranks", grid) for grid in ("tp2", "tp4"))
    first = auto_transform(model, two / "strategy", output=tmp_path / "out")
    second = auto_transform(first.folder, four / "strategy", output=tmp_path / "out", source_strategy=two / "strategy")
    assert second.folder.name == "gqa_transformed"
    assert_same_ranks(first.folder, two)
    assert_same_ranks(second.folder, four)


def test_a_failure_is_marked_and_leaves_no_ranks(model, tmp_path):
    source = go(model, tmp_path / "ckpt", "ranks", "tp4")
    (tmp_path / "wrong").mkdir()
    for name, content in strategy_files(Strategy(({"some.other.weight": Layout((1, 2), (0, -1))},))).items():
        (tmp_path / "wrong" / name).write_bytes(content)
    for _ in range(2):  # the second rank meets the same end
        with pytest.raises(WeightsError, match="do not place"):
            auto_transform(source, tmp_path / "wrong", output=tmp_path / "out", rank=1)
    folder = tmp_path / "out" / "transformed_checkpoint" / "ckpt"
    assert [path.name for path in folder.iterdir()] == ["transform_failed_rank_1.txt"]
    assert "do not place" in (folder / "transform_failed_rank_1.txt").read_text()
    good = go(model, tmp_path / "good", "ranks", "tp2")
    assert auto_transform(source, good / "strategy", output=tmp_path / "out").made
    assert not (folder / "transform_failed_rank_1.txt").exists()


def write_ckpt(path: Path, tensors: dict[str, np.ndarray]) -> None:
    rows = [(name, {"f": "F32", "i": "I32"}[value.dtype.kind], value.shape) for name, value in tensors.items()]
    frame = mindspore.frame(rows)
    data = bytearray(frame.size)
    for offset, piece in frame.pieces:
        data[offset : offset + len(piece)] = piece
    for value, (slot,) in zip(tensors.values(), frame.slots):
        data[slot.offset : slot.offset + slot.bytes] = value.tobytes()
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(data))


def test_training_state_and_counters_go_along(tmp_path):
    """Moments are cut as the weights are; a counter without a layout is on every rank; what the run lacks is named."""
    rng = np.random.default_rng(0)
    full = {name: rng.standard_normal((8, 4)).astype(np.float32) for name in ("w", "adam_m.w", "adam_v.w")}
    two = Layout((1, 2), (0, -1))
    source = Strategy((dict.fromkeys(full, two),))
    for rank in range(2):
        own = {name: np.ascontiguousarray(value[4 * rank : 4 * rank + 4]) for name, value in full.items()}
        write_ckpt(tmp_path / "ckpt" / f"rank_{rank}" / "x.ckpt", {**own, "global_step": np.array([7], np.int32)})
    target = Strategy(({"w": Layout((1, 4), (-1, 0)), "adam_m.w": Layout((1, 4), (0, -1))},))
    for folder, strategy in (("ckpt/strategy", source), ("run", target)):
        (tmp_path / folder).mkdir()
        for name, content in strategy_files(strategy).items():
            (tmp_path / folder / name).write_bytes(content)
    lines: list[str] = []
    made = auto_transform(tmp_path / "ckpt", tmp_path / "run", output=tmp_path / "out", log=lines.append)
    for rank, found in enumerate(ranks_of(made.folder)):
        assert sorted(found) == ["adam_m.w", "global_step", "w"]
        np.testing.assert_array_equal(found["w"], full["w"][:, rank : rank + 1])
        np.testing.assert_array_equal(found["adam_m.w"], full["adam_m.w"][2 * rank : 2 * rank + 2])
        assert found["global_step"].tolist() == [7]
    assert any("left out" in line and "adam_v.w" in line for line in lines)


def test_mindspore_loads_what_was_transformed(model, tmp_path):
    os.environ.setdefault("GLOG_v", "3")
    ms = pytest.importorskip("mindspore", reason="MindSpore is not installed (requirements/mindspore.txt)")
    target = go(model, tmp_path / "target", "ranks", "tp2")
    made = auto_transform(model, target / "strategy", output=tmp_path / "out")
    found = ms.load_checkpoint(str(made.file(1)))
    assert found.keys() == read_strategy(target / "strategy").layouts(1).keys()
    assert json.loads((made.folder / MARK).read_text())["version"] == 1
