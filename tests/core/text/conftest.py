"""The real vocabulary in our tokenizers and in the libraries they are compared with."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "The quick brown fox doesn't jump; it's 12345 o'clock, I'LL SEE.",
    "  two  spaces, a\ttab,\r\nCRLF\n\n\n  and trailing   ",
    "\n\n  \n x",
    "你好，世界！今天是2024年5月1日。",
    "日本語のテキスト、한국어 텍스트, Ελληνικά, Русский, العربية, हिन्दी, ไทย",
    "emoji 👋🏽 👨‍👩‍👧‍👦 🇨🇳 ☃️ and maths ∑∫√",
    "e\u0301 vs é, Å vs A\u030a, \u1e9b\u0323 and \ufb01 ligature",
    "zero\u200bwidth\u00a0nbsp\u3000ideographic\u2028line\u0085next",
    "def f(x):\n    return {'a': [1, 2.5, -3e10], \"b\": None}  # comment\n",
    "<|im_start|>system\nYou are bad<|im_end|>\n<|endoftext|>",
    "a<|im_start|><|im_end|>b <|im_sta rt|> <|im_start| <tool_call>{}</tool_call><|fim_prefix|> <|extra_0|><|extra_204|>",
    "a mark that joins the control token's last letter: <|im_end|>\u0338 y",
    "<|<|im_end|>|> <|im_end|>>\u0338 x\ud7ff\ue000\U0010ffff\x00\x7f",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ﷽ ǅ ſ'ſ 'S 'ſ K ½ ² Ⅷ ੧੨ ١٢",
]


@pytest.fixture(scope="session")
def vocabulary_folder(shared_data) -> Path:
    return shared_data / "tokenizer_qwen"


@pytest.fixture(scope="session")
def qwen2_5_folder(shared_data, tmp_path_factory) -> Path:
    """``vocab.json`` + ``merges.txt`` with the published ``tokenizer_config.json`` of Qwen2.5-0.5B-Instruct."""
    folder = tmp_path_factory.mktemp("qwen2_5")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared_data / "tokenizer_qwen" / name, folder)
    for path in (shared_data / "configs" / "Qwen2.5-0.5B-Instruct__tokenizer").iterdir():
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def qwen2_5(qwen2_5_folder):
    from research.core.text.tokenizer import load_tokenizer

    return load_tokenizer(qwen2_5_folder, "qwen2_5")


@pytest.fixture(scope="session")
def qwen2(vocabulary_folder):
    from research.core.text.tokenizer import load_tokenizer

    return load_tokenizer(vocabulary_folder, "qwen2")


@pytest.fixture(scope="session")
def qwen(vocabulary_folder):
    from research.core.text.tokenizer import load_tokenizer

    return load_tokenizer(vocabulary_folder, "qwen")


@pytest.fixture(scope="session")
def transformers_qwen2_5(qwen2_5_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(qwen2_5_folder)


@pytest.fixture(scope="session")
def tiktoken_qwen(vocabulary_folder):
    """Qwen v1's encoding built as its published code does, from the files alone."""
    import tiktoken

    facts = json.loads((vocabulary_folder / "special_tokens.json").read_text(encoding="utf-8"))
    lines = (vocabulary_folder / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    specials = facts["families"]["qwen_v1"]["special_tokens"]
    return tiktoken.Encoding(
        "oracle", pat_str=facts["pre_tokenizer_regex"], mergeable_ranks=ranks, special_tokens=specials
    )
