"""A conversation in the engine: the answers of the contiguous cache, and what the turns share is not computed again."""

from __future__ import annotations

import pytest
import torch

from research.core.config.schema import EngineConfig
from research.core.engine.engine import PagedEngine
from research.core.engine.run_all import run_all
from research.core.engine.session import EngineSession
from research.core.generation.sampling import Sampling
from research.core.generation.session import ChatSession
from research.core.text.builtin import builtin_tokenizer
from research.core.text.template import get_template
from research.core.torch.decoder import Decoder
from research.core.torch.generate import Runner
from tests import small_model

BLOCK = 8


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return small_model.make("qwen2_5_tiny").eval().requires_grad_(False)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_p=0.9, seed=4)], ids=["greedy", "sampled"])
def test_turns_are_answered_as_from_the_contiguous_cache_and_keep_their_blocks(decoder, sampling):
    tokenizer = builtin_tokenizer()
    own = (tokenizer, get_template("qwen2_5"), sampling, 12, tokenizer.eos_ids(chat=True))
    engine = PagedEngine(decoder, tokenizer, EngineConfig(block_size=BLOCK, num_blocks=200, max_batch=1), own[-1])
    paged, flash = EngineSession(engine, *own), ChatSession(Runner(decoder), *own)
    before = 0
    for turn, message in enumerate(("Hello", "And a second, rather longer question about it?", "x")):
        replies = [session.reply(message, lambda text: None) for session in (paged, flash)]
        assert replies[0].text == replies[1].text and replies[0].reason == replies[1].reason
        if turn:  # whole blocks of the prompt before are kept, at least
            assert replies[0].reused >= before // BLOCK * BLOCK > 0
        before = replies[0].prompt_tokens
    assert engine.stats().total_cached_tokens > 0 and not engine.has_work()


def test_what_ends_early_or_is_refused_leaves_nothing_in_the_engine(decoder):
    from research.core.engine.api import EngineRequest
    from research.core.errors import UserError

    engine = PagedEngine(decoder, builtin_tokenizer(), EngineConfig(block_size=BLOCK, num_blocks=40, max_batch=4))
    requests = [EngineRequest((5, 6, number), max_new_tokens=10) for number in range(3)]
    whole = run_all(engine, requests)
    ended: list[int] = []
    cut = run_all(engine, requests, lambda place, update: place == 1, lambda place, answer: ended.append(place))
    assert [answer.ids for answer in cut] == [whole[0].ids, whole[1].ids[:1], whole[2].ids]
    assert [answer.reason for answer in cut] == ["length", "stop", "length"] and ended[0] == 1 and len(ended) == 3

    def fail(place, update):
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="own"):
        run_all(engine, requests, fail)
    with pytest.raises(UserError, match="more than"):
        run_all(engine, [*requests, EngineRequest((1,), max_new_tokens=10_000)])
    assert [answer.ids for answer in run_all(engine, requests)] == [answer.ids for answer in whole]
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.blocks)
    assert torch.is_grad_enabled()
