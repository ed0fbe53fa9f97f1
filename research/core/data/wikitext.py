"""WikiText as the MindFormers scripts (dataset type ``wiki``) read it: cleaned, without headings, one stream of tokens.

The scripts hold the whole file in memory and go over it rule by rule. The same rules are applied here to a stream: each
one is a generator from pieces of text to pieces of text that holds back only what the next piece may change. The result
is the same text to the last character, though a rule about quotes pairs them up from the start of the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

Pieces = Iterator[str]

_APOSTROPHES = (("s '", "s'"), ("/' [0-9]/", "/'[0-9]/"))  # the second is a pattern; what it writes is not

# WikiText keeps the spaces that its tokeniser put between words and signs, and @ around signs inside a number.
_SPACES = tuple((f" @{sign}@ ", sign) for sign in "-,.") + tuple((f" {sign} ", f"{sign} ") for sign in ":;.!?,")
_PAIRS = ("()", "[]", "{}", '""', "''")
_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


class Paragraph(NamedTuple):
    """A stretch of one paragraph; ``last`` on the one that ends it."""

    text: str
    last: bool


def cleaned_paragraphs(
    read: Callable[[], Pieces], limit: int, cut: Callable[[str, int], Iterator[str]]
) -> Iterator[Paragraph]:
    """The paragraphs of a file without its headings, in order. ``read`` opens it; it is read twice.

    A paragraph longer than about ``limit`` characters comes in the parts that ``cut`` makes of it.
    """
    totals = _count_closing(_fixed_apostrophes(read()))
    pieces = _fixed_apostrophes(read())
    for old, new in _SPACES:
        pieces = _replaced(pieces, old, new)
    for pair in _PAIRS:
        pieces = _tightened(pieces, pair[0], pair[1], totals[pair[1]])
    for old, new in _REST:
        pieces = _replaced(pieces, old, new)
    return _without_headings(pieces, limit, cut)


def _fixed_apostrophes(pieces: Pieces) -> Pieces:
    (old, new), (pattern, by) = _APOSTROPHES
    return _replaced(_replaced(pieces, old, new), "/' 0/", by, re.compile(pattern))


def _count_closing(pieces: Pieces) -> dict[str, int]:
    totals = {pair[1]: 0 for pair in _PAIRS}
    for text in pieces:
        for sign in totals:
            totals[sign] += text.count(sign)
    return totals


def _replaced(pieces: Pieces, old: str, new: str, pattern: re.Pattern | None = None) -> Pieces:
    """``str.replace`` on a stream; with ``pattern``, every match of it, all as long as ``old``."""
    held = ""
    for piece in pieces:
        parts = (held + piece).split(old) if pattern is None else pattern.split(held + piece)
        # A match that is not complete yet can only begin in the last characters.
        keep = min(len(old) - 1, len(parts[-1]))
        held = parts[-1][len(parts[-1]) - keep :]
        parts[-1] = parts[-1][: len(parts[-1]) - keep]
        yield new.join(parts)
    yield held


def _tightened(pieces: Pieces, left: str, right: str, total: int) -> Pieces:
    """White space after ``left`` and before the next ``right`` taken away; ``total``: all ``right`` in the stream.

    Where both are the same sign the first opens, the second closes, and so on. A ``left`` without a ``right`` after it
    stays as it is.
    """
    inside = begun = False
    blank, seen = "", 0  # white space that may turn out to precede ``right``; ``right`` signs passed
    for text in pieces:
        out, at = [], 0
        while at < len(text):
            found = text.find(right if inside else left, at)
            stop = len(text) if found < 0 else found
            piece = text[at:stop]
            at = stop + 1
            if not inside:
                seen += piece.count(right)
                out.append(piece)
                if found >= 0:
                    out.append(left)
                    seen += left == right
                    inside, begun, blank = seen < total, False, ""
                continue
            if not begun:
                piece = piece.lstrip()
                begun = bool(piece)
            body = piece.rstrip()
            if body:
                out += (blank, body)
                blank = piece[len(body) :]
            else:
                blank += piece
            if found >= 0:
                out.append(right)
                seen += 1
                inside = False
        yield "".join(out)


def _without_headings(pieces: Pieces, limit: int, cut: Callable[[str, int], Iterator[str]]) -> Iterator[Paragraph]:
    """Cut at empty lines; a paragraph whose first character is ``=`` is a heading."""
    held = ""
    heading: bool | None = None  # of the paragraph whose parts were given out; None when none was

    def part(text: str, last: bool) -> Iterator[Paragraph]:
        nonlocal heading
        is_heading = text.lstrip().startswith("=") if heading is None else heading
        if not is_heading and (text or heading is not None):
            yield Paragraph(text, last)
        heading = None if last else is_heading

    for piece in pieces:
        *done, held = (held + piece).split("\n\n")
        for text in done:
            yield from part(text, True)
        while len(held) > 8 * limit:
            first, *rest = cut(held, limit)
            yield from part(first, False)
            held = "".join(rest)
    yield from part(held, True)
