"""Many adapters in one batch against peft, one model per adapter; and what the table of adapters refuses."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from research.core.engine.adapters import Adapters, load_table, read_table
from research.core.errors import ConfigError, WeightsError
from research.core.torch.multi_lora import AdapterSlots, SlotLinear
from research.core.torch.weights import load_decoder

SIZES = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
ADAPTERS = {
    "wide": {"r": 8, "lora_alpha": 24, "target_modules": "all-linear"},
    "attention": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "rs": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["down_proj", "o_proj"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["up_proj", "k_proj"],
        "rank_pattern": {"layers.1.self_attn.k_proj": 5},
        "alpha_pattern": {"up_proj": 9},
    },
}
IDS = torch.randint(0, 211, (6, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny dense model in transformers, its folder, and the folders of its adapters with all weights random."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, attn_implementation="eager")).eval()
    model.save_pretrained(folder / "base")
    for number, (name, settings) in enumerate(ADAPTERS.items()):
        _random_adapter(Qwen2ForCausalLM.from_pretrained(folder / "base"), settings, folder / name, number)
    return model, folder


def _random_adapter(model, settings: dict, folder, seed: int) -> None:
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    tuned.save_pretrained(folder)


def _peft_logits(folder, name, ids):
    model = Qwen2ForCausalLM.from_pretrained(folder / "base", attn_implementation="eager").eval()
    return peft.PeftModel.from_pretrained(model, folder / name).eval()(ids).logits


@torch.no_grad()
def test_every_row_of_a_mixed_batch_has_the_logits_of_its_own_peft_model(base):
    model, folder = base
    decoder = load_decoder(folder / "base", torch.float32)
    alone = decoder(IDS)
    slots = AdapterSlots(decoder)
    table = Adapters(slots)
    for name in ADAPTERS:  # ranks grow while they are loaded: 8, then smaller ones behind it; slots grow too
        table.load(name, folder / name)
    names = ["wide", None, "patterns", "rs", "attention", "wide"]
    numbers = [0 if name is None else table.find(name).slot for name in names]

    slots.route([IDS.shape[1]] * len(names), numbers)
    assert slots.routing.mask_NS is None  # long runs: one product per run
    mixed = decoder(IDS)
    slots.route([4] * len(names), numbers)
    assert slots.routing.mask_NS is not None  # short runs: one masked product
    short = decoder(IDS[:, :4])
    for row, name in enumerate(names):
        ids = IDS[row : row + 1]
        expected = model(ids).logits if name is None else _peft_logits(folder, name, ids)
        # fp32 logits around 1, other kernels and another order of sums
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(short[row : row + 1], expected[:, :4], rtol=0, atol=1e-4)
    assert torch.equal(mixed[1], alone[1])  # the base's row, bit for bit

    # Unloading one leaves the others alone, and its slot is taken by the next.
    table.unload("wide")
    again = table.load("other", folder / "attention")
    assert again.slot == numbers[0] and again.generation == len(ADAPTERS) + 1
    slots.route([IDS.shape[1]] * 2, [again.slot, numbers[3]])
    got = decoder(IDS[[4, 3]])
    torch.testing.assert_close(got, mixed[[4, 3]], rtol=0, atol=1e-4)
    for name in table.names:
        table.unload(name)
    slots.route()
    assert not any(isinstance(module, SlotLinear) for module in decoder.modules())
    assert torch.equal(decoder(IDS), alone)


@torch.no_grad()
def test_linears_of_a_mixture_carry_adapters_and_its_routed_experts_are_refused(tmp_path):
    torch.manual_seed(1)
    sizes = {**SIZES, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, attn_implementation="eager")).eval()
    model.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "shared_expert.down_proj", "shared_expert.gate_proj", "shared_expert_gate"]
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    _random_adapter(Qwen2MoeForCausalLM.from_pretrained(tmp_path / "base"), settings, tmp_path / "tuned", 5)
    decoder = load_decoder(tmp_path / "base", torch.float32)
    slots = AdapterSlots(decoder)
    slots.load(1, tmp_path / "tuned")
    slots.route([24, 24], [0, 1])
    got = decoder(IDS[:2])
    base = Qwen2MoeForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    torch.testing.assert_close(got[:1], base(IDS[:1]).logits, rtol=0, atol=1e-4)
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "tuned").eval()
    torch.testing.assert_close(got[1:], tuned(IDS[1:2]).logits, rtol=0, atol=1e-4)

    tensors = load_file(tmp_path / "tuned" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.experts.1.up_proj.lora_{}.weight"
    expert = {key.format("A"): torch.zeros(4, 32), key.format("B"): torch.zeros(16, 4)}
    save_file({**tensors, **expert}, tmp_path / "tuned" / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match=r"experts\.1\.up_proj.*routed experts"):
        slots.load(2, tmp_path / "tuned")


def test_adapters_that_do_not_fit_are_refused_by_tensor_and_change_nothing(base, tmp_path):
    _, folder = base
    decoder = load_decoder(folder / "base", torch.float32)
    table = Adapters(AdapterSlots(decoder))
    bad = tmp_path / "bad"

    def with_tensors(change) -> None:
        shutil.copytree(folder / "attention", bad, dirs_exist_ok=True)
        tensors = load_file(folder / "attention" / "adapter_model.safetensors")
        save_file(change(tensors), bad / "adapter_model.safetensors")

    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    with_tensors(lambda tensors: {**tensors, name: torch.zeros(99, 3)})
    with pytest.raises(WeightsError, match=r"layers\.1\.self_attn\.v_proj\.lora_B\.weight is 99x3.*needs 16x3"):
        table.load("bad", bad)
    with_tensors(lambda tensors: {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(WeightsError, match=r"v_proj\.lora_B\.weight is missing"):
        table.load("bad", bad)
    head = {f"base_model.model.lm_head.lora_{part}.weight": torch.zeros(3, 3) for part in "AB"}
    with_tensors(lambda tensors: {**tensors, **head})
    with pytest.raises(WeightsError, match=r"lm_head.*output matrix"):
        table.load("bad", bad)
    assert table.names == [] and not any(isinstance(module, SlotLinear) for module in decoder.modules())

    adapter = table.load("good", folder / "attention")
    for call, words in (
        (lambda: table.find("goood"), "not a loaded adapter.*\n.*good"),
        (lambda: table.load("good", folder / "rs"), "loaded already"),
        (lambda: table.load("base", folder / "rs"), "cannot be an adapter's name"),
        (lambda: table.unload("base"), "cannot be unloaded"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()
    assert table.find(None) is None and table.find("base") is None
    adapter.users += 1
    with pytest.raises(ConfigError, match="in use by 1 request"):
        table.unload("good")
    adapter.users -= 1
    table.unload("good")


def test_lora_adapter_json_is_loaded_and_what_is_wrong_in_it_is_named(base, tmp_path):
    _, folder = base
    weights = tmp_path / "weights"
    weights.mkdir()
    assert read_table(weights) == {}
    file = weights / "lora_adapter.json"
    shutil.copytree(folder / "rs", weights / "beside")
    file.write_text(json.dumps({"one": str(folder / "wide"), "two": "beside"}))
    table = Adapters(AdapterSlots(load_decoder(folder / "base", torch.float32)))
    load_table(table, weights)
    assert table.names == ["one", "two"]
    for text, words in (
        ('{"one": "a", "one": "b"}', "'one' stands in it twice"),
        ('{"base": "beside"}', "'base' is the model"),
        ('["beside"]', "one JSON object"),
        ('{"one": }', "not valid JSON"),
        ('{"one": "nowhere"}', "'one' is not there.*nowhere"),
    ):
        file.write_text(text)
        with pytest.raises(WeightsError, match=words):
            read_table(weights)


@torch.no_grad()
def test_a_published_adapter_has_pefts_logits_in_a_mixed_batch(shared_data, tmp_path):
    """The adapter's real weights on the real model's sizes, with two of its 24 layers and random base weights."""
    source = shared_data / "lora" / "qwen2.5-0.5b-instruct_r8"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=896,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    shutil.copyfile(source / "adapter_config.json", tuned / "adapter_config.json")
    tensors = load_file(source / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if any(f"layers.{n}." in key for n in (0, 1))}
    save_file(kept, tuned / "adapter_model.safetensors")
    decoder = load_decoder(tmp_path / "base", torch.float32)
    slots = AdapterSlots(decoder)
    slots.load(1, tuned)
    slots.route([24, 24], [0, 1])
    got = decoder(IDS[:2])
    base = Qwen2ForCausalLM.from_pretrained(tmp_path / "base").eval()
    torch.testing.assert_close(got[:1], base(IDS[:1]).logits, rtol=0, atol=1e-4)
    expected = peft.PeftModel.from_pretrained(base, tuned).eval()(IDS[1:2]).logits
    torch.testing.assert_close(got[1:], expected, rtol=0, atol=1e-4)
    assert (got[1:] - decoder(IDS[:2])[:1]).abs().max() > 1e-3
