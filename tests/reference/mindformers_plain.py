"""MindFormers' Qwen models, written plainly on the names of its own checkpoints, float64, without a cache.

What each name does follows from MindFormers' layers: llama keys pass ``w1`` through silu and multiply by ``w3``; Qwen v1
passes ``w3`` through silu and multiplies by ``w1``; ``w_qkv`` and ``w_gate_hidden`` are cut as the release that wrote them cuts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def logits(weights: dict[str, torch.Tensor], config: dict, ids: list[int], concat: str = "none") -> torch.Tensor:
    """-> float64 [len(ids), vocab]. ``config`` is Hugging Face's config.json of the model; no position past its training."""
    weights = {name: value.double() for name, value in weights.items()}
    first = config["model_type"] == "qwen"
    model = _Model(weights, config, concat, first)
    embedding = weights["transformer.wte.embedding_weight" if first else "model.tok_embeddings.embedding_weight"]
    x = embedding[ids]
    for n in range(config["num_hidden_layers"]):
        at = f"{'transformer' if first else 'model'}.layers.{n}."
        x = x + model.attention(model.norm(x, at + "attention_norm.weight"), at + "attention.")
        x = x + model.feed_forward(model.norm(x, at + "ffn_norm.weight"), at + "feed_forward.")
    x = model.norm(x, "transformer.ln_f.weight" if first else "model.norm_out.weight")
    return x @ weights.get("lm_head.weight", embedding).T


class _Model:
    def __init__(self, weights, config, concat: str, first: bool):
        self.w, self.c, self.concat, self.first = weights, config, concat, first
        self.heads = config["num_attention_heads"]
        self.kv = config.get("num_key_value_heads", self.heads)
        self.size = config["hidden_size"] // self.heads

    def norm(self, x, name: str):
        eps = self.c["layer_norm_epsilon" if self.first else "rms_norm_eps"]
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * self.w[name]

    def qkv(self, x, at: str):
        if self.concat == "none":
            return [x @ self.w[f"{at}w{key}.weight"].T + self.w[f"{at}w{key}.bias"] for key in "qkv"]
        joined = x @ self.w[at + "w_qkv.weight"].T + self.w[at + "w_qkv.bias"]
        repeat = self.heads // self.kv
        if self.concat == "stacked":
            return joined.split([self.heads * self.size, self.kv * self.size, self.kv * self.size], dim=-1)
        groups = joined.view(len(x), self.kv, repeat + 2, self.size)
        return [part.reshape(len(x), -1) for part in groups.split([repeat, 1, 1], dim=2)]

    def attention(self, x, at: str):
        time = len(x)
        q, k, v = (part.reshape(time, -1, self.size).transpose(0, 1) for part in self.qkv(x, at))
        q, k = self.turn(q), self.turn(k)
        k, v = (part.repeat_interleave(self.heads // self.kv, dim=0) for part in (k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(self.size)
        scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), -math.inf)
        out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(time, -1)
        return out @ self.w[at + "wo.weight"].T

    def turn(self, x):
        half = self.size // 2
        base = self.c["rotary_emb_base" if self.first else "rope_theta"]
        angle = torch.arange(x.shape[1]).double()[:, None] * base ** (-torch.arange(half).double() / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    def feed_forward(self, x, at: str):
        if at + "routed_experts.router.dense.weight" in self.w:
            return self.experts(x, at)
        if self.concat != "none" and at + "w_gate_hidden.weight" in self.w:
            joined = x @ self.w[at + "w_gate_hidden.weight"].T
            gate, up = joined.chunk(2, dim=-1) if self.concat == "stacked" else (joined[:, ::2], joined[:, 1::2])
        else:
            gate, up = (x @ self.w[f"{at}{key}.weight"].T for key in (("w3", "w1") if self.first else ("w1", "w3")))
        return (F.silu(gate) * up) @ self.w[at + "w2.weight"].T

    def experts(self, x, at: str):
        w1, w2, w3 = (self.w[f"{at}routed_experts.ffn.{key}.weight"] for key in ("w1", "w2", "w3"))
        if w1.shape[-1] != x.shape[-1]:  # written for grouped matmul
            w1, w2, w3 = (part.transpose(1, 2) for part in (w1, w2, w3))
        share = (x @ self.w[at + "routed_experts.router.dense.weight"].T).softmax(-1)
        weight, chosen = share.topk(self.c["num_experts_per_tok"], dim=-1)
        rows = []
        for row, picks, parts in zip(x, chosen, weight):
            each = [part * (w2[e] @ (F.silu(w1[e] @ row) * (w3[e] @ row))) for e, part in zip(picks, parts)]
            rows.append(torch.stack(each).sum(0))
        gate, up = (x @ self.w[f"{at}shared_experts.{key}.weight"].T for key in ("w1", "w3"))
        shared = (F.silu(gate) * up) @ self.w[at + "shared_experts.w2.weight"].T
        return torch.stack(rows) + torch.sigmoid(x @ self.w[at + "shared_experts_gate.weight"].T) * shared
