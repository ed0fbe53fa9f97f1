"""Flags of the MindFormers scripts, translated to settings by one table."""

from __future__ import annotations

from collections.abc import Sequence

from research.core.config.names import did_you_mean
from research.core.errors import ConfigError

# flag -> setting; the documents' own spellings, among them --train_data, which only worked there as a prefix.
FLAGS = {
    "model": "model",
    "run_mode": "task",
    "load_checkpoint": "weights",
    "train_data": "data",
    "train_dataset": "data",
    "train_dataset_dir": "data",
    "predict_data": "prompt",
    "predict_length": "generate.max_new_tokens",
    "do_sample": "generate.temperature",
    "top_k": "generate.top_k",
    "top_p": "generate.top_p",
    "seq_length": "data.seq_length",
    "batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulation",
    "epochs": "train.epochs",
    "seed": "train.seed",
    "resume_training": "train.resume",
    "output_dir": "run",
    "device_target": "device.kind",
    "vocab_file": "tokenizer",
    "merges_file": "tokenizer",
}

_VALUES = {
    "run_mode": {"train": "pretrain", "finetune": "finetune", "predict": "predict", "export": "export"},
    "do_sample": {"True": "1.0", "False": "0.0", "true": "1.0", "false": "0.0"},
    "device_target": {"Ascend": "npu", "GPU": "cuda", "CPU": "cpu"},
    "resume_training": {"True": "true", "False": "false"},
}


def translate_flags(words: Sequence[str]) -> list[str]:
    """Replace ``--flag value`` and ``--flag=value`` by ``setting=value``; other words pass through.

    Raises :class:`ConfigError` for an unknown flag or value, naming the nearest known one.
    """
    out, words = [], list(words)
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not word.startswith("--"):
            out.append(word)
            continue
        name, given, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in FLAGS:
            raise ConfigError(f"no flag is called --{name}", hint=did_you_mean(name, FLAGS, prefix="--"))
        if not given:
            if at >= len(words) or words[at].startswith("--"):
                raise ConfigError(f"--{name} needs a value")
            value = words[at]
            at += 1
        out.append(_setting(name, value))
    return out


def _setting(name: str, value: str) -> str:
    values = _VALUES.get(name)
    if values is not None:
        if value not in values:
            raise ConfigError(f"{value!r} is not a value of --{name}", hint=did_you_mean(value, values))
        value = values[value]
    if name in ("vocab_file", "merges_file"):
        # The vocabulary's files lie in one folder, which is what the setting names.
        head, slash, _ = value.rpartition("/")
        value = head if slash else "."
    return f"{FLAGS[name]}={value}"
