"""The engine: requests in, updates out; scheduler, runner and sampler in between. One thread calls it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from research.core.config.schema import EngineConfig
from research.core.engine.answer import Answer
from research.core.engine.api import EmbedRequest, EngineRequest, FinishReason, Stats, TokenLogprob, Update
from research.core.engine.blocks import BlockPool
from research.core.engine.choose import RowSampler, choose, logprob, numbers
from research.core.engine.constraint import Grammars
from research.core.engine.memory import count_blocks
from research.core.engine.runner import ModelRunner, Scores
from research.core.engine.scheduler import Scheduler, Step
from research.core.errors import ConfigError, UserError
from research.core.generation.requests import Request, check_request
from research.core.generation.stream import TextStream
from research.core.text.tokenizer import Tokenizer
from research.core.torch.decoder import Decoder
from research.core.torch.rotary import ntk_alpha

_log = logging.getLogger("research.engine")


class AnswerState:
    """What the engine keeps of one answer beside its tokens."""

    __slots__ = ("ends", "logprobs", "new", "normalize", "prompt", "sampler", "text", "told")

    def __init__(self):
        self.new = 0  # tokens that may still come
        self.told = False  # whether its first update, which counts the prompt, has gone out
        self.normalize = False
        self.logprobs: int | None = None
        self.prompt: list[TokenLogprob] = []  # of its tokens from the second on; one list for all answers to it
        self.ends: Collection[int] = ()
        self.sampler: RowSampler | None = None
        self.text: TextStream | None = None


class PagedEngine:
    """See :class:`research.core.engine.api.Engine`.

    ``eos_ids`` end an answer unless its request ignores them. ``runner`` replaces the one that is made of ``decoder``
    (tensor parallelism); ``adapters`` is what :mod:`research.core.engine.adapters` keeps of the loaded adapters.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        settings: EngineConfig | None = None,
        eos_ids: Collection[int] = (),
        runner: Any = None,
        adapters: Any = None,
    ):
        self.spec, self.tokenizer = decoder.spec, tokenizer
        self.settings = settings = check_settings(settings or EngineConfig(), decoder)
        self.eos_ids = frozenset(eos_ids)
        if runner is None:
            weight = decoder.model.embed_tokens.weight
            blocks = count_blocks(settings, self.spec, weight.dtype, weight.device) if self.spec.causal else 1
            runner = ModelRunner(decoder, settings, blocks)
        self.runner = runner
        self._loaded = adapters
        self._head = decoder.lm_head is not None
        self.pool = BlockPool(runner.num_blocks, settings.block_size, settings.prefix_cache)
        self.scheduler = Scheduler(
            self.pool,
            settings.max_batch,
            settings.max_tokens_per_step,
            dynamic_ntk=self.spec.dynamic_ntk,
            causal=self.spec.causal,
        )
        self._grammars = Grammars(tokenizer, self.spec.vocab, self.eos_ids)
        self._requests: dict[int, list[Answer]] = {}  # answers that have not ended
        self._adapter_of: dict[int, Any] = {}
        self._ready: list[Update] = []  # updates that need no step
        self._numbers = 0
        self._prompt_tokens = self._cached_tokens = self._new_tokens = self._steps = 0

    # --- requests ------------------------------------------------------------------------------------------------

    @property
    def length_limit(self) -> int:
        limit = min(self.settings.max_length or self.spec.usable_length, self.spec.usable_length)
        return min(limit, self.pool.blocks * self.pool.block_size) if self.spec.causal else limit

    @property
    def adapters(self) -> Sequence[str]:
        return [] if self._loaded is None else self._loaded.names

    def submit(self, request: EngineRequest | EmbedRequest) -> int:
        embed = isinstance(request, EmbedRequest)
        new = 0 if embed else request.max_new_tokens
        check_request(Request(request.prompt, max_new_tokens=new), self.spec.vocab, self.length_limit, "the prompt")
        if not embed:
            self._check_answers(request)
        adapter = self._find_adapter(request.adapter)
        number = self._numbers
        self._numbers += 1
        root: tuple = () if adapter is None else (adapter.name, adapter.generation)
        if self.spec.dynamic_ntk:
            root += (float(ntk_alpha(len(request.prompt), self.spec.train_length)),)
        scored = None if embed else request.prompt_logprobs
        if scored is not None:
            root += ("scored", number)  # every place is computed: no other text's blocks are used
        slot = adapter.slot if adapter else 0
        answers = [
            Answer(number, request.prompt, request.priority, choice, root, slot, embed, scored)
            for choice in range(1 if embed else request.n)
        ]
        for answer in answers:
            answer.state = self._embedding(request) if embed else self._answering(request, answer.choice)
            answer.state.prompt = answers[0].state.prompt
        if new == 0 and not embed and scored is None:
            self._ready += [self._last_update(answer, "length") for answer in answers]
            return number
        answers[0].siblings = answers[1:]
        self._requests[number] = answers
        if adapter is not None:
            adapter.users += 1
            self._adapter_of[number] = adapter
        self.scheduler.add(answers[0])
        return number

    def _check_answers(self, request: EngineRequest) -> None:
        if not self._head or not self.spec.causal:
            raise UserError(
                "this is an embedding model: it gives no text", where="the request", hint="ask it for embeddings"
            )
        if not 1 <= request.n <= self.settings.max_batch:
            raise UserError(
                f"n={request.n} answers to one prompt are not possible",
                where="the request",
                hint=f"1 to {self.settings.max_batch} (engine.max_batch)",
            )
        outside = next((token for token, _ in request.logit_bias if not 0 <= token < self.spec.vocab), None)
        if outside is not None:
            raise UserError(
                f"token id {outside} does not exist in the model: it has {self.spec.vocab}", where="logit_bias"
            )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(request, name)
            if count is not None and count < 0:
                raise UserError(f"{name}={count}", where="the request", hint="0 or more")

    def _find_adapter(self, name: str | None) -> Any:
        if self._loaded is not None:
            return self._loaded.find(name)
        if name is not None and name != "base":
            raise ConfigError(f"{name!r} is not a loaded adapter", where="adapter", hint="none is loaded")
        return None

    def _embedding(self, request: EmbedRequest) -> AnswerState:
        state = AnswerState()
        state.normalize = request.normalize
        return state

    def _answering(self, request: EngineRequest, choice: int) -> AnswerState:
        state = AnswerState()
        state.new, state.logprobs = request.max_new_tokens, request.logprobs
        state.ends = frozenset(request.stop_ids) | (frozenset() if request.ignore_eos else self.eos_ids)
        match = None if request.constraint is None else self._grammars.start(request.constraint)
        state.sampler = RowSampler(request.sampling, request.prompt, self.spec.vocab, choice, match, request.logit_bias)
        state.text = TextStream(self.tokenizer, hidden=state.ends, stop=request.stop)
        return state

    def cancel(self, number: int) -> None:
        answers = self._requests.get(number)
        if answers is None:
            return
        waiting = answers[0].siblings if answers else []
        for answer in list(answers):
            if answer not in waiting:
                self.scheduler.remove(answer)
            self._ready.append(self._last_update(answer, "cancelled"))
        self._forget(number)

    def has_work(self) -> bool:
        return bool(self._requests or self._ready)

    # --- a step --------------------------------------------------------------------------------------------------

    def step(self) -> list[Update]:
        updates, self._ready = self._ready, []
        step = self.scheduler.plan()
        if step is None:
            return updates
        self._steps += 1
        step.plan.greedy = all(
            answer.state.sampler.plain_greedy and answer.state.logprobs is None for answer, _ in step.sampled
        )
        try:
            output = self.runner.execute(step.plan)
            for (answer, _, begin), scores in zip(step.scored, output.scores):
                answer.state.prompt[begin : begin + len(scores.targets)] = _of_prompt(answer, begin, scores)
            if step.sampled:
                self._drop_infinite(step, output.logits, updates)
                chosen = choose(output.logits, [a.state.sampler for a, _ in step.sampled], [r for _, r in step.sampled])
                for (answer, row), token in zip(step.sampled, chosen):
                    updates.append(self._take(answer, token, output.logits[row]))
            if step.embedded:
                updates += self._embedded(step, output.hidden)
        except BaseException:
            # Nobody knows what was computed: what runs begins again, should the caller go on.
            self.scheduler.start_over()
            self._ready = updates + self._ready
            raise
        return updates

    def _drop_infinite(self, step: Step, logits_SV: torch.Tensor, updates: list[Update]) -> None:
        """End the answers whose first logits are no numbers, as damaged weights give."""
        for answer, row in list(step.sampled):
            if not answer.state.told and not numbers(logits_SV[row]):
                step.sampled.remove((answer, row))
                what = "the model's logits are not finite: check the weights, or choose generate.dtype=fp32"
                updates.append(replace(self._last_update(answer, "error"), error=what))
                self._end(answer)

    def _take(self, answer: Answer, token: int, logits_V: torch.Tensor) -> Update:
        """One more token of ``answer``: its text, and whether it ends here."""
        state = answer.state
        if state.new == 0:  # the prompt's log-probabilities are all that was asked for
            return self._only_prompt(answer)
        answer.tokens.append(token)
        state.new -= 1
        self._new_tokens += 1
        text = state.text.push(token)
        finish: FinishReason | None = None
        if token in state.ends:
            finish = "eos" if token in self.eos_ids else "stop"
        elif state.text.stopped or (state.sampler.match is not None and state.sampler.match.complete):
            finish = "stop"
        elif state.new == 0:
            finish = "length"
        if finish is not None:
            text += state.text.flush()
        prompt = () if state.told else tuple(state.prompt)
        self._tell(answer)
        update = Update(
            answer.number,
            answer.choice,
            (token,),
            text,
            () if state.logprobs is None else (logprob(logits_V, token, state.logprobs),),
            finish,
            answer.prompt_length,
            answer.cached_tokens,
            prompt_logprobs=prompt,
        )
        if finish is not None:
            self._end(answer)
        return update

    def _tell(self, answer: Answer) -> None:
        """Count the prompt, once."""
        if not answer.state.told and answer.choice == 0:
            self._prompt_tokens += answer.prompt_length
            self._cached_tokens += answer.cached_tokens
        answer.state.told = True

    def _only_prompt(self, answer: Answer) -> Update:
        self._tell(answer)
        update = replace(self._last_update(answer, "length"), prompt_logprobs=tuple(answer.state.prompt))
        self._end(answer)
        return update

    def _embedded(self, step: Step, hidden_EH: torch.Tensor) -> list[Update]:
        updates = []
        for answer, row in zip(step.embedded, hidden_EH):
            vector = F.normalize(row, dim=-1) if answer.state.normalize else row
            self._prompt_tokens += answer.prompt_length
            self._cached_tokens += answer.cached_tokens
            updates.append(replace(self._last_update(answer, "stop"), embedding=vector.tolist()))
            self._end(answer)
        return updates

    def _last_update(self, answer: Answer, finish: FinishReason) -> Update:
        return Update(
            answer.number,
            answer.choice,
            text="" if answer.state.text is None else answer.state.text.flush(),
            finish=finish,
            prompt_tokens=answer.prompt_length,
            cached_tokens=answer.cached_tokens or 0,
        )

    def _end(self, answer: Answer) -> None:
        self.scheduler.remove(answer)
        answers = self._requests[answer.number]
        answers.remove(answer)
        if not answers:
            self._forget(answer.number)

    def _forget(self, number: int) -> None:
        del self._requests[number]
        adapter = self._adapter_of.pop(number, None)
        if adapter is not None:
            adapter.users -= 1

    # --- the rest ------------------------------------------------------------------------------------------------

    def load_adapter(self, name: str, folder: Path) -> None:
        self._need_adapters().load(name, folder)

    def unload_adapter(self, name: str) -> None:
        self._need_adapters().unload(name)

    def _need_adapters(self) -> Any:
        if self._loaded is None:
            raise ConfigError("this engine was started without adapters", where="adapter")
        return self._loaded

    def stats(self) -> Stats:
        return Stats(
            running=len(self.scheduler.running),
            waiting=self.scheduler.waiting,
            blocks=self.pool.blocks,
            free_blocks=self.pool.free,
            cached_blocks=self.pool.cached,
            total_prompt_tokens=self._prompt_tokens,
            total_cached_tokens=self._cached_tokens,
            total_new_tokens=self._new_tokens,
            total_preemptions=self.scheduler.preemptions,
            total_steps=self._steps,
        )

    def close(self) -> None:
        close = getattr(self.runner, "close", None)
        if close is not None:
            close()
        self.runner = None


def _of_prompt(answer: Answer, begin: int, scores: Scores) -> list[TokenLogprob]:
    """The prompt's tokens behind place ``begin``, with as many others as the request wants."""
    targets = answer.tokens[begin + 1 : begin + 1 + len(scores.targets)]
    best, tokens = scores.best[:, : answer.scored].tolist(), scores.tokens[:, : answer.scored].tolist()
    return [
        TokenLogprob(token, value, tuple(zip(ids, values)))
        for token, value, ids, values in zip(targets, scores.targets.tolist(), tokens, best)
    ]


def check_settings(settings: EngineConfig, decoder: Decoder) -> EngineConfig:
    """Fill in what follows from the device. Raises :class:`ConfigError` for impossible settings."""
    device = decoder.model.embed_tokens.weight.device
    tokens = settings.max_tokens_per_step or (512 if device.type == "cpu" else 8192)
    for name in ("block_size", "num_blocks", "max_batch", "max_tokens_per_step", "max_length"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"{value} is not possible", where=f"engine.{name}", hint="1 or more")
    fraction = settings.memory_fraction
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigError(f"{fraction} is not possible", where="engine.memory_fraction", hint="above 0 and at most 1")
    return replace(settings, max_tokens_per_step=tokens)
