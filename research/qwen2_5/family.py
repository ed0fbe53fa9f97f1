"""Qwen2.5: Qwen2 architecture with tool-call and fill-in-the-middle tokens; Coder."""

from __future__ import annotations

from research.core.family import Family

FAMILY = Family(
    name="qwen2_5",
    title="Qwen2.5",
    template="qwen2_5",
    model_types=("qwen2",),
)
