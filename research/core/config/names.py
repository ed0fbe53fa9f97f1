"""Nearest-name suggestions for a typo."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``word``, or None when nothing is close."""
    known = sorted(set(known))
    folded = {name.lower().replace("-", "_"): name for name in known}
    key = word.lower().replace("-", "_").replace(".", "_")
    if key in folded:
        return folded[key]
    found = difflib.get_close_matches(key, folded, n=1, cutoff=0.5)
    return folded[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """``did you mean X?`` or the list of known names, for the hint of an error."""
    known = sorted(set(known))
    best = nearest(word, known)
    if best is not None:
        return f"did you mean {prefix}{best}?"
    return "one of: " + ", ".join(prefix + name for name in known)
