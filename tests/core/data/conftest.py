from __future__ import annotations

import json

import pytest

from research.core.config.schema import DataConfig
from research.core.data.prepare import prepare_dataset
from research.core.text.builtin import builtin_tokenizer
from research.core.text.template import get_template


@pytest.fixture(scope="session")
def tokenizer():
    return builtin_tokenizer()


@pytest.fixture(scope="session")
def template():
    return get_template("qwen2_5")


@pytest.fixture
def write(tmp_path):
    """write(name, value) puts text, bytes, a list (JSON array; JSON Lines for .jsonl) into a file and returns its path."""

    def put(name, value):
        path = tmp_path / name
        if isinstance(value, list):
            lines = [json.dumps(record, ensure_ascii=False) for record in value]
            value = "".join(line + "\n" for line in lines) if name.endswith(".jsonl") else "[" + ",\n".join(lines) + "]"
        path.write_bytes(value if isinstance(value, bytes) else value.encode())
        return path

    return put


@pytest.fixture
def prepare(tmp_path, tokenizer, template):
    """prepare(source, **settings) -> report, into tmp_path/dataset, with the built-in vocabulary."""

    def go(source, folder=None, model_length=4096, vocab_size=None, **settings):
        defaults = {"seq_length": 128, "workers": 1, "eval_records": 0}
        cfg = DataConfig(source=str(source), **{**defaults, **settings})
        return prepare_dataset(
            cfg,
            tokenizer,
            template,
            folder or tmp_path / "dataset",
            model_length=model_length,
            vocab_size=vocab_size,
            log=lambda line: None,
        )

    return go


def chat(question: str, answer: str, **more) -> dict:
    """A record in the messages format."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}
