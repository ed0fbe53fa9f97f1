"""Random small models on random grids: whatever is written comes back bit for bit."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from research.core.spec import DecoderSpec, MoeSpec
from research.core.weights.opened import OpenOptions
from tests.core.weights.grids import assert_same_tensors, go, write_model

DTYPES = {"F32": "<f4", "F16": "<f2"}


@st.composite
def models(draw) -> tuple[DecoderSpec, int]:
    """A model and a width that it can be cut to."""
    cards = draw(st.sampled_from([2, 4, 8]))
    kv = draw(st.sampled_from([1, 2, 4, 8]))
    heads = max(kv, cards) * draw(st.integers(1, 2))
    family = draw(st.sampled_from(["qwen", "qwen2", "qwen2_moe"]))
    sizes = {
        "model_type": family,
        "layers": draw(st.integers(1, 3)),
        "hidden": draw(st.sampled_from([6, 16])),
        "heads": heads,
        "kv_heads": heads if family == "qwen" else kv,
        "head_dim": draw(st.sampled_from([2, 4])),
        "ffn": cards * draw(st.integers(1, 3)),
        "vocab": draw(st.integers(cards, 30)),
        "max_positions": 32,
        "tied": family != "qwen" and draw(st.booleans()),
    }
    if family == "qwen":
        sizes["hidden"] = heads * sizes["head_dim"]
        sizes["train_length"] = 32
    if family == "qwen2_moe":
        sizes["moe"] = MoeSpec(
            draw(st.integers(1, 3)), 1, cards * draw(st.integers(1, 2)), cards * draw(st.integers(1, 2)),
            sparse_step=draw(st.integers(1, 2)),
        )  # fmt: skip
        sizes["qkv_bias"] = draw(st.booleans())
    return DecoderSpec(**sizes), cards


@pytest.mark.slow
@given(models(), st.data())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_there_and_back_on_any_grid_is_bit_equal(model, data):
    spec, cards = model
    stages = data.draw(st.integers(1, spec.layers), "stages")
    joined = spec.kv_heads % cards == 0 and data.draw(st.booleans(), "joined")
    square = spec.moe is not None and spec.moe.expert_ffn == spec.hidden
    gmm = spec.moe is not None and not square and data.draw(st.booleans(), "gmm")
    first = data.draw(st.sampled_from(["parts", "ranks", "dcp"]), "first")
    second = data.draw(st.sampled_from(["parts", "ranks", "dcp"]), "second")
    root = Path(tempfile.mkdtemp())
    try:
        source = write_model(root / "hf", spec, DTYPES[data.draw(st.sampled_from(list(DTYPES)), "dtype")])
        place, opening = source, None
        for number, (to, tensor) in enumerate(((first, cards), (second, 1))):
            grid = f"tp{tensor}-pp{stages}" + ("-dp2" if to == "ranks" and number else "")
            options = {}
            if to == "ranks":
                options = {
                    "concat": "grouped" if joined else "none",
                    "gmm": gmm,
                    "tied_head": data.draw(st.sampled_from(["copy", "omit"]), "tied_head"),
                    "files": data.draw(st.sampled_from(["ckpt", "safetensors"]), "files"),
                }
            place = go(place, root / f"{number}", to, grid, opening=opening, **options)
            said = OpenOptions(concat="grouped" if joined else "none", gmm=gmm if spec.moe else None)
            opening = said if to == "ranks" else None
        assert_same_tensors(source, go(place, root / "back", "hf", opening=opening))
    finally:
        shutil.rmtree(root)
