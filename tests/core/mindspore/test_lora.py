"""LoRA in MindSpore against the torch pass and peft: targets, initial values, one step, and files in both directions."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import Tensor
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from research.core.config.schema import LoraConfig
from research.core.errors import ConfigError, WeightsError
from research.core.lora import WEIGHTS_FILE
from research.core.mindspore import lora
from research.core.mindspore.decoder import Decoder
from research.core.mindspore.dropout import Dropout, new_key, set_key
from research.core.mindspore.layout import Layout
from research.core.mindspore.loss import Objective, shifted_targets
from research.core.spec import spec_from_hf
from research.core.torch import lora as torch_lora
from research.core.torch.layout import Layout as TorchLayout
from research.core.torch.loss import Objective as TorchObjective
from tests.core.mindspore.peers import Gradients, as_tensor, layout_inputs, twin
from tests.core.torch.peers import make_pair, random_ids
from tests.core.torch.test_lora import CHOICES, SIZES

IDS = random_ids(2, 20)


def small_pair(variant: str):
    return make_pair(variant, num_hidden_layers=2)


def adapted_pair(variant: str, cfg: LoraConfig):
    """-> the torch decoder and its MindSpore twin with the same adapters, B not zero."""
    ours = small_pair(variant)[1]
    decoder = twin(ours)
    assert torch_lora.add_lora(ours, cfg, seed=3) == lora.add_lora(decoder, cfg, seed=3)
    torch.manual_seed(1)
    for (name, theirs), (same, layer) in zip(torch_lora.lora_layers(ours), lora.lora_layers(decoder), strict=True):
        assert name == same and layer.scaling == theirs.scaling
        np.testing.assert_allclose(layer.lora_A.asnumpy(), theirs.lora_A.detach().numpy(), atol=1e-7, rtol=0)
        theirs.lora_B.data.normal_(std=0.1)  # at zero the gradient of A would be zero too
        layer.lora_B.set_data(Tensor(theirs.lora_B.detach().numpy()))
    return ours, decoder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "choice"),
    [
        ("gqa", CHOICES["patterns"]),
        ("tied", CHOICES["rslora"] | CHOICES["all-linear"]),
        ("moe", CHOICES["all-linear"]),
    ],
    ids=["patterns", "rslora of all, tied", "experts"],
)
def test_a_step_has_the_loss_and_adapter_gradients_of_torch(variant, choice):
    cfg = LoraConfig(rank=4, alpha=8.0, **choice)
    ours, decoder = adapted_pair(variant, cfg)
    total, _ = TorchObjective(ours, 1024)(IDS, IDS, TorchLayout.full(2, 20))
    total.backward()
    step = Gradients(Objective(decoder))
    where, targets = shifted_targets(IDS.numpy(), 40)
    inputs = (as_tensor(IDS), *layout_inputs(Layout.full(2, 20)), Tensor(where), Tensor(targets))
    (found, _), gradients = step(*inputs)
    assert float(found) == pytest.approx(float(total.detach()), rel=1e-5)
    expected = {name: p.grad.numpy() for name, p in ours.named_parameters() if p.requires_grad}
    assert {p.name for p in step.weights} == expected.keys()
    for parameter, gradient in zip(step.weights, gradients):
        reference = expected[parameter.name]
        assert np.linalg.norm(gradient.asnumpy() - reference) <= 1e-4 * np.linalg.norm(reference), parameter.name


@pytest.mark.slow
def test_saved_adapter_gives_the_same_logits_in_peft_and_back_and_merged(tmp_path):
    theirs, _ = small_pair("gqa")
    cfg = LoraConfig(rank=4, alpha=8.0, **CHOICES["patterns"])
    _, decoder = adapted_pair("gqa", cfg)
    expected = decoder(as_tensor(IDS)).asnumpy()
    lora.save_adapter(decoder, tmp_path / "a", cfg)
    loaded = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "a")).eval()
    with torch.no_grad():
        np.testing.assert_allclose(loaded(input_ids=IDS).logits.numpy(), expected, atol=1e-4, rtol=0)
    loaded.save_pretrained(str(tmp_path / "b"))
    again = twin(small_pair("gqa")[1])
    names = [p.name for p in again.get_parameters()]
    back = lora.load_adapter(again, tmp_path / "b")
    assert (back.rank, back.rank_pattern) == (cfg.rank, cfg.rank_pattern) and lora.has_lora(again)
    assert {p.name for p in again.trainable_params()} == {
        f"{name}.lora_{part}" for name, _ in lora.lora_layers(again) for part in "AB"
    }
    assert set(names) < {p.name for p in again.get_parameters()}
    lora.merge_lora(again)
    assert not lora.has_lora(again) and [p.name for p in again.get_parameters()] == names
    np.testing.assert_allclose(again(as_tensor(IDS)).asnumpy(), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_dropout_acts_in_training_only_and_as_its_key_says():
    decoder = twin(small_pair("gqa")[1])
    lora.add_lora(decoder, LoraConfig(rank=4, dropout=0.5, target_modules=["q_proj"]))
    for _, layer in lora.lora_layers(decoder):
        layer.lora_B.set_data(Tensor(np.random.default_rng(0).standard_normal(layer.lora_B.shape).astype(np.float32)))
    ids = as_tensor(IDS)
    assert np.array_equal(decoder(ids).asnumpy(), decoder(ids).asnumpy())
    decoder.set_train()
    seen = []
    for key in ((1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0), (1, 0, 0)):
        set_key(decoder, *key)
        seen.append(decoder(ids).asnumpy())
    assert np.array_equal(seen[0], seen[4])
    assert all(not np.array_equal(seen[0], other) for other in seen[1:4])


def test_dropout_keeps_its_share_scales_it_and_passes_the_same_elements_gradients():
    cell = Dropout(0.3, new_key(), 5).set_train()
    x = Tensor(np.ones((64, 1000), np.float32))
    out = cell(x).asnumpy()
    assert np.unique(out).tolist() == pytest.approx([0, 1 / 0.7])
    kept = out > 0
    # 4.5 standard deviations of a binomial of 64,000 draws, of its rows, and of neighbours' agreement (0.7^2 + 0.3^2)
    assert abs(kept.mean() - 0.7) < 0.008 and np.abs(kept.mean(1) - 0.7).max() < 0.07
    assert abs((kept[:, 1:] == kept[:, :-1]).mean() - 0.58) < 0.009
    gradient = ms.grad(cell)(x).asnumpy()
    assert np.array_equal(gradient, out)


@pytest.mark.parametrize("choice", CHOICES)
def test_targets_are_those_of_peft(choice):
    cfg = LoraConfig(rank=4, alpha=8.0, **CHOICES[choice])
    config = Qwen2Config(**SIZES)
    wrapped = peft.get_peft_model(
        Qwen2ForCausalLM(config),
        peft.LoraConfig(r=4, target_modules=cfg.target_modules, rank_pattern=cfg.rank_pattern, task_type="CAUSAL_LM"),
    )
    expected = [
        n[len("base_model.model.") :] for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.Linear)
    ]
    decoder = Decoder(spec_from_hf(config.to_dict()))
    assert lora.add_lora(decoder, cfg) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_prj"]}, "did you mean q_proj"),
        ({"target_modules": []}, "no target modules"),
        ({"rank": 0}, "at least 1"),
        ({"rank_pattern": {"w_proj": 4}}, "matches none"),
    ],
)
def test_wrong_settings_are_refused_and_change_nothing(settings, message):
    decoder = twin(small_pair("gqa")[1])
    with pytest.raises(ConfigError, match=message):
        lora.add_lora(decoder, LoraConfig(**settings))
    assert not lora.has_lora(decoder) and all(p.requires_grad for p in decoder.get_parameters())


def test_adapters_of_other_models_and_damaged_ones_are_refused(tmp_path):
    cfg = LoraConfig(rank=4, target_modules=["q_proj"])
    decoder = twin(small_pair("gqa")[1])
    lora.add_lora(decoder, cfg)
    lora.save_adapter(decoder, tmp_path, cfg)
    wide = twin(make_pair("gqa", num_hidden_layers=2, hidden_size=48)[1])
    with pytest.raises(WeightsError, match=r"q_proj\.lora_A\.weight is 4x96, this model needs 4x48"):
        lora.load_adapter(wide, tmp_path)
    shallow = twin(make_pair("gqa", num_hidden_layers=1)[1])
    with pytest.raises(WeightsError, match=r"layers\.1\..*does not have"):
        lora.load_adapter(shallow, tmp_path)
    assert not lora.has_lora(shallow) and all(p.requires_grad for p in shallow.get_parameters())
    file = tmp_path / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="truncated"):
        lora.load_adapter(twin(small_pair("gqa")[1]), tmp_path)


def test_published_adapter_lies_in_its_modules(shared_data):
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
    decoder = Decoder(spec_from_hf(config.to_dict()))
    cfg = lora.load_adapter(decoder, folder)
    stored = load_file(folder / WEIGHTS_FILE)
    assert len(stored) == len(lora.adapter_tensors(decoder)) == 2 * 2 * 24 and cfg.rank == 8
    for key, parameter in lora.adapter_tensors(decoder).items():
        assert np.array_equal(parameter.asnumpy(), stored[key].float().numpy()), key
