"""Random models twice: transformers' and ours, with the same weights and non-zero biases."""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from research.core.spec import spec_from_hf
from research.core.torch.decoder import Decoder

BASE = {
    "vocab_size": 101,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
MOE = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 6,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
VARIANTS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6},
    "tied": {"tie_word_embeddings": True},
    "window": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "yarn": {"rope_parameters": YARN},
    "yarn_factor": {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
    "moe": MOE,
    "moe_norm_topk": MOE | {"norm_topk_prob": True, "num_key_value_heads": 2},
    "moe_some_dense": MOE | {"mlp_only_layers": [0], "num_experts_per_tok": 3},
    "moe_every_second": MOE | {"decoder_sparse_step": 2},
    "moe_no_bias": MOE | {"qkv_bias": False},
    "moe_window": MOE | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
}


def make_pair(variant: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """-> (transformers' model, our decoder) in evaluation mode; every weight is normal(0, 0.15), biases too."""
    settings = BASE | VARIANTS[variant] | changes
    sparse = "num_experts" in settings
    config = (Qwen2MoeConfig if sparse else Qwen2Config)(**settings)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    theirs = (Qwen2MoeForCausalLM if sparse else Qwen2ForCausalLM)(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    ours = Decoder(spec_from_hf(config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype), ours.to(dtype)


def random_ids(batch: int, time: int, seed: int = 1, vocab: int = 101) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, time), generator=torch.Generator().manual_seed(seed))


def packed_ids(rows: list[list[int]], time: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths of the documents of each row -> position_ids and doc_ids [B, T], filled up with padding (0)."""
    positions = torch.zeros(len(rows), time, dtype=torch.long)
    documents = torch.zeros(len(rows), time, dtype=torch.long)
    for row, lengths in enumerate(rows):
        begin = 0
        for number, length in enumerate(lengths, 1):
            positions[row, begin : begin + length] = torch.arange(length)
            documents[row, begin : begin + length] = number
            begin += length
    return positions, documents
