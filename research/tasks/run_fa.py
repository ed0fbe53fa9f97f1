"""MindIE's run_fa (``python -m examples.run_fa``): prompts through the contiguous cache, with that program's flags.

Further words are plain settings, as ``device=cpu generate.dtype=fp32`` (docs/mindie.md).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from research.core.config.schema import Config
from research.core.errors import ConfigError, UserError
from research.core.generation.requests import Request
from research.core.generation.stream import TextStream
from research.core.launch.environment import place
from research.tasks.answering import Model, load_model
from research.tasks.mindie_flags import Flags, boolean, weights_configuration
from research.tasks.run_pa import DEFAULT_TEXT
from research.tasks.sources import say

# Flags of beam search and of given embeddings, with the values at which they ask for nothing.
_NOT_HERE = {
    "num_beams": (1, "answers are sampled or greedy; beams are not searched"),
    "length_penalty": (1.0, "it weighs the lengths of beams"),
    "min_length": (None, "an answer ends where the model ends it"),
    "inputs_embeds_dir": (None, "prompts are texts"),
    "results_save_path": (None, "answers go to standard output: run_fa ... > file"),
}


def main(argv: Sequence[str]) -> int:
    """Run the program; returns the exit status."""
    flags, words = arguments(argv)
    cfg = settings(flags, words)
    model = load_model(cfg)
    eos_ids = (*model.eos_ids, *stop_ids(flags.stop_words_ids))
    model = Model(model.runner, model.tokenizer, model.template, model.sampling, eos_ids)
    requests = [request(flags, cfg, model, number, text) for number, text in enumerate(flags.input_text)]
    for number, result in enumerate(model.run(requests, batch=cfg.generate.batch)):
        stream = TextStream(model.tokenizer, hidden=eos_ids)
        text = "".join(stream.push(token) for token in result.ids) + stream.flush()
        print(f"Answer[{number}]: {text}")
        print(f"Generate[{number}] token num: {len(result.ids)}", flush=True)
    return 0


def request(flags: argparse.Namespace, cfg: Config, model: Model, number: int, text: str) -> Request:
    ids, where = model.tokenizer.encode(text), f"--input_text[{number}]"
    if len(ids) > flags.max_input_length:
        raise UserError(
            f"the prompt has {len(ids)} tokens, more than --max_input_length {flags.max_input_length}",
            where=where,
            hint=f"--max_input_length {len(ids)}",
        )
    asked = Request(ids, model.sampling, cfg.generate.max_new_tokens)
    model.check(asked, where)
    limit = flags.max_position_embeddings
    if limit is not None and len(ids) + asked.max_new_tokens > limit:
        raise UserError(
            f"{len(ids)} tokens and {asked.max_new_tokens} new ones are more than --max_position_embeddings {limit}",
            where=where,
            hint="a smaller --max_output_length",
        )
    return asked


def stop_ids(text: str | None) -> list[int]:
    """The end tokens of ``--stop_words_ids``: ``[1, 2]`` or ``[[1], [2]]``."""
    if text is None:
        return []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as bad:
        raise ConfigError(f"not valid JSON: {bad}", where="--stop_words_ids") from None
    rows = [row if isinstance(row, list) else [row] for row in value] if isinstance(value, list) else [[]]
    if not all(len(row) == 1 and type(row[0]) is int for row in rows):
        raise ConfigError("must be single token ids", where="--stop_words_ids", hint="[151643, 151645]")
    return [row[0] for row in rows]


def settings(flags: argparse.Namespace, words: Sequence[str]) -> Config:
    """The configuration that flags and plain settings come to; a plain setting wins over its flag."""
    cfg = weights_configuration(flags.model_path, words)
    named = {word.split("=", 1)[0] for word in words}
    for name, value in (
        ("max_new_tokens", flags.max_output_length),
        ("batch", flags.batch_size),
        ("temperature", flags.temperature if flags.do_sample else 0.0),
        ("top_p", flags.top_p if flags.do_sample else None),
        ("repetition_penalty", flags.repetition_penalty),
    ):
        if value is not None and f"generate.{name}" not in named:
            setattr(cfg.generate, name, value)
    cfg.generate.raw = True
    if cfg.engine.mode not in ("auto", "flash"):
        raise ConfigError("run_fa is the contiguous cache", where=f"engine.mode={cfg.engine.mode}", hint="run_pa")
    if place() is not None and place().size > 1:
        raise ConfigError(
            f"the contiguous cache runs on one card, and the launcher started {place().size} ranks",
            hint="one rank, or run_pa, which splits the model",
        )
    return cfg


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The documents' flags, and plain settings. Raises :class:`ConfigError` for other words and impossible values."""
    parser = Flags(__doc__)
    parser.add_argument("--model_path", required=True, help="weight folder")
    parser.add_argument("--input_text", nargs="+", default=[DEFAULT_TEXT], help="texts to go on with")
    parser.add_argument("--max_input_length", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--max_output_length", type=int, default=20, help="tokens of an answer")
    parser.add_argument("--max_position_embeddings", type=int, help="prompt and answer together (default: the model's)")
    parser.add_argument("--batch_size", type=int, default=1, help="prompts that run at a time")
    parser.add_argument("--do_sample", type=boolean, default=False, help="True: sample; else greedy")
    parser.add_argument("--temperature", type=float, default=1.0, help="with --do_sample True")
    parser.add_argument("--top_p", type=float, help="with --do_sample True")
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--stop_words_ids", help="JSON list of further end tokens")
    for name, (default, why) in _NOT_HERE.items():
        parser.add_argument(f"--{name}", type=type(default) if default is not None else str, default=default, help=why)
    for name in ("enable_atb_torch", "trust_remote_code"):
        parser.add_argument(f"--{name}", action="store_true", help="accepted; nothing here depends on it")
    flags, words = parser.read(argv)
    for name, (default, why) in _NOT_HERE.items():
        if getattr(flags, name) != default:
            raise ConfigError(f"not in this version: {why}", where=f"--{name}", hint="leave it out")
    for name in ("max_input_length", "max_output_length", "batch_size"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"{getattr(flags, name)} is not possible", where=f"--{name}", hint="1 or more")
    for name in ("enable_atb_torch", "trust_remote_code"):
        if getattr(flags, name):
            say(f"note: --{name} makes no difference here")
    return flags, words
