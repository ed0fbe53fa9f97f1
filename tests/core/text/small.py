"""A byte-level ``tokenizer.json`` of a few tokens, for tests of loading."""

from __future__ import annotations

from research.core.text.specials import PATTERN
from research.core.text.vocabulary import token_text

NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def small_tokenizer_json(merges: list[list[str]], tokens: list[str], names: tuple[str, ...] = NAMES) -> dict:
    """256 bytes, then ``tokens`` (byte-level alphabet), then the control tokens ``names``."""
    vocab = [token_text(bytes([byte])) for byte in range(256)] + tokens
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(vocab) + at, "content": name, **flags} for at, name in enumerate(names)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {text: index for index, text in enumerate(vocab)},
            "merges": merges,
        },
    }
