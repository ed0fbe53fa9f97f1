"""The functions that the documents' own programs import from qwen_chat."""

from __future__ import annotations

import pytest

from research.core.errors import UserError
from research.core.text.builtin import builtin_tokenizer
from research.core.text.template import get_template
from research.qwen.chat import decode_tokens, make_context

HISTORY = [("one " * 10, "1"), ("two " * 10, "2")]


def test_a_context_is_what_the_template_renders_and_drops_the_oldest_turns_first():
    tokenizer, template = builtin_tokenizer(), get_template("qwen")

    def rendered(turns):
        messages = [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
        messages.append({"role": "user", "content": "now?"})
        return template.render(messages, add_generation_prompt=True, system="Be brief.")

    text, ids = make_context(tokenizer, "now?", HISTORY, "Be brief.")
    assert text == rendered(HISTORY) == tokenizer.decode(ids)
    shorter, fewer = make_context(tokenizer, "now?", HISTORY, "Be brief.", max_window_size=len(ids) - 1)
    assert shorter == rendered(HISTORY[1:]) and len(fewer) < len(ids)
    alone = make_context(tokenizer, "now?", [], "Be brief.")
    assert make_context(tokenizer, "now?", HISTORY, "Be brief.", max_window_size=len(alone[1])) == alone
    with pytest.raises(UserError, match=f"max_window_size={len(alone[1])}"):
        make_context(tokenizer, "now?", HISTORY, "Be brief.", max_window_size=3)
    assert make_context(tokenizer, "now?", HISTORY, chat_format="raw") == ("now?", tokenizer.encode("now?"))


def test_an_answer_ends_at_its_first_control_token():
    tokenizer = builtin_tokenizer()
    _, context = make_context(tokenizer, "now?")
    answer = tokenizer.encode(" fine\n") + [tokenizer.im_end_id] + tokenizer.encode("more")
    assert decode_tokens(context + answer, tokenizer, context_length=len(context)) == "fine"
    assert decode_tokens(tokenizer.encode("now? fine"), tokenizer, raw_text_len=4, chat_format="raw") == "fine"
    with pytest.raises(UserError, match="strict"):
        decode_tokens(answer, tokenizer, errors="strict")
