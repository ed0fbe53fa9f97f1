"""Stands where a tokenizer stands when prompts are token ids and so are the answers."""

from __future__ import annotations

from research.core.errors import UserError


class WithoutText:
    """A vocabulary of which nothing is known: token ids stay token ids."""

    family, source, fingerprint, chat_template = "", "none", None, None
    vocab_size = 0
    special_tokens: dict[str, int] = {}  # noqa: RUF012 (never written)
    hidden_ids: frozenset[int] = frozenset()

    def eos_ids(self, chat: bool = True) -> tuple[int, ...]:
        return ()

    def stream(self, skip_special: bool = False) -> WithoutText:
        return self

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""

    def encode(self, text: str, allowed_special=()) -> list[int]:
        raise UserError("no vocabulary is loaded", where="a prompt of text", hint="token ids, or --load_tokenizer True")
