"""A tiny engine, its tokenizer, and a way to run requests to their end."""

from __future__ import annotations

from collections import defaultdict
from functools import cache

import torch

from research.core.config.schema import EngineConfig
from research.core.engine.api import EmbedRequest, EngineRequest, Update
from research.core.engine.engine import PagedEngine
from research.core.spec import DecoderSpec
from research.core.text.library import LibraryTokenizer
from research.core.torch.decoder import Decoder
from tests.core.text.small import small_tokenizer_json

# 256 bytes, three control tokens, and rows of the embedding matrix that no token has.
VOCAB = 256 + 3 + 5
SPEC = DecoderSpec(
    "qwen2", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=VOCAB, max_positions=2048
)


@cache
def tokenizer() -> LibraryTokenizer:
    return LibraryTokenizer(small_tokenizer_json([], []), "qwen2", "a test", {})


def random_decoder(spec: DecoderSpec = SPEC, seed: int = 0) -> Decoder:
    """Weights wide enough that answers differ, biases too."""
    decoder = Decoder(spec).eval()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(decoder.named_parameters()):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return decoder.requires_grad_(False)


def engine(decoder: Decoder, eos_ids=(), runner=None, **settings) -> PagedEngine:
    return PagedEngine(decoder, tokenizer(), EngineConfig(**{"num_blocks": 400} | settings), eos_ids, runner)


class Answer:
    """One answer put together from its updates."""

    def __init__(self):
        self.tokens: list[int] = []
        self.text = ""
        self.logprobs: list = []
        self.prompt: list = []
        self.last: Update | None = None

    def add(self, update: Update) -> None:
        assert self.last is None, "an update after the last one"
        self.tokens += update.tokens
        self.text += update.text
        self.logprobs += update.logprobs
        self.prompt += update.prompt_logprobs
        if update.finish is not None:
            self.last = update


def drain(running: PagedEngine, answers: dict | None = None) -> dict[tuple[int, int], Answer]:
    """Step until nothing is left -> answers by (request, choice)."""
    answers = defaultdict(Answer) if answers is None else answers
    while running.has_work():
        for update in running.step():
            answers[update.request, update.choice].add(update)
    return answers


def run(running: PagedEngine, requests: list[EngineRequest | EmbedRequest]) -> list[Answer]:
    """Submit all and drain -> the first answer to each."""
    numbers = [running.submit(request) for request in requests]
    answers = drain(running)
    return [answers[number, 0] for number in numbers]


def nothing_leaked(running: PagedEngine) -> bool:
    """Whether every block is free and every place given back."""
    pool, scheduler = running.pool, running.scheduler
    free = pool.free == pool.blocks and not any(pool.references)
    return free and not scheduler.running and not scheduler.waiting and scheduler._rows == 0
