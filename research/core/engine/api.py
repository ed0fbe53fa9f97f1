"""What a caller of the engine sees: requests go in, updates come out. No framework, no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from research.core.generation.sampling import Sampling
from research.core.spec import DecoderSpec
from research.core.text.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Constraint:
    """What an answer has to match: a JSON schema (a dict), any JSON object, a regular expression, or one of some texts."""

    kind: Literal["json_schema", "json_object", "regex", "choice"]
    value: Any = None


@dataclass(frozen=True)
class EngineRequest:
    """One prompt and ``n`` answers to it, which share the prompt's blocks.

    ``stop``: texts that end an answer and are not part of it; ``stop_ids``: tokens that end it beside the model's own
    end tokens, which ``ignore_eos`` switches off. ``logprobs``: report each chosen token's log-probability and those of
    so many best tokens (0: the chosen one only). ``prompt_logprobs``: the same of each token of the prompt but the first,
    in the answer's first update; with ``max_new_tokens=0`` that is all. ``adapter``: name of a loaded adapter. Smaller
    ``priority`` runs first; among equals the oldest. ``logit_bias``: what is added to the logits of some tokens before all
    else that chooses.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    adapter: str | None = None
    priority: int = 0
    constraint: Constraint | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class EmbedRequest:
    """One text's embedding: the last token's hidden state after the final norm, of length 1 if ``normalize``."""

    prompt: tuple[int, ...]
    normalize: bool = True
    adapter: str | None = None
    priority: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probability of a chosen or given token before temperature and filters, and the best tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Update:
    """What one step brought one answer. The last one of an answer has ``finish``.

    ``tokens`` may be empty and ``text`` lag behind them while a character or a stop string is incomplete. ``text`` holds
    no control tokens. ``prompt_tokens``, and how many of them came from the prefix cache: ``cached_tokens``.
    """

    request: int
    choice: int = 0
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    embedding: Sequence[float] | None = None
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Stats:
    """The engine now (gauges) and since its start (counters, ``total_`` in front)."""

    running: int
    waiting: int
    blocks: int
    free_blocks: int
    cached_blocks: int  # hold a prefix that nobody uses now; counted in free_blocks too
    total_prompt_tokens: int
    total_cached_tokens: int
    total_new_tokens: int
    total_preemptions: int
    total_steps: int


class Engine(Protocol):
    """Not thread-safe: one thread submits, cancels and steps (:mod:`research.core.serve` puts requests in a queue)."""

    spec: DecoderSpec
    tokenizer: Tokenizer

    @property
    def length_limit(self) -> int:
        """Prompt and answer together may not be longer, in tokens: the model's context or what the cache can hold."""

    @property
    def adapters(self) -> Sequence[str]: ...

    def submit(self, request: EngineRequest | EmbedRequest) -> int:
        """-> its number. Raises :class:`UserError` for one that can never run (too long, unknown adapter, bad constraint)."""

    def cancel(self, number: int) -> None:
        """End a request; its choices get a last update with ``finish="cancelled"`` from the next step. Unknown numbers are
        ignored: the request may have just ended."""

    def has_work(self) -> bool: ...

    def step(self) -> list[Update]:
        """One forward of the model over some of the requests, and what it brought."""

    def load_adapter(self, name: str, folder: Path) -> None:
        """Raises :class:`UserError` when the name is taken, the folder is no adapter or does not fit the model."""

    def unload_adapter(self, name: str) -> None:
        """Raises :class:`UserError` when it is unknown or in use."""

    def stats(self) -> Stats: ...

    def close(self) -> None:
        """Give memory back; with tensor parallelism, end the other ranks."""
