"""Qwen1.5: llama-like keys with q/k/v bias, one mixture of experts, CodeQwen1.5 with a vocabulary of its own."""

from __future__ import annotations

from research.core.family import Family

FAMILY = Family(
    name="qwen1_5",
    title="Qwen1.5",
    template="qwen1_5",
    model_types=("qwen2", "qwen2_moe"),
)
