"""Writing tokenizer files: what transformers' ``AutoTokenizer`` loads, and the family's own files."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from research.core.text.specials import END_OF_TEXT, IM_END
from research.core.text.vocabulary import (
    CONFIG_FILE,
    MERGES_FILE,
    TIKTOKEN_FILE,
    TOKENIZER_FILE,
    VOCAB_FILE,
    Vocabulary,
    token_text,
)

if TYPE_CHECKING:
    from research.core.text.bytelevel import ByteLevelTokenizer


@contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """A text file under a temporary name, flushed to the disk and renamed at the end: ``path`` never holds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as :func:`writing` does."""
    with writing(path) as file:
        file.write(text)


def merge_pairs(vocabulary: Vocabulary) -> list[tuple[bytes, bytes]]:
    """The merges in order; for a tiktoken vocabulary, the two parts each token's bytes end in by the lower ids alone."""
    if vocabulary.merges is not None:
        return vocabulary.merges
    from research.core.text.bytelevel import split_below

    ranks = {token: index for index, token in enumerate(vocabulary.tokens)}
    pairs = []
    for index, token in enumerate(vocabulary.tokens):
        if len(token) > 1:
            left, right = split_below(token, ranks, index)
            pairs.append((left, right))
    return pairs


def tokenizer_json(vocabulary: Vocabulary, with_added: bool = True) -> str:
    """The vocabulary as ``tokenizer.json`` of the ``tokenizers`` library."""
    spelling = [token_text(token) for token in vocabulary.tokens]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": token.id, "content": name, **flags, "special": token.special}
        for name, token in sorted(vocabulary.added.items(), key=lambda item: item[1].id)
    ]
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": vocabulary.pattern}, "behavior": "Isolated", "invert": False}
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added if with_added else [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, levels]},
        "post_processor": levels,
        "decoder": levels,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: index for index, text in enumerate(spelling)},
            "merges": [[token_text(left), token_text(right)] for left, right in merge_pairs(vocabulary)],
        },
    }
    return json.dumps(data, ensure_ascii=False)


def config_fields(vocabulary: Vocabulary, template: str | None) -> dict:
    """``tokenizer_config.json``: the fields it was read with, or those of the published Qwen2 files."""
    if vocabulary.fields:
        fields = dict(vocabulary.fields)
    else:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        by_id = sorted(vocabulary.added.items(), key=lambda item: item[1].id)
        fields = {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(token.id): {"content": name, **flags, "special": token.special} for name, token in by_id
            },
            "additional_special_tokens": [name for name, token in by_id if token.special and name != END_OF_TEXT],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": IM_END,
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": END_OF_TEXT,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        }
    if template is not None:
        fields["chat_template"] = template
    return fields


def save_bytelevel(tokenizer: ByteLevelTokenizer, folder: Path, template: str | None) -> None:
    """``tokenizer.json`` and ``tokenizer_config.json``; beside them ``qwen.tiktoken``, or ``vocab.json`` + ``merges.txt``."""
    vocabulary = tokenizer.vocabulary
    template = tokenizer.chat_template if template is None else template
    if vocabulary.merges is None:
        lines = [f"{base64.b64encode(token).decode()} {index}\n" for index, token in enumerate(vocabulary.tokens)]
        write_text(folder / TIKTOKEN_FILE, "".join(lines))
    else:
        vocab = {token_text(token): index for index, token in enumerate(vocabulary.tokens)}
        write_text(folder / VOCAB_FILE, json.dumps(vocab, ensure_ascii=False))
        lines = [f"{token_text(left)} {token_text(right)}\n" for left, right in vocabulary.merges]
        write_text(folder / MERGES_FILE, "#version: 0.2\n" + "".join(lines))
    write_text(folder / TOKENIZER_FILE, tokenizer_json(vocabulary))
    fields = config_fields(vocabulary, template)
    write_text(folder / CONFIG_FILE, json.dumps(fields, ensure_ascii=False, indent=2) + "\n")
