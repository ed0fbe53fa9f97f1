"""Split, merge and reshard on the disk: bit-equal for every family and grid, and alike to what MindSpore and torch do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from research.core.errors import ConfigError, WeightsError
from research.core.weights.compare import compare
from research.core.weights.opened import OpenOptions, open_weights
from research.core.weights.strategy import MERGED_FILE
from tests.core.weights.grids import SPECS, assert_same_tensors, go, tensors_of, write_model

FAMILIES = list(SPECS)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, spec) for name, spec in SPECS.items()}


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cards", [2, 4, 8])
def test_split_and_merge_back_is_bit_equal(models, tmp_path, family, cards):
    parts = go(models[family], tmp_path / "parts", "parts", f"tp{cards}")
    assert sorted(path.name for path in parts.iterdir() if path.is_dir()) == [str(n) for n in range(cards)]
    merged = go(parts, tmp_path / "merged", "hf")
    assert_same_tensors(models[family], merged)
    assert json.loads((merged / "config.json").read_text()) == json.loads((models[family] / "config.json").read_text())
    assert (merged / "tokenizer.json").is_file()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("first", "second"), [(4, 2), (2, 8), (8, 1)])
def test_resharded_parts_are_those_of_a_direct_split(models, tmp_path, family, first, second):
    source = go(models[family], tmp_path / "a", "parts", f"tp{first}")
    resharded = go(source, tmp_path / "b", "parts", f"tp{second}")
    direct = go(models[family], tmp_path / "c", "parts", f"tp{second}")
    for rank in range(second):
        assert_same_tensors(direct / str(rank), resharded / str(rank))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid", ["tp2-pp2", "dp2-tp2-pp2", "tp8", "dp2"])
@pytest.mark.parametrize("files", ["ckpt", "safetensors"])
def test_mindspore_ranks_and_back_is_bit_equal(models, tmp_path, family, grid, files):
    ranks = go(models[family], tmp_path / "ranks", "ranks", grid, files=files)
    assert_same_tensors(models[family], go(ranks, tmp_path / "back", "hf"))


@pytest.mark.parametrize("concat", ["grouped", "none"])
def test_joined_matrices_go_to_ranks_and_back(models, tmp_path, concat):
    ranks = go(models["gqa"], tmp_path / "ranks", "ranks", "tp2", concat=concat)
    assert_same_tensors(models["gqa"], go(ranks, tmp_path / "back", "hf", opening=OpenOptions(concat=concat)))


def test_stacked_matrices_cannot_be_cut_by_rows(models, tmp_path):
    with pytest.raises(ConfigError, match="would not get its own part") as error:
        go(models["gqa"], tmp_path / "ranks", "ranks", "tp2", concat="stacked")
    assert "grouped" in error.value.hint
    with pytest.raises(ConfigError, match="would not get its own part"):  # 2 kv heads, 4 cards
        go(models["gqa"], tmp_path / "ranks", "ranks", "tp4", concat="grouped")
    assert not (tmp_path / "ranks").exists()
    go(models["gqa"], tmp_path / "ranks", "ranks", "pp3", concat="stacked")


@pytest.mark.parametrize("family", ["moe", "tied"])
def test_one_pass_from_parts_to_ranks_to_dcp_to_parts(models, tmp_path, family):
    parts = go(models[family], tmp_path / "parts", "parts", "tp4-pp2")
    ranks = go(parts, tmp_path / "ranks", "ranks", "tp2", gmm=family == "moe", tied_head="omit")
    dcp = go(ranks, tmp_path / "dcp", "dcp", "3")
    again = go(dcp, tmp_path / "again", "parts", "tp8")
    assert_same_tensors(models[family], go(again, tmp_path / "back", "hf"))
    for shards in (parts, ranks, dcp, again):
        assert compare(open_weights(models[family]), open_weights(shards)).counts() == {
            "same": len(compare(open_weights(models[family]), open_weights(models[family])).rows),
            "rounded": 0,
            "different": 0,
        }


def test_bfloat16_bits_survive(tmp_path):
    spec = SPECS["gqa"]
    source = write_model(tmp_path / "f4", spec)
    half = go(source, tmp_path / "half", "hf", dtype="BF16")
    back = go(go(half, tmp_path / "parts", "parts", "tp4"), tmp_path / "back", "hf")
    assert (half / "model.safetensors").read_bytes() == (back / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "parts" / "3" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_small_shards_have_an_index_in_every_part(models, tmp_path):
    parts = go(models["mha"], tmp_path / "parts", "parts", "tp2", shard_bytes=8000)
    for rank in range(2):
        index = json.loads((parts / str(rank) / "model.safetensors.index.json").read_text())
        assert {p.name for p in (parts / str(rank)).glob("*.safetensors")} == set(index["weight_map"].values())
    assert_same_tensors(models["mha"], go(parts, tmp_path / "back", "hf"))


# --- what the parts are ------------------------------------------------------------------------------------------------


def test_a_part_is_a_hugging_face_folder_of_local_shapes_that_says_how_it_was_cut(models, tmp_path):
    parts = go(models["tied"], tmp_path / "parts", "parts", "tp4")
    config = json.loads((parts / "2" / "config.json").read_text())
    assert (config["rank"], config["world_size"]) == (2, 4)
    assert config["parallel"] == {
        "data": 1, "tensor": 4, "pipeline": 1, "stage_layers": [2],
        "kv_heads": "replicated", "vocab": "padded", "padded_vocab_size": 104, "rank": 2,
    }  # fmt: skip
    assert config["vocab_size"] == 101 and config["num_attention_heads"] == 8
    part, whole = tensors_of(parts / "2"), tensors_of(models["tied"])
    assert part["model.embed_tokens.weight"].shape == (26, 32)
    name = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(part[name], whole[name][8:16])  # cards 2 and 3 share kv head 1
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(part[name], whole[name][:, 24:36])
    last = tensors_of(parts / "3")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(last[:23], whole["model.embed_tokens.weight"][78:])
    assert not last[23:].any()
    record = json.loads((parts / "conversion.json").read_text())
    assert any("replicated, each head on 2 cards" in line for line in record["choices"])


def test_qwen1_parts_hold_their_own_rows_of_the_fused_matrix(models, tmp_path):
    part = tensors_of(go(models["qwen1"], tmp_path / "parts", "parts", "tp2") / "1")
    whole = tensors_of(models["qwen1"])["transformer.h.0.attn.c_attn.weight"]
    expected = np.concatenate([whole[16:32], whole[48:64], whole[80:96]])
    np.testing.assert_array_equal(part["transformer.h.0.attn.c_attn.weight"], expected)


def test_parts_of_other_programs_are_recognised_by_their_shapes(models, tmp_path):
    parts = go(models["tied"], tmp_path / "parts", "parts", "tp4")
    for rank in range(4):
        shutil.copy(models["tied"] / "config.json", parts / str(rank) / "config.json")
    assert_same_tensors(models["tied"], go(parts, tmp_path / "back", "hf"))


# --- damaged sources -----------------------------------------------------------------------------------------------------


def broken(models, tmp_path, cards=2) -> Path:
    return go(models["gqa"], tmp_path / "parts", "parts", f"tp{cards}")


def expect(parts: Path, tmp_path: Path, match: str) -> None:
    with pytest.raises(WeightsError, match=match):
        go(parts, tmp_path / "back", "hf")
    assert not (tmp_path / "back").exists()


def test_a_missing_part_is_named(models, tmp_path):
    parts = broken(models, tmp_path, 4)
    shutil.rmtree(parts / "2")
    expect(parts, tmp_path, "part 2 is missing")


def test_parts_of_two_cuts_are_refused(models, tmp_path):
    parts = broken(models, tmp_path, 4)
    other = go(models["gqa"], tmp_path / "other", "parts", "tp2")
    shutil.rmtree(parts / "1")
    shutil.copytree(other / "1", parts / "1")
    expect(parts, tmp_path, "another cut")


def test_exchanged_parts_are_refused(models, tmp_path):
    parts = broken(models, tmp_path)
    (parts / "0").rename(parts / "x")
    (parts / "1").rename(parts / "0")
    (parts / "x").rename(parts / "1")
    expect(parts, tmp_path, "part 1 in the place of part 0")


def test_norms_that_drifted_apart_are_refused(models, tmp_path):
    parts = broken(models, tmp_path)
    values = load_file(parts / "1" / "model.safetensors")
    values["model.norm.weight"] = values["model.norm.weight"] + 1
    save_file(values, parts / "1" / "model.safetensors")
    expect(parts, tmp_path, "0/model.norm.weight and 1/model.norm.weight should be copies")


def test_a_truncated_part_is_named(models, tmp_path):
    file = broken(models, tmp_path) / "1" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    expect(tmp_path / "parts", tmp_path, "1/model.safetensors: truncated")


def test_ranks_with_strategy_files_of_another_grid_are_refused(models, tmp_path):
    ranks = go(models["gqa"], tmp_path / "ranks", "ranks", "tp2")
    four = go(models["gqa"], tmp_path / "four", "ranks", "tp4")
    with pytest.raises(WeightsError, match="rank_2 is missing"):
        go(ranks, tmp_path / "back", "hf", opening=OpenOptions(strategy=str(four / "strategy")))
    with pytest.raises(WeightsError, match="4 ranks here, the strategy files are for 2"):
        go(four, tmp_path / "back", "hf", opening=OpenOptions(strategy=str(ranks / "strategy")))
    shutil.rmtree(ranks / "strategy")
    with pytest.raises(WeightsError, match="nothing says how they are cut"):
        go(ranks, tmp_path / "back", "hf")


def test_a_target_inside_the_source_is_refused(models, tmp_path):
    source = write_model(tmp_path / "model", SPECS["gqa"])
    before = sorted(path.name for path in source.iterdir())
    with pytest.raises(WeightsError, match="inside the source"):
        go(source, source / "parts", "parts", "tp2")
    assert sorted(path.name for path in source.iterdir()) == before


def test_data_parallel_parts_are_refused(models, tmp_path):
    with pytest.raises(ConfigError, match="one replica"):
        go(models["gqa"], tmp_path / "parts", "parts", "dp2-tp2")


# --- MindSpore ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mindspore():
    os.environ.setdefault("GLOG_v", "3")
    return pytest.importorskip("mindspore", reason="MindSpore is not installed (requirements/mindspore.txt)")


def checkpoint(mindspore, folder: Path) -> dict[str, np.ndarray]:
    (file,) = folder.glob("*.ckpt")
    return {name: value.asnumpy() for name, value in mindspore.load_checkpoint(str(file)).items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("first", "second"), [("tp1", "dp2-tp4-pp2"), ("tp4", "tp2-pp2"), ("dp2-tp2", "tp8"), ("tp4-pp2", "tp1")]
)
def test_mindspore_transforms_our_checkpoints_as_we_do(mindspore, models, tmp_path, family, first, second):
    source = go(models[family], tmp_path / "a", "ranks", first)
    ours = go(models[family], tmp_path / "b", "ranks", second)
    strategies = [str(folder / "strategy" / MERGED_FILE) for folder in (source, ours)]
    mindspore.transform_checkpoints(str(source), str(tmp_path / "theirs"), "checkpoint_", *strategies)
    ranks = sorted(path.name for path in ours.glob("rank_*"))
    assert ranks == sorted(path.name for path in (tmp_path / "theirs").glob("rank_*"))
    for rank in ranks:
        expected, found = checkpoint(mindspore, tmp_path / "theirs" / rank), checkpoint(mindspore, ours / rank)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(value, found[name], err_msg=f"{rank} {name}")


def test_our_resharding_follows_mindspores_strategy_files(mindspore, models, tmp_path):
    """The target's strategy files alone decide; the parallel optimizer's cut over the data axis is one of their ways."""
    from research.core.weights.strategy import Layout, Strategy, read_strategy, strategy_files

    base = go(models["gqa"], tmp_path / "base", "ranks", "dp2-tp2")
    (table,) = read_strategy(base / "strategy").stages
    sharded = {
        name: Layout(how.dev_matrix, how.tensor_map, 2, 2)
        if 0 in how.tensor_map[:1] and len(how.tensor_map) == 2
        else how
        for name, how in table.items()
    }
    assert sharded != table
    (tmp_path / "zero").mkdir()
    for name, content in strategy_files(Strategy((sharded,))).items():
        (tmp_path / "zero" / name).write_bytes(content)
    ours = go(models["gqa"], tmp_path / "ours", "ranks", strategy=str(tmp_path / "zero"))
    mindspore.transform_checkpoints(
        str(base),
        str(tmp_path / "theirs"),
        "c_",
        str(base / "strategy" / MERGED_FILE),
        str(tmp_path / "zero" / MERGED_FILE),
    )
    for rank in range(4):
        expected = checkpoint(mindspore, tmp_path / "theirs" / f"rank_{rank}")
        found = checkpoint(mindspore, ours / f"rank_{rank}")
        for name, value in expected.items():
            np.testing.assert_array_equal(value, found[name], err_msg=name)
    assert_same_tensors(models["gqa"], go(ours, tmp_path / "back", "hf"))


# --- torch's distributed checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_loads_our_distributed_checkpoint_into_the_decoder(models, tmp_path, family):
    import torch
    import torch.distributed.checkpoint as torch_dcp

    from research.core.torch.decoder import Decoder
    from research.core.torch.weights import load_decoder

    folder = go(models[family], tmp_path / "dcp", "dcp", "3")
    assert sorted(path.name for path in folder.glob("*.distcp")) == [f"__{rank}_0.distcp" for rank in range(3)]
    decoder = Decoder(SPECS[family])
    state = dict(decoder.named_parameters())
    torch_dcp.load(state, checkpoint_id=folder, no_dist=True)
    expected = dict(load_decoder(models[family]).named_parameters())
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_distributed_checkpoint_of_torch_merges_bit_equal(models, tmp_path, family):
    import torch.distributed.checkpoint as torch_dcp

    from research.core.torch.weights import load_decoder

    decoder = load_decoder(models[family])
    state = {"model": dict(decoder.named_parameters()), "step": 7, "optimizer": {"lr": 0.1}}
    torch_dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    opening = OpenOptions(config=str(models[family]))
    opened = open_weights(tmp_path / "dcp", opening)
    assert opened.unused == ["optimizer.lr", "step"]
    assert_same_tensors(models[family], go(tmp_path / "dcp", tmp_path / "back", "hf", opening=opening))


def test_metadata_that_imports_anything_else_is_refused(models, tmp_path):
    import pickle

    folder = go(models["mha"], tmp_path / "dcp", "dcp", "2")

    class Evil:
        def __reduce__(self):
            return (os.system, ("touch " + str(tmp_path / "ran"),))

    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    expect(folder, tmp_path, "wants to import posix.system")
    assert not (tmp_path / "ran").exists()


def test_a_truncated_distributed_checkpoint_is_refused(models, tmp_path):
    folder = go(models["mha"], tmp_path / "dcp", "dcp", "2")
    file = folder / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    expect(folder, tmp_path, "truncated")


FSDP = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
sys.path.insert(0, {repo!r})
from torch.distributed.fsdp import fully_shard
from research.core.torch.weights import load_decoder
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
decoder = load_decoder({model!r})
for layer in decoder.model.layers:
    fully_shard(layer)
fully_shard(decoder)
dcp.save({{"model": decoder.state_dict()}}, checkpoint_id={folder!r})
if {back!r}:
    fresh = {{name: torch.zeros_like(value) for name, value in decoder.state_dict().items()}}
    dcp.load(fresh, checkpoint_id={back!r})
    assert all(torch.equal(value.full_tensor(), fresh[name].full_tensor()) for name, value in decoder.state_dict().items())
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_checkpoint_saved_under_fsdp_merges_and_ours_loads_under_fsdp(models, tmp_path, repo):
    """Two processes, DTensors cut along the first axis, odd sizes included."""
    import subprocess
    import sys

    ours = go(models["moe"], tmp_path / "ours", "dcp", "3")
    code = FSDP.format(repo=str(repo), model=str(models["moe"]), folder=str(tmp_path / "dcp"), back=str(ours))
    command = [sys.executable, "-W", "ignore", "-c", code]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meet")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    opening = OpenOptions(config=str(models["moe"]))
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    assert_same_tensors(models["moe"], go(tmp_path / "dcp", tmp_path / "back", "hf", opening=opening))


# --- interrupted and repeated ------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {repo!r})
from pathlib import Path
from research.core.weights import staging
from tests.core.weights.grids import go
note, done = staging.Staging.note, []
def noting(self, written):
    note(self, written)
    done.append(written)
    if len(done) == 40:
        os.kill(os.getpid(), signal.SIGKILL)
staging.Staging.note = noting
go(Path({source!r}), Path({target!r}), {to!r}, {grid!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("to", "grid"), [("parts", "tp4"), ("ranks", "dp2-tp2"), ("dcp", "2")])
def test_a_killed_split_is_finished_from_where_it_was(models, tmp_path, repo, monkeypatch, to, grid):
    import signal
    import subprocess
    import sys

    from research.core.weights import staging

    expected = go(models["moe"], tmp_path / "whole", to, grid)
    target = tmp_path / "cut"
    code = KILLED.format(repo=str(repo), source=str(models["moe"]), target=str(target), to=to, grid=grid)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not target.exists()
    made: list = []
    note = staging.Staging.note
    monkeypatch.setattr(staging.Staging, "note", lambda self, written: (made.append(written), note(self, written)))
    go(models["moe"], target, to, grid)
    files = [path for path in expected.rglob("*") if path.is_file() and path.name != "conversion.json"]
    total = len(json.loads((target / "conversion.json").read_text())["tensors"])
    assert 0 < len(made) <= total - 39  # one may have been under way
    for path in files:
        assert path.read_bytes() == (target / path.relative_to(expected)).read_bytes(), path


def test_overwriting_leaves_no_part_of_the_former_cut(models, tmp_path):
    target = go(models["mha"], tmp_path / "parts", "parts", "tp8")
    with pytest.raises(WeightsError, match=r"holds .* already"):
        go(models["mha"], target, "parts", "tp2")
    go(models["mha"], target, "parts", "tp2", overwrite=True)
    assert sorted(path.name for path in target.iterdir() if path.is_dir()) == ["0", "1"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_text("not theirs")
    with pytest.raises(WeightsError, match="not replaced"):
        go(models["mha"], tmp_path / "mine", "parts", "tp2", overwrite=True)


def test_the_merged_folder_is_what_transformers_loads(models, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    parts = go(models["gqa"], tmp_path / "parts", "parts", "tp4-pp2")
    merged = AutoModelForCausalLM.from_pretrained(go(parts, tmp_path / "merged", "hf"))
    whole = AutoModelForCausalLM.from_pretrained(models["gqa"])
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(merged(ids).logits, whole(ids).logits)
