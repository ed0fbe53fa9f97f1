"""vLLM, or vllm-ascend on NPUs, in place of this repository's engine: the same requests in, the same updates out.

``engine.mode=vllm`` (``ENGINE=vllm``) where vLLM is installed; it is imported when an engine is opened. Text, stop strings
and end tokens are handled here as in the engine of our own, so that answers mean the same. Written against vLLM's
``LLMEngine`` of its first-generation name (0.6 to 0.20); it has been tested against a stand-in of that interface, not with
vLLM itself.
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from research.core.config.names import did_you_mean
from research.core.config.schema import Config
from research.core.engine.adapters import BASE, read_table
from research.core.engine.api import Constraint, EmbedRequest, EngineRequest, Stats, TokenLogprob, Update
from research.core.errors import ConfigError, UserError
from research.core.generation.requests import Request, check_request
from research.core.generation.stream import TextStream
from research.core.lora import read_adapter_config
from research.core.spec import spec_from_hf
from research.core.text.tokenizer import Tokenizer
from research.core.weights.folder import read_config
from research.core.weights.opened import NOTHING_SAID, OpenOptions

DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}
# Ranks for which vLLM has kernels: a rank is rounded up to one of them.
RANKS = (8, 16, 32, 64, 128, 256, 512)


def require_vllm() -> ModuleType:
    """vLLM, imported now. Raises :class:`ConfigError` where it is not installed."""
    try:
        return importlib.import_module("vllm")
    except ImportError as missing:
        raise ConfigError(
            f"vLLM cannot be imported: {missing}",
            where="engine.mode=vllm",
            hint="install vllm (vllm-ascend beside it on NPUs), or leave ENGINE out for the engine of this repository",
        ) from None


def engine_arguments(weights: Path, cfg: Config, adapters: Mapping[str, Path]) -> dict[str, Any]:
    """What ``cfg.engine`` comes to as arguments of vLLM, by its names; what is not set here is left to vLLM."""
    own = cfg.engine
    arguments: dict[str, Any] = {
        "model": str(weights),
        "tokenizer": str(cfg.tokenizer or weights),
        "dtype": DTYPES[cfg.generate.dtype],
        "tensor_parallel_size": cfg.parallel.cards,
        "max_num_seqs": own.max_batch,
        "enable_prefix_caching": own.prefix_cache,
        "max_model_len": own.max_length,
        "max_num_batched_tokens": own.max_tokens_per_step,
        "num_gpu_blocks_override": own.num_blocks,
        "gpu_memory_utilization": own.memory_fraction,
        "block_size": None if own.block_size == type(own)().block_size else own.block_size,
    }
    if adapters:
        ranks = [max(cfg.rank, *cfg.rank_pattern.values()) if cfg.rank_pattern else cfg.rank
                 for cfg in map(read_adapter_config, adapters.values())]  # fmt: skip
        largest = next((rank for rank in RANKS if rank >= max(ranks)), RANKS[-1])
        arguments |= {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": largest}
    return {name: value for name, value in arguments.items() if value is not None}


def all_adapters(weights: Path, given: Mapping[str, Path] | None) -> dict[str, Path]:
    """What ``lora_adapter.json`` beside the weights lists, and ``given``, which win over it."""
    return read_table(weights) | {name: Path(folder) for name, folder in (given or {}).items()}


def open_engine(
    weights: str | os.PathLike,
    tokenizer: Tokenizer,
    eos_ids: Collection[int],
    cfg: Config,
    adapters: Mapping[str, Path] | None = None,
    opening: OpenOptions = NOTHING_SAID,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[VllmEngine, str]:
    """As :func:`research.core.engine.build.open_engine`. Raises UserErrors, also for what vLLM does not take."""
    vllm = require_vllm()
    weights = Path(weights)
    loaded = all_adapters(weights, adapters)
    arguments = engine_arguments(weights, cfg, loaded)
    say("vLLM: " + " ".join(f"{name}={value}" for name, value in arguments.items()))
    if cfg.model.embedding:
        arguments |= {"task": "embed"}
    try:
        engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**arguments))
    except (TypeError, ValueError) as bad:
        raise ConfigError(
            f"vLLM does not take this: {str(bad).splitlines()[0]}",
            where="engine.mode=vllm",
            hint="other engine settings",
        ) from None
    opened = VllmEngine(engine, vllm, weights, tokenizer, eos_ids, cfg)
    for name, folder in loaded.items():
        opened.load_adapter(name, folder)
        say(f"adapter {name} from {folder}")
    return opened, f"{arguments['dtype']} on vLLM {getattr(vllm, '__version__', '')}".rstrip()


@dataclass
class _Running:
    """A request in vLLM: our request, and what each of its answers has come to."""

    request: EngineRequest | EmbedRequest
    texts: list[TextStream]
    left: set[int]


class VllmEngine:
    """See :class:`research.core.engine.api.Engine`. Counters that vLLM does not tell are 0."""

    def __init__(self, engine, vllm: ModuleType, weights: Path, tokenizer: Tokenizer, eos_ids, cfg: Config):
        self._engine, self._vllm = engine, vllm
        self.tokenizer, self.eos_ids = tokenizer, tuple(eos_ids)
        self.spec = spec_from_hf(read_config(weights), where=str(weights / "config.json"))
        self._limit = min(cfg.engine.max_length or self.spec.usable_length, self.spec.usable_length)
        self._embedding = cfg.model.embedding
        self._adapters: dict[str, tuple[int, Path]] = {}
        self._running: dict[int, _Running] = {}
        self._ready: list[Update] = []
        self._numbers, self._slots = itertools.count(), itertools.count(1)
        self._prompt_tokens = self._cached_tokens = self._new_tokens = self._steps = 0

    @property
    def length_limit(self) -> int:
        return self._limit

    @property
    def adapters(self) -> Sequence[str]:
        return list(self._adapters)

    def submit(self, request: EngineRequest | EmbedRequest) -> int:
        embed = isinstance(request, EmbedRequest)
        new = 0 if embed else request.max_new_tokens
        check_request(Request(request.prompt, max_new_tokens=new), self.spec.vocab, self.length_limit, "the prompt")
        if embed != self._embedding:
            kind = "an embedding model: it gives no text" if self._embedding else "opened to answer, not to embed"
            raise UserError(f"this model is {kind}", where="the request", hint="--is_embedding_model says which")
        if not embed and request.prompt_logprobs is not None:
            hint = "mode=vllm tells them of an answer only; the engine of this repository (mode=paged) tells both"
            raise UserError("log-probabilities of a prompt are not told", where="the request", hint=hint)
        adapter, number = self._lora(request.adapter), next(self._numbers)
        count = 1 if embed else request.n
        if not embed and new == 0:
            prompt = len(request.prompt)
            self._ready += [Update(number, choice, finish="length", prompt_tokens=prompt) for choice in range(count)]
            return number
        params = self._vllm.PoolingParams() if embed else self._sampling(request)
        prompt = {"prompt_token_ids": list(request.prompt)}
        try:
            self._engine.add_request(str(number), prompt, params, lora_request=adapter, priority=request.priority)
        except ValueError as bad:
            raise UserError(
                f"vLLM does not take this request: {str(bad).splitlines()[0]}", where="the request"
            ) from None
        hidden = () if embed else (*request.stop_ids, *(() if request.ignore_eos else self.eos_ids))
        stop = () if embed else request.stop
        texts = [TextStream(self.tokenizer, hidden=hidden, stop=stop) for _ in range(count)]
        self._running[number] = _Running(request, texts, set(range(count)))
        return number

    def _lora(self, name: str | None):
        if name is None or name == BASE:
            return None
        if name not in self._adapters:
            hint = did_you_mean(name, self._adapters) if self._adapters else "none is loaded"
            raise ConfigError(f"{name!r} is not a loaded adapter", where="adapter", hint=hint)
        slot, folder = self._adapters[name]
        return importlib.import_module("vllm.lora.request").LoRARequest(name, slot, str(folder))

    def _sampling(self, request: EngineRequest):
        own = request.sampling
        fields: dict[str, Any] = {
            "n": request.n,
            "temperature": own.temperature,
            "top_p": own.top_p,
            "top_k": own.top_k or -1,
            "min_p": own.min_p,
            "repetition_penalty": own.repetition_penalty,
            "presence_penalty": own.presence_penalty,
            "frequency_penalty": own.frequency_penalty,
            "seed": own.seed,
            "max_tokens": request.max_new_tokens,
            "ignore_eos": request.ignore_eos,
            "stop_token_ids": [*request.stop_ids, *(() if request.ignore_eos else self.eos_ids)],
            "logprobs": request.logprobs,
            "logit_bias": dict(request.logit_bias) or None,
            "detokenize": request.constraint is not None,
            "output_kind": self._vllm.sampling_params.RequestOutputKind.DELTA,
        }
        if request.constraint is not None:
            fields |= self._constraint(request.constraint)
        return self._vllm.SamplingParams(**fields)

    def _constraint(self, constraint: Constraint) -> dict[str, Any]:
        """The field was renamed between versions: the one that this vLLM has."""
        name = {"json_schema": "json"}.get(constraint.kind, constraint.kind)
        value = True if constraint.kind == "json_object" else constraint.value
        module = self._vllm.sampling_params
        for kind, field in (
            ("StructuredOutputsParams", "structured_outputs"),
            ("GuidedDecodingParams", "guided_decoding"),
        ):
            if hasattr(module, kind):
                return {field: getattr(module, kind)(**{name: value})}
        raise UserError("this vLLM has no constrained answers", where="the request", hint="a newer vLLM")

    def cancel(self, number: int) -> None:
        running = self._running.pop(number, None)
        if running is None:
            return
        self._engine.abort_request([str(number)])
        self._ready += [Update(number, choice, finish="cancelled") for choice in sorted(running.left)]

    def has_work(self) -> bool:
        return bool(self._running or self._ready)

    def step(self) -> list[Update]:
        updates, self._ready = self._ready, []
        if not self._running:
            return updates
        self._steps += 1
        for output in self._engine.step():
            number = int(output.request_id)
            running = self._running.get(number)
            if running is None:
                continue
            if isinstance(running.request, EmbedRequest):
                updates += self._embedded(number, running, output)
            else:
                updates += [
                    self._answered(number, running, output, one) for one in output.outputs if one.index in running.left
                ]
            if output.finished or not running.left:
                if not output.finished:  # all answers ended by a stop string, which vLLM knows nothing of
                    self._engine.abort_request([str(number)])
                self._running.pop(number, None)
        return updates

    def _answered(self, number: int, running: _Running, output, one) -> Update:
        stream, tokens = running.texts[one.index], tuple(one.token_ids)
        text = "".join(stream.push(token) for token in tokens)
        finish = None
        if stream.stopped:
            finish = "stop"
        elif one.finish_reason is not None:
            ended = bool(tokens) and tokens[-1] in self.eos_ids
            finish = "length" if one.finish_reason == "length" else "eos" if ended else "stop"
        if finish is not None:
            text += stream.flush()
            running.left.discard(one.index)
        self._new_tokens += len(tokens)
        prompt, cached = len(running.request.prompt), output.num_cached_tokens or 0
        if finish is not None and one.index == 0:
            self._prompt_tokens += prompt
            self._cached_tokens += cached
        return Update(number, one.index, tokens, text, self._logprobs(running, tokens, one), finish, prompt, cached)

    def _logprobs(self, running: _Running, tokens: Sequence[int], one) -> tuple[TokenLogprob, ...]:
        wanted = running.request.logprobs
        if wanted is None or not one.logprobs:
            return ()
        found = []
        for token, table in zip(tokens, list(one.logprobs)[-len(tokens) :]):
            best = sorted(table.items(), key=lambda item: -item[1].logprob)[:wanted]
            found.append(TokenLogprob(token, table[token].logprob, tuple((i, entry.logprob) for i, entry in best)))
        return tuple(found)

    def _embedded(self, number: int, running: _Running, output) -> list[Update]:
        if not output.finished:
            return []
        values = [float(value) for value in output.outputs.data]
        if running.request.normalize:
            length = sum(value * value for value in values) ** 0.5 or 1.0
            values = [value / length for value in values]
        prompt = len(running.request.prompt)
        self._prompt_tokens += prompt
        return [Update(number, finish="stop", prompt_tokens=prompt, embedding=values)]

    def load_adapter(self, name: str, folder: Path) -> None:
        if not name or name == BASE or name in self._adapters:
            raise ConfigError(f"{name!r} is taken or cannot be an adapter's name", where="adapter", hint="another name")
        read_adapter_config(folder)
        self._adapters[name] = (next(self._slots), Path(folder))

    def unload_adapter(self, name: str) -> None:
        self._lora(name)
        if any(running.request.adapter == name for running in self._running.values()):
            raise ConfigError(f"{name!r} is in use", where="adapter", hint="unload it when its requests have ended")
        slot, _ = self._adapters.pop(name)
        self._engine.remove_lora(slot)

    def stats(self) -> Stats:
        return Stats(
            running=len(self._running),
            waiting=0,
            blocks=0,
            free_blocks=0,
            cached_blocks=0,
            total_prompt_tokens=self._prompt_tokens,
            total_cached_tokens=self._cached_tokens,
            total_new_tokens=self._new_tokens,
            total_preemptions=0,
            total_steps=self._steps,
        )

    def close(self) -> None:
        for number in list(self._running):
            self.cancel(number)
        self._engine = None


# --- its server -------------------------------------------------------------------------------------------------------

# Settings of `make serve` that vLLM's server has nothing for.
_OURS_ONLY = ("requests_per_minute", "max_requests", "max_body_mb", "max_choices", "max_prompts", "max_new_tokens",
              "read_timeout_s", "write_timeout_s", "drain_s", "adapter_folder", "page", "log_prompts")  # fmt: skip


def server_command(
    weights: Path, name: str, cfg: Config, adapters: Mapping[str, Path], keys: Sequence[str]
) -> list[str]:
    """Arguments of vLLM's OpenAI server (behind ``python``) for what ``make serve`` was asked. With keys they are visible to
    whoever may list this machine's processes, except a single one, which goes by ``VLLM_API_KEY``."""
    words = ["-m", "vllm.entrypoints.openai.api_server", "--host", cfg.serve.host, "--port", str(cfg.serve.port)]
    words += ["--served-model-name", name]
    for argument, value in engine_arguments(weights, cfg, adapters).items():
        flag = f"--{argument.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, str(value)]
    if cfg.model.embedding:
        words += ["--task", "embed"]
    if adapters:
        words += ["--lora-modules", *(f"{name}={Path(folder).resolve()}" for name, folder in adapters.items())]
    if len(keys) > 1:
        words += ["--api-key", *keys]
    return words


def without_counterpart(cfg: Config) -> list[str]:
    """The ``serve.*`` settings that were changed and that vLLM's server does not know."""
    default = type(cfg.serve)()
    return [f"serve.{name}" for name in _OURS_ONLY if getattr(cfg.serve, name) != getattr(default, name)]
