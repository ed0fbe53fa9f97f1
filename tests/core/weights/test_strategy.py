"""Strategy files against MindSpore itself: its protocol buffer classes, its merge and its checkpoint transform."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from research.core.errors import WeightsError
from research.core.weights.strategy import (
    MERGED_FILE,
    Layout,
    Strategy,
    encode_merged,
    encode_stage,
    read_strategy,
    strategy_files,
)

WIDE = {
    "embed": Layout((2, 4), (-1, -1)),
    "wq": Layout((2, 4), (0, -1)),
    "wo": Layout((2, 4), (-1, 0)),
    "bias": Layout((2, 4), (0,)),
    "wk": Layout((2, 2, 2), (1, -1)),  # two kv heads over four cards: each on two
    "experts": Layout((2, 4), (-1, 0, -1)),
}
SHAPES = {"embed": (6, 16), "wq": (16, 8), "wo": (8, 16), "bias": (16,), "wk": (8, 8), "experts": (3, 8, 4)}


@pytest.fixture(scope="module")
def mindspore():
    os.environ.setdefault("GLOG_v", "3")
    return pytest.importorskip("mindspore", reason="MindSpore is not installed (requirements/mindspore.txt)")


def tensors(names) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {name: rng.standard_normal(SHAPES[name]).astype(np.float32) for name in names}


def write(folder: Path, strategy: Strategy) -> Path:
    folder.mkdir(parents=True)
    for name, content in strategy_files(strategy).items():
        (folder / name).write_bytes(content)
    return folder


def transform(mindspore, root: Path, full: dict[str, np.ndarray], strategy: Strategy) -> list[dict[str, np.ndarray]]:
    """What MindSpore makes of a whole checkpoint for every rank of ``strategy``."""
    (root / "src" / "rank_0").mkdir(parents=True)
    values = [{"name": name, "data": mindspore.Tensor(value)} for name, value in full.items()]
    mindspore.save_checkpoint(values, str(root / "src" / "rank_0" / "a.ckpt"))
    merged = write(root / "strategy", strategy) / MERGED_FILE
    mindspore.transform_checkpoints(str(root / "src"), str(root / "dst"), "c_", None, str(merged))
    out = []
    for rank in range(strategy.ranks):
        got = mindspore.load_checkpoint(str(root / "dst" / f"rank_{rank}" / f"c_{rank}.ckpt"))
        out.append({name: value.asnumpy() for name, value in got.items()})
    return out


def cut(value: np.ndarray, layout: Layout, device: int) -> np.ndarray:
    return value[tuple(slice(*edge) for edge in layout.box(device, value.shape))]


def assert_same_cuts(mindspore, root: Path, strategy: Strategy) -> None:
    full = tensors({name for stage in strategy.stages for name in stage})
    for rank, got in enumerate(transform(mindspore, root, full, strategy)):
        layouts = strategy.layouts(rank)
        assert got.keys() == layouts.keys()
        for name, layout in layouts.items():
            np.testing.assert_array_equal(got[name], cut(full[name], layout, strategy.device(rank)), err_msg=name)


def test_mindspore_cuts_a_checkpoint_as_our_layouts_say(mindspore, tmp_path):
    assert_same_cuts(mindspore, tmp_path, Strategy((WIDE,)))


def test_mindspore_follows_our_stages_and_a_parameter_in_two_of_them(mindspore, tmp_path):
    first = {name: Layout((1, 2), WIDE[name].tensor_map) for name in ("embed", "wq")}
    last = {name: Layout((1, 2), WIDE[name].tensor_map) for name in ("embed", "wo", "bias")}
    assert_same_cuts(mindspore, tmp_path, Strategy((first, last)))


@pytest.mark.parametrize(
    ("devices", "tensor_map", "step", "size"),
    [
        ((4, 2), (0, -1), 2, 4),
        ((4, 2), (0, -1), 2, 2),
        ((4, 2), (0, -1), 2, -1),
        ((4, 2), (-1, -1), 1, 8),
        ((4, 1), (-1, -1), 1, 4),
        ((2, 2, 2), (1, -1), 1, 2),
        ((2, 2, 2), (1, -1), 1, 4),
    ],
)
def test_mindspore_cuts_for_the_parallel_optimizer_as_we_do(mindspore, tmp_path, devices, tensor_map, step, size):
    assert_same_cuts(mindspore, tmp_path, Strategy(({"wq": Layout(devices, tensor_map, step, size)},)))


def test_our_bytes_are_the_message_that_mindspores_classes_write(mindspore):
    from mindspore.train import node_strategy_pb2

    message = node_strategy_pb2.ParallelStrategyMap()
    message.ParseFromString(encode_stage(WIDE, stage=1))
    assert message.IsInitialized()
    assert {item.parallel_strategys.stage for item in message.parallel_strategy_item} == {1}
    found = {}
    for item in message.parallel_layout_item:
        layout = item.parallel_layouts
        maps = tuple(layout.tensor_map[0].dim)
        found[item.param_name] = Layout(
            tuple(layout.dev_matrix[0].dim), maps, layout.opt_weight_shard_step, layout.opt_weight_shard_size
        )
    assert found == WIDE


def test_merging_by_mindspore_and_by_us_reads_back_alike(mindspore, tmp_path):
    strategy = Strategy(({"wq": WIDE["wq"]}, {"wo": WIDE["wo"], "bias": WIDE["bias"]}))
    ranks = tmp_path / "ranks"
    write(ranks, strategy)
    (ranks / MERGED_FILE).unlink()
    mindspore.merge_pipeline_strategys(str(ranks), str(tmp_path / "merged.ckpt"))
    (tmp_path / "ours.ckpt").write_bytes(encode_merged(strategy))
    assert read_strategy(tmp_path / "merged.ckpt") == strategy
    assert read_strategy(tmp_path / "ours.ckpt") == strategy
    assert read_strategy(ranks) == strategy


def test_mindspore_finds_the_ranks_to_read_in_our_files(mindspore, tmp_path):
    source = Strategy(({"wq": Layout((1, 4), (0, -1))},))
    target = Strategy(({"wq": Layout((1, 2), (0, -1))},))
    files = [str(write(tmp_path / name, s) / MERGED_FILE) for name, s in (("a", source), ("b", target))]
    wanted = set(mindspore.rank_list_for_transform(1, *files))
    assert {2, 3} <= wanted <= {0, 1, 2, 3}  # it may ask for more than it needs


# --- reading, without MindSpore -----------------------------------------------------------------------------------


def test_documents_file_names_are_read(tmp_path):
    strategy = Strategy(({"wq": WIDE["wq"]},))
    files = strategy_files(strategy, document_names=True)
    assert "ckpt_strategy_rank_3_rank_3.ckpt" in files
    for name, content in files.items():
        if name != MERGED_FILE:
            (tmp_path / name).write_bytes(content)
    assert read_strategy(tmp_path) == strategy


def test_json_strategies_are_read(tmp_path):
    file = tmp_path / "ckpt_strategy_rank_0.json"
    file.write_text(
        '{"current_stage": 1, "parallel_strategy_item": {"op": {"stage": 0, "parallel_strategy": [[2, 1]]}},'
        ' "parallel_layout_item": {"wq": {"dev_matrix": [1, 2], "tensor_map": [0, -1], "tensor_shape": [4, 4],'
        ' "field": 0, "opt_weight_shard_step": 0, "opt_weight_shard_size": 0}}}'
    )
    assert read_strategy(file) == Strategy(({"wq": Layout((1, 2), (0, -1))},))


def test_a_missing_stage_is_named(tmp_path):
    (tmp_path / "ckpt_strategy_rank_2.ckpt").write_bytes(encode_stage({"wq": Layout((1, 2), (0, -1))}, stage=1))
    with pytest.raises(WeightsError, match="stage 0 of 2 is missing"):
        read_strategy(tmp_path)


def test_a_file_that_contradicts_its_stage_is_named(tmp_path):
    (tmp_path / "ckpt_strategy_rank_0.ckpt").write_bytes(encode_stage({"wq": Layout((1, 2), (0, -1))}, stage=0))
    (tmp_path / "ckpt_strategy_rank_1.ckpt").write_bytes(encode_stage({"wq": Layout((1, 2), (-1, 0))}, stage=0))
    with pytest.raises(WeightsError, match=r"rank_1.*contradicts"):
        read_strategy(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02", b"PK\x03\x04 not a strategy at all", b"\x1a\xff"])
def test_other_files_are_refused(tmp_path, content):
    file = tmp_path / "ckpt_strategy_rank_0.ckpt"
    file.write_bytes(content)
    with pytest.raises(WeightsError):
        read_strategy(file)


def test_every_prefix_of_a_strategy_file_is_refused_or_smaller(tmp_path):
    """A truncated file never raises anything but our error, and never invents a parameter."""
    content = encode_stage(WIDE, stage=0)
    file = tmp_path / "ckpt_strategy_rank_0.ckpt"
    for length in range(len(content)):
        file.write_bytes(content[:length])
        try:
            found = read_strategy(file).stages[0]
        except WeightsError:
            continue
        assert all(WIDE[name] == layout for name, layout in found.items())


def test_uneven_shapes_are_refused():
    with pytest.raises(WeightsError, match="cannot be cut into 4"):
        Layout((1, 4), (0, -1)).box(0, (6, 4))
    with pytest.raises(WeightsError, match="2 axes"):
        Layout((1, 4), (0, -1)).box(0, (8,))
