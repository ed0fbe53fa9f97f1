"""Autoregressive generation against a static key/value cache: prefill, then one step per token.

Shape letters: B rows of the running batch, T time, V vocabulary. Rows of a batch may have different lengths: prompts
are padded on the right for the prefill, each row's real tokens take the first slots of its cache row, and positions
count real tokens, so a row's answer is the one it gets alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from research.core.errors import UserError
from research.core.torch.cache import KVCache
from research.core.torch.compiled_step import CompiledStep
from research.core.torch.decode_step import MOST_ROWS, DecodeStep
from research.core.torch.decoder import Decoder
from research.core.torch.layout import Layout
from research.core.torch.rotary import ntk_alpha
from research.core.torch.sampler import Sampler, Sampling

# Called with (request number, token) for every new token; a true result ends that request.
OnToken = Callable[[int, int], "bool | None"]


@dataclass(frozen=True)
class Request:
    """One prompt (token ids, at least one) and how to continue it."""

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256


@dataclass(frozen=True)
class Result:
    """New tokens (the end token included) and why they ended: ``eos``, ``length`` or ``stop`` (the callback said so)."""

    ids: list[int]
    reason: str


class Runner:
    """Prefill and decode steps of one decoder.

    A step goes layer by layer, or as one call of the native kernel where that can run the decoder
    (:class:`DecodeStep`), or, if ``compiled``, through torch.compile. The answers are the same.
    """

    def __init__(self, decoder: Decoder, compiled: bool = False):
        self.decoder, self.compiled = decoder, compiled
        weight = decoder.model.embed_tokens.weight
        self.dtype, self.device = weight.dtype, weight.device
        self._compiled_step = CompiledStep(decoder) if compiled else None
        self._native_step = DecodeStep(decoder) if not compiled and DecodeStep.fits(decoder) else None

    @property
    def length_limit(self) -> int:
        """Prompt and answer together may not be longer, in tokens."""
        return self.decoder.spec.usable_length

    def new_cache(self, batch: int, length: int) -> KVCache:
        return KVCache(self.decoder.spec, batch, length, self.dtype, self.device)

    def can_extend(self, cache: KVCache, kept: int, length: int) -> bool:
        """Whether row 0, cut to ``kept`` tokens, may become a prompt of ``length`` tokens without computing all anew.

        Qwen v1's rotary depends on the length of the whole prompt: a longer one may need other keys.
        """
        spec = self.decoder.spec
        if kept == 0 or not spec.dynamic_ntk or cache.ntk_alpha is None:
            return True
        return float(cache.ntk_alpha[0]) == ntk_alpha(length, spec.train_length)

    @torch.inference_mode()
    def prefill(self, cache: KVCache, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Put one prompt (or its rest) behind each row of ``cache`` -> float32 logits [B, V] after the last token."""
        lengths = torch.tensor([len(p) for p in prompts])
        longest = int(lengths.max())
        ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_BT[row, : len(prompt)] = torch.as_tensor(list(prompt), dtype=torch.long)
        mask_BT = torch.arange(longest)[None] < lengths[:, None]
        layout = Layout.cached(cache, longest, mask_BT)
        hidden_BTH = self.decoder.hidden(ids_BT.to(self.device), layout, cache)
        rows = torch.arange(len(prompts), device=self.device)
        return self.decoder.logits(hidden_BTH[rows, lengths.to(self.device) - 1]).float()

    @torch.inference_mode()
    def step(self, cache: KVCache, tokens: Sequence[int]) -> Tensor:
        """One more token in every row -> float32 logits [B, V]."""
        if self._compiled_step is not None:
            return self._compiled_step(cache, tokens)
        if self._native_step is not None and len(tokens) <= MOST_ROWS:
            return self._native_step(cache, tokens)
        ids_B1 = torch.tensor(tokens, dtype=torch.long)[:, None].to(self.device)
        return self.decoder.logits(self.decoder.hidden(ids_B1, None, cache)[:, 0]).float()


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    max_new_tokens: int = 256,
    eos_ids: Collection[int] = (),
    on_token: OnToken | None = None,
    batch: int = 8,
    compiled: bool = False,
) -> list[list[int]]:
    """Continue token-id ``prompts``; returns the new tokens of each, in order, an end token included.

    ``sampling`` is one for all or one per prompt (None: greedy). Prompts run ``batch`` at a time, those of like length
    together; ``compiled`` runs the steps through torch.compile. Raises :class:`UserError` before anything is computed when a prompt is empty, has an id outside the
    vocabulary, or does not leave room for ``max_new_tokens``.
    """
    if not isinstance(sampling, Sequence):
        sampling = [sampling or Sampling()] * len(prompts)
    requests = [Request(p, s, max_new_tokens) for p, s in zip(prompts, sampling, strict=True)]
    return [result.ids for result in run_requests(Runner(decoder, compiled), requests, eos_ids, on_token, batch)]


def run_requests(
    runner: Runner,
    requests: Sequence[Request],
    eos_ids: Collection[int] = (),
    on_token: OnToken | None = None,
    batch: int = 8,
) -> list[Result]:
    """Run all ``requests``, at most ``batch`` at a time, and return their results in order. Raises as :func:`generate`."""
    for number, request in enumerate(requests):
        check_request(request, runner, f"prompt {number}")
    was_training = runner.decoder.training
    runner.decoder.eval()  # Qwen v1's length rules act in evaluation mode only
    try:
        results: list[Result | None] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        for begin in range(0, len(order), batch):
            chosen = order[begin : begin + batch]
            part = [requests[i] for i in chosen]
            for i, result in zip(chosen, _run_batch(runner, part, eos_ids, _renumbered(on_token, chosen))):
                results[i] = result
        return results
    finally:
        runner.decoder.train(was_training)


def _renumbered(on_token: OnToken | None, numbers: Sequence[int]) -> OnToken | None:
    return None if on_token is None else lambda row, token: on_token(numbers[row], token)


def _run_batch(
    runner: Runner, requests: Sequence[Request], eos_ids: Collection[int], on_token: OnToken | None
) -> list[Result]:
    length = max(len(r.prompt) for r in requests) + max(r.max_new_tokens for r in requests)
    cache = runner.new_cache(len(requests), length)
    logits_BV = runner.prefill(cache, [r.prompt for r in requests])
    return continue_from(runner, cache, logits_BV, requests, eos_ids, on_token)


def continue_from(
    runner: Runner,
    cache: KVCache,
    logits_BV: Tensor,
    requests: Sequence[Request],
    eos_ids: Collection[int] = (),
    on_token: OnToken | None = None,
) -> list[Result]:
    """Sample and step until every request has ended. ``cache`` holds the prompts, ``logits_BV`` what follows them.

    Afterwards the cache holds, for a single request, its prompt and its answer without the last token.
    """
    if not bool(torch.isfinite(logits_BV).all()):
        raise UserError(
            "the model's logits are not finite",
            where="the prompt's last token",
            hint="generate.dtype=fp32, or check the weights",
        )
    eos = frozenset(eos_ids)
    sampler = Sampler([r.sampling for r in requests], [r.prompt for r in requests], runner.decoder.spec.vocab)
    answers: list[list[int]] = [[] for _ in requests]
    reasons = ["length"] * len(requests)
    rows = list(range(len(requests)))  # the request in each row of the cache
    going = [row for row in rows if requests[row].max_new_tokens > 0]  # rows of the cache that still run
    while going:
        chosen = sampler(logits_BV if len(going) == len(rows) else logits_BV[going], [rows[place] for place in going])
        tokens, still = [0] * len(rows), []
        for place, token in zip(going, chosen):
            row = rows[place]
            answers[row].append(token)
            told_to_stop = on_token is not None and bool(on_token(row, token))
            if token in eos:
                reasons[row] = "eos"
            elif told_to_stop:
                reasons[row] = "stop"
            elif len(answers[row]) < requests[row].max_new_tokens:
                tokens[place] = token
                still.append(place)
        if still and len(still) < len(rows) and not runner.compiled:  # a compiled step keeps its shapes
            cache.keep(still)
            rows, tokens = [rows[place] for place in still], [tokens[place] for place in still]
            still = list(range(len(rows)))
        going = still
        if going:
            logits_BV = runner.step(cache, tokens)
    return [Result(ids, reason) for ids, reason in zip(answers, reasons)]


def check_request(request: Request, runner: Runner, name: str) -> None:
    """Raise :class:`UserError` when ``request`` cannot be run; ``name`` says which one it is."""
    if not request.prompt:
        raise UserError("is empty: a model continues at least one token", where=name, hint="give it some text")
    if request.max_new_tokens < 0:
        raise UserError(
            f"{request.max_new_tokens} new tokens cannot be generated", where=name, hint="a positive number"
        )
    vocab = runner.decoder.spec.vocab
    wrong = [i for i in request.prompt if not 0 <= i < vocab]
    if wrong:
        raise UserError(
            f"token id {wrong[0]} is outside the model's vocabulary of {vocab}",
            where=name,
            hint="use the tokenizer that belongs to these weights",
        )
    check_room(len(request.prompt), request.max_new_tokens, runner.length_limit, name)


def check_room(prompt_tokens: int, new_tokens: int, limit: int, name: str) -> None:
    """Raise :class:`UserError` when prompt and new tokens together are more than ``limit``."""
    if prompt_tokens + new_tokens > limit:
        room = limit - prompt_tokens
        hint = f"at most {room} new tokens (generate.max_new_tokens={room})" if room > 0 else "a shorter prompt"
        raise UserError(
            f"{prompt_tokens} tokens and {new_tokens} new ones are more than the model's {limit}", where=name, hint=hint
        )
