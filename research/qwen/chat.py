"""A conversation's prompt for Qwen, and the text of its answer: what the documents' own programs call."""

from __future__ import annotations

from collections.abc import Sequence

from research.core.errors import UserError
from research.core.text.template import get_template
from research.core.text.tokenizer import Tokenizer

FORMATS = ("raw", "chatml")


def make_context(
    tokenizer: Tokenizer,
    query: str,
    history: Sequence[tuple[str, str]] | None = None,
    system: str = "",
    max_window_size: int = 6144,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """-> (the prompt's text, its token ids): ``query`` behind as many of the newest turns (question, answer) of ``history``
    as ``max_window_size`` tokens hold; ``raw`` is the query alone.

    Control tokens inside the texts stay text. Raises :class:`UserError` when the query alone does not fit.
    """
    if chat_format not in FORMATS:
        raise UserError(f"{chat_format!r} is no format of a prompt", where="chat_format", hint=" or ".join(FORMATS))
    if chat_format == "raw":
        ids = tokenizer.encode(query)
        _check(len(ids), max_window_size)
        return query, ids
    template, turns = get_template("qwen"), list(history or ())
    while True:
        messages = [message for turn in turns for message in _messages(*turn)] + [{"role": "user", "content": query}]
        ids = list(template.encode(tokenizer, messages, add_generation_prompt=True, system=system).ids)
        if len(ids) <= max_window_size or not turns:
            _check(len(ids), max_window_size)
            return template.render(messages, add_generation_prompt=True, system=system), ids
        turns.pop(0)


def decode_tokens(
    tokens: Sequence[int],
    tokenizer: Tokenizer,
    raw_text_len: int = 0,
    context_length: int = 0,
    chat_format: str = "chatml",
    verbose: bool = False,
    errors: str = "replace",
) -> str:
    """The answer in ``tokens`` (prompt and answer together, ``context_length`` tokens of prompt): what comes before the
    first control token. ``raw`` keeps the whole text but its first ``raw_text_len`` characters.

    Broken UTF-8 becomes U+FFFD, the only way of ``errors`` there is; ``verbose`` prints the answer with its control tokens.
    """
    if errors != "replace":
        raise UserError(f"{errors!r} is no way of reading broken text here", where="errors", hint="replace")
    ids = [int(token) for token in tokens]
    if chat_format == "raw":
        return tokenizer.decode(ids, skip_special=True)[raw_text_len:].strip()
    answer = ids[context_length:]
    ends = {*tokenizer.eos_ids(chat=True), tokenizer.im_start_id}
    end = next((place for place, token in enumerate(answer) if token in ends), len(answer))
    if verbose:
        print(tokenizer.decode(answer), flush=True)
    return tokenizer.decode(answer[:end], skip_special=True).strip()


def _messages(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _check(count: int, window: int) -> None:
    if count > window:
        raise UserError(
            f"the query alone has {count} tokens", where=f"max_window_size={window}", hint=f"max_window_size={count}"
        )
