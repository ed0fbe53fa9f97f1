"""The first generation against an independent plain reference: log-n attention, dynamic NTK, fused and swapped keys."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file

from research.core.torch.cache import KVCache
from research.core.torch.layout import Layout
from research.core.torch.rotary import ntk_alpha
from research.core.torch.weights import load_decoder
from tests.reference import qwen1_plain

TRAINED = 12
CONFIG = {
    "model_type": "qwen",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 96,  # both halves
    "vocab_size": 71,
    "max_position_embeddings": 128,
    "seq_length": TRAINED,
    "rotary_emb_base": 10000,
    "layer_norm_epsilon": 1e-6,
    "kv_channels": 8,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tie_word_embeddings": False,
    "no_bias": True,
    "initializer_range": 0.02,
}


def make_weights() -> dict[str, torch.Tensor]:
    shapes = {"transformer.wte.weight": (71, 32), "transformer.ln_f.weight": (32,), "lm_head.weight": (71, 32)}
    for n in range(2):
        block = f"transformer.h.{n}."
        shapes |= {block + "ln_1.weight": (32,), block + "ln_2.weight": (32,)}
        shapes |= {block + "attn.c_attn.weight": (96, 32), block + "attn.c_attn.bias": (96,)}
        shapes |= {block + "attn.c_proj.weight": (32, 32), block + "mlp.c_proj.weight": (32, 48)}
        shapes |= {block + "mlp.w1.weight": (48, 32), block + "mlp.w2.weight": (48, 32)}
    random = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(shape, generator=random) * 0.3 + (1.0 if ".ln_" in name else 0.0)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def weights():
    return make_weights()


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen1")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    buffers = {
        "transformer.rotary_emb.inv_freq": torch.ones(4),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    save_file(weights | buffers, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def decoder(folder):
    return load_decoder(folder)


def some_ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 71, (count,), generator=torch.Generator().manual_seed(seed))


# fp32 against float64: logits of size ~5, errors of a few 1e-6
CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.mark.parametrize("length", [1, 7, TRAINED, TRAINED + 1, 2 * TRAINED, 2 * TRAINED + 1, 50])
def test_logits_within_and_past_the_training_length(decoder, weights, length):
    ids = some_ids(length)
    expected = qwen1_plain.logits(weights, CONFIG, ids.tolist(), length)
    with torch.no_grad():
        torch.testing.assert_close(decoder(ids[None])[0].double(), expected, **CLOSE)


@pytest.mark.parametrize(("switch", "length"), [("use_dynamic_ntk", 40), ("use_logn_attn", 40)])
def test_reference_and_decoder_feel_each_switch(folder, weights, tmp_path, switch, length):
    changed = CONFIG | {switch: False}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    ids = some_ids(length)
    expected = qwen1_plain.logits(weights, changed, ids.tolist(), length)
    assert (expected - qwen1_plain.logits(weights, CONFIG, ids.tolist(), length)).abs().max() > 1e-2
    with torch.no_grad():
        torch.testing.assert_close(load_decoder(tmp_path)(ids[None])[0].double(), expected, **CLOSE)


@pytest.mark.parametrize("prompt", [5, TRAINED, 14, 30])
def test_decode_keeps_the_base_of_the_prompt(decoder, weights, prompt):
    ids = some_ids(40, seed=prompt)
    expected = qwen1_plain.logits(weights, CONFIG, ids.tolist(), prompt)
    with torch.inference_mode():
        cache = KVCache(decoder.spec, 1, 40, torch.float32)
        parts = [decoder(ids[None, :prompt], cache=cache)]
        parts += [decoder(ids[None, t : t + 1], cache=cache) for t in range(prompt, 40)]
    torch.testing.assert_close(torch.cat(parts, 1)[0].double(), expected, **CLOSE)
    assert cache.ntk_alpha.item() == ntk_alpha(prompt, TRAINED)


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_padded_batch_has_its_own_base_and_counts_real_tokens(decoder, weights, side):
    """Whole forward, and prompt (first 20 columns) plus steps: the prompt is what is real of those 20."""
    lengths, time, prompt = [40, 26, 9], 40, 20
    ids, mask = torch.zeros(3, time, dtype=torch.long), torch.zeros(3, time, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(time - length, time) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = some_ids(length, seed=row), True
    with torch.inference_mode():
        whole = decoder(ids, Layout.padded(mask))
        cache = KVCache(decoder.spec, 3, time, torch.float32)
        borders = [0, *range(prompt, time + 1)]
        stepped = torch.cat(
            [
                decoder(ids[:, a:b], Layout.cached(cache, b - a, mask[:, a:b]), cache)
                for a, b in itertools.pairwise(borders)
            ],
            dim=1,
        )
    for row, length in enumerate(lengths):
        real = mask[row]
        expected = qwen1_plain.logits(weights, CONFIG, ids[row, real].tolist(), length)
        torch.testing.assert_close(whole[row, real].double(), expected, **CLOSE)
        first = max(int(real[:prompt].sum()), 1)  # a row that starts after the prompt starts with one token
        expected = qwen1_plain.logits(weights, CONFIG, ids[row, real].tolist(), first)
        torch.testing.assert_close(stepped[row, real].double(), expected, **CLOSE)


def test_packed_documents_have_the_base_of_their_own_length(decoder, weights):
    first, second = some_ids(30, seed=1), some_ids(8, seed=2)
    documents = torch.tensor([[1] * 30 + [2] * 8])
    positions = torch.cat((torch.arange(30), torch.arange(8)))[None]
    with torch.no_grad():
        out = decoder(torch.cat((first, second))[None], Layout.packed(positions, documents))[0].double()
    expected = [qwen1_plain.logits(weights, CONFIG, x.tolist(), len(x)) for x in (first, second)]
    torch.testing.assert_close(out, torch.cat(expected), **CLOSE)


def test_training_mode_has_neither_log_n_nor_dynamic_ntk(decoder, weights):
    """As published: both switches act in evaluation only."""
    ids = some_ids(40)
    plain = CONFIG | {"use_dynamic_ntk": False, "use_logn_attn": False}
    decoder.train()
    try:
        out = decoder(ids[None])[0].detach().double()
    finally:
        decoder.eval()
    torch.testing.assert_close(out, qwen1_plain.logits(weights, plain, ids.tolist(), 40), **CLOSE)


def test_alpha_is_the_published_staircase():
    lengths = torch.tensor([1, 8192, 8193, 16384, 16385, 32768, 32769])
    assert ntk_alpha(lengths, 8192).tolist() == [1, 1, 3, 3, 7, 7, 15]
    assert [ntk_alpha(int(n), 8192) for n in lengths] == [1, 1, 3, 3, 7, 7, 15]


def test_bf16_rotates_in_fp32(folder):
    """A bf16 angle table at position 100 would be off by up to 0.4 rad; the published model rotates in fp32."""
    exact, rounded = load_decoder(folder), load_decoder(folder, dtype="bfloat16")
    tables = rounded.rope(Layout.full(1, 100), torch.bfloat16)
    assert tables.cos.dtype == torch.float32
    ids = some_ids(100)[None]
    with torch.no_grad():
        target = exact(ids)
        # ~10 roundings to 8 bits per layer, two layers: a few per cent of the logits' size
        assert (rounded(ids).float() - target).norm() < 0.06 * target.norm()
