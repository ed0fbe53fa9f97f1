"""What one model family tells the rest of the code about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """``template`` is the chat template's name; ``chat_eos`` / ``base_eos`` are the control tokens that end an answer."""

    name: str
    title: str
    template: str
    model_types: tuple[str, ...]
    chat_eos: tuple[str, ...] = ("<|im_end|>", "<|endoftext|>")
    base_eos: tuple[str, ...] = ("<|endoftext|>",)
    tokenizer_files: tuple[str, ...] = ("tokenizer.json", "vocab.json", "merges.txt")
