"""The shard rules: what each card holds, which widths are refused, and that the shards compute the model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.errors import ConfigError
from research.core.spec import DecoderSpec
from research.core.weights.blocks import (
    Block,
    Stored,
    apply_copy,
    box_elements,
    compose,
    covers,
    crop,
    hf_layout,
    index_sources,
    intersect,
    logical_shapes,
    subtract,
)
from research.core.weights.grid import Grid, parse_grid, shard_model, shard_stored
from tests.core.weights.grids import SPECS


def test_ranks_count_the_tensor_axis_fastest_then_data_then_the_stage():
    grid = Grid(data=2, tensor=4, pipeline=2)
    assert [grid.place(rank).tensor for rank in range(4)] == [0, 1, 2, 3]
    assert (grid.place(5).data, grid.place(5).tensor) == (1, 1)
    assert grid.place(8).stage == 1
    assert all(grid.rank(grid.place(rank)) == rank for rank in range(grid.ranks))


@pytest.mark.parametrize(
    ("text", "grid"),
    [("4", Grid(1, 4, 1)), ("tp8", Grid(1, 8, 1)), ("pp2-dp3-mp4", Grid(3, 4, 2)), ("dp2 tp=2", Grid(2, 2, 1))],
)
def test_grids_are_read_as_people_write_them(text, grid):
    assert parse_grid(text) == grid


@pytest.mark.parametrize("text", ["", "tp", "tp0", "tq4", "tp2-tp4", "4x"])
def test_other_texts_are_no_grid(text):
    with pytest.raises(ConfigError):
        parse_grid(text)


def test_a_layer_is_in_one_stage_and_stages_are_even():
    assert Grid(pipeline=4).layers_per_stage(30) == (8, 8, 7, 7)
    assert Grid(pipeline=2, stage_layers=(20, 8)).layers_per_stage(28) == (20, 8)
    with pytest.raises(ConfigError, match="the model has 28"):
        Grid(pipeline=2, stage_layers=(20, 9)).layers_per_stage(28)
    with pytest.raises(ConfigError, match="pipeline stages"):
        Grid(pipeline=4).layers_per_stage(3)


def test_a_tied_embedding_is_in_the_first_and_the_last_stage():
    sharding = shard_model(SPECS["tied"], Grid(pipeline=2))
    assert sharding.stages("model.embed_tokens.weight") == (0, 1)
    assert sharding.stages("model.norm.weight") == (1,)
    assert sharding.stages("model.layers.1.mlp.up_proj.weight") == (1,)


def test_widths_that_tear_heads_are_refused_and_those_that_work_are_named():
    half = DecoderSpec("qwen2", 24, 896, 14, 2, 64, 4864, 151936, 32768, tied=True)  # Qwen2.5-0.5B
    with pytest.raises(ConfigError, match="14 attention heads do not divide by 4") as error:
        shard_model(half, Grid(tensor=4))
    assert error.value.hint == "widths that work: 2"
    with pytest.raises(ConfigError, match="feed-forward columns"):
        shard_model(DecoderSpec("qwen2", 1, 32, 6, 6, 8, 50, 96, 64), Grid(tensor=3))
    with pytest.raises(ConfigError, match="neither divide by 4 nor into it"):
        shard_model(DecoderSpec("qwen2", 1, 32, 12, 6, 8, 48, 96, 64), Grid(tensor=4))


def test_kv_heads_and_vocabulary_may_be_refused_and_the_choice_is_named():
    spec = SPECS["tied"]  # 2 kv heads, 101 words
    for choice in ({"kv": "refuse"}, {"vocab": "refuse"}):
        with pytest.raises(ConfigError, match="=refuse"):
            shard_model(spec, Grid(tensor=4), **choice)
    named = " / ".join(shard_model(spec, Grid(tensor=4)).describe())
    assert "replicated, each head on 2 cards" in named
    assert "padded with zeros to 104, 26 rows on each card" in named
    assert "whole on each card" in " ".join(shard_model(spec, Grid(tensor=4), vocab="replicate").describe())
    assert shard_model(SPECS["mha"], Grid(tensor=4), vocab="replicate").vocab == "split"
    assert shard_model(SPECS["mha"], Grid(tensor=4), vocab="whole").vocab == "replicated"


def test_sparse_models_without_dense_layers_do_not_ask_their_unused_ffn_to_divide():
    from dataclasses import replace

    shard_model(replace(SPECS["moe"], ffn=47), Grid(tensor=8))
    with pytest.raises(ConfigError, match="47"):
        shard_model(replace(SPECS["mha"], ffn=47), Grid(tensor=8))


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("cards", [2, 4, 8])
def test_every_query_head_finds_its_key_head_on_its_own_card(family, cards):
    spec = SPECS[family]
    sharding, shapes = shard_model(spec, Grid(tensor=cards)), logical_shapes(spec)
    size, repeat = spec.head_dim, spec.heads // spec.kv_heads
    for card in range(cards):
        name = "model.layers.0.self_attn.{}_proj.weight"
        q = sharding.box(name.format("q"), shapes[name.format("q")], card)[0]
        k = sharding.box(name.format("k"), shapes[name.format("k")], card)[0]
        heads = range(q[0] // size, q[1] // size)
        assert {head // repeat for head in heads} == set(range(k[0] // size, k[1] // size))
        # Locally the same ratio, so that a card is a smaller model of the same kind.
        assert len(heads) % ((k[1] - k[0]) // size) == 0


# --- the arithmetic of blocks ---------------------------------------------------------------------------------------

edges = st.tuples(st.integers(0, 6), st.integers(1, 6)).map(lambda pair: (pair[0], pair[0] + pair[1]))
boxes = st.tuples(edges, edges)


@given(boxes, boxes)
@settings(max_examples=200, deadline=None)
def test_a_box_is_its_common_part_and_the_rest(a, b):
    grid = np.zeros((14, 14), int)
    common = intersect(a, b)
    for box in subtract(a, b) + ([common] if common else []):
        grid[slice(*box[0]), slice(*box[1])] += 1
    assert grid.max() == 1 and grid.sum() == box_elements(a)
    assert (grid[slice(*a[0]), slice(*a[1])] == 1).all()


@given(st.integers(1, 3), st.integers(0, 3), st.data())
@settings(max_examples=150, deadline=None)
def test_cropping_a_strided_block_keeps_the_elements_in_place(step, start, data):
    rows = data.draw(st.integers(1, 6))
    height = start + (rows - 1) * step + 1 + data.draw(st.integers(0, 2))
    stored = Stored("s", (height, 4), (Block("w", ((0, rows), (0, 4)), (start, 0), (0, 1), (step, 1)),))
    source = np.arange(rows * 4).reshape(rows, 4) + 1
    sources = index_sources([("w", Stored("w", (rows, 4), (Block("w", ((0, rows), (0, 4)), (0, 0), (0, 1), (1, 1)),)))])
    whole = fill(stored, sources, {"w": source})
    low = data.draw(st.integers(0, height - 1))
    high = data.draw(st.integers(low + 1, height + 2))
    part = crop(stored, ((low, high), (1, 3)))
    expected = np.zeros((high - low, 2), int)
    expected[: max(0, height - low)] = whole[low:high, 1:3]
    np.testing.assert_array_equal(fill(part, sources, {"w": source}), expected)


def fill(stored: Stored, sources, arrays) -> np.ndarray:
    out = np.zeros(stored.shape, next(iter(arrays.values())).dtype)
    for copy in compose(stored, sources):
        apply_copy(copy, arrays[copy.source], out)
    return out


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("cards", [2, 4, 8])
def test_shards_of_every_family_lie_together_as_the_model(family, cards):
    spec = SPECS[family]
    shapes, layout = logical_shapes(spec), hf_layout(spec)
    sharding = shard_model(spec, Grid(tensor=cards))
    parts = [(card, shard_stored(stored, sharding, card, shapes)) for stored in layout for card in range(cards)]
    sources = index_sources(((card, part.name), part) for card, part in parts)
    for stored in layout:
        compose(stored, sources)  # raises when an element is nowhere
        assert covers(stored)
    held = sum(box_elements(tuple((0, n) for n in part.shape)) for _, part in parts)
    assert held < 1.6 * spec.parameters()  # nothing but norms, kv heads, padding and the router is on several cards
