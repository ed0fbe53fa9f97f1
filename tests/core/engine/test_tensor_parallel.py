"""The engine over 2, 4 and 8 ranks against the plain decoder: the same greedy tokens, for every kind of model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from research.core.config.schema import LoraConfig
from research.core.engine.build import open_engine
from research.core.errors import ConfigError
from research.core.spec import DecoderSpec, MoeSpec
from research.core.text.builtin import builtin_tokenizer
from research.core.torch.cache import KVCache
from research.core.torch.decoder import Decoder
from research.core.torch.lora import add_lora, load_adapter, lora_layers, save_adapter
from research.core.torch.tensor_parallel import TensorPart, load_part
from research.core.torch.weights import load_decoder, save_decoder
from research.core.weights.grid import Grid
from research.core.weights.opened import NOTHING_SAID
from research.core.weights.reshard import ReshardOptions, reshard
from tests.core.engine.tensor_parallel_case import ADAPTED, CASES, NEW, adapter_of, count_of, drawn, prompts, settings

# 3079 is a prime: the vocabulary is cut unevenly. 2 kv heads are fewer than 4 ranks.
DENSE = DecoderSpec(
    "qwen2",
    layers=2,
    hidden=64,
    heads=8,
    kv_heads=4,
    head_dim=16,
    ffn=96,
    vocab=3079,
    max_positions=512,
    init_range=0.2,
)
SPECS = {
    "dense": DENSE,
    "tied": replace(DENSE, kv_heads=2, tied=True),
    "mixture": replace(DENSE, model_type="qwen2_moe", moe=MoeSpec(6, 2, 32, 64)),
    "embedding": replace(DENSE, kv_heads=2, causal=False),
    "qwen1": replace(DENSE, model_type="qwen", kv_heads=8, logn_attention=True, dynamic_ntk=True, train_length=64),
}


def _write_adapter(weights, folder, targets, rank: int, seed: int) -> None:
    decoder, cfg = load_decoder(weights), LoraConfig(rank=rank, alpha=3 * rank, target_modules=targets)
    add_lora(decoder, cfg, seed=seed)
    for _, layer in lora_layers(decoder):
        layer.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    save_adapter(decoder, folder, cfg)


@torch.no_grad()
def _greedy(decoder: Decoder, prompt: list[int]) -> list[int]:
    """Token by token over the contiguous cache, alone."""
    cache = KVCache(decoder.spec, 1, len(prompt) + NEW, torch.float32)
    logits, tokens = decoder(torch.tensor([prompt]), cache=cache), []
    for _ in range(NEW):
        tokens.append(int(logits[0, -1].argmax()))
        logits = decoder(torch.tensor([tokens[-1:]]), cache=cache)
    return tokens


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Everything that the ranks found, and the folders that they read."""
    folder, threads = tmp_path_factory.mktemp("ranks"), torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products: threads would wait for each other
    for name, spec in SPECS.items():
        save_decoder(Decoder(spec, head=name != "embedding").init_weights(1), folder / name)
    reshard(folder / "dense", folder / "parts", ReshardOptions("parts", Grid(tensor=2)), NOTHING_SAID)
    for name in ADAPTED:
        _write_adapter(folder / name, folder / f"{name}-one", "all-linear", 4, 5)
        _write_adapter(folder / name, folder / f"{name}-two", ["o_proj", "v_proj", "down_proj"], 2, 6)
    for name in ("torn", "wrong"):
        shutil.copytree(folder / "dense-two", folder / f"dense-{name}")
    file = folder / "dense-wrong" / "adapter_model.safetensors"
    save_file({key: value[:, :-1].contiguous() for key, value in load_file(file).items()}, file)
    command = [sys.executable, "-m", "tests.core.engine.tensor_parallel_case", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    statuses = json.loads((folder / "statuses.json").read_text())
    sizes = {"two": 2, "four": 4, "eight": 8}
    assert all(statuses[name] == [0] * size for name, size in sizes.items()), (statuses, done.stderr[-4000:])
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in sizes}
    yield folder, found, statuses, done.stderr
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_greedy_tokens_on_2_4_and_8_ranks_are_the_plain_decoders(ranks):
    folder, found, _, _ = ranks
    for case in [case for case in CASES if case != "embedding"]:
        decoders = {None: load_decoder(folder / ("dense" if case == "parts" else case), torch.float32)}
        for name in ("one", "two") if case in ADAPTED else ():
            decoders[name] = load_decoder(folder / case, torch.float32)
            load_adapter(decoders[name], folder / f"{case}-{name}")
        sizes = [size for size in found if case in found[size]]
        for place, prompt in enumerate(prompts(DENSE.vocab, count_of(case))):
            expected = _greedy(decoders[adapter_of(case, place)], prompt)
            for size in sizes:
                assert found[size][case][place] == expected, (case, size, place)
        assert len({found[size][f"{case} preempted"] for size in sizes}) == 1 and found["two"][f"{case} preempted"] > 0
    adapted = found["two"]["dense"], found["two"]["parts"]
    assert (
        adapted[0][1] != adapted[1][1] and adapted[0][0] == adapted[1][0]
    )  # the adapters do something, where asked for


@pytest.mark.slow
def test_tokens_drawn_on_several_ranks_are_those_of_one_with_their_log_probabilities(ranks):
    folder, found, _, _ = ranks
    engine, _ = open_engine(folder / "dense", builtin_tokenizer(), (), settings(), {"one": folder / "dense-one"})
    tokens, logprobs = drawn(engine)
    for size in (found["two"], found["four"]):
        assert size["drawn"][0] == tokens
        assert size["drawn"][1] == pytest.approx(logprobs, abs=1e-4)  # fp32, sums in another order


@pytest.mark.slow
def test_embeddings_on_several_ranks_are_the_plain_decoders(ranks):
    folder, found, _, _ = ranks
    decoder = load_decoder(folder / "embedding", torch.float32, head=False)
    for place, prompt in enumerate(prompts(DENSE.vocab)):
        with torch.no_grad():
            expected = decoder.embed(torch.tensor([prompt]), normalize=False)[0]
        for size in found.values():
            # fp32 values around 1, sums in another order
            torch.testing.assert_close(torch.tensor(size["embedding"][place]), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_an_adapter_that_one_rank_cannot_load_is_loaded_by_none_and_the_engine_goes_on(ranks):
    _, found, _, _ = ranks
    for size in (found["two"], found["four"]):
        torn, wrong, *loaded = size["refused"]
        assert torn == "cannot be read by rank 1"
        assert "lora_A.weight is 2x95, this model needs 2x96" in wrong
        assert loaded == ["one", "two"]
        assert size["again"] == size["dense"][0]


@pytest.mark.slow
def test_a_rank_that_fails_in_a_step_ends_and_so_does_the_first(ranks):
    _, _, statuses, said = ranks
    assert statuses["failing"] == [1, 1]
    assert "rank 1 has had enough" in said


def test_numbers_of_ranks_that_would_tear_heads_are_refused_with_those_that_work(tmp_path):
    with pytest.raises(ConfigError, match=r"8 attention heads do not divide by 3(.|\n)*widths that work: 2, 4, 8"):
        TensorPart.of(DENSE, 0, 3)
    save_decoder(Decoder(replace(DENSE, vocab=33)).init_weights(2), tmp_path / "w")
    # Two kv heads on eight ranks: each is on four of them, whole; the last rank's vocabulary rows are padding.
    part = load_part(tmp_path / "w", 7, 8)
    whole = load_decoder(tmp_path / "w")
    attention, expected = part.model.layers[1].self_attn, whole.model.layers[1].self_attn
    assert torch.equal(attention.k_proj.weight, expected.k_proj.weight[48:64])
    assert torch.equal(attention.o_proj.weight, expected.o_proj.weight[:, 112:128])
    assert part.lm_head.weight.shape == (5, 64) and not part.lm_head.weight.any()
