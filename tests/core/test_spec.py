"""Sizes against the released config.json files and their published parameter counts."""

from __future__ import annotations

import json

import pytest

from research.core.errors import WeightsError
from research.core.spec import spec_differences, spec_from_hf, spec_to_hf
from research.registry import model_config, model_files, model_spec

# config.json files in the test data -> the model preset they belong to. The MLC copy of Qwen1.5-1.8B ties its head,
# which the release does not: the contradiction is kept as a test of the refusal below.
PRESETS = {
    "Qwen-1_8B-Chat.json": "qwen_1_8b",
    "Qwen-7B.json": "qwen_7b",
    "Qwen-7B__legacy_2023-08.json": "qwen_7b",
    "Qwen-14B-Chat.json": "qwen_14b",
    "Qwen-72B.json": "qwen_72b",
    "Qwen1.5-0.5B.json": "qwen1_5_0_5b",
    "Qwen1.5-0.5B-Chat.json": "qwen1_5_0_5b",
    "Qwen1.5-7B-Chat.json": "qwen1_5_7b",
    "Qwen1.5-14B-Chat.json": "qwen1_5_14b",
    "Qwen1.5-72B-Chat.json": "qwen1_5_72b",
    "Qwen1.5-110B.json": "qwen1_5_110b",
    "Qwen1.5-MoE-A2.7B.json": "qwen1_5_moe_a2_7b",
    "Qwen1.5-MoE-A2.7B-Chat.json": "qwen1_5_moe_a2_7b",
    "CodeQwen1.5-7B-Chat.json": "codeqwen1_5_7b",
    "Qwen2-0.5B.json": "qwen2_0_5b",
    "Qwen2-0.5B-Instruct.json": "qwen2_0_5b",
    "Qwen2-1.5B-Instruct.json": "qwen2_1_5b",
    "Qwen2-7B.json": "qwen2_7b",
    "Qwen2-7B-Instruct.json": "qwen2_7b",
    "Qwen2-72B.json": "qwen2_72b",
    "Qwen2-72B-Instruct.json": "qwen2_72b",
    "Qwen2-57B-A14B.json": "qwen2_57b_a14b",
    "gte-Qwen2-7B-instruct.json": "gte_qwen2_7b",
    "Qwen2.5-0.5B.json": "qwen2_5_0_5b",
    "Qwen2.5-3B-Instruct.json": "qwen2_5_3b",
    "Qwen2.5-7B.json": "qwen2_5_7b",
    "Qwen2.5-7B-Instruct.json": "qwen2_5_7b",
    "Qwen2.5-14B-Instruct.json": "qwen2_5_14b",
    "Qwen2.5-72B-Instruct.json": "qwen2_5_72b",
    "Qwen2.5-Coder-7B.json": "qwen2_5_coder_7b",
}

# Billions of parameters of the sizes without a config.json in the test data, as published on the model cards (rounded).
CARDS = {
    "qwen1_5_1_8b": 1.837,
    "qwen1_5_4b": 3.950,
    "qwen1_5_32b": 32.512,
    "qwen2_5_1_5b": 1.544,
    "qwen2_5_32b": 32.764,
}


@pytest.mark.parametrize(("file", "model"), sorted(PRESETS.items()))
def test_preset_is_the_released_architecture(shared_data, file, model):
    released = spec_from_hf(json.loads((shared_data / "configs" / file).read_text()), file)
    assert spec_differences(model_spec(model_config(model)), released) == []


def test_parameter_counts_are_exact(shared_data):
    sources = json.loads((shared_data / "configs" / "SOURCES.json").read_text())
    counted = 0
    for row in sources:
        if row["file"] in PRESETS and "parameters" in row:
            assert model_spec(model_config(PRESETS[row["file"]])).parameters() == row["parameters"], row["file"]
            counted += 1
    assert counted == len([name for name in PRESETS if "legacy" not in name])


def test_every_released_size_is_checked_somewhere():
    released = {name for name in model_files() if not name.endswith("_tiny")}
    assert released == set(PRESETS.values()) | set(CARDS)


@pytest.mark.parametrize(("model", "billions"), sorted(CARDS.items()))
def test_sizes_without_a_config_match_their_card(model, billions):
    assert round(model_spec(model_config(model)).parameters() / 1e9, 3) == billions


@pytest.mark.parametrize(("model", "billions"), [("qwen1_5_moe_a2_7b", 2.689), ("qwen2_57b_a14b", 14.249)])
def test_active_parameters_of_the_mixtures(model, billions):
    assert round(model_spec(model_config(model)).active_parameters() / 1e9, 3) == billions


@pytest.mark.parametrize("model", sorted(model_files()))
def test_config_json_round_trip_keeps_every_field(model):
    spec = model_spec(model_config(model), tokens=1000)
    assert spec_from_hf(spec_to_hf(spec)) == spec


def test_contradicting_checkpoint_lists_the_differing_keys(shared_data):
    tied = spec_from_hf(json.loads((shared_data / "configs" / "Qwen1.5-1.8B-Chat__mlc.json").read_text()))
    rows = spec_differences(model_spec(model_config("qwen1_5_1_8b")), tied)
    assert rows == ["tied: expected False, found True"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"hidden_size": None}, "wrong type"),
        ({"num_attention_heads": 5, "num_key_value_heads": 2, "hidden_size": 20}, "evenly"),
        ({"rope_scaling": {"type": "su", "factor": 2}}, "su"),
    ],
)
def test_unusable_config_says_why(change, says):
    hf = spec_to_hf(model_spec(model_config("qwen2_5_0_5b"))) | change
    with pytest.raises(WeightsError, match=says):
        spec_from_hf(hf)


def test_missing_key_is_named():
    hf = spec_to_hf(model_spec(model_config("qwen2_5_0_5b")))
    del hf["num_hidden_layers"]
    with pytest.raises(WeightsError, match="num_hidden_layers"):
        spec_from_hf(hf, "folder/config.json")


def test_yarn_and_windows_survive_the_round_trip():
    hf = spec_to_hf(model_spec(model_config("qwen2_5_7b")))
    hf["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    hf |= {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 20}
    spec = spec_from_hf(hf)
    assert spec.usable_length == 131072
    assert spec.sliding_layers == tuple(range(20, 28))
    assert spec_from_hf(spec_to_hf(spec)) == spec
