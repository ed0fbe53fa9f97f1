"""Rotary frequencies and their application against transformers' functions."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from research.core.errors import WeightsError
from research.core.spec import spec_from_hf
from research.core.torch.rotary import Rotary, apply_rotary, inverse_frequencies

SCALINGS = [
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 0.8},
    {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 512, "beta_fast": 20, "beta_slow": 3},
    {"rope_type": "linear", "factor": 3.5},
]


def make_config(scaling: dict, theta: float, head_dim: int) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        rope_parameters=scaling | {"rope_theta": theta},
    )


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize(("theta", "head_dim"), [(1e6, 128), (1e4, 64), (5e6, 16)])
def test_scaled_frequencies_equal_transformers(scaling, theta, head_dim):
    config = make_config(scaling, theta, head_dim)
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    frequencies, ours = inverse_frequencies(spec_from_hf(config.to_dict()))
    torch.testing.assert_close(frequencies, expected, rtol=1e-7, atol=0)
    assert ours == pytest.approx(factor, rel=1e-12)


def test_yarn_attention_factor_is_on_for_short_texts_too():
    """It belongs to the configuration, not to the length (vLLM and transformers agree; the paper's is length-free)."""
    spec = spec_from_hf(make_config(SCALINGS[0], 1e6, 64).to_dict())
    tables = Rotary(spec).tables(torch.zeros(1, 1, dtype=torch.long), torch.float32)
    torch.testing.assert_close(tables.cos, torch.full_like(tables.cos, 0.1 * torch.log(torch.tensor(4.0)).item() + 1))


def test_absent_rope_theta_means_what_transformers_takes_it_for():
    config = Qwen2Config.from_dict({"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4})
    given = {k: v for k, v in config.to_dict().items() if k != "rope_parameters"}
    assert spec_from_hf(given).rope_theta == config.rope_parameters["rope_theta"]


@pytest.mark.parametrize("change", [{"mscale": 1.0}, {"truncate": False}, {"partial_rotary_factor": 0.5}])
def test_scaling_that_would_be_computed_otherwise_is_refused(change):
    config = make_config(SCALINGS[0], 1e6, 64).to_dict()
    config["rope_parameters"] |= change
    with pytest.raises(WeightsError, match=next(iter(change))):
        spec_from_hf(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_bit_equal_to_transformers(dtype):
    config = make_config({"rope_type": "default"}, 1e6, 32)
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 11, heads, 32, generator=random).to(dtype) for heads in (4, 2))
    positions = torch.randint(0, 30000, (2, 11), generator=random)
    frequencies, _ = Qwen2RotaryEmbedding.compute_default_rope_parameters(config)
    angles = positions[..., None].float() * frequencies
    whole = torch.cat((angles, angles), dim=-1)
    cos, sin = whole.cos().to(dtype), whole.sin().to(dtype)
    tables = Rotary(spec_from_hf(config.to_dict())).tables(positions, dtype)
    assert torch.equal(tables.cos.squeeze(2), cos[..., :16])
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    assert torch.equal(apply_rotary(q, tables), expected_q)
    assert torch.equal(apply_rotary(k, tables), expected_k)
