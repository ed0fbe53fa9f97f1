"""`make predict`: answer one prompt, or a file of prompts. Only answers go to stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.core.config.schema import Config
from research.core.errors import DataError, UserError, require_file
from research.core.generation.requests import OnToken, Request, Result
from research.core.generation.stream import TextStream
from research.core.launch.environment import place
from research.core.launch.ranks import launch, needs_launch
from research.tasks.answering import EngineModel, Model, OnResult, mode, open_model
from research.tasks.sources import say


@dataclass(frozen=True)
class Question:
    """One thing to answer: a text or a conversation; ``fields`` of its record go along to the answer."""

    where: str
    text: str | None
    messages: list[dict] | None
    fields: dict[str, Any]


def run(cfg: Config) -> int:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")
    if (mode(cfg) == "paged" or cfg.backend == "mindspore") and needs_launch(cfg):
        return launch(cfg)
    here = place()
    follows = mode(cfg) == "paged" and here is not None and here.rank > 0  # rank 0 asks, the others compute for it
    questions = [] if follows else read_questions(cfg)
    cfg.engine.max_batch = min(cfg.engine.max_batch, max(1, len(questions)))  # what the cache's memory goes by
    model = open_model(cfg)
    try:
        return answer(cfg, model, questions)
    finally:
        model.close()


def answer(cfg: Config, model: Model | EngineModel, questions: list[Question] | None = None) -> int:
    """Answer the questions of ``cfg``: one as it comes, several as JSON lines."""
    questions = read_questions(cfg) if questions is None else questions
    prompts = [encode_question(cfg, model, question) for question in questions]
    if cfg.prompts or cfg.prompt_list:
        answer_file(cfg, model, questions, prompts)
    else:
        answer_one(cfg, model, questions[0], prompts[0])
    return 0


def answer_one(cfg: Config, model: Model | EngineModel, question: Question, prompt: list[int]) -> None:
    """Stream one answer to stdout, with a line end behind it."""
    stream = _stream(cfg, model)

    def on_token(_: int, token: int) -> bool:
        show(stream.push(token))
        return stream.stopped

    def show(text: str) -> None:
        if text:
            print(text, end="", flush=True)

    def on_result(_: int, result: Result) -> None:
        show(stream.flush())
        if not stream.text.endswith("\n"):
            print(flush=True)

    _run(cfg, model, [question], [prompt], on_token, on_result)


def answer_file(cfg: Config, model: Model | EngineModel, questions: list[Question], prompts: list[list[int]]) -> None:
    """Answer all questions; one JSON line each on stdout, in order, as soon as those before it are answered."""
    streams = [_stream(cfg, model) for _ in questions]
    ended: set[int] = set()
    shown = 0

    def on_token(place: int, token: int) -> bool:
        streams[place].push(token)
        return streams[place].stopped

    def on_result(place: int, result: Result) -> None:
        nonlocal shown
        streams[place].flush()
        ended.add(place)
        while shown in ended:
            record = questions[shown].fields | {"answer": streams[shown].text}
            print(json.dumps(record, ensure_ascii=False), flush=True)
            shown += 1

    _run(cfg, model, questions, prompts, on_token, on_result)


def _stream(cfg: Config, model: Model | EngineModel) -> TextStream:
    return TextStream(model.tokenizer, hidden=model.eos_ids, stop=cfg.generate.stop)


def _run(cfg: Config, model: Model | EngineModel, questions, prompts, on_token: OnToken, on_result: OnResult) -> None:
    requests = [Request(prompt, model.sampling, cfg.generate.max_new_tokens) for prompt in prompts]
    for question, request in zip(questions, requests):
        model.check(request, question.where)
    start = time.perf_counter()
    results = model.run(requests, on_token, cfg.generate.batch, on_result)
    new, seconds = sum(len(r.ids) for r in results), time.perf_counter() - start
    cut = sum(r.reason == "length" for r in results)
    note = f"; {cut} cut at generate.max_new_tokens={cfg.generate.max_new_tokens}" if cut else ""
    say(
        f"{sum(map(len, prompts))} prompt tokens, {new} new ones in {seconds:.1f} s ({new / seconds:.1f} tokens/s){note}"
    )


def encode_question(cfg: Config, model: Model | EngineModel, question: Question) -> list[int]:
    """Token ids of a question: its text alone (``generate.raw``), or rendered by the template, waiting for an answer."""
    if cfg.generate.raw:
        if question.messages is not None:
            raise DataError(
                "a conversation needs a template, and generate.raw=true uses none",
                where=question.where,
                hint='{"prompt": "text"}, or generate.raw=false',
            )
        return model.tokenizer.encode(question.text, "all" if cfg.allow_special else ())
    messages = question.messages or [{"role": "user", "content": question.text}]
    encoded = model.template.encode(
        model.tokenizer,
        messages,
        add_generation_prompt=True,
        allow_special=cfg.allow_special,
        system=cfg.generate.system,
    )
    return list(encoded.ids)


# --- where questions come from ----------------------------------------------------------------------------------


def read_questions(cfg: Config) -> list[Question]:
    """The prompt, the file of prompts, or standard input when it is not a terminal. Raises UserErrors."""
    if cfg.prompt and cfg.prompts:
        raise UserError("prompt and prompts are both set", where=cfg.prompts, hint="one of them")
    if cfg.prompt_list:
        for number, text in enumerate(cfg.prompt_list):
            if not text.strip() and not cfg.generate.raw:
                raise UserError("there is nothing to answer", where=f"prompt_list[{number}]", hint="leave it out")
        return [Question(f"prompt_list[{n}]", text, None, {"prompt": text}) for n, text in enumerate(cfg.prompt_list)]
    if cfg.prompts:
        return list(_read_file(require_file(cfg.prompts, "file of prompts", hint="a .txt or .jsonl file")))
    text, where = cfg.prompt, "PROMPT"
    if not text and not sys.stdin.isatty():
        text, where = sys.stdin.read().rstrip("\n"), "standard input"
    if not text or (not text.strip() and not cfg.generate.raw):
        raise UserError("there is nothing to answer", where=where, hint="make predict PROMPT='What is 2 + 3?'")
    return [Question(where, text, None, {})]


def _read_file(path: Path) -> Iterator[Question]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as bad:
        raise DataError(f"not UTF-8: {bad}", where=path) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            yield _record(line, where) if path.suffix == ".jsonl" else Question(where, line, None, {"prompt": line})


def _record(line: str, where: str) -> Question:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as bad:
        raise DataError(f"not valid JSON: {bad.msg}", where=where) from None
    if isinstance(record, dict):
        fields = {key: record[key] for key in ("id", "prompt", "messages") if key in record}
        prompt, messages = record.get("prompt"), record.get("messages")
        if isinstance(prompt, str) and prompt and messages is None:
            return Question(where, prompt, None, fields)
        if isinstance(messages, list) and messages and all(_is_message(m) for m in messages) and prompt is None:
            return Question(where, None, messages, fields)
    raise DataError(
        "is neither a prompt nor a conversation",
        where=where,
        hint='{"prompt": "text"} or {"messages": [{"role": "user", "content": "text"}]}',
    )


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    return isinstance(value.get("content"), str) or bool(value.get("tool_calls"))
