"""Every way in which a conversion can be asked for wrongly: one clear message, status 2, source as it was, nothing left."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from research.core.errors import run_cli
from tests.conftest import REPO, load_script
from tests.core.weights.cases import Case, mindformers_weights

CASE = Case("qwen2", layers=2)


@pytest.fixture(scope="module")
def tool():
    return load_script(REPO / "tools" / "convert_weight.py").main


@pytest.fixture
def hf(tmp_path):
    return CASE.write(tmp_path / "hf", shards=2)


def state(folder: Path) -> dict[str, tuple]:
    """Contents and times of every file below."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def refused(tool, tmp_path, capsys):
    """Run the tool, expect a refusal; -> its message."""

    def run(*args, output="out.ckpt", model="qwen2_5") -> str:
        before = state(tmp_path)
        capsys.readouterr()
        words = ["--model", model, "--output_path", str(tmp_path / output), *map(str, args)]
        assert run_cli(tool, words) == 2
        assert state(tmp_path) == before  # the source as it was, and nothing else either
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and len(said.err.splitlines()) < 20 and "Traceback" not in said.err
        assert "written" not in said.out
        return said.err

    return run


def test_a_truncated_shard(refused, hf):
    shard = hf / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    message = refused("--input_path", hf)
    assert "truncated" in message and shard.name in message


def test_a_truncated_checkpoint(refused, hf, tmp_path, tool):
    assert (
        run_cli(tool, ["--model", "qwen2_5", "--input_path", str(hf), "--output_path", str(tmp_path / "a.ckpt")]) == 0
    )
    data = (tmp_path / "a.ckpt").read_bytes()
    for cut in (1, 17, len(data) // 2, len(data) - 3):
        (tmp_path / "a.ckpt").write_bytes(data[:cut])
        message = refused("--reversed", "--input_path", tmp_path / "a.ckpt", "--config", hf, output="back")
        assert "truncated" in message or "cut off" in message


def test_a_checkpoint_that_lacks_its_last_values(refused, hf, tmp_path, tool):
    """Cut between two values the file still parses."""
    from research.core.weights.formats import mindspore

    assert (
        run_cli(tool, ["--model", "qwen2_5", "--input_path", str(hf), "--output_path", str(tmp_path / "a.ckpt")]) == 0
    )
    entries, _ = mindspore.read_entries(tmp_path / "a.ckpt")
    segment = list(entries.values())[-2].segments[0]
    (tmp_path / "a.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[: segment.offset + segment.bytes])
    assert "missing: lm_head.weight" in refused(
        "--reversed", "--input_path", tmp_path / "a.ckpt", "--config", hf, output="back"
    )


def test_other_bytes_than_a_checkpoint(refused, hf, tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"PK\x03\x04 this is a zip")
    assert "not a whole MindSpore checkpoint" in refused(
        "--reversed", "--input_path", tmp_path / "x.ckpt", "--config", hf, output="back"
    )


def test_a_missing_shard(refused, hf):
    (hf / "model-00001-of-00002.safetensors").unlink()
    message = refused("--input_path", hf)
    assert "1 of 2 files" in message and "model-00001-of-00002.safetensors" in message


def test_an_index_that_names_a_tensor_twice(refused, hf):
    index = hf / "model.safetensors.index.json"
    text = index.read_text()
    name = "model.norm.weight"
    index.write_text(text.replace('"weight_map": {', f'"weight_map": {{"{name}": "model-00001-of-00002.safetensors", '))
    assert f"names {name} twice" in refused("--input_path", hf)


def test_a_tensor_that_is_in_two_shards(refused, hf):
    first, second = (hf / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: value}, second)
    message = refused("--input_path", hf)
    assert name in message and first.name in message and second.name in message


def test_an_index_of_a_tensor_that_is_not_there(refused, hf):
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.extra.weight" in refused("--input_path", hf)


@pytest.mark.parametrize(
    ("family", "model", "words"),
    [
        ("qwen2", "qwen", "model type qwen2, not of the family qwen"),
        ("qwen", "qwen2_5", "model type qwen, not of the family qwen2_5"),
        ("qwen2", "qwen2-moe", "not of the family qwen2_moe"),
        ("qwen2_moe", "qwen2_5", "not of the family qwen2_5"),
        ("qwen2", "qwen2_5_7b", "these weights are not qwen2_5_7b"),
        ("qwen2", "qwen9", "no model or family is called 'qwen9'"),
    ],
)
def test_the_wrong_family(refused, tmp_path, family, model, words):
    folder = Case(family).write(tmp_path / "hf")
    assert words in refused("--input_path", folder, model=model)


def test_tensors_of_another_model_than_config_json_says(refused, hf):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    message = refused("--input_path", hf)
    assert "missing" in message and "model.layers.2" in message
    (hf / "config.json").write_text(json.dumps(config | {"intermediate_size": 7}))
    assert "wrong shape" in refused("--input_path", hf)


@pytest.fixture
def joined(hf, tmp_path, tool):
    """A file in the grouped layout, with its record."""
    path = tmp_path / "g.ckpt"
    words = ["--model", "qwen2_5", "--input_path", str(hf), "--output_path", str(path), "--qkv_concat", "grouped"]
    assert run_cli(tool, words) == 0
    return path


def test_the_wrong_layout_option(refused, joined, hf, tmp_path):
    args = ("--reversed", "--input_path", joined)
    assert "was written as grouped, not stacked" in refused(*args, "--qkv_concat", "stacked", output="back")
    assert "are joined in this file" in refused(*args, "--qkv_concat", "none", output="back")
    assert "True has meant two layouts" in refused(*args, "--qkv_concat", "True", output="back")
    assert "no such layout" in refused(*args, "--qkv_concat", "megatron", output="back")
    assert "only a MindFormers input" in refused("--input_path", hf, "--qkv_concat", "probe")


def test_a_joined_layout_that_nobody_names_is_not_guessed(refused, joined, hf, tmp_path):
    (tmp_path / "conversion.json").unlink()
    message = refused("--reversed", "--input_path", joined, "--config", hf, output="back")
    assert "nothing in the file tells apart" in message and "probe" in message
    message = refused("--reversed", "--input_path", joined, "--config", hf, "--qkv_concat", "probe", output="back")
    assert "the probe cannot tell" in message  # random weights predict nothing in either reading


def test_a_layout_of_joined_tensors_for_a_file_without_any(refused, hf, tmp_path):
    save_file(mindformers_weights(CASE, CASE.weights()), tmp_path / "m.safetensors")
    args = ("--reversed", "--input_path", tmp_path / "m.safetensors", "--config", hf, "--qkv_concat", "grouped")
    assert "are apart in this file" in refused(*args, output="back")


def test_a_record_of_a_file_that_was_replaced_is_not_believed(refused, joined, hf, tmp_path):
    save_file(mindformers_weights(CASE, CASE.weights(seed=4), "stacked"), tmp_path / "s.safetensors")
    record = json.loads((tmp_path / "conversion.json").read_text())
    record["target"]["file"] = "s.safetensors"
    (tmp_path / "conversion.json").write_text(json.dumps(record))
    message = refused("--reversed", "--input_path", tmp_path / "s.safetensors", "--config", hf, output="back")
    assert "nothing in the file tells apart" in message


def test_square_experts_are_not_guessed(refused, tmp_path):
    case = Case("qwen2_moe", expert_ffn=16)
    assert case.hidden == case.expert_ffn
    config = case.write(tmp_path / "hf")
    save_file(mindformers_weights(case, case.weights()), tmp_path / "m.safetensors")
    args = ("--reversed", "--input_path", tmp_path / "m.safetensors", "--config", config)
    assert "square" in refused(*args, output="back", model="qwen2-moe")


def test_the_wrong_word_about_the_experts(refused, tmp_path):
    case = Case("qwen2_moe")
    config = case.write(tmp_path / "hf")
    save_file(mindformers_weights(case, case.weights()), tmp_path / "m.safetensors")
    args = ("--reversed", "--input_path", tmp_path / "m.safetensors", "--config", config, "--use_gmm", "true")
    assert "not exchanged in this file" in refused(*args, output="back", model="qwen2-moe")


def test_a_pickle_without_the_flag(refused, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CASE.config()))
    torch.save(CASE.weights(), folder / "pytorch_model.bin")
    assert "pickle can run code" in refused("--input_path", folder)


class Evil:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def test_a_pickle_with_code_is_refused_even_with_the_flag(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CASE.config()))
    torch.save(CASE.weights() | {"x": Evil()}, folder / "pytorch_model.bin")
    assert "refuses" in refused("--input_path", folder, "--allow_pickle")
    assert not (tmp_path / "was_run").exists()
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:-100])
    assert "refuses" in refused("--input_path", folder, "--allow_pickle")


def test_a_disk_without_room_is_noticed_before_anything_is_written(refused, hf, monkeypatch):
    real = os.statvfs

    def full(path):
        found = real(path)
        return os.statvfs_result((*found[:2], found[2], 3, 3, *found[5:]))

    monkeypatch.setattr(os, "statvfs", full)
    assert "GB free" in refused("--input_path", hf)


def test_a_disk_that_fills_up_all_the_same(hf, tmp_path):
    """The kernel refuses more than 4 KiB per file: as on a full disk, at the first file."""
    before = state(tmp_path)
    words = ["--model", "qwen2_5", "--input_path", str(hf), "--output_path", str(tmp_path / "x.ckpt")]
    done = subprocess.run(
        [sys.executable, str(REPO / "tools" / "convert_weight.py"), *words],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
        check=False,
    )
    assert done.returncode == 2 and "no space left" in done.stderr and "Traceback" not in done.stderr
    assert state(tmp_path) == before


def test_a_target_inside_the_source(refused, hf, tmp_path):
    for name in ("hf/x.ckpt", "hf/ms", "hf", "hf/sub/deep/x.safetensors"):
        assert "lies inside the source" in refused("--input_path", hf, output=name)
    link = tmp_path / "link"
    link.symlink_to(hf)
    assert "lies inside the source" in refused("--input_path", hf, output="link/x.ckpt")


def test_a_source_inside_the_target(refused, tmp_path):
    folder = CASE.write(tmp_path / "big" / "hf")
    assert "lies inside the target" in refused("--input_path", folder, output="big")


def test_a_target_that_is_there_already(refused, hf, joined, tmp_path):
    assert "exists already" in refused("--input_path", hf, output="g.ckpt")
    shutil.copytree(hf, tmp_path / "other")
    assert "holds" in refused("--reversed", "--input_path", joined, output="other")


def test_overflow_in_fp16(refused, tmp_path, tool, capsys):
    folder = CASE.write(tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:2] = torch.tensor([1e6, 1e-12])
    save_file(weights, folder / "model.safetensors")
    message = refused("--input_path", folder, "--dtype", "fp16")
    assert "model.norm_out.weight" in message and "too large" in message
    words = ["--model", "qwen2_5", "--input_path", str(folder), "--output_path", str(tmp_path / "x.ckpt")]
    assert run_cli(tool, [*words, "--dtype", "fp16", "--allow_overflow"]) == 0
    assert "1 overflowed, 1 became zero" in capsys.readouterr().out


def test_a_tied_head_with_other_values(refused, tmp_path):
    case = Case("qwen2", tied=True)
    folder = case.write(tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors")
    assert "tie_word_embeddings" in refused("--input_path", folder)


def test_an_untied_head_that_is_missing(refused, tmp_path):
    """The trap of Qwen1.5-0.5B: its head is left out of the file, and read with an untied config it would be random."""
    case = Case("qwen2", tied=True)
    config = case.write(tmp_path / "hf")
    save_file(mindformers_weights(case, case.weights(), head=False), tmp_path / "m.safetensors")
    untied = json.loads((config / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "untied.json").write_text(json.dumps(untied))
    args = ("--reversed", "--input_path", tmp_path / "m.safetensors")
    assert "missing: lm_head.weight" in refused(*args, "--config", tmp_path / "untied.json", output="back")


def test_a_file_without_its_architecture(refused, tmp_path):
    save_file(mindformers_weights(CASE, CASE.weights()), tmp_path / "m.safetensors")
    assert "does not say its architecture" in refused(
        "--reversed", "--input_path", tmp_path / "m.safetensors", output="b"
    )


def test_paths_flags_and_dtypes_that_do_not_exist(refused, hf, tmp_path):
    assert "not found" in refused("--input_path", tmp_path / "nowhere")
    assert "no dtype" in refused("--input_path", hf, "--dtype", "int8")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused("--input_path", tmp_path / "empty")


def test_a_quantised_folder(refused, tmp_path):
    folder = CASE.write(tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors")
    assert "quantised weights" in refused("--input_path", folder)
