"""The native decode step against the decoder's own layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from research.core.config.schema import LoraConfig
from research.core.errors import ConfigError
from research.core.native.build import library
from research.core.spec import DecoderSpec, MoeSpec, RopeScaling
from research.core.torch import decode_step
from research.core.torch.decode_step import MOST_ROWS, DecodeStep
from research.core.torch.decoder import Decoder
from research.core.torch.generate import Runner
from research.core.torch.lora import add_lora

# Sizes that are no multiples of the vector width, and three query heads per kv head.
BASE = DecoderSpec(
    "qwen2",
    layers=3,
    hidden=80,
    heads=6,
    kv_heads=2,
    head_dim=32,
    ffn=104,
    vocab=203,
    max_positions=512,
    init_range=0.15,
)
SPECS = {
    "gqa": BASE,
    "mha-tied": replace(BASE, kv_heads=6, tied=True),
    "small-heads": replace(BASE, head_dim=16),
    "large-heads": replace(BASE, head_dim=128, heads=3, kv_heads=1, hidden=96),
    "sliding": replace(BASE, sliding_window=8, sliding_layers=(1,)),
    "yarn": replace(BASE, rope_scaling=RopeScaling("yarn", 4.0, original_positions=32)),
    "qwen": replace(
        BASE, model_type="qwen", kv_heads=6, logn_attention=True, dynamic_ntk=True, train_length=16, rope_theta=1e4
    ),
}
# float32: only the order of sums differs, over at most 203 terms of size 1. bfloat16: both paths round at the same
# places, and a different sum moves a value by at most one unit in the last place (1/128) now and then; three layers
# of such differences stay within a few units of logits of size 5.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.15}

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler here: the native step does not exist")


def _decoder(spec: DecoderSpec, dtype: torch.dtype = torch.float32) -> Decoder:
    decoder = Decoder(spec).init_weights(1).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return decoder.to(dtype).requires_grad_(False)


def _layer_by_layer(decoder: Decoder, cache, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return decoder.logits(decoder.hidden(torch.tensor(tokens)[:, None], None, cache)[:, 0]).float()


def _largest_difference(decoder: Decoder, prompts: list[list[int]], steps: int = 12) -> float:
    runner = Runner(decoder)
    ours, theirs = runner.new_cache(len(prompts), 96), runner.new_cache(len(prompts), 96)
    runner.prefill(ours, prompts)
    runner.prefill(theirs, prompts)
    step, worst = DecodeStep(decoder), 0.0
    for t in range(steps):
        tokens = [(7 * t + 31 * row) % 203 for row in range(len(prompts))]
        expected, got = _layer_by_layer(decoder, theirs, tokens), step(ours, tokens)
        assert expected.abs().max() > 1
        worst = max(worst, float((expected - got).abs().max()))
    assert ours.lengths.tolist() == theirs.lengths.tolist() and ours.used == theirs.used
    torch.testing.assert_close(ours.k, theirs.k, rtol=0, atol=TOLERANCE[decoder.model.norm.weight.dtype])
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SPECS)
def test_the_native_step_gives_the_logits_of_the_layers(name, dtype):
    decoder = _decoder(SPECS[name], dtype)
    assert DecodeStep.fits(decoder)
    assert _largest_difference(decoder, [[1, 2, 3], [4] * 40, [7, 8, 9, 10, 11]]) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
def test_every_number_of_rows(rows):
    for dtype in (torch.float32, torch.bfloat16):
        prompts = [[row + 1] * (1 + 3 * row) for row in range(rows)]
        assert _largest_difference(_decoder(BASE, dtype), prompts, 2) < TOLERANCE[dtype]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(threads, monkeypatch):
    monkeypatch.setattr(decode_step, "_ONE_THREAD", 0)
    decoder = _decoder(BASE, torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            runner = Runner(decoder)
            cache = runner.new_cache(1, 32)
            cache.advance(_empty_prompt(cache, 7))
            results.append(torch.stack([DecodeStep(decoder)(cache, [t]) for t in range(4)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def _empty_prompt(cache, length: int):
    from research.core.torch.layout import Layout

    return Layout.cached(cache, length)  # keys and values of zero: the prefill may depend on the threads, the step not


def test_the_step_runs_where_it_can_and_the_layers_elsewhere():
    assert Runner(_decoder(BASE))._native_step is not None
    sparse = replace(BASE, model_type="qwen2_moe", moe=MoeSpec(4, 2, 32, 48))
    adapted = _decoder(BASE)
    add_lora(adapted, LoraConfig(rank=2, target_modules=["q_proj"]))
    reference = _decoder(BASE)
    reference.use_attention("reference")
    for other in (
        _decoder(sparse),
        adapted,
        reference,
        _decoder(BASE, torch.float16),
        _decoder(replace(BASE, head_dim=24)),
    ):
        assert not DecodeStep.fits(other) and Runner(other)._native_step is None


def test_changes_of_the_weights_are_seen():
    decoder = _decoder(BASE)
    step, runner = DecodeStep(decoder), Runner(decoder)
    first = step(runner.new_cache(1, 4), [5])
    with torch.no_grad():
        decoder.model.layers[1].mlp.down_proj.weight.mul_(2)
    second = step(runner.new_cache(1, 4), [5])
    torch.testing.assert_close(second, _layer_by_layer(decoder, runner.new_cache(1, 4), [5]), rtol=0, atol=2e-5)
    assert not torch.equal(first, second)


def test_a_full_cache_is_refused():
    decoder = _decoder(BASE)
    cache = Runner(decoder).new_cache(1, 2)
    step = DecodeStep(decoder)
    step(cache, [1])
    step(cache, [1])
    with pytest.raises(ConfigError, match="3 tokens do not fit"):
        step(cache, [1])
