"""Which tokens are trained, and what is cut from a conversation that is too long.

Supervised means: this token is a target of the loss. By mode (``data.supervise``):
    assistant    the content of every assistant message and the <|im_end|> that closes it
    last         the same, of the last assistant message only
    all          every token
    mindformers  what the MindFormers scripts trained (research/<family>/*_preprocess.py, dataset type qa): for the
                 first generation the assistant's content and, of every turn, <|im_start|>, <|im_end|> and the newline
                 after it; later ones every token. The padding id is masked, also where the text really has it.
The first token of a document is never a target: nothing precedes it. Otherwise a mask here only looks at spans, never
at ids, so an <|endoftext|> in the text is trained although padding uses the same id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from research.core.data.sources import Where
from research.core.errors import DataError

MODES = ("assistant", "last", "all", "mindformers")
ON_LONG = ("truncate", "drop", "error")
TOO_LONG = "longer than data.seq_length"
NOTHING_LEFT = "nothing supervised within data.seq_length"
NOTHING_SUPERVISED = "nothing supervised"


class Span(Protocol):
    """Tokens ``start .. stop - 1`` of one message; kind is header, content, end or newline."""

    start: int
    stop: int
    role: str
    turn: int
    kind: str


@dataclass(frozen=True)
class Rules:
    """What decides labels and cuts. ``first_generation`` picks the MindFormers variant of the family ``qwen``."""

    seq_length: int
    mode: str = "assistant"
    on_long: str = "truncate"
    first_generation: bool = False
    pad_id: int = 0


def supervised_mask(ids: Sequence[int], spans: Sequence[Span], rules: Rules) -> bytearray:
    """One byte per token, 1 where the token is a target of the loss."""
    if rules.mode == "all":
        mask = bytearray(b"\1") * len(ids)
    elif rules.mode == "mindformers":
        mask = _mindformers_mask(ids, spans, rules)
    else:
        mask = bytearray(len(ids))
        answers = [s for s in spans if s.role == "assistant" and (s.kind == "content" or s.kind == "end")]
        last = answers[-1].turn if answers and rules.mode == "last" else None
        for span in answers:
            if last is None or span.turn == last:
                mask[span.start : span.stop] = b"\1" * (span.stop - span.start)
    if mask:
        mask[0] = 0
    return mask


def _mindformers_mask(ids: Sequence[int], spans: Sequence[Span], rules: Rules) -> bytearray:
    mask = bytearray(b"\1") * len(ids)
    if rules.first_generation:
        for span in spans:
            if span.kind == "header":
                mask[span.start + 1 : span.stop] = bytes(max(0, span.stop - span.start - 1))
            elif span.kind == "content" and span.role != "assistant":
                mask[span.start : span.stop] = bytes(span.stop - span.start)
    for position, token in enumerate(ids):
        if token == rules.pad_id:
            mask[position] = 0
    return mask


def kept_length(spans: Sequence[Span], mask: bytearray, rules: Rules, where: Where) -> tuple[int, str | None]:
    """``(tokens kept, reason to drop)`` of a conversation of ``len(mask)`` tokens.

    Too long, it is cut after the last assistant turn that fits, so that the turns kept are whole; when that would leave
    nothing supervised (the first exchange alone is too long) it is cut at seq_length, inside the answer. MindFormers
    always cut at seq_length. Raises :class:`DataError` with ``data.on_long=error``.
    """
    limit, length = rules.seq_length, len(mask)
    if length <= limit:
        return length, None if any(mask) else NOTHING_SUPERVISED
    if rules.on_long == "drop":
        return 0, TOO_LONG
    if rules.on_long == "error":
        raise DataError(
            f"the record has {length} tokens, data.seq_length is {limit}",
            where=where,
            hint=f"data.seq_length={1 << (length - 1).bit_length()}, data.on_long=truncate or data.on_long=drop",
        )
    cut = limit
    if rules.mode != "mindformers":
        ends = [s.stop for s in spans if s.role == "assistant" and s.kind in ("end", "newline") and s.stop <= limit]
        if ends and any(mask[: ends[-1]]):
            cut = ends[-1]
    return (cut, None) if any(mask[:cut]) else (0, NOTHING_LEFT)
