"""Packing loses, splits and duplicates nothing, and fills its rows."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.data.packing import WINDOW, Packer, _closest_subset


def pack(documents, seq_length):
    packer = Packer(seq_length)
    rows = [row for document in documents if (row := packer.add(document)) is not None]
    return rows + list(packer.flush())


@st.composite
def cases(draw):
    seq_length = draw(st.integers(1, 300))
    longest = draw(st.integers(1, seq_length))
    return seq_length, draw(st.lists(st.integers(1, longest), max_size=300))


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_every_document_lands_in_one_row_whole_and_in_order(case):
    seq_length, lengths = case
    ends = np.cumsum(lengths)
    documents = [np.arange(end - n, end, dtype=np.int32) for end, n in zip(ends, lengths)]  # every token is unique
    rows = pack(documents, seq_length)
    assert all(0 < sum(map(len, row)) <= seq_length for row in rows)
    placed = [document for row in rows for document in row]
    assert sorted(d.tolist() for d in placed) == [d.tolist() for d in documents]
    for row in rows:
        firsts = [int(document[0]) for document in row]
        assert firsts == sorted(firsts)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=9), gap=st.integers(0, 60))
def test_the_chosen_subset_is_the_best_of_all_subsets(lengths, gap):
    chosen = _closest_subset(lengths, gap)
    assert chosen == sorted(set(chosen))
    best = max(sum(c) for n in range(len(lengths) + 1) for c in combinations(lengths, n) if sum(c) <= gap)
    assert sum(lengths[i] for i in chosen) == best


@pytest.mark.parametrize(("seq_length", "least"), [(512, 0.995), (2048, 0.995), (8192, 0.995)])
def test_rows_of_ordinary_lengths_are_full(seq_length, least):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.4, 0.6, 4000).astype(int) + 25, 1, seq_length)
    rows = pack([np.zeros(n, np.int32) for n in lengths], seq_length)
    full = rows[:-1]  # the last one has what is left over
    assert sum(len(document) for row in full for document in row) / (len(full) * seq_length) > least


def test_no_document_waits_for_long():
    """A document that fits badly still leaves: the oldest one starts the next row."""
    packer = Packer(100)
    first = np.full(99, 7, np.int32)
    packer.add(first)
    for _ in range(WINDOW + 1):
        row = packer.add(np.zeros(50, np.int32))
        if row is not None:
            assert row[0] is first
            return
    raise AssertionError("the first document never left")


@pytest.mark.parametrize("length", [0, 11])
def test_a_document_that_cannot_fit_is_refused(length):
    with pytest.raises(ValueError, match="does not fit"):
        Packer(10).add(np.zeros(length, np.int32))
