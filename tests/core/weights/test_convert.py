"""Conversions there and back over random small models: bit-equal, with MindFormers' side held against keys written by hand."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from research.core.weights.compare import compare
from research.core.weights.convert import ConvertOptions, convert
from research.core.weights.opened import HUGGINGFACE, MINDFORMERS, OpenOptions, open_weights
from research.core.weights.tensors import Files, read_tensor
from tests.core.weights.cases import DTYPES, FAMILIES, Case, cases, folder_tensors, mindformers_weights, same

QUICK = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@pytest.fixture
def root():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@QUICK
@given(
    case=cases(),
    dtype=st.sampled_from(sorted(DTYPES)),
    concat=st.sampled_from(["none", "stacked", "grouped"]),
    files=st.sampled_from(["ckpt", "safetensors"]),
    gmm=st.booleans(),
    tied_head=st.sampled_from(["copy", "omit"]),
    shards=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_there_and_back_is_bit_equal(case, dtype, concat, files, gmm, tied_head, shards, seed):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source = case.write(root / "hf", DTYPES[dtype], seed, shards)
        there = root / f"ms.{files}"
        convert(source, there, ConvertOptions(concat=concat, gmm=gmm, tied_head=tied_head))
        if files == "safetensors":
            expected = mindformers_weights(case, case.weights(DTYPES[dtype], seed), concat, gmm, tied_head == "copy")
            assert same(load_file(there), expected)
        convert(there, root / "back", ConvertOptions(to=HUGGINGFACE))
        assert same(folder_tensors(root / "back"), case.weights(DTYPES[dtype], seed))
        assert json.loads((root / "back/config.json").read_text())["tie_word_embeddings"] == case.tied
        assert not compare(open_weights(source), open_weights(there)).counts()["different"]
        assert not list(root.glob(".*"))  # no staging folder stays


@QUICK
@given(
    case=cases(),
    first=st.sampled_from(["none", "stacked", "grouped"]),
    second=st.sampled_from(["none", "stacked", "grouped"]),
)
def test_one_joined_layout_becomes_the_other(case, first, second):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source = case.write(root / "hf")
        convert(source, root / "a.ckpt", ConvertOptions(concat=first))
        convert(root / "a.ckpt", root / "b.safetensors", ConvertOptions(concat=second))
        assert same(load_file(root / "b.safetensors"), mindformers_weights(case, case.weights(), second))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slab", [1, 64])
def test_slabs_of_any_size_make_the_same_file(family, slab, root, monkeypatch):
    """Large tensors are made row by row: with slabs of a byte every row is one."""
    from research.core.weights import runner

    case = Case(family, tied=False)
    source = case.write(root / "hf")
    for number, gmm in enumerate((False, True)):
        options = ConvertOptions(concat="grouped", gmm=gmm)
        convert(source, root / f"whole{number}.ckpt", options)
        with monkeypatch.context() as patched:
            patched.setattr(runner, "SLAB_BYTES", slab)
            convert(source, root / f"rows{number}.ckpt", options)
            convert(root / f"rows{number}.ckpt", root / f"back{number}", ConvertOptions(to=HUGGINGFACE))
        assert (root / f"whole{number}.ckpt").read_bytes() == (root / f"rows{number}.ckpt").read_bytes()
        assert same(folder_tensors(root / f"back{number}"), case.weights())


def test_tensors_above_the_slice_limit_are_cut_and_joined(root, monkeypatch):
    """MindSpore cuts tensors above 512 MiB into several values."""
    from research.core.weights.formats import mindspore

    case = Case("qwen2")
    source = case.write(root / "hf")
    monkeypatch.setattr(mindspore, "SLICE_BYTES", 100)
    convert(source, root / "cut.ckpt", ConvertOptions())
    entries, _ = mindspore.read_entries(root / "cut.ckpt")
    name = "model.layers.0.attention.wq.weight"
    assert len(entries[name].segments) == -(-entries[name].bytes // 100)
    convert(root / "cut.ckpt", root / "back", ConvertOptions(to=HUGGINGFACE))
    assert same(folder_tensors(root / "back"), case.weights())


def test_a_folder_target_gets_rank_0_and_the_side_files(root):
    case = Case("qwen2", tied=True)
    source = case.write(root / "hf")
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    (source / "vocab.json").write_text("{}")
    convert(source, root / "ms", ConvertOptions(files="safetensors"))
    assert {p.relative_to(root / "ms").as_posix() for p in (root / "ms").rglob("*") if p.is_file()} == {
        "rank_0/checkpoint_0.safetensors", "config.json", "generation_config.json", "vocab.json", "conversion.json",
    }  # fmt: skip
    convert(root / "ms", root / "back", ConvertOptions(to=HUGGINGFACE))
    assert same(folder_tensors(root / "back"), case.weights())
    assert (root / "back/generation_config.json").read_text() == '{"eos_token_id": 7}'


def test_shards_of_the_written_folder_keep_to_their_size(root):
    case = Case("qwen2", layers=3)
    source = case.write(root / "hf")
    convert(source, root / "out", ConvertOptions(to=HUGGINGFACE, shard_bytes=2000, dtype="BF16"))
    files = sorted((root / "out").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((root / "out/model.safetensors.index.json").read_text())
    assert {index["weight_map"][name] for name in case.weights()} == {path.name for path in files}
    expected = {name: value.bfloat16() for name, value in case.weights().items()}
    assert same(folder_tensors(root / "out"), expected)
    assert json.loads((root / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_training_state_in_a_checkpoint_is_left_out_and_named(root):
    case = Case("qwen2")
    config = case.write(root / "hf")
    tensors = mindformers_weights(case, case.weights())
    state = {f"adam_m.{name}": value.clone() for name, value in tensors.items()} | {"global_step": torch.tensor([7])}
    save_file(tensors | state, root / "trained.safetensors")
    summary = convert(
        root / "trained.safetensors", root / "back", ConvertOptions(to=HUGGINGFACE), OpenOptions(config=str(config))
    )
    assert set(summary.unused) == set(state)
    assert same(folder_tensors(root / "back"), case.weights())


def test_experts_stacked_as_in_memory_are_read(root):
    case = Case("qwen2_moe")
    weights = case.weights()
    source = case.write(root / "hf")
    stacked = {name: value for name, value in weights.items() if ".mlp.experts." not in name}
    for n in range(case.layers):
        at = f"model.layers.{n}.mlp.experts."
        each = [
            [weights[f"{at}{e}.{part}_proj.weight"] for part in ("gate", "up", "down")] for e in range(case.experts)
        ]
        stacked[at + "gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in each])
        stacked[at + "down_proj"] = torch.stack([down for _, _, down in each])
    save_file(stacked, source / "model.safetensors")
    convert(source, root / "x.safetensors", ConvertOptions(gmm=True))
    assert same(load_file(root / "x.safetensors"), mindformers_weights(case, weights, gmm=True))
    convert(source, root / "apart", ConvertOptions(to=HUGGINGFACE))
    assert same(folder_tensors(root / "apart"), weights)


def test_the_record_tells_how_each_tensor_was_made(root):
    import xxhash

    case = Case("qwen2", layers=1, tied=True)
    source = case.write(root / "hf")
    summary = convert(source, root / "x.ckpt", ConvertOptions(concat="grouped", dtype="BF16"))
    record = json.loads((root / "conversion.json").read_text())
    assert record["source"]["layout"]["names"] == HUGGINGFACE
    assert record["target"]["layout"] == {
        "names": MINDFORMERS, "model_type": "qwen2", "files": "ckpt", "qkv_concat": "grouped", "tied_head": "copy",
    }  # fmt: skip
    rows = {row["name"]: row for row in record["tensors"]}
    assert rows["model.layers.0.attention.w_qkv.weight"]["from"] == [
        f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"
    ]
    assert rows["model.layers.0.feed_forward.w_gate_hidden.weight"]["how"] == "interleave + cast"
    opened = open_weights(root / "x.ckpt")
    with Files() as files:
        for handle, entry in opened.entries.items():
            row = rows[handle]
            assert row["shape"] == list(entry.shape) and row["dtype"] == entry.dtype == "BF16"
            assert row["xxh3_128"] == xxhash.xxh3_128_hexdigest(read_tensor(files, entry).tobytes())
    assert record["tied"] == summary.tied == ["lm_head.weight = model.tok_embeddings.embedding_weight"]
    assert record["config"] == case.config()


def test_two_files_in_one_folder_keep_a_record_each(root):
    case = Case("qwen2")
    source = case.write(root / "hf")
    convert(source, root / "a.ckpt", ConvertOptions(concat="grouped"))
    convert(source, root / "b.ckpt", ConvertOptions(concat="stacked"))
    assert json.loads((root / "conversion.json").read_text())["target"]["file"] == "a.ckpt"
    assert json.loads((root / "b.ckpt.conversion.json").read_text())["target"]["file"] == "b.ckpt"
    for name in ("a", "b"):  # each knows its own layout
        convert(root / f"{name}.ckpt", root / name, ConvertOptions(to=HUGGINGFACE))
        assert same(folder_tensors(root / name), case.weights())


def test_pickled_weights_are_read_with_the_flag_and_become_the_same_file(root):
    case = Case("qwen2_moe")
    source = case.write(root / "hf", torch.bfloat16)
    pickled = root / "bin"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps(case.config()))
    names = list(case.weights())
    weights = case.weights(torch.bfloat16)
    files = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, mine in files.items():
        torch.save({name: weights[name] for name in mine}, pickled / file)
    places = {name: file for file, mine in files.items() for name in mine}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    torch.save({"lr": 1.0}, pickled / "training_args.bin")
    convert(source, root / "a.ckpt", ConvertOptions())
    convert(pickled, root / "b.ckpt", ConvertOptions(), OpenOptions(allow_pickle=True))
    assert (root / "a.ckpt").read_bytes() == (root / "b.ckpt").read_bytes()
