"""Weights of every family and layout in MindSpore against transformers on their source; saving; what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from mindspore import Tensor
from safetensors.torch import load_file, save_file

from research.core.errors import ConfigError, WeightsError
from research.core.mindspore.decoder import Decoder
from research.core.mindspore.layout import rope_base
from research.core.mindspore.weights import fill_decoder, init_weights, load_decoder, save_decoder, set_value
from research.core.spec import spec_from_hf
from research.core.torch.decoder import Decoder as TorchDecoder
from research.core.torch.weights import load_decoder as load_in_torch
from research.core.weights.convert import ConvertOptions, convert
from research.core.weights.opened import OpenOptions, open_weights
from research.tasks.cli import main
from tests.core.weights.cases import Case, folder_tensors, mindformers_weights, same
from tests.core.weights.test_verify import IDS, reference_logits

# (qkv_concat, file, experts' axes exchanged)
CONVERSIONS = [("none", "a.ckpt", False), ("stacked", "b.safetensors", False), ("grouped", "c.ckpt", True)]


def logits(decoder: Decoder) -> np.ndarray:
    base = rope_base(decoder.spec, np.full((1, 1), len(IDS)))
    ids = Tensor(np.array([IDS], np.int32))
    return decoder(ids, None, None, None if base is None else Tensor(base)).asnumpy()[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [Case("qwen", vocab=23), Case("qwen2", vocab=23), Case("qwen2", vocab=23, tied=True)]
    + [Case("qwen2_moe", vocab=23, expert_ffn=8, dense_layers=(0,))],
    ids=["qwen", "qwen2", "tied", "moe"],
)
def test_converted_checkpoints_give_transformers_logits_on_the_source(case, tmp_path):
    source = case.write(tmp_path / "hf", shards=2)
    if case.family == "qwen":  # the reference reads one file
        save_file(folder_tensors(source), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(case.config()))
        expected = reference_logits(case, tmp_path).numpy()
    else:
        expected = reference_logits(case, source).numpy()
    limit = 1e-4 * max(1.0, np.abs(expected).max())  # logits of size ~50 in float32
    decoder = load_decoder(source)
    np.testing.assert_allclose(logits(decoder), expected, atol=limit, rtol=0)
    for concat, name, gmm in CONVERSIONS:
        options = ConvertOptions(concat=concat, gmm=gmm and case.family == "qwen2_moe")
        convert(source, tmp_path / concat / name, options)
        for parameter in decoder.get_parameters():
            set_value(parameter, np.zeros(parameter.shape, np.float32))
        assert np.abs(logits(decoder)).max() == 0
        fill_decoder(decoder, open_weights(tmp_path / concat / name, OpenOptions(config=str(source))))
        np.testing.assert_allclose(logits(decoder), expected, atol=limit, rtol=0)


@pytest.mark.parametrize("family", ["qwen", "qwen2", "qwen2_moe"])
def test_16_bit_folders_load_as_float32_and_save_bit_equal(family, tmp_path):
    case = Case(family, vocab=23, tied=family == "qwen2")
    for dtype, kind in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (torch.float32, None)):
        source = case.write(tmp_path / f"hf_{kind}", dtype)
        decoder, theirs = load_decoder(source), dict(load_in_torch(source, torch.float32).named_parameters())
        for parameter in decoder.get_parameters():
            assert np.array_equal(parameter.asnumpy(), theirs[parameter.name].detach().numpy()), parameter.name
        save_decoder(decoder, tmp_path / f"out_{kind}", kind, eos=7, shard_bytes=4000)
        assert same(folder_tensors(source), folder_tensors(tmp_path / f"out_{kind}"))
        config = json.loads((tmp_path / f"out_{kind}" / "config.json").read_text())
        assert config["torch_dtype"] == (kind or "float32") and config["eos_token_id"] == 7
        assert spec_from_hf(config) == decoder.spec


def test_a_seed_makes_the_torch_decoders_initial_weights():
    spec = spec_from_hf(Case("qwen2_moe", size=6, ffn=9, vocab=29, dense_layers=(1,)).config())
    theirs = dict(TorchDecoder(spec).init_weights(7).named_parameters())
    for parameter in init_weights(Decoder(spec), 7).get_parameters():
        # the last bits of a vectorised logarithm and cosine
        expected = theirs[parameter.name].detach().numpy()
        np.testing.assert_allclose(parameter.asnumpy(), expected, atol=1e-8, rtol=1e-6, err_msg=parameter.name)


def test_folders_that_torch_refuses_are_refused_with_the_same_words(tmp_path):
    case = Case("qwen2", vocab=23)
    weights = case.weights()
    bad = {
        "a tensor missing": {k: v for k, v in weights.items() if not k.endswith("layers.1.mlp.up_proj.weight")},
        "one too many": weights | {"model.layers.2.mlp.up_proj.weight": torch.zeros(1)},
        "a wrong shape": weights | {"model.norm.weight": torch.zeros(3)},
        "no head": {k: v for k, v in weights.items() if k != "lm_head.weight"},
    }
    for name, tensors in bad.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(case.config()))
        save_file(tensors, folder / "model.safetensors")
    (tmp_path / "nothing").mkdir()
    truncated = case.write(tmp_path / "truncated") / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-8])
    for folder in (*bad, "nothing", "truncated", "nowhere"):
        said = []
        for load in (load_in_torch, load_decoder):
            with pytest.raises(WeightsError) as error:
                load(tmp_path / folder)
            said.append(error.value.what)
        assert said[0].split(",")[0] == said[1].split(",")[0] or folder == "nowhere", said
    assert load_decoder(tmp_path / "no head", head=False).lm_head is None


def test_another_model_an_untied_twin_and_bf16_on_the_cpu_are_refused(tmp_path):
    case = Case("qwen2", vocab=23, tied=True)
    source = case.write(tmp_path / "hf")
    with pytest.raises(WeightsError, match="not the chosen MODEL"):
        load_decoder(source, expect=spec_from_hf(Case("qwen2", vocab=23, layers=3, tied=True).config()))
    with pytest.raises(ConfigError, match="float32 on the CPU, not in bfloat16"):
        load_decoder(source, "bfloat16")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, source / "model.safetensors")
    with pytest.raises(WeightsError, match="ties the output matrix to the embedding"):
        load_decoder(source)


def test_a_full_disk_leaves_no_folder(tmp_path, monkeypatch):
    from research.core.weights import write

    decoder = load_decoder(Case("qwen2", vocab=23).write(tmp_path / "hf"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "_write_shard", full)
    with pytest.raises(OSError):
        save_decoder(decoder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# --- verify BACKEND=mindspore -----------------------------------------------------------------------------------------


def verify(a, b, *words: str) -> int:
    return main(["task=verify", "backend=mindspore", f"verify.a={a}", f"verify.b={b}", "verify.logits=true", *words])


def difference(said: str) -> float:
    return float(said.rsplit("largest difference ", 1)[1].split()[0])


@pytest.mark.slow
def test_verify_in_mindspore_finds_a_conversion_equal_and_catches_swaps(tmp_path, capsys):
    case = Case("qwen2", vocab=23)
    source = case.write(tmp_path / "hf")
    good = mindformers_weights(case, case.weights())
    save_file(good, tmp_path / "good.safetensors")
    assert verify(source, tmp_path / "good.safetensors") == 0
    said = capsys.readouterr().out
    assert "(A torch, B mindspore)" in said and said.endswith("equal\n") and difference(said) < 1e-3
    for first, second in (("feed_forward.w1", "feed_forward.w3"), ("attention.wk", "attention.wv")):
        tensors = dict(good)
        for kind in ("weight", "bias"):
            names = [f"model.layers.1.{part}.{kind}" for part in (first, second)]
            if names[0] in tensors:
                tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
        save_file(tensors, tmp_path / "bad.safetensors")
        assert verify(source, tmp_path / "bad.safetensors") == 1
        said = capsys.readouterr().out
        assert said.endswith("DIFFERENT\n") and difference(said) > 0.01  # by the logits alone, too


@pytest.mark.slow
def test_verify_in_mindspore_knows_qwen1_past_no_training_length(tmp_path, capsys):
    case = Case("qwen", vocab=23)
    source = case.write(tmp_path / "hf")
    convert(source, tmp_path / "x.ckpt", ConvertOptions(concat="grouped"))
    # 48 tokens of a model trained on 32: dynamic NTK and log-n act
    assert verify(source, tmp_path / "x.ckpt", "verify.tokens=48") == 0
    said = capsys.readouterr().out
    assert said.endswith("equal\n") and difference(said) < 1e-2
