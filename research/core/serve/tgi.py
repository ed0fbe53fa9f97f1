"""The endpoints of text-generation-inference: ``/generate``, ``/generate_stream``, ``/info``."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from research.core.engine.api import Constraint, EngineRequest, TokenLogprob, Update
from research.core.generation.sampling import Sampling
from research.core.serve.errors import bad, tgi_payload
from research.core.serve.events import EventStream, event
from research.core.serve.logprobs import finite
from research.core.serve.schema import Grammar, TgiParameters, TgiRequest
from research.core.serve.service import Service, Work, with_seed

router = APIRouter()

_DEFAULT_TOKENS = 100
_FINISH = {"eos": "eos_token", "stop": "stop_sequence", "length": "length", "cancelled": "stop_sequence"}


@router.post("/generate", tags=["tgi"])
async def generate(request: Request, body: TgiRequest) -> Response:
    """A text continued, in one answer."""
    service: Service = request.app.state.service
    work, engine_request = await _submit(request, body)
    answer = _Answer(service, body, engine_request)
    for _, update, _ in await work.all(request):
        answer.take(update)
    result: dict[str, Any] = {"generated_text": answer.text()}
    if body.parameters.details:
        result["details"] = answer.details() | {"tokens": answer.tokens, "prefill": answer.prefill()}
        if body.parameters.top_n_tokens:
            result["details"]["top_tokens"] = answer.top
    return JSONResponse(result)


@router.post("/generate_stream", tags=["tgi"])
async def generate_stream(request: Request, body: TgiRequest) -> Response:
    """A text continued, one event for each token."""
    if body.parameters.return_full_text:
        raise bad("parameters.return_full_text", "is not possible in a stream")
    if body.parameters.decoder_input_details:
        raise bad("parameters.decoder_input_details", "is not possible in a stream")
    work, engine_request = await _submit(request, body)
    answer = _Answer(request.app.state.service, body, engine_request)
    return EventStream(work, _events(work, answer, bool(body.parameters.top_n_tokens)), tgi_payload)


@router.get("/info", tags=["tgi"])
async def info(request: Request) -> Response:
    """The model and the limits of this server."""
    service: Service = request.app.state.service
    settings = service.settings
    return JSONResponse(
        {
            "model_id": service.served.name,
            **dict(service.served.info),
            "max_concurrent_requests": settings.max_requests,
            "max_best_of": 1,
            "max_stop_sequences": 16,
            "max_input_tokens": service.length_limit - 1,
            "max_total_tokens": service.length_limit,
            "max_client_batch_size": settings.max_prompts,
            "adapters": list(service.driver.adapters),
            "router": "qwen-workbench",
        }
    )


async def _submit(request: Request, body: TgiRequest) -> tuple[Work, EngineRequest]:
    service: Service = request.app.state.service
    service.check_can_generate()
    asked = body.parameters
    if asked.decoder_input_details and not asked.details:
        raise bad("parameters.decoder_input_details", "is a part of the details: it needs details=true")
    request.state.entry.note(model=asked.adapter_id)
    adapter = service.adapter_of(asked.adapter_id)
    (ids,) = await service.encode([body.inputs])
    if asked.truncate is not None:
        ids = ids[-asked.truncate :]
    engine_request = EngineRequest(
        prompt=tuple(ids),
        sampling=_sampling(asked),
        max_new_tokens=service.new_tokens(
            len(ids), asked.max_new_tokens, "inputs", "parameters.max_new_tokens", _DEFAULT_TOKENS
        ),
        stop=tuple(asked.stop),
        logprobs=asked.top_n_tokens or 0,
        prompt_logprobs=0 if asked.decoder_input_details else None,
        adapter=adapter,
        constraint=_constraint(asked.grammar),
    )
    work = await service.submit(request, [engine_request])
    if service.settings.log_prompts:
        work.entry.note(inputs=body.inputs)
    return work, engine_request


def _sampling(asked: TgiParameters) -> Sampling:
    """TGI's defaults, not the model's: greedy, unless ``do_sample`` or a setting that only sampling has is there."""
    sampled = asked.do_sample or any(value is not None for value in (asked.temperature, asked.top_k, asked.top_p))
    sampling = Sampling(
        temperature=(asked.temperature or 1.0) if sampled else 0.0,
        top_k=asked.top_k or 0,
        top_p=asked.top_p or 1.0,
        repetition_penalty=asked.repetition_penalty or 1.0,
    )
    return with_seed(replace(sampling, frequency_penalty=asked.frequency_penalty or 0.0), asked.seed)


def _constraint(grammar: Grammar | None) -> Constraint | None:
    if grammar is None:
        return None
    if grammar.type == "regex":
        if not isinstance(grammar.value, str):
            raise bad("parameters.grammar.value", "a regular expression is a text")
        return Constraint("regex", grammar.value)
    value = grammar.value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise bad("parameters.grammar.value", "is not valid JSON") from None
    if not isinstance(value, dict):
        raise bad("parameters.grammar.value", "a JSON schema is an object")
    return Constraint("json_schema", value)


class _Answer:
    def __init__(self, service: Service, body: TgiRequest, request: EngineRequest):
        self._tokenizer, self._request = service.tokenizer, request
        self._text = [body.inputs] if body.parameters.return_full_text else []
        self.tokens: list[dict[str, Any]] = []
        self.top: list[list[dict[str, Any]]] = []
        self.finish: str | None = None
        self._prompt: tuple[TokenLogprob, ...] = ()

    def take(self, update: Update) -> None:
        self._text.append(update.text)
        self._prompt += update.prompt_logprobs
        for place, token in enumerate(update.tokens):
            known = update.logprobs[place] if place < len(update.logprobs) else TokenLogprob(token, 0.0)
            # A step's text is complete with its last token.
            text = update.text if place == len(update.tokens) - 1 else ""
            self.tokens.append(self._token(token, known.logprob, text))
            self.top.append([self._token(other, value) for other, value in known.top])
        if update.finish is not None:
            self.finish = _FINISH.get(update.finish, "stop_sequence")

    def _token(self, token: int, logprob: float, text: str | None = None) -> dict[str, Any]:
        if text is None:
            text = self._tokenizer.decode([token])
        special = token in self._tokenizer.hidden_ids
        return {"id": token, "text": text, "logprob": finite(logprob), "special": special}

    def text(self) -> str:
        return "".join(self._text)

    def prefill(self) -> list[dict[str, Any]]:
        """The prompt's tokens with their log-probabilities, where they were asked for; the first has none."""
        if self._request.prompt_logprobs is None:
            return []
        first = self._request.prompt[0]
        known = [(first, None), *((one.token, finite(one.logprob)) for one in self._prompt)]
        return [{"id": id, "text": self._tokenizer.decode([id]), "logprob": value} for id, value in known]

    def details(self) -> dict[str, Any]:
        return {
            "finish_reason": self.finish,
            "generated_tokens": len(self.tokens),
            "seed": self._request.sampling.seed if self._request.sampling.temperature else None,
            "input_length": len(self._request.prompt),
        }


async def _events(work: Work, answer: _Answer, top: bool) -> AsyncGenerator[bytes, None]:
    """One event a token; the last one has the whole text. It is held back until it is known to be the last."""
    held, sent = None, 0
    async for batch in work.batches():
        for _, update, _ in batch:
            answer.take(update)
        for place in range(sent, len(answer.tokens)):
            if held is not None:
                yield event(held)
            held = {"index": place + 1, "token": answer.tokens[place], "generated_text": None, "details": None}
            if top:
                held["top_tokens"] = answer.top[place]
        sent = len(answer.tokens)
        if answer.finish is None and held is not None:
            yield event(held)
            held = None
    if held is None:  # the end came without a token of its own
        last = answer.tokens[-1] if answer.tokens else None
        held = {"index": sent, "token": last}
    yield event(held | {"generated_text": answer.text(), "details": answer.details()})
