"""The proof of a conversion: MindFormers' own arithmetic on a converted file gives transformers' logits, and ``verify``
catches every swap that loads without an error."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from research.core.errors import WeightsError
from research.core.torch.probe import fixed_prompt, logits, probe_concat
from research.core.torch.weights import load_decoder
from research.core.weights.compare import compare
from research.core.weights.convert import ConvertOptions, convert
from research.core.weights.opened import HUGGINGFACE, OpenOptions, open_weights
from research.tasks.cli import main
from tests.core.weights.cases import FAMILIES, Case, mindformers_weights
from tests.reference import mindformers_plain, qwen1_plain

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 8]


def reference_logits(case: Case, folder) -> torch.Tensor:
    """transformers on the Hugging Face folder; for Qwen v1 the plain reference on its own names."""
    if case.family == "qwen":
        config = case.config() | {"use_dynamic_ntk": False, "use_logn_attn": False}
        return qwen1_plain.logits(load_file(folder / "model.safetensors"), config, IDS, len(IDS))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].double()


@pytest.mark.parametrize("concat", ["none", "stacked", "grouped"])
@pytest.mark.parametrize("name", [*FAMILIES, "tied", "moe_gmm"])
def test_mindformers_arithmetic_on_a_converted_file_gives_the_source_logits(name, concat, tmp_path):
    family = {"tied": "qwen2", "moe_gmm": "qwen2_moe"}.get(name, name)
    case = Case(family, tied=name == "tied", vocab=23, expert_ffn=8)  # torch's grouped matmul wants rows of 16 bytes
    source = case.write(tmp_path / "hf")
    convert(source, tmp_path / "x.safetensors", ConvertOptions(concat=concat, gmm=name == "moe_gmm"))
    found = mindformers_plain.logits(load_file(tmp_path / "x.safetensors"), case.config(), IDS, concat)
    expected = reference_logits(case, source)
    # float64 against float32 with logits of size ~50: the rest is transformers' rounding
    assert float((found - expected).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_the_decoders(family, tmp_path):
    case = Case(family, vocab=23)
    source = case.write(tmp_path / "hf")
    convert(source, tmp_path / "x.ckpt", ConvertOptions(concat="grouped"))
    ids = fixed_prompt(case.vocab, 12)
    with torch.no_grad():
        expected = load_decoder(source, "float32")(torch.from_numpy(ids)).numpy()
    assert np.array_equal(logits(open_weights(source), ids), expected)
    assert np.array_equal(logits(open_weights(tmp_path / "x.ckpt"), ids), expected)


def verify(a, b, *words: str) -> int:
    return main(["task=verify", f"verify.a={a}", f"verify.b={b}", "verify.logits=true", *words])


@pytest.fixture
def pair(tmp_path):
    """A model and its MindFormers file whose k and v, gate and up have equal shapes."""
    case = Case("qwen2", vocab=23)
    return case, case.write(tmp_path / "hf"), tmp_path


def test_equal_weights_verify(pair, capsys):
    case, source, root = pair
    convert(source, root / "x.ckpt", ConvertOptions(concat="stacked"))
    assert verify(source, root / "x.ckpt") == 0
    said = capsys.readouterr().out
    assert f"tensors: {len(case.weights())} same, 0 equal after rounding, 0 different" in said
    assert "largest difference 0 " in said and said.endswith("equal\n")


def test_rounded_weights_verify_within_their_dtype(pair, capsys):
    case, source, root = pair
    convert(source, root / "x.ckpt", ConvertOptions(dtype="BF16"))
    assert verify(source, root / "x.ckpt") == 0
    assert f"0 same, {len(case.weights())} equal after rounding, 0 different" in capsys.readouterr().out
    assert verify(source, root / "x.ckpt", "verify.tolerance=1e-6") == 1


@pytest.mark.parametrize(
    ("first", "second"), [("feed_forward.w1", "feed_forward.w3"), ("attention.wk", "attention.wv")]
)
def test_a_swap_is_caught(pair, capsys, first, second):
    case, source, root = pair
    tensors = mindformers_weights(case, case.weights())
    for kind in ("weight", "bias"):
        names = [f"model.layers.1.{part}.{kind}" for part in (first, second)]
        if names[0] in tensors:
            tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    save_file(tensors, root / "x.safetensors")
    assert verify(source, root / "x.safetensors") == 1
    said = capsys.readouterr().out
    assert said.endswith("DIFFERENT\n")
    line = next(line for line in said.splitlines() if line.startswith("logits"))
    assert float(line.split("largest difference ")[1].split()[0]) > 0.01  # by the logits alone, too


@pytest.mark.parametrize(("written", "read"), [("stacked", "grouped"), ("grouped", "stacked")])
def test_a_wrong_joined_layout_is_caught(pair, capsys, written, read):
    case, source, root = pair
    save_file(mindformers_weights(case, case.weights(), written), root / "x.safetensors")
    assert verify(source, root / "x.safetensors", f"verify.b_concat={written}") == 0
    assert verify(source, root / "x.safetensors", f"verify.b_concat={read}") == 1
    assert float(capsys.readouterr().out.rsplit("largest difference ", 1)[1].split()[0]) > 0.01


def test_qwen1_gate_in_the_llama_place_is_caught(tmp_path):
    """w1 and w3 have equal shapes: the other family's table loads without an error."""
    case = Case("qwen", vocab=23)
    source = case.write(tmp_path / "hf")
    tensors = mindformers_weights(case, case.weights())
    for n in range(case.layers):
        names = [f"transformer.layers.{n}.feed_forward.{key}.weight" for key in ("w1", "w3")]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    save_file(tensors, tmp_path / "x.safetensors")
    assert verify(source, tmp_path / "x.safetensors") == 1


def test_other_models_and_missing_backends_are_errors(pair, tmp_path, capsys):
    _, source, root = pair
    other = Case("qwen2", layers=1, vocab=23).write(tmp_path / "other")
    assert verify(source, other) == 2
    assert "layers: expected 2, found 1" in capsys.readouterr().err
    assert main(["task=verify", f"verify.a={source}"]) == 2
    assert main(["task=verify", f"verify.a={source}", f"verify.b={root / 'nowhere'}"]) == 2


def test_one_bit_is_a_difference(pair):
    case, source, root = pair
    weights = case.weights()
    weights["model.layers.1.mlp.up_proj.weight"].view(torch.int32)[-1, -1] ^= 1
    other = root / "other"
    other.mkdir()
    save_file(weights, other / "model.safetensors")
    (other / "config.json").write_text(json.dumps(case.config()))
    rows = [row for row in compare(open_weights(source), open_weights(other)).rows if row.verdict != "same"]
    assert [(row.name, row.count) for row in rows] == [("model.layers.1.mlp.up_proj.weight", 1)]


# --- the probe ------------------------------------------------------------------------------------------------------------


def told_story(folder, length: int) -> np.ndarray:
    """Text in the model's own vocabulary: what it says itself when sampled."""
    decoder = load_decoder(folder, "float32")
    random, ids = torch.Generator().manual_seed(0), [1]
    with torch.no_grad():
        while len(ids) < length:
            scores = decoder(torch.tensor([ids]))[0, -1].softmax(-1)
            ids.append(int(torch.multinomial(scores, 1, generator=random)))
    return np.array(ids)


@pytest.mark.parametrize("name", ["stories260K", "aidreams260K"])
def test_the_probe_tells_the_joined_layouts_of_trained_weights_apart(shared_data, tmp_path, name):
    source = shared_data / "weights" / name / "hf_qwen2"
    story = told_story(source, 48)
    for concat in ("stacked", "grouped"):
        convert(source, tmp_path / f"{concat}.ckpt", ConvertOptions(concat=concat))
        (tmp_path / "conversion.json").unlink()
        found, words = probe_concat(tmp_path / f"{concat}.ckpt", OpenOptions(config=str(source)), story)
        assert found == concat, words


def test_the_probe_refuses_to_guess_about_random_weights(pair):
    _, source, root = pair
    convert(source, root / "x.ckpt", ConvertOptions(concat="grouped"))
    (root / "conversion.json").unlink()
    with pytest.raises(WeightsError, match="cannot tell"):
        probe_concat(root / "x.ckpt", OpenOptions(config=str(source)))


def test_the_probe_reads_text_with_the_vocabulary_beside_the_config(tmp_path):
    """A model that has learned its probe text by heart, with the built-in vocabulary, converted without being told."""
    from research.core.spec import spec_from_hf
    from research.core.text.builtin import builtin_tokenizer
    from research.core.torch.decoder import Decoder
    from research.core.torch.probe import PROBE_TEXT
    from research.core.torch.weights import save_decoder

    tokenizer = builtin_tokenizer()
    case = Case("qwen2", layers=1, kv=2, repeat=2, size=8, ffn=32, vocab=tokenizer.vocab_size, tied=True)
    torch.manual_seed(0)
    decoder = Decoder(spec_from_hf(case.config())).init_weights(1)
    ids = torch.tensor([tokenizer.encode(PROBE_TEXT)])
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-2)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(decoder(ids[:, :-1])[0].float(), ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < math.log(case.vocab) - 1.5
    save_decoder(decoder.eval(), tmp_path / "hf")
    tokenizer.save(tmp_path / "hf")
    for concat in ("stacked", "grouped"):
        convert(tmp_path / "hf", tmp_path / f"{concat}.ckpt", ConvertOptions(concat=concat))
        (tmp_path / "conversion.json").unlink()
        words = [f"weights={tmp_path / concat}.ckpt", f"output={tmp_path / concat}", "convert.qkv_concat=probe"]
        assert main(["task=convert", "convert.to=huggingface", f"convert.config={tmp_path / 'hf'}", *words]) == 0
        assert compare(open_weights(tmp_path / "hf"), open_weights(tmp_path / concat)).counts()["different"] == 0


def test_models_where_both_layouts_are_the_same_need_no_probe(tmp_path):
    case = Case("qwen2_moe", kv=1, repeat=2)
    source = case.write(tmp_path / "hf")
    convert(source, tmp_path / "x.ckpt", ConvertOptions(concat="grouped"))
    (tmp_path / "conversion.json").unlink()
    assert "the same" in probe_concat(tmp_path / "x.ckpt", OpenOptions(config=str(source)))[1]
    convert(
        tmp_path / "x.ckpt",
        tmp_path / "back",
        ConvertOptions(to=HUGGINGFACE),
        OpenOptions(concat="stacked", config=str(source)),
    )
    assert compare(open_weights(source), open_weights(tmp_path / "back")).counts()["different"] == 0
