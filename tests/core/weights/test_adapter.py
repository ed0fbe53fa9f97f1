"""LoRA adapters between PEFT and MindFormers: names, configs, fused c_attn, and adapters for another model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from research.core.errors import WeightsError
from research.core.spec import spec_from_hf
from research.core.weights.convert import ConvertOptions
from research.core.weights.convert_adapter import convert_adapter
from research.core.weights.opened import HUGGINGFACE, MINDFORMERS, OpenOptions
from tests.core.weights.cases import Case, mindformers_weights, same

RANK = 3
BASE = "base_model.model."


def write(folder: Path, shapes: dict[str, tuple[int, int]], **config) -> dict[str, torch.Tensor]:
    """A PEFT folder; ``shapes``: module -> (out, in)."""
    random = torch.Generator().manual_seed(1)
    tensors = {}
    for module, (out, width) in shapes.items():
        tensors[f"{BASE}{module}.lora_A.weight"] = torch.randn(RANK, width, generator=random)
        tensors[f"{BASE}{module}.lora_B.weight"] = torch.randn(out, RANK, generator=random)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "rank_pattern": {}, "alpha_pattern": {}} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return tensors


def qwen2_modules(case: Case) -> dict[str, tuple[int, int]]:
    h, kv = case.hidden, case.kv * case.size
    shapes = {}
    for n in range(case.layers):
        at = f"model.layers.{n}."
        shapes |= {at + "self_attn.q_proj": (h, h), at + "self_attn.v_proj": (kv, h), at + "self_attn.o_proj": (h, h)}
        shapes |= {at + "mlp.gate_proj": (case.ffn, h), at + "mlp.up_proj": (case.ffn, h)}
        shapes[at + "mlp.down_proj"] = (h, case.ffn)
    return shapes


def qwen1_modules(case: Case) -> dict[str, tuple[int, int]]:
    h = case.hidden
    shapes = {}
    for n in range(case.layers):
        at = f"transformer.h.{n}."
        shapes |= {at + "attn.c_attn": (3 * h, h), at + "attn.c_proj": (h, h)}
        shapes |= {at + "mlp.w1": (case.ffn, h), at + "mlp.w2": (case.ffn, h), at + "mlp.c_proj": (h, case.ffn)}
    return shapes


@pytest.mark.parametrize("files", ["ckpt", "safetensors"])
def test_qwen2_adapter_there_and_back(tmp_path, files):
    case = Case("qwen2")
    tensors = write(
        tmp_path / "peft", qwen2_modules(case), target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        rank_pattern={"v_proj": 3}, alpha_pattern={"model.layers.0.mlp.up_proj": 8},
    )  # fmt: skip
    before = (tmp_path / "peft" / "adapter_config.json").read_bytes()
    target = tmp_path / "ms" / f"adapter.{files}"
    convert_adapter(tmp_path / "peft", target, ConvertOptions(to=MINDFORMERS), spec=spec_from_hf(case.config()))
    assert (tmp_path / "peft" / "adapter_config.json").read_bytes() == before  # not rewritten in place
    config = json.loads((tmp_path / "ms" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["wq", "wv", "wo", "w1", "w3", "w2"]
    assert config["rank_pattern"] == {"wv": 3} and config["alpha_pattern"] == {"model.layers.0.feed_forward.w3": 8}
    if files == "safetensors":
        found = load_file(target)
        for old, new in (("self_attn.q_proj", "attention.wq"), ("mlp.gate_proj", "feed_forward.w1"),
                         ("mlp.up_proj", "feed_forward.w3"), ("mlp.down_proj", "feed_forward.w2")):  # fmt: skip
            for half in "AB":
                key = f"model.layers.1.{new}.lora_{half.lower()}"
                assert torch.equal(found[key], tensors[f"{BASE}model.layers.1.{old}.lora_{half}.weight"])
        assert len(found) == len(tensors)
    convert_adapter(target, tmp_path / "back", ConvertOptions(to=HUGGINGFACE))
    assert same(load_file(tmp_path / "back" / "adapter_model.safetensors"), tensors)
    back = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert back["target_modules"] == ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert back["alpha_pattern"] == {"model.layers.0.mlp.up_proj": 8}


def test_qwen1_fused_adapter_there_and_back(tmp_path):
    case = Case("qwen")
    h = case.hidden
    tensors = write(
        tmp_path / "peft", qwen1_modules(case), target_modules=["c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj"]
    )
    convert_adapter(tmp_path / "peft", tmp_path / "a.safetensors", ConvertOptions(to=MINDFORMERS))
    found = load_file(tmp_path / "a.safetensors")
    fused = f"{BASE}transformer.h.1.attn.c_attn.lora_"
    for place, key in enumerate(("wq", "wk", "wv")):
        at = f"transformer.layers.1.attention.{key}.lora_"
        assert torch.equal(found[at + "a"], tensors[fused + "A.weight"])
        assert torch.equal(found[at + "b"], tensors[fused + "B.weight"][place * h : (place + 1) * h])
    # Qwen v1's gate is w2 in Hugging Face and w3 in MindFormers
    gate = "transformer.layers.0.feed_forward.w3.lora_a"
    assert torch.equal(found[gate], tensors[f"{BASE}transformer.h.0.mlp.w2.lora_A.weight"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["wq", "wk", "wv", "attention.wo", "w1", "w3", "feed_forward.w2"]
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "back", ConvertOptions(to=HUGGINGFACE))
    assert same(load_file(tmp_path / "back" / "adapter_model.safetensors"), tensors)
    back = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert back["target_modules"] == ["c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj"]


def test_separate_adapters_on_q_k_v_do_not_fit_one_c_attn(tmp_path):
    case = Case("qwen", layers=1)
    write(tmp_path / "peft", qwen1_modules(case))
    convert_adapter(tmp_path / "peft", tmp_path / "a.safetensors", ConvertOptions(to=MINDFORMERS))
    found = load_file(tmp_path / "a.safetensors")
    found["transformer.layers.0.attention.wk.lora_a"][0, 0] += 1
    save_file(found, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="should be copies of one tensor but differ"):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "back", ConvertOptions(to=HUGGINGFACE))
    del found["transformer.layers.0.attention.wk.lora_a"], found["transformer.layers.0.attention.wk.lora_b"]
    save_file(found, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="wk carries no adapter"):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "back", ConvertOptions(to=HUGGINGFACE))


def test_a_regular_expression_of_modules_is_translated(tmp_path):
    case = Case("qwen2")
    write(tmp_path / "peft", qwen2_modules(case), target_modules=r".*\.(q_proj|v_proj)|.*mlp\.(gate|up)_proj")
    convert_adapter(tmp_path / "peft", tmp_path / "a.ckpt", ConvertOptions(to=MINDFORMERS))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"].startswith(r".*\.(wq|wv)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32, "num_attention_heads": 8}, "the adapter is for a matrix"),
        ({"num_hidden_layers": 1}, "the model has no model.layers.1"),
        ({"intermediate_size": 9}, "the adapter is for a matrix"),
    ],
)
def test_an_adapter_for_another_model(tmp_path, change, message):
    case = Case("qwen2")
    write(tmp_path / "peft", qwen2_modules(case))
    spec = spec_from_hf(case.config() | change)
    with pytest.raises(WeightsError, match=message):
        convert_adapter(tmp_path / "peft", tmp_path / "x" / "a.ckpt", ConvertOptions(to=MINDFORMERS), spec=spec)
    assert not (tmp_path / "x").exists()


def test_an_adapter_of_another_generation(tmp_path):
    write(tmp_path / "peft", qwen1_modules(Case("qwen")))
    spec = spec_from_hf(Case("qwen2").config())
    with pytest.raises(WeightsError, match="for Qwen v1, the model is qwen2"):
        convert_adapter(tmp_path / "peft", tmp_path / "a.ckpt", ConvertOptions(to=MINDFORMERS), spec=spec)


def test_adapters_that_mindformers_has_no_place_for(tmp_path):
    write(tmp_path / "experts", {"model.layers.0.mlp.experts.0.up_proj": (5, 8)})
    with pytest.raises(WeightsError, match="no place"):
        convert_adapter(tmp_path / "experts", tmp_path / "a.ckpt", ConvertOptions(to=MINDFORMERS))
    write(tmp_path / "dora", qwen2_modules(Case("qwen2")), use_dora=True)
    with pytest.raises(WeightsError, match="use_dora"):
        convert_adapter(tmp_path / "dora", tmp_path / "a.ckpt", ConvertOptions(to=MINDFORMERS))


def test_a_pickled_adapter_needs_the_flag(tmp_path):
    folder = tmp_path / "peft"
    tensors = write(folder, qwen2_modules(Case("qwen2")))
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(WeightsError, match="pickle can run code"):
        convert_adapter(folder, tmp_path / "a.ckpt", ConvertOptions(to=MINDFORMERS))
    convert_adapter(folder, tmp_path / "a.ckpt", ConvertOptions(to=MINDFORMERS), OpenOptions(allow_pickle=True))
    convert_adapter(tmp_path / "a.ckpt", tmp_path / "back", ConvertOptions(to=HUGGINGFACE))
    assert same(load_file(tmp_path / "back" / "adapter_model.safetensors"), tensors)


def test_the_adapter_is_taken_out_of_a_training_checkpoint(tmp_path):
    case = Case("qwen2")
    tensors = write(tmp_path / "peft", qwen2_modules(case))
    convert_adapter(tmp_path / "peft", tmp_path / "a.safetensors", ConvertOptions(to=MINDFORMERS))
    found = load_file(tmp_path / "a.safetensors")
    state = {f"adam_m.{name}": value.clone() for name, value in found.items()} | {"epoch_num": torch.tensor(3)}
    base = mindformers_weights(case, case.weights())
    save_file(found | state | base, tmp_path / "a.safetensors")
    summary = convert_adapter(tmp_path / "a.safetensors", tmp_path / "back", ConvertOptions(to=HUGGINGFACE))
    assert same(load_file(tmp_path / "back" / "adapter_model.safetensors"), tensors)
    assert set(summary.unused) == set(state) | set(base)


def test_a_trained_adapter_of_peft_comes_back_unchanged(shared_data, tmp_path):
    folder = shared_data / "lora" / "qwen2.5-0.5b-instruct_r8"
    spec = spec_from_hf(json.loads((shared_data / "configs" / "Qwen2.5-0.5B.json").read_text()))
    convert_adapter(folder, tmp_path / "a.ckpt", ConvertOptions(to=MINDFORMERS), spec=spec)
    convert_adapter(tmp_path / "a.ckpt", tmp_path / "back", ConvertOptions(to=HUGGINGFACE))
    assert same(
        load_file(tmp_path / "back" / "adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    )
    other = spec_from_hf(json.loads((shared_data / "configs" / "Qwen2.5-7B.json").read_text()))
    with pytest.raises(WeightsError, match="the adapter is for a matrix"):
        convert_adapter(folder, tmp_path / "b.ckpt", ConvertOptions(to=MINDFORMERS), spec=other)
