"""Many adapters in one batch against peft, one model per adapter; and what the table of adapters refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from research.core.config.schema import Config
from research.core.engine.adapters import Adapters, read_table
from research.core.engine.api import EngineRequest
from research.core.engine.build import open_engine
from research.core.engine.run_all import run_all
from research.core.errors import ConfigError, WeightsError
from research.core.generation.sampling import Sampling
from research.core.spec import DecoderSpec
from research.core.text.builtin import builtin_tokenizer
from research.core.torch.decoder import Decoder
from research.core.torch.multi_lora import AdapterSlots, SlotLinear
from research.core.torch.weights import load_decoder

SIZES = {
    "vocab_size": 211,
    "hidden_size": 64,  # heads of 16: what the native step of the engine takes
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
ADAPTERS = {
    "wide": {"r": 8, "lora_alpha": 24, "target_modules": "all-linear"},
    "attention": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "rs": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["down_proj", "o_proj"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["up_proj", "k_proj"],
        "rank_pattern": {"layers.1.self_attn.k_proj": 5},
        "alpha_pattern": {"up_proj": 9},
    },
}
IDS = torch.randint(0, 211, (6, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny dense model in transformers, its folder, and the folders of its adapters with all weights random."""
    folder, threads = tmp_path_factory.mktemp("adapters"), torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products: threads would wait for each other
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, attn_implementation="eager")).eval()
    model.save_pretrained(folder / "base")
    for number, (name, settings) in enumerate(ADAPTERS.items()):
        _random_adapter(Qwen2ForCausalLM.from_pretrained(folder / "base"), settings, folder / name, number)
    yield model, folder
    torch.set_num_threads(threads)


def _random_adapter(model, settings: dict, folder, seed: int) -> None:
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    tuned.save_pretrained(folder)


def _peft_logits(folder, name, ids):
    model = Qwen2ForCausalLM.from_pretrained(folder / "base", attn_implementation="eager").eval()
    return peft.PeftModel.from_pretrained(model, folder / name).eval()(ids).logits


@pytest.mark.slow
@torch.no_grad()
def test_every_row_of_a_mixed_batch_has_the_logits_of_its_own_peft_model(base):
    model, folder = base
    decoder = load_decoder(folder / "base", torch.float32)
    alone = decoder(IDS)
    slots = AdapterSlots(decoder)
    table = Adapters(slots)
    for name in ADAPTERS:  # ranks grow while they are loaded: 8, then smaller ones behind it; slots grow too
        table.load(name, folder / name)
    names = ["wide", None, "patterns", "rs", "attention", "wide"]
    numbers = [0 if name is None else table.find(name).slot for name in names]

    slots.route([IDS.shape[1]] * len(names), numbers)
    assert slots.routing.mask_NS is None  # long runs: one product per run
    mixed = decoder(IDS)
    slots.route([4] * len(names), numbers)
    assert slots.routing.mask_NS is not None  # short runs: one masked product
    short = decoder(IDS[:, :4])
    for row, name in enumerate(names):
        ids = IDS[row : row + 1]
        expected = model(ids).logits if name is None else _peft_logits(folder, name, ids)
        # fp32 logits around 1, other kernels and another order of sums
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(short[row : row + 1], expected[:, :4], rtol=0, atol=1e-4)
    assert torch.equal(mixed[1], alone[1])  # the base's row, bit for bit

    # Unloading one leaves the others alone, and its slot is taken by the next.
    table.unload("wide")
    again = table.load("other", folder / "attention")
    assert again.slot == numbers[0] and again.generation == len(ADAPTERS) + 1
    slots.route([IDS.shape[1]] * 2, [again.slot, numbers[3]])
    got = decoder(IDS[[4, 3]])
    torch.testing.assert_close(got, mixed[[4, 3]], rtol=0, atol=1e-4)
    for name in table.names:
        table.unload(name)
    slots.route()
    assert not any(isinstance(module, SlotLinear) for module in decoder.modules())
    assert torch.equal(decoder(IDS), alone)


@torch.no_grad()
def test_linears_of_a_mixture_carry_adapters_and_its_routed_experts_are_refused(tmp_path):
    torch.manual_seed(1)
    sizes = {**SIZES, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, attn_implementation="eager")).eval()
    model.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "shared_expert.down_proj", "shared_expert.gate_proj", "shared_expert_gate"]
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    _random_adapter(Qwen2MoeForCausalLM.from_pretrained(tmp_path / "base"), settings, tmp_path / "tuned", 5)
    decoder = load_decoder(tmp_path / "base", torch.float32)
    slots = AdapterSlots(decoder)
    slots.load(1, tmp_path / "tuned")
    slots.route([24, 24], [0, 1])
    got = decoder(IDS[:2])
    base = Qwen2MoeForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    torch.testing.assert_close(got[:1], base(IDS[:1]).logits, rtol=0, atol=1e-4)
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "tuned").eval()
    torch.testing.assert_close(got[1:], tuned(IDS[1:2]).logits, rtol=0, atol=1e-4)

    tensors = load_file(tmp_path / "tuned" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.experts.1.up_proj.lora_{}.weight"
    expert = {key.format("A"): torch.zeros(4, 32), key.format("B"): torch.zeros(16, 4)}
    save_file({**tensors, **expert}, tmp_path / "tuned" / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match=r"experts\.1\.up_proj.*routed experts"):
        slots.load(2, tmp_path / "tuned")


def test_adapters_that_do_not_fit_are_refused_by_tensor_and_change_nothing(base, tmp_path):
    _, folder = base
    decoder = load_decoder(folder / "base", torch.float32)
    table = Adapters(AdapterSlots(decoder))
    bad = tmp_path / "bad"

    def with_tensors(change) -> None:
        shutil.copytree(folder / "attention", bad, dirs_exist_ok=True)
        tensors = load_file(folder / "attention" / "adapter_model.safetensors")
        save_file(change(tensors), bad / "adapter_model.safetensors")

    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    with_tensors(lambda tensors: {**tensors, name: torch.zeros(99, 3)})
    with pytest.raises(WeightsError, match=r"layers\.1\.self_attn\.v_proj\.lora_B\.weight is 99x3.*needs 32x3"):
        table.load("bad", bad)
    with_tensors(lambda tensors: {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(WeightsError, match=r"v_proj\.lora_B\.weight is missing"):
        table.load("bad", bad)
    head = {f"base_model.model.lm_head.lora_{part}.weight": torch.zeros(3, 3) for part in "AB"}
    with_tensors(lambda tensors: {**tensors, **head})
    with pytest.raises(WeightsError, match=r"lm_head.*output matrix"):
        table.load("bad", bad)
    assert table.names == [] and not any(isinstance(module, SlotLinear) for module in decoder.modules())

    adapter = table.load("good", folder / "attention")
    for call, words in (
        (lambda: table.find("goood"), "not a loaded adapter.*\n.*good"),
        (lambda: table.load("good", folder / "rs"), "loaded already"),
        (lambda: table.load("base", folder / "rs"), "cannot be an adapter's name"),
        (lambda: table.unload("base"), "cannot be unloaded"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()
    assert table.find(None) is None and table.find("base") is None
    adapter.users += 1
    with pytest.raises(ConfigError, match="in use by 1 request"):
        table.unload("good")
    adapter.users -= 1
    table.unload("good")


@torch.no_grad()
def test_adapters_of_qwen_v1_may_name_its_own_fused_linears(tmp_path):
    """c_attn's rows are q, k and v; its gate is w2. Against the same change made to the weights."""
    spec = DecoderSpec("qwen", 2, 64, 4, 4, 16, 48, 211, 256, dynamic_ntk=False, logn_attention=False, train_length=256)
    decoder, changed = Decoder(spec).init_weights(1).eval(), Decoder(spec).init_weights(1).eval()
    parts = {
        "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.c_proj": ("self_attn.o_proj",),
        "mlp.w1": ("mlp.up_proj",),
        "mlp.w2": ("mlp.gate_proj",),
    }
    generator, tensors = torch.Generator().manual_seed(2), {}
    for name, modules in parts.items():
        layers = [changed.get_submodule(f"model.layers.1.{module}") for module in modules]
        a = torch.randn(3, layers[0].in_features, generator=generator)
        b = torch.randn(sum(layer.out_features for layer in layers), 3, generator=generator) * 0.02
        for layer, delta in zip(layers, (2 * b @ a).split([layer.out_features for layer in layers])):
            layer.weight += delta
        key = f"base_model.model.transformer.h.1.{name}.lora_{{}}.weight"
        tensors |= {key.format("A"): a, key.format("B"): b}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "attn.c_proj", "w1", "w2"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    slots = AdapterSlots(decoder)
    alone = decoder(IDS[:1])
    slots.load(1, tmp_path)
    slots.route([24, 24], [0, 1])
    got = decoder(IDS[[0, 0]])
    torch.testing.assert_close(got[:1], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1:], changed(IDS[:1]), rtol=0, atol=1e-4)
    assert (got[1] - got[0]).abs().max() > 0.01


def test_what_is_wrong_in_lora_adapter_json_is_named(base, tmp_path):
    _, folder = base
    assert read_table(tmp_path) == {}
    (tmp_path / "beside").mkdir()
    file = tmp_path / "lora_adapter.json"
    file.write_text(json.dumps({"one": str(folder / "wide"), "two": "beside"}))
    assert read_table(tmp_path) == {"one": folder / "wide", "two": tmp_path / "beside"}
    for text, words in (
        ('{"one": "a", "one": "b"}', "'one' stands in it twice"),
        ('{"base": "beside"}', "'base' is the model"),
        ('["beside"]', "one JSON object"),
        ('{"one": }', "not valid JSON"),
        ('{"one": "nowhere"}', "'one' is not there.*nowhere"),
    ):
        file.write_text(text)
        with pytest.raises(WeightsError, match=words):
            read_table(tmp_path)


@torch.no_grad()
def test_engine_requests_with_adapters_get_pefts_tokens_and_share_no_blocks_with_others(base):
    model, folder = base
    (folder / "base" / "lora_adapter.json").write_text(json.dumps({name: f"../{name}" for name in ADAPTERS}))
    cfg = Config()
    cfg.device.kind, cfg.device.threads, cfg.generate.dtype = "cpu", 1, "fp32"
    cfg.engine.block_size, cfg.engine.num_blocks, cfg.engine.max_tokens_per_step = 8, 100, 40
    engine, _ = open_engine(folder / "base", builtin_tokenizer(), (), cfg)
    assert list(engine.adapters) == list(ADAPTERS)
    prompt, new = IDS[:2].flatten().tolist(), 8

    def expected(name: str | None) -> list[int]:
        asked = model
        if name is not None:
            asked = Qwen2ForCausalLM.from_pretrained(folder / "base", attn_implementation="eager").eval()
            asked = peft.PeftModel.from_pretrained(asked, folder / name).eval()
        ids = list(prompt)
        for _ in range(new):
            ids.append(int(asked(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    def request(name: str | None) -> EngineRequest:
        return EngineRequest(tuple(prompt), max_new_tokens=new, adapter=name)

    names = [None, *ADAPTERS, "base"]
    tokens = {name: expected(name) for name in (None, *ADAPTERS)}
    assert len({tuple(ids) for ids in tokens.values()}) == len(tokens)
    first = run_all(engine, [request(name) for name in names])
    assert [answer.ids for answer in first] == [tokens[None if name == "base" else name] for name in names]
    again = run_all(engine, [request(name) for name in names])  # now from blocks of their own
    assert [answer.ids for answer in again] == [answer.ids for answer in first]
    assert all(answer.cached_tokens == 40 for answer in again)

    number = engine.submit(request("rs"))
    engine.step()
    with pytest.raises(ConfigError, match="'rs' is in use by 1 request"):
        engine.unload_adapter("rs")
    engine.cancel(number)
    engine.unload_adapter("rs")
    with pytest.raises(ConfigError, match="'rs' is not a loaded adapter"):
        engine.submit(request("rs"))
    engine.load_adapter("rs", folder / "patterns")  # another adapter under its name: nothing computed before is used
    answer = run_all(engine, [request("rs")])[0]
    assert answer.ids == tokens["patterns"] and answer.cached_tokens == 0


def test_base_requests_have_the_same_bits_beside_adapters_as_alone(base):
    """In bf16, where a change of the last bit would be seen in the log-probabilities."""
    _, folder = base
    cfg = Config()
    cfg.device.kind, cfg.device.threads, cfg.generate.dtype = "cpu", 1, "bf16"
    cfg.engine.num_blocks = 60
    engine, _ = open_engine(folder / "base", builtin_tokenizer(), (), cfg, {"wide": folder / "wide"})

    def requests(name: str | None, greedy: bool) -> list[EngineRequest]:
        sampling = Sampling() if greedy else Sampling(temperature=0.8, seed=4)
        logprobs = None if greedy else 0
        return [EngineRequest(tuple(ids), sampling, 6, adapter=name, logprobs=logprobs) for ids in IDS[:3].tolist()]

    for greedy in (True, False):
        alone = run_all(engine, requests(None, greedy))
        adapted = run_all(engine, requests("wide", greedy))
        mixed = [request for pair in zip(requests(None, greedy), requests("wide", greedy)) for request in pair]
        beside = run_all(engine, mixed)
        for place, answer in enumerate(alone):
            assert (beside[2 * place].ids, beside[2 * place].logprobs) == (answer.ids, answer.logprobs)
        assert [answer.ids for answer in beside[1::2]] == [answer.ids for answer in adapted]
        assert alone[0].ids != adapted[0].ids
    # Prompts are scored over torch's products, whose last bits depend on the number of rows: 1/256 of logits up to 2.
    both = [[replace(r, prompt_logprobs=0) for r in requests(name, True)] for name in (None, "wide")]
    alone = [run_all(engine, some) for some in both]
    beside = run_all(engine, [request for pair in zip(*both) for request in pair])
    for place, answer in enumerate(beside):
        expected = alone[place % 2][place // 2]
        values, others = ([one.logprob for one in it.prompt_logprobs] for it in (answer, expected))
        assert answer.ids == expected.ids and len(values) == len(IDS[0]) - 1
        assert values == pytest.approx(others, abs=0.03)
    pairs = zip(alone[0][0].prompt_logprobs, alone[1][0].prompt_logprobs)
    assert max(abs(plain.logprob - adapted.logprob) for plain, adapted in pairs) > 0.06


@torch.no_grad()
def test_a_published_adapter_has_pefts_logits_in_a_mixed_batch(shared_data, tmp_path):
    """The adapter's real weights on the real model's sizes, with two of its 24 layers and random base weights."""
    source = shared_data / "lora" / "qwen2.5-0.5b-instruct_r8"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=896,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    shutil.copyfile(source / "adapter_config.json", tuned / "adapter_config.json")
    tensors = load_file(source / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if any(f"layers.{n}." in key for n in (0, 1))}
    save_file(kept, tuned / "adapter_model.safetensors")
    decoder = load_decoder(tmp_path / "base", torch.float32)
    slots = AdapterSlots(decoder)
    slots.load(1, tuned)
    slots.route([24, 24], [0, 1])
    got = decoder(IDS[:2])
    base = Qwen2ForCausalLM.from_pretrained(tmp_path / "base").eval()
    torch.testing.assert_close(got[:1], base(IDS[:1]).logits, rtol=0, atol=1e-4)
    expected = peft.PeftModel.from_pretrained(base, tuned).eval()(IDS[1:2]).logits
    torch.testing.assert_close(got[1:], expected, rtol=0, atol=1e-4)
    assert (got[1:] - decoder(IDS[:2])[:1]).abs().max() > 1e-3
