"""The control tokens of each family, by name, and the pattern that cuts text into words before byte-pair merging.

Facts from the published vocabularies: QwenLM/Qwen ``tokenization_note.md`` (Qwen v1: 3 control tokens and 205 spare ones),
``tokenizer_config.json`` of Qwen1.5, Qwen2 and Qwen2.5. Ids follow the base vocabulary without a gap.
"""

from __future__ import annotations

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

BASE_VOCAB = 151643  # tokens of the base vocabulary that all four families share

# Contractions; a word with at most one leading non-letter; one digit; punctuation with the line breaks after it;
# white space up to its last line break; trailing white space; other white space.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CHATML = (END_OF_TEXT, IM_START, IM_END)

FAMILY_SPECIALS: dict[str, tuple[str, ...]] = {
    "qwen": _CHATML + tuple(f"<|extra_{index}|>" for index in range(205)),
    "qwen1_5": _CHATML,
    "qwen2": _CHATML,
    "qwen2_5": _CHATML
    + tuple(f"<|{what}_{end}|>" for what in ("object_ref", "box", "quad") for end in ("start", "end"))
    + ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    + ("<tool_call>", "</tool_call>")
    + ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
}

# Added tokens that decoding keeps when control tokens are skipped (``"special": false`` in the published files).
VISIBLE = frozenset(
    ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>")
    + ("<|repo_name|>", "<|file_sep|>")
)
