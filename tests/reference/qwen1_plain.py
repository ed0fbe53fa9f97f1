"""The first Qwen generation, written plainly from its published description, on the checkpoint's own tensor names.

One sequence at a time, one head at a time, in float64, without a cache: what a position's logits are follows from the
tokens before it and from ``prompt_length``, the length of the first forward, which alone fixes the rotary base.
"""

from __future__ import annotations

import math

import torch


def logits(weights: dict[str, torch.Tensor], config: dict, ids: list[int], prompt_length: int) -> torch.Tensor:
    """-> float64 [len(ids), vocab]. ``weights`` has the names of the published checkpoints (``transformer.h.0...``)."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size, trained = hidden // heads, config["seq_length"]

    alpha = 1.0
    if config["use_dynamic_ntk"]:
        alpha = max(2 ** math.ceil(math.log(prompt_length / trained, 2) + 1) - 1, 1)
    base = config["rotary_emb_base"] * alpha ** (size / (size - 2))
    angle = torch.tensor(
        [[place / base ** (2 * pair / size) for pair in range(size // 2)] for place in range(len(ids))],
        dtype=torch.float64,
    )

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean = (x * x).mean(dim=-1, keepdim=True)
        return x / (mean + config["layer_norm_epsilon"]).sqrt() * weights[name]

    def turn(x: torch.Tensor) -> torch.Tensor:
        # The first half of a head is the real part, the second half the imaginary part of complex numbers.
        turned = torch.complex(x[:, : size // 2], x[:, size // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], dim=-1)

    x = weights["transformer.wte.weight"][ids]
    for n in range(config["num_hidden_layers"]):
        block = f"transformer.h.{n}."
        h = norm(x, block + "ln_1.weight")
        mixed = h @ weights[block + "attn.c_attn.weight"].T + weights[block + "attn.c_attn.bias"]
        queries, keys, values = mixed[:, :hidden], mixed[:, hidden : 2 * hidden], mixed[:, 2 * hidden :]
        joined = torch.zeros_like(x)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            q, k, v = turn(queries[:, part]), turn(keys[:, part]), values[:, part]
            for place in range(len(ids)):
                query = q[place]
                if config["use_logn_attn"] and place + 1 > trained:
                    query = query * math.log(place + 1, trained)
                scores = k[: place + 1] @ query / math.sqrt(size)
                joined[place, part] = torch.softmax(scores, dim=0) @ v[: place + 1]
        x = x + joined @ weights[block + "attn.c_proj.weight"].T
        h = norm(x, block + "ln_2.weight")
        first = h @ weights[block + "mlp.w1.weight"].T
        second = h @ weights[block + "mlp.w2.weight"].T
        gated = first * (second * torch.sigmoid(second))
        x = x + gated @ weights[block + "mlp.c_proj.weight"].T
    return norm(x, "transformer.ln_f.weight") @ weights["lm_head.weight"].T
