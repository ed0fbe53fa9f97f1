"""The engine's native step against the decoder's own layers on whole sequences."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from research.core.config.schema import LoraConfig
from research.core.engine import native_step
from research.core.engine.batch import PagedBatch, StepPlan
from research.core.engine.native_step import NativePagedStep
from research.core.native import build
from research.core.native.build import library
from research.core.spec import DecoderSpec, MoeSpec, RopeScaling
from research.core.torch.decoder import Decoder
from research.core.torch.layout import Layout
from research.core.torch.lora import add_lora
from tests.core.torch.test_decode_step import _decoder

# Sizes that are no multiples of the vector width, three query heads per kv head, a k of more than one piece (ffn).
BASE = DecoderSpec(
    "qwen2",
    layers=2,
    hidden=80,
    heads=6,
    kv_heads=2,
    head_dim=32,
    ffn=600,
    vocab=203,
    max_positions=512,
    init_range=0.15,
)
SPECS = {
    "gqa": BASE,
    "mha-tied": replace(BASE, kv_heads=6, tied=True, hidden=72),
    "large-heads": replace(BASE, head_dim=128, heads=3, kv_heads=1, hidden=96),
    "sliding": replace(BASE, sliding_window=8, sliding_layers=(1,)),
    "yarn": replace(BASE, head_dim=48, rope_scaling=RopeScaling("yarn", 4.0, original_positions=32)),
    "qwen": replace(
        BASE, model_type="qwen", kv_heads=6, logn_attention=True, dynamic_ntk=True, train_length=16, rope_theta=1e4
    ),
}
# float32: only the order of sums differs, over at most 600 terms of size 1. bfloat16: both paths round at the same places,
# and a different sum moves a value by at most one unit in the last place (1/128) now and then; two layers of such
# differences stay within a few units of logits of size 5.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 0.15}
BLOCK = 16
LENGTHS = [1, 5, 100, 33, 70]

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler here: the native step does not exist")


def _texts(lengths: list[int]) -> list[list[int]]:
    return [[(7 * t + 31 * row + t * t) % 203 for t in range(length)] for row, length in enumerate(lengths)]


def _by_steps(decoder: Decoder, texts: list[list[int]], chunk, together: int) -> list[torch.Tensor]:
    """Logits of every token of every text [T, V], computed ``chunk()`` tokens of a row at a time, ``together`` rows a step,
    on blocks in no order."""
    spec = decoder.spec
    tables, order = [], random.Random(1).sample(range(64), 64)
    for text in texts:
        count = -(-len(text) // BLOCK)
        tables.append(order[:count])
        order = order[count:]
    k, v = (torch.zeros(spec.layers, 64, spec.kv_heads, BLOCK, spec.head_dim, dtype=_dtype(decoder)) for _ in range(2))
    step, done, logits = NativePagedStep(decoder, k, v), [0] * len(texts), [[] for _ in texts]
    while any(done[row] < len(text) for row, text in enumerate(texts)):
        rows = [row for row, text in enumerate(texts) if done[row] < len(text)][:together]
        queries = [min(chunk(), len(texts[row]) - done[row]) for row in rows]
        tokens = [t for row, count in zip(rows, queries) for t in texts[row][done[row] : done[row] + count]]
        contexts = [done[row] + count for row, count in zip(rows, queries)]
        plan = StepPlan(tokens, queries, contexts, [tables[row] for row in rows], [])
        batch = PagedBatch.of(plan, BLOCK)
        rope = None
        if step.needs_rope:
            lengths = torch.tensor([len(texts[row]) for row in rows]).repeat_interleave(torch.tensor(queries))
            layout = Layout(1, len(tokens), batch.positions[None], lengths[None], against_cache=True)
            rope = decoder.rope(layout, _dtype(decoder))
        found = step(tokens, batch, range(len(tokens)), rope).clone()
        best = step.best(tokens, batch, range(len(tokens)), rope)  # the same tokens once more: nothing changes
        assert torch.equal(best, found.argmax(-1))
        begin = 0
        for row, count in zip(rows, queries):
            logits[row].append(found[begin : begin + count])
            done[row] += count
            begin += count
    return [torch.cat(parts) for parts in logits]


def _dtype(decoder: Decoder) -> torch.dtype:
    return decoder.model.embed_tokens.weight.dtype


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
def test_prompts_chunks_and_decode_rows_in_one_step_give_the_logits_of_the_layers(dtype):
    texts = _texts(LENGTHS)
    for name, spec in SPECS.items():
        decoder, sizes = _decoder(spec, dtype), random.Random(2)
        assert NativePagedStep.fits(decoder)
        got = _by_steps(decoder, texts, partial(sizes.choice, [1, 1, 3, 24, 60]), 4)
        for text, logits in zip(texts, got):
            with torch.inference_mode():
                expected = decoder(torch.tensor([text]))[0].float()
            assert expected.abs().max() > 1
            difference = (logits - expected).abs().max()
            assert difference < TOLERANCE[dtype], (name, len(text), difference)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
def test_no_bit_depends_on_batching_chunking_or_threads(dtype, monkeypatch):
    monkeypatch.setattr(native_step, "_ONE_THREAD", 0)
    decoder, texts = _decoder(SPECS["sliding"], dtype), _texts([130, 9, 70, 40])
    whole = _by_steps(decoder, texts, lambda: 200, 4)  # so many rows that weights are widened beforehand
    threads, chunks = torch.get_num_threads(), random.Random(3)
    try:
        torch.set_num_threads(3)
        others = [
            _by_steps(decoder, texts, lambda: 1, 4),
            _by_steps(decoder, texts, lambda: chunks.choice([2, 5, 7, 8, 50]), 3),
            _by_steps(decoder, texts, lambda: 200, 1),
        ]
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(whole, other))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Path:
    """The step as a processor with products of bfloat16 runs it, with their instructions emulated."""
    if "avx512bw" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("they are emulated with AVX-512, which this processor does not have")
    sources, target = Path(build.__file__).parent, tmp_path_factory.mktemp("emulated") / "step.so"
    flags = ["-O1", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-shared"]
    header = ["-include", str(Path(__file__).with_name("emulated_amx.h"))]
    command = [os.environ.get("CXX", "g++"), *flags, *header, str(sources / "paged_step.cpp"), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [True, False], ids=["tiles", "pairs"])
def test_products_of_bf16_give_the_logits_of_the_layers_and_no_bit_depends_on_batching(
    emulated, tmp_path, monkeypatch, tiles
):
    monkeypatch.setenv("QWEN_AMX", str(int(tiles)))
    kernels = ctypes.CDLL(shutil.copy(emulated, tmp_path / "own.so"))  # reads the variable once
    kernels.paged_step.argtypes, kernels.paged_step.restype = library().paged_step.argtypes, None
    kernels.tile_products.restype = ctypes.c_long
    monkeypatch.setattr(native_step, "library", lambda: kernels)
    monkeypatch.setattr(native_step, "_ONE_THREAD", 0)
    texts, sizes, threads = _texts([1, 5, 100, 33]), random.Random(2), torch.get_num_threads()
    # "even": every matrix is made of whole tiles, one k is of more than one piece.
    specs = {name: SPECS[name] for name in ("gqa", "mha-tied")} | {
        "even": replace(BASE, hidden=192, ffn=1088, vocab=224)
    }
    for name, spec in specs.items():
        decoder = _decoder(spec, torch.bfloat16)
        try:
            torch.set_num_threads(2)
            whole = _by_steps(decoder, texts, lambda: 200, 4)
            others = [
                _by_steps(decoder, texts, partial(sizes.choice, [1, 3, 17, 40]), 3),
                _by_steps(decoder, texts, lambda: 9, 1),
            ]
        finally:
            torch.set_num_threads(threads)
        for text, logits in zip(texts, whole):
            with torch.inference_mode():
                expected = decoder(torch.tensor([text]))[0].float()
            difference = (logits - expected).abs().max()
            assert difference < TOLERANCE[torch.bfloat16], (name, len(text), difference)
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(whole, other)), name
    assert (kernels.tile_products() > 0) == tiles


def test_hidden_states_of_a_decoder_without_output_matrix():
    decoder = Decoder(BASE, head=False).init_weights(1).eval()
    k, v = (torch.zeros(2, 4, 2, BLOCK, 32) for _ in range(2))
    text = _texts([20])[0]
    batch = PagedBatch.of(StepPlan(text, [20], [20], [[3, 1]], []), BLOCK)
    got = NativePagedStep(decoder, k, v).hidden(text, batch, [4, 19])
    with torch.inference_mode():
        expected = decoder.hidden(torch.tensor([text]))[0, [4, 19]]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_logits_that_are_no_numbers_have_no_best_token():
    decoder = _decoder(BASE)
    k, v = (torch.zeros(2, 4, 2, BLOCK, 32) for _ in range(2))
    step, batch = NativePagedStep(decoder, k, v), PagedBatch.of(StepPlan([5], [1], [1], [[0]], []), BLOCK)
    assert step.best([5], batch, [0]).item() >= 0
    with torch.no_grad():
        decoder.model.norm.weight.fill_(float("nan"))
    assert step.best([5], batch, [0]).tolist() == [-1]


def test_decoders_that_the_kernel_cannot_run_are_told():
    adapted, reference = _decoder(BASE), _decoder(BASE)
    add_lora(adapted, LoraConfig(rank=2, target_modules=["q_proj"]))
    reference.use_attention("reference")
    sparse = replace(BASE, model_type="qwen2_moe", moe=MoeSpec(4, 2, 32, 48))
    others = [adapted, reference, _decoder(sparse), _decoder(BASE, torch.float16), _decoder(replace(BASE, head_dim=24))]
    assert not any(NativePagedStep.fits(decoder) for decoder in others)
