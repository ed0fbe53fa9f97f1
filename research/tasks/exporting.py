"""What goes beside exported weights: vocabulary files, end tokens, and the note about how they were made."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from research.core.config.schema import Config
from research.core.text.template import ChatTemplate
from research.core.text.tokenizer import Tokenizer


def export_options(cfg: Config, tokenizer: Tokenizer, template: ChatTemplate) -> dict[str, Any]:
    """Keyword arguments of :func:`research.core.torch.weights.save_weights` that make the folder complete.

    A model of conversations ends at the end of a turn, one of plain text at the end of text.
    """
    eos = tokenizer.eos_ids(chat=is_chat(cfg))
    return {
        "eos": eos if len(eos) > 1 else eos[0],
        "bos": tokenizer.eos_id,
        "generation": {"pad_token_id": tokenizer.pad_id, "do_sample": False},
        "fingerprints": note(cfg, tokenizer, template),
        "files": tokenizer_files(tokenizer, template),
    }


def is_chat(cfg: Config) -> bool:
    """Whether the training data were conversations; pretraining is on plain text."""
    return cfg.task.name != "pretrain"


def note(cfg: Config, tokenizer: Tokenizer, template: ChatTemplate) -> dict[str, Any]:
    """``workbench.json``: model and family by name, fingerprints of vocabulary and template, and the system prompt that
    replaced the template's own in training (None: the template's)."""
    from research.core.text.template import get_template

    named = template.name
    try:
        known = get_template(named).fingerprint == template.fingerprint
    except Exception:  # a template read from a file has no name here
        known = False
    return {
        "model": cfg.model.name,
        "family": cfg.model.family,
        "template_name": named if known else None,
        "template": template.fingerprint if is_chat(cfg) else None,
        "system": cfg.data.system if is_chat(cfg) else None,
        "tokenizer": tokenizer.fingerprint,
        "task": cfg.task.name,
    }


def tokenizer_files(tokenizer: Tokenizer, template: ChatTemplate) -> dict[str, bytes]:
    """The files that the tokenizer writes, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder, template.source)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def companions(weights: Path) -> dict[str, Path]:
    """Small files of a weight folder that go along unchanged: vocabulary and template, not configs and tensors."""
    own = {"config.json", "generation_config.json", "workbench.json"}
    return {
        path.name: path
        for path in sorted(weights.iterdir())
        if path.suffix in (".json", ".txt", ".tiktoken", ".jinja")
        and path.name not in own
        and not path.name.endswith(".index.json")
    }
