"""Log-probabilities in the two shapes of OpenAI's interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from research.core.engine.api import TokenLogprob
from research.core.text.tokenizer import Tokenizer


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.token_bytes(token)
    return {"token": text.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(text)}


def finite(logprob: float) -> float:
    """JSON has no infinities: a token that a constraint or filter ruled out has -9999, as in OpenAI's interface."""
    return max(float(logprob), -9999.0)


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [
        _token(tokenizer, one.token, one.logprob)
        | {"top_logprobs": [_token(tokenizer, token, value) for token, value in one.top]}
        for one in tokens
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The lists of ``/v1/completions``; ``offset`` is where in the text the next token begins."""

    def __init__(self, tokenizer: Tokenizer, offset: int = 0):
        self._tokenizer, self._offset = tokenizer, offset

    def lists(self, tokens: Sequence[TokenLogprob]) -> dict[str, list]:
        """Lists for ``tokens``, which follow those of the last call."""
        lists: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in tokens:
            text = self._text(one.token)
            lists["tokens"].append(text)
            lists["token_logprobs"].append(finite(one.logprob))
            lists["top_logprobs"].append({self._text(token): finite(value) for token, value in one.top})
            lists["text_offset"].append(self._offset)
            self._offset += len(text)
        return lists

    def first(self, token: int) -> dict[str, list]:
        """Lists for a text's first token, which follows nothing and has no probability."""
        text, offset = self._text(token), self._offset
        self._offset += len(text)
        return {"tokens": [text], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [offset]}

    def _text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")
