"""How the C library hands out memory for large tensors on the CPU."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # mallopt(3)


def keep_freed_memory() -> bool:
    """Keep what tensors give back for the tensors of the next step; True where the C library can be told so (glibc).

    By default glibc returns every block above 32 MB, and the top of its heap, to the system and asks for them again, and
    the system fills each page with zeros at its first touch: some 20,000 page faults in a training step of two layers.
    The largest blocks still go back: they are few, and in the heap a small block that outlives a step (a cached oneDNN
    primitive) would keep the next large one from taking the place of the last, so that chunks of logits of ever other
    sizes added up to gigabytes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_MMAP_THRESHOLD, 64 << 20), mallopt(_TRIM_THRESHOLD, 1 << 30), mallopt(_TOP_PAD, 64 << 20)])
