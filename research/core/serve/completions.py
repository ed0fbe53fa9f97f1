"""``/v1/completions``: plain text continued, without a template."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from research.core.engine.api import EngineRequest, Update
from research.core.serve.errors import bad
from research.core.serve.events import DONE, EventStream, event, merged
from research.core.serve.fields import bias_of, choices_of, constraint_of, sampling_of, stop_of
from research.core.serve.logprobs import CompletionLogprobs
from research.core.serve.schema import CompletionRequest, StreamOptions
from research.core.serve.service import Service, Work

router = APIRouter()

# What a fill-in-the-middle answer may not go on with: the tokens of Qwen2.5-Coder's file format.
_FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
_FIM_ENDS = (*_FIM, "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
_DEFAULT_TOKENS = 16  # OpenAI's
_FINISH = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop", "error": "stop"}


@dataclass(frozen=True)
class Prompt:
    """``ids`` go into the model; ``text`` is what ``echo`` repeats."""

    ids: list[int]
    text: str


@router.post("/v1/completions", tags=["openai"])
async def completions(request: Request, body: CompletionRequest) -> Response:
    """OpenAI's completion interface: a text continued, or filled in before ``suffix``."""
    service: Service = request.app.state.service
    service.check_can_generate()
    adapter = service.adapter_of(body.model)
    request.state.entry.note(model=body.model, user=body.user, stream=body.stream or None)
    n = choices_of(body, service)
    if body.best_of is not None and body.best_of != n:
        raise bad("best_of", f"every answer is returned here: it is n ({n}), or left out")
    scored = body.echo and body.logprobs is not None
    if scored and body.suffix is not None:
        raise bad("logprobs", "of a text that is filled in are not told: leave echo, suffix or logprobs out")
    prompts = await _prompts(service, body)
    nothing = body.max_tokens == 0
    if nothing and (not body.echo or body.stream):
        raise bad("max_tokens", "0 is only for echo=true, and not for a stream")
    sampling = sampling_of(body, service.served.sampling)
    ends = tuple(body.stop_token_ids or ())
    if body.suffix is not None:
        ends += tuple(service.tokenizer.special_tokens[name] for name in _FIM_ENDS)
    requests = [
        EngineRequest(
            prompt=tuple(prompt.ids),
            sampling=sampling,
            max_new_tokens=service.new_tokens(
                len(prompt.ids), body.max_tokens, "prompt", "max_tokens", _DEFAULT_TOKENS
            ),
            n=n,
            stop=stop_of(body),
            stop_ids=ends,
            ignore_eos=body.ignore_eos,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if scored else None,
            adapter=adapter,
            priority=body.priority,
            constraint=constraint_of(body),
            logit_bias=bias_of(body, service),
        )
        for prompt in prompts
    ]
    head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time())}
    head["model"] = body.model or service.served.name
    answers = [
        Answer(service, prompt.text if body.echo else "", prompt.ids if scored else ())
        for prompt in prompts
        for _ in range(n)
    ]
    if nothing and not scored:
        return JSONResponse({**head, **_only_echo(answers, requests)})
    work = await service.submit(request, requests)
    if service.settings.log_prompts:
        work.entry.note(prompts_text=[prompt.text for prompt in prompts])
    if body.stream:
        return EventStream(work, _chunks(work, answers, head, n, body.stream_options or StreamOptions()))
    for index, update, _ in await work.all(request):
        answers[index * n + update.choice].take(update)
    choices = [answer.choice(index) for index, answer in enumerate(answers)]
    if service.settings.log_prompts:
        work.entry.note(answers=[choice["text"] for choice in choices])
    return JSONResponse({**head, "choices": choices, "usage": work.usage()})


async def _prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    texts, rows = await service.rows(body.prompt, "prompt")
    if texts is None:
        texts = [service.tokenizer.decode(ids) if body.echo else "" for ids in rows]
    prompts = [Prompt(ids, text) for ids, text in zip(rows, texts)]
    if body.suffix is None:
        return prompts
    specials = service.tokenizer.special_tokens
    if not all(name in specials for name in _FIM):
        raise bad("suffix", "this vocabulary has no tokens for filling in the middle")
    prefix, suffix, middle = (specials[name] for name in _FIM)
    (behind,) = await service.encode([body.suffix])
    return [Prompt([prefix, *prompt.ids, suffix, *behind, middle], prompt.text) for prompt in prompts]


def _only_echo(answers: list[Answer], requests: list[EngineRequest]) -> dict[str, Any]:
    tokens = sum(len(request.prompt) for request in requests)
    for answer in answers:
        answer.finish = "length"
    usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    return {"choices": [answer.choice(index) for index, answer in enumerate(answers)], "usage": usage}


@dataclass
class Answer:
    """One choice, taken together from its updates; ``echo`` stands in front of it, with the log-probabilities of the ids
    ``scored``, if there are any."""

    service: Service
    echo: str
    scored: Sequence[int] = ()
    text: list[str] = field(default_factory=list)
    logprobs: dict[str, list] | None = None
    finish: str | None = None

    def __post_init__(self):
        self._lists = CompletionLogprobs(self.service.tokenizer, 0 if self.scored else len(self.echo))

    def take(self, update: Update) -> None:
        self.text.append(update.text)
        for column, values in (self.logprobs_of(update) or {}).items():
            self.logprobs = self.logprobs or {}
            self.logprobs.setdefault(column, []).extend(values)
        if update.finish is not None:
            self.finish = _FINISH[update.finish]

    def logprobs_of(self, update: Update) -> dict[str, list] | None:
        """The log-probabilities that an update brings, with the first one those of the prompt: nothing is ``scored`` then."""
        parts = [self._lists.first(self.scored[0])] if self.scored else []
        self.scored = ()
        tokens = update.prompt_logprobs + update.logprobs
        parts += [self._lists.lists(tokens)] if tokens else []
        return {column: [v for part in parts for v in part[column]] for column in parts[0]} if parts else None

    def choice(self, index: int) -> dict[str, Any]:
        text = self.echo + "".join(self.text)
        return {"index": index, "text": text, "logprobs": self.logprobs, "finish_reason": self.finish}


async def _chunks(
    work: Work, answers: list[Answer], head: dict[str, Any], n: int, options: StreamOptions
) -> AsyncGenerator[bytes, None]:
    def chunk(index: int, text: str, logprobs: Any = None, finish: str | None = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": work.usage() if options.continuous_usage_stats else None} if options.include_usage else {}
        return event({**head, "choices": [choice], **usage})

    for index, answer in enumerate(answers):
        if answer.echo and not answer.scored:  # else it comes with its log-probabilities
            yield chunk(index, answer.echo)
    async for batch in work.batches():
        out = []
        for prompt, update in merged(batch):
            index = prompt * n + update.choice
            answer = answers[index]
            text = (answer.echo if answer.scored else "") + update.text
            logprobs = answer.logprobs_of(update)
            finish = _FINISH[update.finish] if update.finish is not None else None
            if text or logprobs or finish:
                out.append(chunk(index, text, logprobs, finish))
        if out:
            yield b"".join(out)
    if options.include_usage:
        yield event({**head, "choices": [], "usage": work.usage()})
    yield DONE
