"""What predict and chat share: the loaded model with its vocabulary, template, end tokens and sampling."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from research.core.config.schema import Config
from research.core.engine.api import Engine, EngineRequest, Update
from research.core.engine.run_all import Answered, run_all
from research.core.errors import ConfigError, WeightsError
from research.core.generation.loop import Runner, run_requests
from research.core.generation.requests import MODELS, OnToken, Request, Result, check_request
from research.core.generation.sampling import Sampling
from research.core.spec import DecoderSpec
from research.core.text.template import ChatTemplate
from research.core.text.tokenizer import Tokenizer
from research.core.weights.generation import GenerationDefaults, read_generation_defaults
from research.core.weights.quantised import check_float
from research.tasks.framework import half
from research.tasks.sources import (
    NOTE_FILE,
    check_architecture,
    check_grid,
    opening,
    read_note,
    resolve_template,
    resolve_tokenizer,
    resolve_weights,
    say,
)

BATCH = 8  # prompts at a time in a contiguous cache
OnResult = Callable[[int, Result], None]  # (number of the request, its answer)


@dataclass(frozen=True)
class Model:
    """A model ready to answer, one batch after another in a contiguous cache."""

    runner: Runner
    tokenizer: Tokenizer
    template: ChatTemplate
    sampling: Sampling
    eos_ids: tuple[int, ...]

    @property
    def length_limit(self) -> int:
        return self.runner.length_limit

    def check(self, request: Request, where: str) -> None:
        """Raise :class:`UserError` for one that can never run; ``where`` says which one it is."""
        check_request(request, self.runner.spec.vocab, self.length_limit, where)

    def run(
        self,
        requests: Sequence[Request],
        on_token: OnToken | None = None,
        batch: int | None = None,
        on_result: OnResult = lambda place, result: None,
    ) -> list[Result]:
        """Continue all ``requests``, ``batch`` (None: 8) at a time, in order; ``on_result`` hears of each that has ended."""
        batch, results = batch or BATCH, []
        for begin in range(0, len(requests), batch):
            tell = None if on_token is None else _shifted(on_token, begin)
            part = requests[begin : begin + batch]
            for result in run_requests(self.runner, part, self.eos_ids, tell, batch):
                on_result(len(results), result)
                results.append(result)
        return results

    def close(self) -> None:
        """Nothing is held beyond memory."""


@dataclass(frozen=True)
class EngineModel:
    """A model ready to answer in the engine. ``adapter``: the one of ``cfg.adapter``, which every request uses that names
    none of its own."""

    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate
    sampling: Sampling
    eos_ids: tuple[int, ...]
    adapter: str | None = None
    how: str = ""  # dtype and device in words

    @property
    def length_limit(self) -> int:
        return self.engine.length_limit

    def check(self, request: Request, where: str) -> None:
        """Raise :class:`UserError` for one that can never run; ``where`` says which one it is."""
        spec, limit = self.engine.spec, self.length_limit
        check_request(request, spec.vocab, limit, where, MODELS if limit == spec.usable_length else "the engine's")

    def run(
        self,
        requests: Sequence[Request],
        on_token: OnToken | None = None,
        batch: int | None = None,
        on_result: OnResult = lambda place, result: None,
    ) -> list[Result]:
        """Continue all ``requests``, as many at a time as the engine takes (``batch`` was its ``max_batch``); ``on_result``
        hears of each that has ended."""

        def tell(place: int, update: Update) -> bool:
            return any(bool(on_token(place, token)) for token in update.tokens) if on_token else False

        def end(place: int, answer: Answered) -> None:
            on_result(place, Result(answer.ids, answer.reason))

        asked = [EngineRequest(tuple(r.prompt), r.sampling, r.max_new_tokens, adapter=self.adapter) for r in requests]
        return [Result(answer.ids, answer.reason) for answer in run_all(self.engine, asked, tell, end)]

    def close(self) -> None:
        """Give memory back; with tensor parallelism, end the other ranks."""
        self.engine.close()


def _shifted(on_token: OnToken, begin: int) -> OnToken:
    return lambda row, token: on_token(begin + row, token)


@dataclass(frozen=True)
class Parts:
    """What belongs to weights: ``source`` is their folder, or a MindFormers file."""

    source: Path
    tokenizer: Tokenizer
    template: ChatTemplate
    sampling: Sampling
    eos_ids: tuple[int, ...]


def open_model(cfg: Config) -> Model | EngineModel:
    """The model of ``cfg``, to be run as ``engine.mode`` says."""
    return load_model(cfg) if mode(cfg) == "flash" else open_engine_model(cfg)


def mode(cfg: Config) -> str:
    """``engine.mode``, with ``auto`` decided. Raises :class:`ConfigError` for one that cannot be had."""
    chosen = cfg.engine.mode
    if chosen == "auto":
        chosen = "flash" if cfg.backend == "mindspore" or cfg.generate.compile else "paged"
    elif chosen != "flash":
        other = "backend=mindspore" if cfg.backend == "mindspore" else "generate.compile=true"
        if cfg.backend == "mindspore" or cfg.generate.compile:
            raise ConfigError(
                "do not go together", where=f"engine.mode={chosen} and {other}", hint="engine.mode=auto, or flash"
            )
    if chosen == "flash" and cfg.backend == "torch" and cfg.parallel.cards * cfg.parallel.nodes > 1:
        raise ConfigError(
            "the contiguous cache runs on one card",
            where=f"parallel.cards={cfg.parallel.cards}",
            hint="engine.mode=paged without generate.compile, or CARDS=1",
        )
    return chosen


def load_model(cfg: Config) -> Model:
    """Load what ``cfg`` names. Raises UserErrors for folders, adapters, vocabularies and settings that do not fit."""
    if cfg.model.embedding:
        raise ConfigError(
            "an embedding model has no output matrix and answers nothing",
            where=f"model={cfg.model.name}",
            hint="a chat or base model",
        )
    parts = find_parts(cfg)
    load_runner = half(cfg.backend, "load_runner").load_runner
    runner, how = load_runner(parts.source, cfg.generate, cfg.device, cfg.adapter, opening(cfg))
    check_loaded(cfg, parts, runner.spec, how)
    return Model(runner, parts.tokenizer, parts.template, parts.sampling, parts.eos_ids)


def open_engine_model(
    cfg: Config, tokenizer: Tokenizer | None = None, adapters: Mapping[str, Path] | None = None
) -> EngineModel:
    """The model of ``cfg`` in the paged engine (torch), with the adapters of ``lora_adapter.json`` beside the weights, the
    given ``adapters`` and that of ``cfg.adapter``, called after its folder. An embedding model too. ``tokenizer``: instead
    of the one beside the weights. Raises UserErrors. On several ranks only the first returns."""
    module = "vllm" if mode(cfg) == "vllm" else "build"
    if cfg.generate.batch is not None:
        cfg.engine.max_batch = cfg.generate.batch
    parts = find_parts(cfg, tokenizer)
    adapter = Path(cfg.adapter).resolve().name if cfg.adapter else None
    open_engine = importlib.import_module(f"research.core.engine.{module}").open_engine
    engine, how = open_engine(
        parts.source,
        parts.tokenizer,
        parts.eos_ids,
        cfg,
        dict(adapters or {}) | ({adapter: Path(cfg.adapter)} if adapter else {}),
        opening(cfg),
        say,
    )
    check_loaded(cfg, parts, engine.spec, how)
    return EngineModel(engine, parts.tokenizer, parts.template, parts.sampling, parts.eos_ids, adapter, how)


def find_parts(cfg: Config, tokenizer: Tokenizer | None = None) -> Parts:
    """Weights, vocabulary, template and sampling of ``cfg``, found and checked, the weights not yet read. ``tokenizer``:
    instead of the one beside the weights."""
    weights = resolve_weights(cfg)
    if weights is None:
        raise WeightsError("there are no weights to generate with", hint="WEIGHTS=<folder>")
    check_grid(cfg, weights)
    if (weights / "config.json").is_file():  # else the weights themselves say it, when they are opened
        if mode(cfg) != "vllm":
            check_float(weights)
        check_architecture(cfg, weights)
    beside = weights if weights.is_dir() else weights.parent
    if (weights / "0" / "config.json").is_file():  # parts, each with the vocabulary
        beside = weights / "0"
    tokenizer = tokenizer or resolve_tokenizer(cfg, beside)
    template = resolve_template(cfg, beside)
    for folder in (beside, Path(cfg.adapter)) if cfg.adapter else (beside,):
        check_fingerprints(folder, tokenizer, template, raw=cfg.generate.raw)
        if cfg.generate.system is None:  # what it was trained with; None: the template's own
            cfg.generate.system = read_note(folder).get("system")
    defaults = read_generation_defaults(beside)
    return Parts(weights, tokenizer, template, choose_sampling(cfg, defaults), end_tokens(cfg, defaults, tokenizer))


def check_loaded(cfg: Config, parts: Parts, spec: DecoderSpec, how: str) -> None:
    """Raise :class:`WeightsError` when the weights, now read, are not of the chosen model or too small for the
    vocabulary; else say what was loaded (``how``: dtype and device in words)."""
    check_architecture(cfg, parts.source, spec)
    if parts.tokenizer.vocab_size > spec.vocab:
        raise WeightsError(
            f"the vocabulary has {parts.tokenizer.vocab_size} tokens, the weights only {spec.vocab}",
            where=cfg.tokenizer or parts.source,
            hint="TOKENIZER=<the folder that belongs to these weights>",
        )
    name = f"{parts.source} + {cfg.adapter}" if cfg.adapter else parts.source
    say(f"{cfg.model.name} from {name}, {how}")


def end_tokens(cfg: Config, defaults: GenerationDefaults, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The checkpoint's end tokens and the vocabulary's own: for a conversation the end of a turn as well."""
    own = tokenizer.eos_ids(chat=not cfg.generate.raw)
    return tuple(dict.fromkeys((*defaults.eos_ids, *own)))


def choose_sampling(cfg: Config, defaults: GenerationDefaults) -> Sampling:
    """``generate.*`` where it is set, else the checkpoint's ``generation_config.json``, else greedy."""
    chosen = {
        name: getattr(defaults if getattr(cfg.generate, name) is None else cfg.generate, name)
        for name in ("temperature", "top_k", "top_p", "repetition_penalty")
    }
    sampling = Sampling(**chosen, seed=cfg.generate.seed)
    if sampling.greedy:
        for name in ("top_k", "top_p"):
            if getattr(cfg.generate, name) is not None:
                say(f"generate.{name} has no effect at temperature 0; set generate.temperature as well")
    return sampling


def check_fingerprints(weights: Path, tokenizer: Tokenizer, template: ChatTemplate, raw: bool) -> None:
    """Raise :class:`ConfigError` when the weights were trained with another vocabulary or template than is used now."""
    note = read_note(weights)
    checked = [("tokenizer", tokenizer.fingerprint, "TOKENIZER=<the vocabulary that the run used>")]
    if not raw:
        checked.append(("template", template.fingerprint, 'ARGS="model.template=<the run\'s>", or generate.raw=true'))
    for kind, used, hint in checked:
        stored = note.get(kind)
        if stored is not None and used is not None and stored != used:
            name = f"{kind} {template.name}" if kind == "template" else kind
            raise ConfigError(
                f"these weights were trained with the {kind} {_short(stored)}, here the {name} is {_short(used)}",
                where=weights / NOTE_FILE,
                hint=hint,
            )


def _short(fingerprint: str) -> str:
    return str(fingerprint)[:12]
