"""Qwen, the first generation: multi-head attention with a fused c_attn, log-n attention and dynamic NTK, qwen.tiktoken."""

from __future__ import annotations

from research.core.family import Family

FAMILY = Family(
    name="qwen",
    title="Qwen",
    template="qwen",
    model_types=("qwen",),
    tokenizer_files=("qwen.tiktoken",),
)
