"""``/v1/chat/completions``: messages through the template, the answer as a message, whole or in pieces."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from research.core.engine.api import EngineRequest, TokenLogprob
from research.core.errors import DataError
from research.core.serve.errors import bad
from research.core.serve.events import DONE, EventStream, event, merged
from research.core.serve.fields import bias_of, choices_of, constraint_of, sampling_of, stop_of
from research.core.serve.logprobs import chat_logprobs
from research.core.serve.schema import ChatMessage, ChatRequest, StreamOptions, Tool, ToolChoice
from research.core.serve.service import Service, Work
from research.core.serve.tools import CLOSE, OPEN, Call, CallParser, forced_call

router = APIRouter()


@router.post("/v1/chat/completions", tags=["openai"])
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """OpenAI's chat interface: the next message of a conversation."""
    service: Service = request.app.state.service
    service.check_can_generate()
    adapter = service.adapter_of(body.model)
    request.state.entry.note(model=body.model, user=body.user, stream=body.stream or None)
    if body.top_logprobs and not body.logprobs:
        raise bad("top_logprobs", "needs logprobs=true")
    turn = Turn.of(body)
    prompt = await _prompt(service, body, turn)
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    limit_field = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    engine_request = EngineRequest(
        prompt=tuple(prompt),
        sampling=sampling_of(body, service.served.sampling),
        max_new_tokens=service.new_tokens(len(prompt), wanted, "messages", limit_field, None),
        n=choices_of(body, service),
        stop=stop_of(body) + turn.ends,
        stop_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        adapter=adapter,
        priority=body.priority,
        constraint=turn.constraint,
        logit_bias=bias_of(body, service),
    )
    work = await service.submit(request, [engine_request])
    if service.settings.log_prompts:
        work.entry.note(messages=[message.model_dump(exclude_none=True) for message in body.messages])
    head = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": body.model or service.served.name,
    }
    if body.stream:
        options = body.stream_options or StreamOptions()
        return EventStream(work, _chunks(service, work, turn, head, engine_request.n, bool(body.logprobs), options))
    answers = [Answer(turn) for _ in range(engine_request.n)]
    for _, update, _ in await work.all(request):
        answers[update.choice].take(update)
    choices = [answer.choice(index, service) for index, answer in enumerate(answers)]
    if service.settings.log_prompts:
        work.entry.note(answers=[choice["message"] for choice in choices])
    return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": work.usage()})


# --- the prompt ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """What the answer may be: calls of ``names``, one of which it has to begin with (``forced``), ``constraint``."""

    tools: list[Tool]
    forced: bool
    parallel: bool
    constraint: Any

    @staticmethod
    def of(body: ChatRequest) -> Turn:
        choice, tools = body.tool_choice, body.tools or []
        constraint = constraint_of(body)
        if not tools and choice is not None and choice != "none":
            raise bad("tool_choice", "there are no tools to choose from")
        name = choice.function.name if isinstance(choice, ToolChoice) else None
        if name is not None and name not in [tool.function.name for tool in tools]:
            raise bad("tool_choice", f"there is no tool {name[:100]!r} in tools")
        forced = name is not None or choice == "required"
        if forced and constraint is not None:
            raise bad("tool_choice", "a call has its own form; leave response_format and guided_ fields out")
        if forced:
            constraint = forced_call(tools, name)
        return Turn([] if choice == "none" else tools, forced, body.parallel_tool_calls, constraint)

    @property
    def ends(self) -> tuple[str, ...]:
        """Without ``parallel_tool_calls`` the first call ends the answer."""
        return (CLOSE,) if self.tools and not self.parallel else ()

    def parser(self) -> CallParser | None:
        names = [tool.function.name for tool in self.tools]
        return CallParser(names, inside=self.forced) if names else None


async def _prompt(service: Service, body: ChatRequest, turn: Turn) -> list[int]:
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(body.messages)]
    tools = [tool.model_dump(exclude_none=True) for tool in turn.tools] or None
    size = sum(len(message["content"] or "") for message in messages)

    def encode() -> list[int]:
        ids = service.template.encode(
            service.tokenizer, messages, tools, add_generation_prompt=True, system=service.served.system
        ).ids
        return ids + service.tokenizer.encode(f"{OPEN}\n", allowed_special=(OPEN,)) if turn.forced else ids

    try:
        return await service.in_thread(size, encode)
    except DataError as error:
        field_name = "tools" if tools and "place for tools" in error.what else "messages"
        raise bad(field_name, str(error)) from None


def _message(message: ChatMessage, where: str) -> dict[str, Any]:
    """As the template wants it: content as text, arguments of calls as objects."""
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    if message.tool_calls is None or role != "assistant":
        if message.tool_calls:
            raise bad(f"{where}.tool_calls", "only an assistant calls tools")
        if content is None:
            raise bad(f"{where}.content", "is missing")
        return {"role": role, "content": content}
    calls = []
    for index, call in enumerate(message.tool_calls):
        try:
            arguments = json.loads(call.function.arguments)
        except (ValueError, RecursionError):
            raise bad(f"{where}.tool_calls[{index}].function.arguments", "is not valid JSON") from None
        calls.append({"type": "function", "function": {"name": call.function.name, "arguments": arguments}})
    if not calls and content is None:
        raise bad(f"{where}.content", "is missing")
    return {"role": role, "content": content if calls else content or "", "tool_calls": calls}


# --- the answer ---------------------------------------------------------------------------------------------------

_FINISH = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop", "error": "stop"}


@dataclass
class Answer:
    """One choice, taken together from its updates."""

    turn: Turn
    text: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None

    def __post_init__(self):
        self._parser = self.turn.parser()

    def take(self, update) -> list[str | Call]:
        """What ``update`` adds that can be shown."""
        parts: list[str | Call] = [update.text] if update.text else []
        if self._parser is not None:
            parts = self._parser.push(update.text)
            if update.finish is not None:
                parts += self._parser.end()
        for part in parts:
            (self.calls if isinstance(part, Call) else self.text).append(part)
        self.logprobs += update.logprobs
        if update.finish is not None:
            self.finish = "tool_calls" if self.calls else _FINISH[update.finish]
        return parts

    def choice(self, index: int, service: Service) -> dict[str, Any]:
        text = "".join(self.text)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if self.calls else "")}
        if self.calls:
            message["tool_calls"] = [call.to_json() for call in self.calls]
        logprobs = chat_logprobs(service.tokenizer, self.logprobs) if self.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self.finish}


async def _chunks(
    service: Service, work: Work, turn: Turn, head: dict[str, Any], n: int, logprobs: bool, options: StreamOptions
) -> AsyncGenerator[bytes, None]:
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, probs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": probs, "finish_reason": finish}
        usage = {"usage": work.usage() if options.continuous_usage_stats else None} if options.include_usage else {}
        return event({**head, "choices": [choice], **usage})

    answers = [Answer(turn) for _ in range(n)]
    for index in range(n):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for batch in work.batches():
        out = []
        for _, update in merged(batch):
            answer, index = answers[update.choice], update.choice
            if answer.finish is not None:
                continue
            before = len(answer.calls)
            parts = answer.take(update)
            probs = chat_logprobs(service.tokenizer, update.logprobs) if logprobs and update.logprobs else None
            for part in parts:
                if isinstance(part, Call):
                    delta = {"tool_calls": [part.to_json(before)]}
                    before += 1
                else:
                    delta = {"content": part}
                out.append(chunk(index, delta, None, probs))
                probs = None
            if probs is not None:
                out.append(chunk(index, {}, None, probs))
            if update.finish is not None:
                out.append(chunk(index, {}, answer.finish))
        if out:
            yield b"".join(out)
    if service.settings.log_prompts:
        work.entry.note(answers=["".join(answer.text) for answer in answers])
    if options.include_usage:
        yield event({**head, "choices": [], "usage": work.usage()})
    yield DONE
