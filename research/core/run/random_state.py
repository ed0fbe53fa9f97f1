"""State of numpy's and Python's random generators as arrays, for checkpoints."""

from __future__ import annotations

import random

import numpy as np


def host_state() -> dict[str, np.ndarray]:
    """The state of both generators, by name."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    assert kind == "MT19937"
    version, words, next_gauss = random.getstate()
    assert version == 3
    return {
        "numpy.keys": keys.astype(np.int64),
        "numpy.rest": np.array([position, has_gauss, gauss], np.float64),
        "python.words": np.array(words, np.int64),
        "python.gauss": np.array([] if next_gauss is None else [next_gauss], np.float64),
    }


def restore_host_state(state: dict[str, np.ndarray]) -> None:
    """Put :func:`host_state` back."""
    position, has_gauss, gauss = state["numpy.rest"].tolist()
    np.random.set_state(("MT19937", state["numpy.keys"].astype(np.uint32), int(position), int(has_gauss), gauss))
    next_gauss = state["python.gauss"].tolist()
    random.setstate((3, tuple(state["python.words"].tolist()), next_gauss[0] if next_gauss else None))
