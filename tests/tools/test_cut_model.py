"""scripts/cut_model_and_run.sh as the document calls it: it cuts once, notices stale parts, and says what it did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.weights.grids import SPECS, assert_same_tensors, go, write_model

DONE = "Tensor parallelism weights have been successfully saved."


@pytest.fixture
def model(tmp_path) -> Path:
    return write_model(tmp_path / "model", SPECS["qwen1"])


def cut(repo: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("input_dir", "output_dir", "world_size")
    }
    return subprocess.run(
        ["bash", str(repo / "scripts" / "cut_model_and_run.sh"), *words],
        env={**environment, "PY": sys.executable, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_first_call_cuts_into_one_folder_per_card(repo, model, tmp_path):
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    result = cut(repo, input_dir=str(model), world_size="4")
    assert result.returncode == 0, result.stderr
    assert DONE in result.stdout and "make predict" in result.stdout
    parts = model / "part_model"
    for rank in range(4):
        assert (parts / str(rank) / "tokenizer.json").is_file()
        config = json.loads((parts / str(rank) / "config.json").read_text())
        assert (config["rank"], config["world_size"], config["model_type"]) == (rank, 4, "qwen")
    assert before == {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    assert_same_tensors(model, go(parts, tmp_path / "back", "hf"))


def test_current_parts_are_used_again(repo, model):
    words = ("--input_dir", str(model), "--world_size=2")
    assert cut(repo, *words).returncode == 0
    stamp = (model / "part_model" / "0" / "model.safetensors").stat().st_mtime_ns
    result = cut(repo, *words)
    assert result.returncode == 0 and "current" in result.stdout and DONE not in result.stdout
    assert (model / "part_model" / "0" / "model.safetensors").stat().st_mtime_ns == stamp


def test_variables_edited_inside_the_file_count(repo, model, tmp_path):
    script = tmp_path / "scripts" / "cut_model_and_run.sh"
    script.parent.mkdir()
    text = (repo / "scripts" / "cut_model_and_run.sh").read_text()
    for name, value in (("input_dir", str(model)), ("output_dir", str(tmp_path / "out")), ("world_size", "2")):
        line = next(line for line in text.splitlines() if line.startswith(f"{name}="))
        text = text.replace(line, f"{name}={value}")
    script.write_text(text)
    (tmp_path / "tools").symlink_to(repo / "tools")
    result = subprocess.run(
        ["bash", str(script)], env={**os.environ, "PY": sys.executable}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["0", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["weights", "world_size", "missing part", "truncated part"])
def test_stale_parts_are_refused_and_cut_again_when_told(repo, model, change):
    assert cut(repo, input_dir=str(model), world_size="4").returncode == 0
    world = "4"
    if change == "weights":
        write_model(model.parent / "other", SPECS["qwen1"], seed=9)
        os.replace(model.parent / "other" / "model.safetensors", model / "model.safetensors")
    elif change == "world_size":
        world = "2"
    elif change == "missing part":
        (model / "part_model" / "3" / "config.json").unlink()
    else:
        with (model / "part_model" / "1" / "model.safetensors").open("r+b") as file:
            file.truncate(5000)
    result = cut(repo, input_dir=str(model), world_size=world)
    assert result.returncode == 2 and "these parts are not what would be cut now" in result.stderr
    assert "recut=1" in result.stderr
    result = cut(repo, input_dir=str(model), world_size=world, recut="1")
    assert result.returncode == 0 and DONE in result.stdout, result.stderr
    folders = sorted(path.name for path in (model / "part_model").iterdir() if path.is_dir())
    assert folders == [str(rank) for rank in range(int(world))]  # nothing of the former cut is left among them
    assert cut(repo, input_dir=str(model), world_size=world).returncode == 0


def test_a_folder_that_was_not_cut_here_is_never_replaced(repo, model):
    (model / "part_model").mkdir()
    (model / "part_model" / "thesis.txt").write_text("x")
    result = cut(repo, input_dir=str(model), world_size="2", recut="1")
    assert result.returncode == 2 and "not replaced" in result.stderr
    assert (model / "part_model" / "thesis.txt").is_file()


@pytest.mark.parametrize(
    ("words", "variables", "match"),
    [
        ((), {}, "input_dir is not set"),
        ((), {"input_dir": "/nowhere"}, "not found"),
        (("--world_size", "0"), {"input_dir": "."}, "no number of cards"),
        (("train",), {"input_dir": "."}, "neither a task nor a flag"),
    ],
)
def test_mistakes_end_with_status_2(repo, words, variables, match):
    result = cut(repo, *words, **variables)
    assert result.returncode == 2 and match in result.stderr and "try:" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_width_that_tears_heads_names_those_that_work(repo, model):
    result = cut(repo, input_dir=str(model), world_size="3")
    assert result.returncode == 2 and "widths that work: 2, 4, 8" in result.stderr
    assert not (model / "part_model").exists()
