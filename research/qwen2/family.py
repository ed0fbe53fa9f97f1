"""Qwen2: grouped-query attention, tied heads below 7B, YaRN, one mixture of experts, and the gte embedding model."""

from __future__ import annotations

from research.core.family import Family

FAMILY = Family(
    name="qwen2",
    title="Qwen2",
    template="qwen2",
    model_types=("qwen2", "qwen2_moe"),
)
