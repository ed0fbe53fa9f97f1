"""MindIE's run_pa (``python -m examples.run_pa``): prompts through the paged engine, with that program's flags.

Prompts come from --input_dict (an adapter per prompt), --input_ids, --input_file (conversations; with --is_chat_model) or
--input_texts, the first of them that is given. Further words are plain settings, as ``device=cpu generate.temperature=0``.
``ENGINE=vllm`` hands all of it to vLLM where that is installed; ATB_LLM_BENCHMARK_ENABLE=1 writes times to
ATB_LLM_BENCHMARK_FILEPATH (docs/mindie.md).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from research.core.config.schema import Config
from research.core.engine.api import EmbedRequest, EngineRequest
from research.core.engine.run_all import Answered, run_all
from research.core.errors import ConfigError, DataError, UserError, require_file
from research.core.generation.requests import Request
from research.core.launch.environment import place
from research.core.launch.torchrun import launch, needs_launch
from research.core.lora import read_adapter_config
from research.core.text.template import ChatTemplate, template_from_file, template_from_jinja
from research.core.text.without_text import WithoutText
from research.tasks.answering import EngineModel, mode, open_engine_model
from research.tasks.mindie_flags import Flags, bind_cpu, boolean, reserve_memory, weights_configuration
from research.tasks.sources import say
from research.tasks.step_times import StepTimes, benchmark_row, write_rows

DEFAULT_TEXT = "What's deep learning?"
# Ways to split a model that are MindIE's and not this engine's.
_SPLITS = ("dp", "pp", "microbatch_size", "moe_ep", "sp", "cp")


@dataclass(frozen=True)
class Asked:
    """One prompt: a text, a conversation or token ids."""

    where: str
    text: str | None = None
    messages: list[dict] | None = None
    ids: list[int] | None = None
    adapter: str | None = None


def main(argv: Sequence[str]) -> int:
    """Run the program; returns the exit status."""
    flags, words = arguments(argv)
    cfg = settings(flags, words)
    if mode(cfg) == "paged" and needs_launch(cfg):
        return launch(cfg)
    bind_cpu()
    asked = read_inputs(flags)
    template = chat_template(flags.chat_template)
    reserve_memory(cfg)
    model = open_engine_model(cfg, None if flags.load_tokenizer else WithoutText(), lora_modules(flags))
    if template is not None:
        model = replace(model, template=template)
    try:
        requests = [request(flags, cfg, model, item) for item in asked]
        times = StepTimes()
        answers = run_all(model.engine, requests, times.note)
        show(flags, answers)
        if os.environ.get("ATB_LLM_BENCHMARK_ENABLE", "0") == "1":
            path = Path(os.environ.get("ATB_LLM_BENCHMARK_FILEPATH") or "benchmark_result/benchmark.csv")
            write_rows(path, [benchmark_row(flags.max_batch_size, answers, times)])
            say(f"times: {path}")
    finally:
        model.close()
    return 0


# --- flags ------------------------------------------------------------------------------------------------------------


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The documents' flags, and plain settings. Raises :class:`ConfigError` for other words."""
    parser = Flags(__doc__)
    parser.add_argument("--model_path", required=True, help="weight folder; lora_adapter.json in it lists adapters")
    parser.add_argument("--input_texts", nargs="+", help=f"texts, or files of one text each (default {DEFAULT_TEXT!r})")
    parser.add_argument("--input_ids", nargs="+", help="token ids with commas between, one word for each prompt")
    parser.add_argument("--input_file", help='.jsonl with a conversation a line: [{"role": .., "content": ..}, ..]')
    parser.add_argument("--input_dict", help='JSON, or a file of it: [{"prompt": "text", "adapter": "name"}, ..]')
    parser.add_argument("--max_batch_size", type=int, default=1, help="prompts that run at a time")
    parser.add_argument("--max_prefill_batch_size", type=int, help="of them, prompts that begin in one step")
    parser.add_argument("--max_input_length", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--max_output_length", type=int, default=20, help="tokens of an answer")
    parser.add_argument("--max_position_embeddings", type=int, help="prompt and answer together (default: the model's)")
    parser.add_argument("--max_prefill_tokens", type=int, default=-1, help="tokens of one step; -1: the engine's own")
    parser.add_argument("--block_size", type=int, default=128, help="tokens of a block of the key/value cache")
    parser.add_argument("--chat_template", help="Jinja text, or a file of it (default: the model's own)")
    parser.add_argument("--ignore_eos", action="store_true", help="go on after an end token")
    parser.add_argument("--is_chat_model", action="store_true", help="put prompts into the chat template")
    parser.add_argument("--is_embedding_model", action="store_true", help="write embeddings: embedding_tensor_N.pth")
    parser.add_argument("--load_tokenizer", type=boolean, default=True, help="False: --input_ids in, token ids out")
    parser.add_argument("--lora_modules", help='adapters beside those of lora_adapter.json: {"name": "folder"}')
    parser.add_argument("--max_loras", type=int, default=0, help="refuse more adapters than that (0: no limit)")
    parser.add_argument("--max_lora_rank", type=int, default=0, help="refuse adapters of a larger rank (0: no limit)")
    parser.add_argument("--tp", type=int, default=-1, help="cards; without a launcher, so many processes are started")
    parser.add_argument("--moe_tp", type=int, default=-1, help="as --tp: experts are cut as all layers are")
    for name in _SPLITS:
        parser.add_argument(f"--{name}", type=int, default=-1, help="-1 or 1: this engine splits by --tp only")
    parser.add_argument("--kw_args", default="", help="JSON of extensions; none is known here")
    for name in ("enable_atb_torch", "trust_remote_code", "distributed_enable"):
        parser.add_argument(f"--{name}", action="store_true", help="accepted; nothing here depends on it")
    flags, words = parser.read(argv)
    check_flags(flags)
    return flags, words


def check_flags(flags: argparse.Namespace) -> None:
    """Raise :class:`ConfigError` for values that cannot be, say which flags make no difference."""
    for name in ("max_batch_size", "max_input_length", "max_output_length", "block_size", "max_prefill_batch_size"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ConfigError(f"{value} is not possible", where=f"--{name}", hint="1 or more")
    if flags.max_prefill_tokens != -1 and flags.max_prefill_tokens < 1:
        raise ConfigError(f"{flags.max_prefill_tokens} is not possible", where="--max_prefill_tokens", hint="-1, or 1")
    longest = flags.max_input_length + flags.max_output_length
    limit = flags.max_position_embeddings
    if limit is not None and limit < 1:
        raise ConfigError(f"{limit} is not possible", where="--max_position_embeddings", hint=f"{longest} or more")
    for name in _SPLITS:
        if getattr(flags, name) not in (-1, 1):
            raise ConfigError(
                "this engine splits a model over cards by tensor parallelism only",
                where=f"--{name} {getattr(flags, name)}",
                hint="--tp <cards>",
            )
    if flags.moe_tp not in (-1, flags.tp):
        raise ConfigError("experts are cut as all layers are", where=f"--moe_tp {flags.moe_tp}", hint="leave it out")
    extensions = json_flag("kw_args", flags.kw_args or "{}", dict)
    if extensions:
        raise ConfigError(f"no extension is called {next(iter(extensions))!r} here", where="--kw_args")
    if not flags.load_tokenizer and (not flags.input_ids or flags.input_dict or flags.is_chat_model):
        raise ConfigError(
            "without a tokenizer prompts are token ids", where="--load_tokenizer False", hint="--input_ids 1,2,3"
        )
    for name, why in (
        ("enable_atb_torch", "there is one way to build a model here"),
        ("trust_remote_code", "no code of a weight folder is ever run"),
        ("distributed_enable", "the launcher says whether there are several ranks"),
    ):
        if getattr(flags, name):
            say(f"note: --{name} makes no difference: {why}")


def settings(flags: argparse.Namespace, words: Sequence[str]) -> Config:
    """The configuration that flags and plain settings come to; a plain setting wins over its flag."""
    if not os.path.isdir(os.path.expanduser(flags.model_path)):
        raise UserError("weight folder not found", where=f"--model_path {flags.model_path}", hint="a folder")
    cfg = weights_configuration(flags.model_path, words)
    named = {word.split("=", 1)[0] for word in words}
    budget = [] if flags.max_prefill_tokens == -1 else [flags.max_prefill_tokens]
    if flags.max_prefill_batch_size is not None:
        budget.append(flags.max_prefill_batch_size * flags.max_input_length)
    cards = next((number for number in (flags.tp, flags.moe_tp) if number != -1), None)
    if cards is not None and place() is not None and cards != place().size:
        raise ConfigError(
            f"the launcher started {place().size} ranks",
            where=f"--tp {cards}",
            hint="leave --tp out: that number counts",
        )
    for owner, name, value in (
        (cfg.engine, "engine.max_batch", flags.max_batch_size),
        (cfg.engine, "engine.block_size", flags.block_size),
        (cfg.engine, "engine.max_length", flags.max_position_embeddings),
        (cfg.engine, "engine.max_tokens_per_step", min(budget) if budget else None),
        (cfg.generate, "generate.max_new_tokens", flags.max_output_length),
        (cfg.parallel, "parallel.cards", cards),
    ):
        if value is not None and name not in named:
            setattr(owner, name.split(".")[1], value)
    cfg.model.embedding = flags.is_embedding_model
    cfg.generate.raw = not flags.is_chat_model
    if mode(cfg) == "flash":
        raise ConfigError("run_pa is the paged engine", where=f"engine.mode={cfg.engine.mode}", hint="run_fa")
    return cfg


def lora_modules(flags: argparse.Namespace) -> dict[str, Path]:
    """``--lora_modules``, checked against ``--max_loras`` and ``--max_lora_rank`` with those of ``lora_adapter.json``."""
    from research.core.engine.adapters import read_table

    given = json_flag("lora_modules", flags.lora_modules or "{}", dict)
    if not all(isinstance(folder, str) for folder in given.values()):
        raise ConfigError("must be names and folders", where="--lora_modules", hint='{"name": "folder"}')
    modules = {name: Path(folder).expanduser() for name, folder in given.items()}
    every = read_table(Path(flags.model_path).expanduser()) | modules
    if flags.max_loras and len(every) > flags.max_loras:
        raise ConfigError(
            f"{len(every)} adapters are listed: {', '.join(every)}", where=f"--max_loras {flags.max_loras}"
        )
    for name, folder in every.items() if flags.max_lora_rank else ():
        cfg = read_adapter_config(folder)
        rank = max([cfg.rank, *cfg.rank_pattern.values()])
        if rank > flags.max_lora_rank:
            raise ConfigError(f"adapter {name} has the rank {rank}", where=f"--max_lora_rank {flags.max_lora_rank}")
    return modules


def chat_template(given: str | None) -> ChatTemplate | None:
    """The template of a file, or of the Jinja text itself; None: the model's own."""
    if not given:
        return None
    return template_from_file(given) if os.path.isfile(given) else template_from_jinja(given, "--chat_template")


def json_flag(name: str, text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as bad:
        raise ConfigError(f"not valid JSON: {bad}", where=f"--{name}") from None
    if not isinstance(value, kind):
        raise ConfigError(f"not a JSON {'object' if kind is dict else 'list'}", where=f"--{name}")
    return value


# --- prompts ----------------------------------------------------------------------------------------------------------


def read_inputs(flags: argparse.Namespace) -> list[Asked]:
    """The prompts, by the document's precedence; what else was given is said. Raises UserErrors."""
    order = ("input_dict", "input_file", "input_ids", "input_texts")
    given = [name for name in order if getattr(flags, name)]
    if flags.input_file and not flags.is_chat_model:
        raise ConfigError("conversations need a chat model", where="--input_file", hint="--is_chat_model")
    for name in given[1:]:
        say(f"note: --{name} is not used, because --{given[0]} is given")
    if not given:
        return [Asked("--input_texts", DEFAULT_TEXT)]
    return {"input_dict": _dict, "input_file": _file, "input_ids": _ids, "input_texts": _texts}[given[0]](flags)


def _dict(flags: argparse.Namespace) -> list[Asked]:
    text = flags.input_dict
    if not text.lstrip().startswith(("[", "{")) and os.path.isfile(text):
        text = Path(text).read_text(encoding="utf-8")
    asked = []
    for number, item in enumerate(json_flag("input_dict", text, list)):
        where = f"--input_dict[{number}]"
        prompt, adapter = (item.get(key) for key in ("prompt", "adapter")) if isinstance(item, dict) else (None, None)
        if not isinstance(prompt, str) or not (adapter is None or isinstance(adapter, str)):
            raise DataError("is no prompt", where=where, hint='{"prompt": "text", "adapter": "name"}')
        asked.append(Asked(where, prompt, adapter=adapter))
    if not asked:
        raise DataError("holds no prompt", where="--input_dict")
    return asked


def _file(flags: argparse.Namespace) -> list[Asked]:
    path = require_file(flags.input_file, "file of conversations", hint="a .jsonl file")
    asked = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            messages = json.loads(line)
        except json.JSONDecodeError as bad:
            raise DataError(f"not valid JSON: {bad.msg}", where=where) from None
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise DataError("is no conversation", where=where, hint='[{"role": "user", "content": "text"}]')
        asked.append(Asked(where, messages=messages))
    if not asked:
        raise DataError("holds no conversation", where=path)
    return asked


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _ids(flags: argparse.Namespace) -> list[Asked]:
    asked = []
    for number, word in enumerate(flags.input_ids):
        try:
            asked.append(Asked(f"--input_ids[{number}]", ids=[int(part) for part in word.split(",")]))
        except ValueError:
            raise DataError(f"{word!r} is no list of token ids", where=f"--input_ids[{number}]", hint="1,2,3") from None
    if flags.is_chat_model:
        say("note: --is_chat_model makes no difference to token ids")
    return asked


def _texts(flags: argparse.Namespace) -> list[Asked]:
    asked = []
    for number, text in enumerate(flags.input_texts):
        where = f"--input_texts[{number}]"
        if os.path.isfile(text):
            where, text = text, Path(text).read_text(encoding="utf-8")
        asked.append(Asked(where, text))
    return asked


def request(flags: argparse.Namespace, cfg: Config, model: EngineModel, asked: Asked) -> EngineRequest | EmbedRequest:
    """The engine's request for one prompt. Raises :class:`UserError` for one that is longer than ``--max_input_length``."""
    ids = asked.ids
    if ids is None and flags.is_chat_model:
        messages = asked.messages or [{"role": "user", "content": asked.text}]
        encoded = model.template.encode(
            model.tokenizer, messages, add_generation_prompt=True, system=cfg.generate.system
        )
        ids = list(encoded.ids)
    elif ids is None:
        ids = model.tokenizer.encode(asked.text)
    if len(ids) > flags.max_input_length:
        raise UserError(
            f"the prompt has {len(ids)} tokens, more than --max_input_length {flags.max_input_length}",
            where=asked.where,
            hint=f"--max_input_length {len(ids)}",
        )
    new = 0 if flags.is_embedding_model else cfg.generate.max_new_tokens
    model.check(Request(ids, max_new_tokens=new), asked.where)
    adapter = asked.adapter or model.adapter
    if flags.is_embedding_model:
        return EmbedRequest(tuple(ids), normalize=False, adapter=adapter)
    return EngineRequest(
        tuple(ids),
        model.sampling,
        new,
        stop=tuple(cfg.generate.stop),
        ignore_eos=flags.ignore_eos,
        adapter=adapter,
    )


# --- answers ----------------------------------------------------------------------------------------------------------


def show(flags: argparse.Namespace, answers: Sequence[Answered]) -> None:
    """Print the answers and their numbers of tokens; embeddings go to ``embedding_tensor_N.pth``, float32 [H]."""
    for number, answer in enumerate(answers):
        if answer.embedding is not None:
            path = Path(f"embedding_tensor_{number}.pth")
            write_tensor(path, answer.embedding)
            print(f"Embedding[{number}]: {len(answer.embedding)} numbers in {path}")
            continue
        text = answer.text if flags.load_tokenizer else json.dumps(answer.ids)
        print(f"Answer[{number}]: {text}")
        print(f"Generate[{number}] token num: {len(answer.ids)}", flush=True)


def write_tensor(path: Path, values: Sequence[float]) -> None:
    import torch

    aside = path.with_suffix(".tmp")
    torch.save(torch.tensor(values, dtype=torch.float32), aside)
    os.replace(aside, path)
