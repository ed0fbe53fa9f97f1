"""Shards at work: the cards' parts computed together give the model's logits, and shards load where whole weights do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from research.core.spec import DecoderSpec
from research.core.torch.decoder import Decoder
from research.core.torch.layout import Layout
from research.core.torch.weights import load_decoder
from research.core.weights.grid import Grid, shard_model
from tests.core.weights.grids import SPECS, go, tensors_of, write_model


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, spec) for name, spec in SPECS.items()}


def one_card(spec: DecoderSpec, cards: int) -> DecoderSpec:
    """A card's decoder: the same model with its share of heads and columns."""
    moe = spec.moe and replace(
        spec.moe, expert_ffn=spec.moe.expert_ffn // cards, shared_ffn=spec.moe.shared_ffn // cards
    )
    return replace(
        spec,
        heads=spec.heads // cards,
        kv_heads=max(1, spec.kv_heads // cards),
        ffn=spec.ffn // cards,
        vocab=-(-spec.vocab // cards),
        moe=moe,
    )


def load_card(part: Path, spec: DecoderSpec, tmp_path: Path) -> Decoder:
    """A part as the smaller model that it is: its tensors with the card's own sizes in config.json."""
    from research.core.spec import spec_to_hf

    folder = tmp_path / f"card{part.name}"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(part / "model.safetensors")
    config = spec_to_hf(spec) | {"head_dim": spec.head_dim}
    (folder / "config.json").write_text(json.dumps(config))
    return load_decoder(folder)


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("cards", [2, 4, 8])
def test_partial_sums_of_the_cards_are_the_models_logits(models, tmp_path, family, cards):
    """Column- then row-parallel matrices: one sum after attention and one after the feed-forward, as on real cards."""
    spec = SPECS[family]
    parts = go(models[family], tmp_path / "parts", "parts", f"tp{cards}")
    own = one_card(spec, cards)
    decoders = [load_card(parts / str(card), own, tmp_path) for card in range(cards)]
    ids = torch.randint(0, spec.vocab, (2, 9), generator=torch.Generator().manual_seed(0))
    layout = Layout.full(2, 9, ids.device)
    with torch.no_grad():
        rows = own.vocab
        x = sum(
            F.embedding((ids - card * rows).clamp(0, rows - 1), decoder.model.embed_tokens.weight)
            * ((ids >= card * rows) & (ids < (card + 1) * rows))[..., None]
            for card, decoder in enumerate(decoders)
        )
        rope = decoders[0].rope(layout, x.dtype)
        for n in range(spec.layers):
            layers = [decoder.model.layers[n] for decoder in decoders]
            normed = layers[0].input_layernorm(x)
            x = x + sum(layer.self_attn(normed, rope, layout) for layer in layers)
            normed = layers[0].post_attention_layernorm(x)
            outs = [layer.mlp(normed) for layer in layers]
            x = x + sum(out[0] if isinstance(out, tuple) else out for out in outs)
        hidden = decoders[0].model.norm(x)
        logits = torch.cat([decoder.logits(hidden) for decoder in decoders], -1)[..., : spec.vocab]
        expected = load_decoder(models[family])(ids)
    # fp32 sums in another order: a few units in the last place of values up to 1e3.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize(("to", "grid"), [("parts", "tp4-pp2"), ("ranks", "dp2-tp2"), ("dcp", "3")])
def test_shards_load_into_the_decoder_without_a_manual_step(models, tmp_path, family, to, grid):
    shards = go(models[family], tmp_path / "shards", to, grid)
    found, expected = load_decoder(shards), load_decoder(models[family])
    assert found.spec == expected.spec
    for (name, a), (other, b) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b), name


def test_the_published_config_of_a_sharded_model_is_its_own(models, tmp_path):
    parts = go(models["gqa"], tmp_path / "parts", "parts", "tp2")
    assert json.loads((parts / "config.json").read_text()) == json.loads((models["gqa"] / "config.json").read_text())
    assert (parts / "tokenizer.json").is_file()


def test_a_stage_of_a_pipeline_has_its_layers_and_no_others(models, tmp_path):
    parts = go(models["gqa"], tmp_path / "parts", "parts", "pp3")
    names = [set(tensors_of(parts / str(stage))) for stage in range(3)]
    sharding = shard_model(SPECS["gqa"], Grid(pipeline=3))
    for stage, held in enumerate(names):
        assert {int(name.split(".")[2]) for name in held if ".layers." in name} == {stage}
        assert ("model.embed_tokens.weight" in held) == (stage == 0)
        assert ("lm_head.weight" in held) == ("model.norm.weight" in held) == (stage == 2)
        assert all(stage in sharding.stages(name) for name in held)
