from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.data.holdout import HeldOut


@settings(max_examples=150, deadline=None)
@given(keys=st.lists(st.integers(0, 50), max_size=60), limit=st.integers(0, 20), at_most=st.integers(0, 30))
def test_the_smallest_keys_are_held_out_copies_together_and_nothing_is_lost(keys, limit, at_most):
    held_out = HeldOut(limit)
    trained = []
    for number, key in enumerate(keys):
        trained += held_out.offer(key, np.array([number, key]))
    held, rest = held_out.finish(at_most)
    trained += rest
    size = min(limit, at_most)
    assert sorted(int(d[0]) for d in [*held, *trained]) == list(range(len(keys)))
    assert len(held) <= size
    assert not {int(d[1]) for d in held} & {int(d[1]) for d in trained}
    assert [int(d[0]) for d in held] == sorted(int(d[0]) for d in held)
    if len(set(keys)) == len(keys):  # without copies: exactly the smallest
        assert sorted(int(d[1]) for d in held) == sorted(keys)[:size]
