"""Answers that match a JSON schema, a regular expression or a list of texts, by llguidance.

llguidance parses the answer as it comes and gives the set of tokens that may follow. A grammar is compiled in
milliseconds whatever the vocabulary (outlines-core takes seconds for a schema over 152,000 tokens: docs/engine.md); the
vocabulary itself is prepared once, in one to two seconds, when the first constrained request comes.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import numpy as np

from research.core.engine.api import Constraint
from research.core.errors import UserError
from research.core.text.tokenizer import Tokenizer

KEPT_GRAMMARS = 64
# A model that is not sure may write blanks without end where JSON allows any number of them.
JSON_OPTIONS = {"whitespace_pattern": r"[\x20\n]{0,16}"}


class Grammars:
    """Compiled constraints of one vocabulary. ``vocab``: columns of the logits."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos_ids: Collection[int]):
        self._tokenizer, self.vocab = tokenizer, vocab
        self._size = max(vocab, tokenizer.vocab_size)
        self._eos_ids = sorted(eos_ids)
        self._library_tokenizer: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def start(self, constraint: Constraint) -> Match:
        """The beginning of an answer. Raises :class:`UserError` for a constraint that cannot be compiled."""
        from llguidance import LLMatcher

        grammar = _grammar(constraint)
        matcher = self._compiled.pop(grammar, None)
        if matcher is None:
            if self._library_tokenizer is None:
                self._library_tokenizer = self._prepare()
            matcher = LLMatcher(self._library_tokenizer, grammar)
            if matcher.is_error():
                raise _refused(constraint, matcher.get_error().strip())
        self._compiled[grammar] = matcher
        if len(self._compiled) > KEPT_GRAMMARS:
            self._compiled.popitem(last=False)
        return Match(matcher.deep_copy(), self.vocab, self._size)

    def _prepare(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        vocabulary = TokenizerWrapper(_Vocabulary(self._tokenizer, self._size))
        return LLTokenizer(vocabulary, self._size, self._eos_ids or [self._tokenizer.eos_id])


class _Vocabulary:
    """A tokenizer under the names that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer, size: int):
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, None
        self.tokens = [tokenizer.token_bytes(index) for index in range(size)]
        self.special_token_ids = list(tokenizer.special_tokens.values())
        self._encode = tokenizer.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


class Match:
    """One answer's place in its grammar."""

    def __init__(self, matcher: Any, vocab: int, size: int):
        self._matcher, self._vocab = matcher, vocab
        self._bits = np.zeros(-(-size // 32), np.int32)

    def allowed(self) -> np.ndarray:
        """bool [V]: the tokens that may come next; an end token is among them when the answer may end."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        return np.unpackbits(self._bits.view(np.uint8), count=self._vocab, bitorder="little").view(bool)

    def take(self, token: int) -> None:
        """The answer goes on with ``token``."""
        self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return self._matcher.is_stopped()


def _grammar(constraint: Constraint) -> str:
    from llguidance import LLMatcher

    value = constraint.value
    if constraint.kind == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object"}, JSON_OPTIONS)
    if constraint.kind == "json_schema":
        if not isinstance(value, (dict, bool)):
            raise _refused(constraint, f"a JSON schema is an object, not {type(value).__name__}")
        try:
            return LLMatcher.grammar_from_json_schema(json.dumps(value), JSON_OPTIONS)
        except (TypeError, ValueError) as wrong:
            raise _refused(constraint, str(wrong)) from None
    if constraint.kind == "regex":
        if not isinstance(value, str) or not value:
            raise _refused(constraint, "a regular expression is a text that is not empty")
        return LLMatcher.grammar_from_regex(value)
    if constraint.kind == "choice":
        if not isinstance(value, (list, tuple)) or not value or not all(isinstance(v, str) and v for v in value):
            raise _refused(constraint, "a choice is a list of texts that are not empty")
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(v, ensure_ascii=False) for v in value))
    raise _refused(constraint, f"{constraint.kind!r} is not known: json_schema, json_object, regex or choice")


def _refused(constraint: Constraint, why: str) -> UserError:
    return UserError(why, where=f"the {constraint.kind} constraint", hint="a constraint that llguidance can compile")
