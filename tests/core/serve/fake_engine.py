"""An engine that says what a test wants: scripted answers, slow steps, steps that fail. Same contract as the real one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from research.core.engine.api import EmbedRequest, EngineRequest, Stats, TokenLogprob, Update
from research.core.errors import UserError
from research.core.generation.stream import TextStream
from research.core.spec import DecoderSpec
from research.core.text.builtin import builtin_tokenizer

BLOCK = 16


@dataclass
class _Running:
    request: EngineRequest | EmbedRequest
    choice: int
    ids: list[int]
    stream: TextStream
    said: list[int] = field(default_factory=list)

    def blocks(self) -> int:
        return -(-(len(self.request.prompt) + len(self.said)) // BLOCK)


class FakeEngine:
    """``script(request, choice)`` is the answer's text, one token of it a step; ``step_s`` how long a step takes.

    ``fail`` is called at the beginning of each step and may raise. Control tokens in a script become control tokens.
    """

    def __init__(
        self,
        script: Callable[[EngineRequest, int], str] = lambda request, choice: "All is well.",
        step_s: float = 0.0,
        fail: Callable[[], None] = lambda: None,
        blocks: int = 4096,
        length_limit: int = 2048,
        adapters: tuple[str, ...] = (),
    ):
        self.tokenizer = builtin_tokenizer()
        self.spec = DecoderSpec("qwen2", 2, 64, 4, 2, 16, 128, self.tokenizer.vocab_size, length_limit)
        self.script, self.step_s, self.fail, self.blocks = script, step_s, fail, blocks
        self.length_limit, self.adapters = length_limit, list(adapters)
        self.requests: list[EngineRequest | EmbedRequest] = []
        self.closed = False
        self._running: dict[int, list[_Running]] = {}
        self._cancelled: set[int] = set()
        self._steps = 0

    def submit(self, request):
        if request.adapter is not None and request.adapter not in self.adapters:
            raise UserError(f"no adapter {request.adapter}")
        if len(request.prompt) + getattr(request, "max_new_tokens", 0) > self.length_limit:
            raise UserError("too long")
        self.requests.append(request)
        number = len(self.requests)
        self._running[number] = []
        for choice in range(getattr(request, "n", 1)):
            ids, stop = [], ()
            if isinstance(request, EngineRequest):
                ids = self.tokenizer.encode(self.script(request, choice), "all") + [self.tokenizer.im_end_id]
                stop = request.stop
            stream = TextStream(self.tokenizer, [self.tokenizer.im_end_id], stop)
            self._running[number].append(_Running(request, choice, ids, stream))
        return number

    def cancel(self, number):
        self._cancelled.add(number)

    def has_work(self):
        return bool(self._running)

    def step(self):
        self._steps += 1
        time.sleep(self.step_s)
        self.fail()
        updates = []
        for number, answers in list(self._running.items()):
            for answer in list(answers):
                update = self._advance(number, answer)
                updates.append(update)
                if update.finish is not None:
                    answers.remove(answer)
            if not answers:
                del self._running[number]
        return updates

    def _advance(self, number: int, answer: _Running) -> Update:
        request, prompt = answer.request, len(answer.request.prompt)
        if number in self._cancelled:
            return Update(number, answer.choice, finish="cancelled", prompt_tokens=prompt)
        if isinstance(request, EmbedRequest):
            vector = [float(len(request.prompt)), *[0.0] * (self.spec.hidden - 1)]
            return Update(number, finish="eos", embedding=vector, prompt_tokens=prompt)
        token = answer.ids[len(answer.said)]
        answer.said.append(token)
        text = answer.stream.push(token)
        finish = None
        if token == self.tokenizer.im_end_id:
            finish = "eos"
        elif answer.stream.stopped:
            finish = "stop"
        elif len(answer.said) >= request.max_new_tokens:
            finish = "length"
        if finish is not None:
            text += answer.stream.flush()
        logprobs = ()
        if request.logprobs is not None:
            top = tuple((token + other, -0.5 - other) for other in range(request.logprobs))
            logprobs = (TokenLogprob(token, -0.5, top),)
        return Update(number, answer.choice, (token,), text, logprobs, finish, prompt)

    def load_adapter(self, name, folder):
        if not (Path(folder) / "adapter_config.json").is_file():
            raise UserError("no adapter here", where=folder)
        self.adapters.append(name)

    def unload_adapter(self, name):
        self.adapters.remove(name)

    def stats(self):
        used = sum(answer.blocks() for answers in self._running.values() for answer in answers)
        running = sum(map(len, self._running.values()))
        prompts = sum(len(request.prompt) for request in self.requests)
        return Stats(running, 0, self.blocks, self.blocks - used, 0, prompts, 0, 0, 0, self._steps)

    def close(self):
        self.closed = True
