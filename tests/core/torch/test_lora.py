"""LoRA against peft: targets, one training step, and files in both directions."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from research.core.config.schema import LoraConfig
from research.core.errors import ConfigError, WeightsError
from research.core.lora import CONFIG_FILE
from research.core.torch import lora

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def _twins() -> tuple[nn.Module, nn.Module]:
    # transformers' own model serves as the decoder: the pass must work on any tree with Hugging Face's names
    torch.manual_seed(0)
    ours = Qwen2ForCausalLM(Qwen2Config(**SIZES, attn_implementation="eager"))
    theirs = Qwen2ForCausalLM(Qwen2Config(**SIZES, attn_implementation="eager"))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _peft_names(model) -> list[str]:
    return [n[len("base_model.model.") :] for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)]


IDS = torch.arange(40).view(2, 20) % 97

CHOICES = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "expression": {"target_modules": r".*layers\.1\..*_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "one full name": {"target_modules": ["model.layers.0.mlp.up_proj", "k_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "o_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 3, "o_proj": 2},
        "alpha_pattern": {r"layers\.1\..*k_proj": 40.0},
    },
    "rslora": {"target_modules": ["down_proj"], "rslora": True},
}


def _peft_config(cfg: LoraConfig) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=cfg.target_modules,
        rank_pattern=cfg.rank_pattern,
        alpha_pattern=cfg.alpha_pattern,
        use_rslora=cfg.rslora,
        task_type="CAUSAL_LM",
    )


@pytest.mark.parametrize("choice", CHOICES)
def test_step_has_the_loss_and_adapter_gradients_of_peft(choice):
    cfg = LoraConfig(rank=4, alpha=8.0, **CHOICES[choice])
    ours, theirs = _twins()
    names = lora.add_lora(ours, cfg, seed=1)
    theirs = peft.get_peft_model(theirs, _peft_config(cfg))
    assert names == _peft_names(theirs)
    state = {}
    for i, (name, layer) in enumerate(lora.lora_layers(ours)):
        torch.manual_seed(i)
        layer.lora_B.data.normal_(std=0.1)  # at zero the gradient of A would be zero too
        other = theirs.base_model.model.get_submodule(name)
        assert other.scaling["default"] == pytest.approx(layer.scaling)
        other.lora_A["default"].weight.data.copy_(layer.lora_A.data)
        other.lora_B["default"].weight.data.copy_(layer.lora_B.data)
        state[name] = (layer, other)
    loss = ours(input_ids=IDS, labels=IDS).loss
    expected = theirs(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    loss.backward()
    expected.backward()
    for layer, other in state.values():
        torch.testing.assert_close(layer.lora_A.grad, other.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(layer.lora_B.grad, other.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-7)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        f"{n}.lora_{part}" for n in names for part in "AB"
    }


@pytest.mark.parametrize("choice", CHOICES)
def test_saved_adapter_gives_the_same_logits_in_peft_and_back(choice, tmp_path):
    cfg = LoraConfig(rank=4, alpha=8.0, **CHOICES[choice])
    ours, theirs = _twins()
    lora.add_lora(ours, cfg, seed=1)
    for _, layer in lora.lora_layers(ours):
        layer.lora_B.data.normal_(std=0.3)
    lora.save_adapter(ours, tmp_path / "a", cfg)
    loaded = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "a")).eval()
    with torch.no_grad():
        expected = ours(input_ids=IDS).logits
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
        loaded.save_pretrained(str(tmp_path / "b"))
        again, _ = _twins()
        back = lora.load_adapter(again, tmp_path / "b")
        torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
        assert (back.rank, back.rslora) == (cfg.rank, cfg.rslora)
        merged = lora.merge_lora(again)
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
        assert not lora.has_lora(merged)


def test_init_has_the_distribution_of_peft_and_follows_the_seed():
    cfg = LoraConfig(rank=16, target_modules=["q_proj"])
    a, b = _twins()
    lora.add_lora(a, cfg, seed=3)
    lora.add_lora(b, cfg, seed=3)
    for (_, x), (_, y) in zip(lora.lora_layers(a), lora.lora_layers(b)):
        assert torch.equal(x.lora_A, y.lora_A) and x.lora_B.abs().sum() == 0
        assert x.lora_A.abs().max() <= 32**-0.5  # kaiming_uniform(a=sqrt 5): bound 1/sqrt(in)
        assert x.lora_A.std().item() == pytest.approx(32**-0.5 / 3**0.5, rel=0.1)


def test_dropout_acts_in_training_only():
    model, _ = _twins()
    lora.add_lora(model, LoraConfig(rank=4, dropout=0.5, target_modules=["q_proj"]))
    for _, layer in lora.lora_layers(model):
        layer.lora_B.data.normal_()
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
        model.eval()
        assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_bf16_base_with_fp32_adapter_computes_in_bf16():
    model, _ = _twins()
    model.to(torch.bfloat16)
    lora.add_lora(model, LoraConfig(rank=4, target_modules=["q_proj"]), dtype=torch.float32)
    model(input_ids=IDS, labels=IDS).loss.backward()
    layer = next(layer for _, layer in lora.lora_layers(model))
    assert layer.lora_B.grad.dtype == torch.float32 and layer.lora_B.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_prj"]}, "did you mean q_proj"),
        ({"target_modules": "q_proj"}, "matches no linear module as a whole"),
        ({"target_modules": []}, "no target modules"),
        ({"rank": 0}, "at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"rank_pattern": {"w_proj": 4}}, "matches none"),
        ({"target_modules": "(q_proj"}, "not a regular expression"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    model, _ = _twins()
    with pytest.raises(ConfigError, match=message):
        lora.add_lora(model, LoraConfig(**settings))


def test_adapter_of_another_size_names_tensor_and_shapes_and_changes_nothing(tmp_path):
    model, _ = _twins()
    cfg = LoraConfig(rank=4, target_modules=["q_proj"])
    lora.add_lora(model, cfg)
    lora.save_adapter(model, tmp_path, cfg)
    other = Qwen2ForCausalLM(Qwen2Config(**SIZES | {"hidden_size": 64}))
    with pytest.raises(
        WeightsError, match=r"layers\.0\.self_attn\.q_proj\.lora_A\.weight is 4x32, this model needs 4x64"
    ):
        lora.load_adapter(other, tmp_path)
    assert not lora.has_lora(other) and all(p.requires_grad for p in other.parameters())


def test_adapter_with_more_layers_is_refused(tmp_path):
    big = Qwen2ForCausalLM(Qwen2Config(**SIZES | {"num_hidden_layers": 3}))
    cfg = LoraConfig(rank=4, target_modules=["q_proj"])
    lora.add_lora(big, cfg)
    lora.save_adapter(big, tmp_path, cfg)
    model, _ = _twins()
    with pytest.raises(WeightsError, match=r"layers\.2\..*does not have"):
        lora.load_adapter(model, tmp_path)


def test_damaged_and_foreign_adapter_folders_are_refused(tmp_path):
    model, _ = _twins()
    with pytest.raises(WeightsError, match="not a PEFT adapter"):
        lora.load_adapter(model, tmp_path)
    cfg = LoraConfig(rank=4, target_modules=["q_proj"])
    lora.add_lora(model, cfg)
    lora.save_adapter(model, tmp_path, cfg)
    whole = (tmp_path / lora.WEIGHTS_FILE).read_bytes()
    (tmp_path / lora.WEIGHTS_FILE).write_bytes(whole[:-100])
    fresh, _ = _twins()
    with pytest.raises(WeightsError, match="truncated"):
        lora.load_adapter(fresh, tmp_path)
    (tmp_path / lora.WEIGHTS_FILE).unlink()
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(WeightsError, match="pickle"):
        lora.load_adapter(fresh, tmp_path)
    settings = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(WeightsError, match="use_dora"):
        lora.load_adapter(fresh, tmp_path)


def test_full_disk_leaves_no_half_written_adapter(tmp_path, monkeypatch):
    model, _ = _twins()
    cfg = LoraConfig(rank=4, target_modules=["q_proj"])
    lora.add_lora(model, cfg)

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(lora, "save_file", full)
    with pytest.raises(OSError):
        lora.save_adapter(model, tmp_path, cfg)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_published_adapter_gives_the_logits_of_peft(shared_data):
    folder = shared_data / "lora" / "qwen2.5-0.5b-instruct_r8"
    config = Qwen2Config(
        vocab_size=200,  # the adapter touches q_proj and v_proj only: their shapes are the released ones
        hidden_size=896,
        intermediate_size=64,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        lora.load_adapter(model, folder)
        ours = model(input_ids=IDS).logits
        torch.manual_seed(0)
        theirs = peft.PeftModel.from_pretrained(Qwen2ForCausalLM(config), str(folder)).eval()
        torch.testing.assert_close(ours, theirs(input_ids=IDS).logits, rtol=0, atol=1e-4)
    assert (ours - plain).abs().max() > 1e-3


def test_all_linear_on_a_mixture_of_experts_is_what_peft_adapts(tmp_path):
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    from research.core.torch.weights import load_decoder

    sizes = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    }
    torch.manual_seed(0)
    theirs = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES | sizes)).eval()
    theirs.save_pretrained(tmp_path / "base")
    ours, lines = load_decoder(tmp_path / "base", torch.float32), []
    cfg = LoraConfig(rank=4)
    names = lora.add_lora(ours, cfg, log=lines.append)
    assert any("experts are stacked" in line for line in lines)
    for _, layer in lora.lora_layers(ours):
        layer.lora_B.data.normal_(std=0.3)
    lora.save_adapter(ours, tmp_path / "adapter", cfg)
    loaded = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    assert names == _peft_names(loaded) and not any(name.endswith("mlp.gate") for name in names)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, ours(IDS), rtol=0, atol=1e-4)
