"""A conversation: the cache is reused without changing an answer, and the oldest turns leave when it grows too long."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from research.core.errors import UserError
from research.core.generation.sampling import Sampling
from research.core.generation.session import ChatSession
from research.core.spec import DecoderSpec
from research.core.text.builtin import builtin_tokenizer
from research.core.text.template import get_template
from research.core.torch.decoder import Decoder
from research.core.torch.generate import Runner, generate

MESSAGES = ["Hello there", "And now?", "你好", "Count to three", "Thanks, that is all", "One more"]


@pytest.fixture(scope="module")
def tokenizer():
    return builtin_tokenizer()


def _spec(tokenizer, **changes) -> DecoderSpec:
    base = DecoderSpec(
        "qwen2",
        layers=2,
        hidden=32,
        heads=2,
        kv_heads=1,
        head_dim=16,
        ffn=48,
        vocab=tokenizer.vocab_size,
        max_positions=4096,
        init_range=0.3,
    )
    return replace(base, **changes)


def _session(tokenizer, new: int = 8, sampling: Sampling | None = None, template: str = "qwen2_5", **changes):
    decoder = Decoder(_spec(tokenizer, **changes)).init_weights(1).eval()
    eos = tokenizer.eos_ids(chat=True)
    return ChatSession(Runner(decoder), tokenizer, get_template(template), sampling or Sampling(), new, eos)


def _silent(text: str) -> None:
    pass


def _fresh_answer(session: ChatSession, turn: int, first: int = 0) -> str:
    """The answer of a model that has never seen the conversation before."""
    messages = session.messages[2 * first : 2 * turn + 1]
    prompt = list(
        session.template.encode(session.tokenizer, messages, add_generation_prompt=True, system=session.system).ids
    )
    sampling = replace(session.sampling, seed=session.sampling.seed + turn)
    ids = generate(session.runner.decoder, [prompt], sampling, session.max_new_tokens, session.eos_ids)[0]
    return session.tokenizer.decode([i for i in ids if i not in session.eos_ids], skip_special=True)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, seed=4, repetition_penalty=1.2)], ids=["greedy", "sampled"]
)
def test_reusing_the_cache_changes_no_answer(tokenizer, sampling):
    session = _session(tokenizer, sampling=sampling)
    replies = [session.reply(message, _silent) for message in MESSAGES]
    assert [r.text for r in replies] == [_fresh_answer(session, turn) for turn in range(len(MESSAGES))]
    assert replies[0].reused == 0
    # All but the new message and what closes the last answer was in the cache already.
    assert all(b.prompt_tokens - b.reused < 40 and b.reused >= a.prompt_tokens for a, b in itertools.pairwise(replies))


def test_streamed_text_is_the_answer(tokenizer):
    session, shown = _session(tokenizer), []
    reply = session.reply("Hello", shown.append)
    assert "".join(shown) == reply.text == session.messages[-1]["content"] != ""
    assert (reply.new_tokens, reply.reason) == (8, "length")


def test_the_oldest_turns_leave_first_and_are_announced(tokenizer):
    session = _session(tokenizer, max_positions=160)
    heard = []
    for message in MESSAGES:
        reply = session.reply(message, _silent, on_trim=lambda turns, length: heard.append((turns, length)))
        assert reply.prompt_tokens + 8 <= 160
    assert heard and all(length == 160 for _, length in heard)
    gone = sum(turns for turns, _ in heard)
    assert len(session.messages) == 2 * len(MESSAGES), "what the model no longer sees is still saved"
    assert session.messages[-1]["content"] == _fresh_answer(session, len(MESSAGES) - 1, first=gone)
    # The system prompt stays: only the turns after it left.
    assert gone < len(MESSAGES) - 1


def test_a_message_that_is_too_long_alone_is_refused_and_forgotten(tokenizer):
    session = _session(tokenizer, max_positions=160)
    first = session.reply("Hello there", _silent).text
    with pytest.raises(UserError, match=r"this message: \d+ tokens and 8 new ones are more than the model's 160"):
        session.reply("word " * 300, _silent)
    assert [m["content"] for m in session.messages] == ["Hello there", first]
    session.reply("And now?", _silent)
    assert session.messages[-1]["content"] == _fresh_answer(session, 1)


def test_clearing_and_a_new_system_prompt_take_effect(tokenizer):
    session = _session(tokenizer)
    first = session.reply("Hello there", _silent).text
    session.reply("And now?", _silent)
    session.clear()
    assert session.record() == []
    assert session.reply("Hello there", _silent).text == first
    session.system = "Answer in French."
    session.reply("And now?", _silent)
    assert session.messages[-1]["content"] == _fresh_answer(session, 1)
    assert session.record()[0] == {"role": "system", "content": "Answer in French."}


def test_an_interrupted_answer_is_kept_and_the_conversation_goes_on(tokenizer):
    session, stopped, shown = _session(tokenizer, new=30), [], []

    def on_text(text: str) -> None:
        shown.append(text)
        if len(shown) == 4:
            stopped.append(True)

    reply = session.reply("Hello there", on_text, stopped)
    assert reply.reason == "interrupted" and reply.new_tokens < 8
    session.reply("And now?", _silent)
    assert session.messages[-1]["content"] == _fresh_answer(session, 1)


def test_qwen_v1_computes_anew_when_its_rotary_changes_with_the_length(tokenizer):
    changes = {"model_type": "qwen", "kv_heads": 2, "logn_attention": True, "dynamic_ntk": True, "train_length": 64}
    session = _session(tokenizer, template="qwen", rope_theta=10000.0, **changes)
    replies = [session.reply(message, _silent) for message in MESSAGES]
    assert [r.text for r in replies] == [_fresh_answer(session, turn) for turn in range(len(MESSAGES))]
    lengths = [r.prompt_tokens for r in replies]
    assert lengths[0] < 64 < 128 < lengths[-1], "the conversation must cross the training length twice"
    assert [r.reused for r in replies].count(0) == 3  # the first turn, and where alpha became 3 and 7
