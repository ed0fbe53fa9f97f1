"""A tiny preset's decoder with random weights whose answers depend on the prompt, and its Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from research.core.text.builtin import builtin_tokenizer
from research.core.text.template import get_template
from research.core.torch.decoder import Decoder
from research.core.torch.weights import save_decoder
from research.registry import model_config, model_spec
from research.tasks.exporting import tokenizer_files


def make(name: str, layers: int | None = None) -> Decoder:
    """The preset's decoder over the built-in vocabulary; ``layers``: other than the preset has."""
    model = model_config(name)
    if layers is not None:
        model.hf["num_hidden_layers"] = layers
    decoder = Decoder(model_spec(model, tokens=builtin_tokenizer().vocab_size)).init_weights(3)
    for layer in decoder.model.layers:  # strong enough for answers that depend on the prompt
        layer.self_attn.v_proj.weight.data *= 30
        layer.mlp.down_proj.weight.data *= 30
    return decoder


def save(folder: Path, name: str, layers: int | None = None, *, vocabulary: bool = True, eos: bool = False) -> Path:
    """:func:`make` as ``folder``; ``vocabulary``: with its files and the template beside it; ``eos``: with the chat's end
    tokens in its config."""
    tokenizer = builtin_tokenizer()
    options = {"files": tokenizer_files(tokenizer, get_template(model_config(name).family))} if vocabulary else {}
    if eos:
        options["eos"] = list(tokenizer.eos_ids(chat=True))
    save_decoder(make(name, layers), folder, **options)
    return folder
