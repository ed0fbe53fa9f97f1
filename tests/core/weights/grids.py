"""Tiny models of every family for the tests of grids: a Hugging Face folder of random weights, and how to compare two."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from research.core.spec import DecoderSpec, MoeSpec, spec_to_hf
from research.core.weights.blocks import hf_layout
from research.core.weights.grid import parse_grid
from research.core.weights.opened import OpenOptions
from research.core.weights.reshard import ReshardOptions, reshard

SPECS = {
    "gqa": DecoderSpec("qwen2", 3, 32, 8, 2, 8, 48, 100, 64),
    "mha": DecoderSpec("qwen2", 2, 32, 8, 8, 4, 48, 96, 64),
    "tied": DecoderSpec("qwen2", 2, 32, 8, 2, 8, 48, 101, 64, tied=True),
    "moe": DecoderSpec("qwen2_moe", 2, 32, 8, 4, 8, 48, 100, 64, moe=MoeSpec(4, 2, 24, 40)),
    "qwen1": DecoderSpec("qwen", 2, 32, 8, 8, 4, 48, 101, 64, train_length=32),
}


def write_model(folder: Path, spec: DecoderSpec, dtype: str = "<f4", seed: int = 1) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {stored.name: rng.standard_normal(stored.shape).astype(dtype) for stored in hf_layout(spec)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(spec_to_hf(spec)))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    return folder


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = tensors_of(a), tensors_of(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert value.tobytes() == second[name].tobytes(), name


def go(source: Path, target: Path, to: str, grid: str = "tp1", opening: OpenOptions | None = None, **options) -> Path:
    reshard(
        source,
        target,
        ReshardOptions(to=to, grid=parse_grid(grid), **options),
        opening or OpenOptions(),
    )
    return target
