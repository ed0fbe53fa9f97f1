"""``tools/convert_weight.py`` and the documents' scripts, started as their users start them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import REPO
from tests.core.weights.cases import Case, folder_tensors, mindformers_weights, same
from tests.core.weights.test_adapter import qwen2_modules, write

TOOL = "tools/convert_weight.py"


def run(script: str, *words, cwd=None, status: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, str(REPO / script), *map(str, words)], capture_output=True, text=True, cwd=cwd, check=False
    )
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.parametrize(
    ("family", "model", "words"),
    [
        ("qwen", "qwen", []),
        ("qwen2", "qwen1_5", ["--qkv_concat", "stacked"]),
        ("qwen2", "qwen2_5", ["--qkv_concat", "grouped", "--dtype", "bf16"]),
        ("qwen2_moe", "qwen2-moe", ["--qkv_concat", "grouped", "--use_gmm", "True"]),
    ],
)
def test_there_and_back_with_the_fixed_flags(tmp_path, family, model, words):
    case = Case(family)
    dtype = torch.bfloat16 if "bf16" in words else torch.float32
    source = case.write(tmp_path / "hf")
    concat = words[1] if words else "none"
    expected = mindformers_weights(case, case.weights(), concat, gmm="--use_gmm" in words)
    said = run(
        TOOL, "--model", model, "--input_path", source, "--output_path", tmp_path / "ms" / "x.safetensors", *words
    )
    found = load_file(tmp_path / "ms" / "x.safetensors")
    assert same(found, {name: value.to(dtype) for name, value in expected.items()})
    for word in ("mapped", "unused", "missing", "tied", "record:", "written:"):
        assert word in said.stdout
    back = ["--model", model, "--input_path", tmp_path / "ms" / "x.safetensors", "--output_path", tmp_path / "back"]
    run(TOOL, *back, "--reversed", "--verify")
    assert same(folder_tensors(tmp_path / "back"), {n: v.to(dtype) for n, v in case.weights().items()})


def test_a_file_of_the_folder_stands_for_it_and_a_folder_gets_rank_0(tmp_path):
    case = Case("qwen2", tied=True)
    source = case.write(tmp_path / "hf", shards=2)
    shard = source / "model-00001-of-00002.safetensors"
    run(TOOL, "--model", "qwen2", "--input_path", shard, "--output_path", tmp_path / "ms")
    assert (tmp_path / "ms/rank_0/checkpoint_0.ckpt").is_file()
    run(TOOL, "--model", "qwen2", "--input_path", tmp_path / "ms", "--output_path", tmp_path / "back", "--reversed")
    assert same(folder_tensors(tmp_path / "back"), case.weights())


@pytest.mark.parametrize("place", ["beside", "given", "target"])
def test_a_foreign_file_finds_its_architecture(tmp_path, place):
    """A file that MindFormers wrote has no record; a tied head may be left out of it."""
    case = Case("qwen2", tied=True)
    (tmp_path / "ms").mkdir()
    save_file(mindformers_weights(case, case.weights(), head=False), tmp_path / "ms" / "x.safetensors")
    config = {"beside": "ms", "given": "other", "target": "back"}[place]
    (tmp_path / config).mkdir(exist_ok=True)
    (tmp_path / config / "config.json").write_text(json.dumps(case.config()))
    words = ["--config", tmp_path / "other"] if place == "given" else []
    source, target = tmp_path / "ms" / "x.safetensors", tmp_path / "back"
    run(TOOL, "--model", "qwen1_5", "--reversed", "--input_path", source, "--output_path", target, *words)
    assert same(folder_tensors(tmp_path / "back"), case.weights())
    assert json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.slow
def test_adapters_there_and_back(tmp_path):
    case = Case("qwen2")
    base = case.write(tmp_path / "hf")
    tensors = write(tmp_path / "peft", qwen2_modules(case), target_modules=["q_proj", "v_proj"])
    there = ["--model", "qwen2_5", "--input_path", tmp_path / "peft", "--output_path", tmp_path / "ms" / "a.ckpt"]
    run(TOOL, *there, "--is_lora", "--config", base)
    back = ["--model", "qwen2_5", "--input_path", tmp_path / "ms" / "a.ckpt", "--output_path", tmp_path / "back"]
    run(TOOL, *back, "--is_lora", "True", "--reversed")
    assert same(load_file(tmp_path / "back" / "adapter_model.safetensors"), tensors)
    other = Case("qwen2", ffn=9).write(tmp_path / "other")
    there[-1] = tmp_path / "new" / "a.ckpt"
    assert "the adapter is for a matrix" in run(TOOL, *there, "--is_lora", "--config", other, status=2).stderr
    assert "not for qwen" in run(TOOL, "--model", "qwen", *there[2:], "--is_lora", status=2).stderr
    assert (
        "LoRA adapter, not a model"
        in run(TOOL, *back[:4], "--output_path", tmp_path / "x", "--reversed", status=2).stderr
    )


@pytest.mark.slow
def test_the_documents_scripts_under_their_own_flags(tmp_path):
    case = Case("qwen")
    source = case.write(tmp_path / "hf")
    script = "research/qwen/convert_weight.py"
    run(script, "--torch_ckpt_path", source / "model.safetensors", "--dtype", "float16", cwd=tmp_path)
    assert (tmp_path / "run" / "qwen_7b_ms.ckpt").is_file()  # the default of the document

    case = Case("qwen2", tied=True)
    source = case.write(tmp_path / "hf1_5")
    run("research/qwen1_5/convert_weight.py", "--torch_ckpt_dir", source, cwd=tmp_path)
    assert (tmp_path / "transform.ckpt").is_file()
    run("research/qwen1_5/convert_reversed.py", "--torch_ckpt_path", tmp_path / "back", cwd=tmp_path)
    assert same(folder_tensors(tmp_path / "back"), case.weights())
    inside = run("research/qwen1_5/convert_weight.py", cwd=source, status=2)  # both defaults: into the source itself
    assert "lies inside the source" in inside.stderr


def test_the_tool_needs_neither_torch_nor_mindspore(tmp_path):
    source = Case("qwen2").write(tmp_path / "hf")
    code = (
        f"import sys; sys.path.insert(0, {str(REPO)!r}); sys.argv = ['x', 'y']\n"
        "import importlib.util as u\n"
        f"s = u.spec_from_file_location('c', {str(REPO / TOOL)!r}); m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        f"m.main(['--model', 'qwen2_5', '--input_path', {str(source)!r}, '--output_path', {str(tmp_path / 'x.ckpt')!r}])\n"
        "assert not {'torch', 'transformers', 'mindspore'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
