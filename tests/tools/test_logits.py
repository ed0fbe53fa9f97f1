"""tools/logits.py as another program calls it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import load_script
from tests.core.torch.peers import make_pair, random_ids
from tests.core.torch.test_decoder_qwen1 import CONFIG as QWEN1
from tests.core.torch.test_decoder_qwen1 import TRAINED, make_weights
from tests.reference import qwen1_plain


def save_models(root, layers: dict[str, int]):
    """``root`` with a folder of each variant that ``layers`` names, and of the first generation."""
    for variant, count in layers.items():
        make_pair(variant, num_hidden_layers=count)[0].save_pretrained(root / variant)
    (root / "qwen1").mkdir()
    (root / "qwen1" / "config.json").write_text(json.dumps(QWEN1))
    save_file(make_weights(), root / "qwen1" / "model.safetensors")
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"), dict.fromkeys(("gqa", "tied", "window", "yarn", "moe"), 3))


@pytest.fixture(scope="module")
def tool(repo):
    return load_script(repo / "tools" / "logits.py")


def logits(tool, tmp_path, weights, *args, **arrays) -> np.ndarray:
    np.savez(tmp_path / "ids.npz", **arrays)
    command = ["--weights", weights, "--ids", tmp_path / "ids.npz", "--out", tmp_path / "out.npz", *args]
    tool.main([str(arg) for arg in command])
    out = np.load(tmp_path / "out.npz")
    assert sorted(out.files) == ["input_ids", "logits"]
    assert np.array_equal(out["input_ids"], arrays["input_ids"]) and out["input_ids"].dtype == np.int64
    assert out["logits"].dtype == np.float32
    return out["logits"]


@pytest.mark.parametrize("variant", ["tied", "window", "yarn", "moe"])
def test_logits_of_every_position_equal_transformers_whole_and_stepwise(tool, tmp_path, models, variant):
    ids = random_ids(2, 18)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(models / variant)(ids).logits.numpy()
    whole = logits(tool, tmp_path, models / variant, input_ids=ids.numpy())
    np.testing.assert_allclose(whole, expected, atol=1e-4, rtol=0)
    stepped = logits(tool, tmp_path, models / variant, "--prefill", 7, input_ids=ids.numpy())
    np.testing.assert_allclose(stepped, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prefill", [None, 3, 9])
def test_padded_rows_equal_the_rows_alone(tool, tmp_path, models, prefill):
    theirs, ids = make_pair("gqa")[0], random_ids(3, 14)
    mask = np.ones((3, 14), dtype=np.int64)
    mask[0, :8] = 0
    mask[1, 10:] = 0
    options = [] if prefill is None else ["--prefill", prefill]
    out = logits(tool, tmp_path, models / "gqa", *options, input_ids=ids.numpy(), attention_mask=mask)
    assert np.isfinite(out).all()
    for row, real in enumerate(mask.astype(bool)):
        with torch.no_grad():
            alone = theirs(ids[row : row + 1, torch.from_numpy(real)]).logits[0].numpy()
        np.testing.assert_allclose(out[row, real], alone, atol=1e-4, rtol=0)


def test_first_generation_takes_its_base_from_the_prompt(tool, tmp_path, models):
    ids = random_ids(1, 2 * TRAINED + 6, vocab=71)
    for options, prompt in (([], 2 * TRAINED + 6), (["--prefill", TRAINED + 3], TRAINED + 3)):
        out = logits(tool, tmp_path, models / "qwen1", *options, input_ids=ids.numpy())
        expected = qwen1_plain.logits(make_weights(), QWEN1, ids[0].tolist(), prompt).numpy()
        np.testing.assert_allclose(out[0], expected, atol=1e-4, rtol=0)


def test_bfloat16_and_adapter(tool, tmp_path, models):
    theirs = AutoModelForCausalLM.from_pretrained(models / "gqa")
    ids = random_ids(1, 11)
    with torch.no_grad():
        plain = theirs(ids).logits.numpy()
    rounded = logits(tool, tmp_path, models / "gqa", "--dtype", "bfloat16", input_ids=ids.numpy())
    error = np.linalg.norm(rounded - plain) / np.linalg.norm(plain)
    assert 0 < error < 0.05  # ~10 roundings to 8 bits per layer, three layers

    peft = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
        adapted = peft(ids).logits.numpy()
    peft.save_pretrained(tmp_path / "adapter")
    out = logits(tool, tmp_path, models / "gqa", "--adapter", tmp_path / "adapter", input_ids=ids.numpy())
    assert np.abs(adapted - plain).max() > 0.1
    np.testing.assert_allclose(out, adapted, atol=1e-4, rtol=0)


def test_unusable_input_ends_with_2_and_leaves_no_file(tool, tmp_path, models, capsys):
    good = random_ids(2, 6).numpy()
    broken = models.parent / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "config.json").write_text((models / "gqa" / "config.json").read_text())
    tensors = load_file(models / "gqa" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    (tmp_path / "text.npz").write_text("not an archive")
    hole = np.array([[1, 1, 0, 1, 1, 1], [1] * 6])
    cases = [
        ({"input_ids": good + 100}, [], "vocabulary has 101 ids"),
        ({"input_ids": good - 200}, [], "is -"),
        ({"input_ids": good.astype(np.float32)}, [], "must be integers"),
        ({"input_ids": good[0]}, [], "must be integers"),
        ({"input_ids": good[:, :0]}, [], "must be integers"),
        ({"ids": good}, [], "no array input_ids"),
        ({"input_ids": good, "attention_mask": np.ones((2, 5), int)}, [], "attention_mask must be integers"),
        ({"input_ids": good, "attention_mask": np.full((2, 6), 2)}, [], "only 0 and 1"),
        ({"input_ids": good, "attention_mask": np.zeros((2, 6), int)}, [], "row 0 has no real token"),
        ({"input_ids": good, "attention_mask": hole}, [], "row 0 has a hole"),
        ({"input_ids": good}, ["--prefill", "7"], "outside 1..6"),
        ({"input_ids": good}, ["--weights", str(tmp_path / "none")], "weight folder not found"),
        ({"input_ids": good}, ["--weights", str(broken)], "not finite from position 0"),
        ({"input_ids": good}, ["--ids", str(tmp_path / "none.npz")], "file of token ids not found"),
        ({"input_ids": good}, ["--ids", str(tmp_path / "text.npz")], "not an .npz"),
        ({"input_ids": good}, ["--adapter", str(tmp_path)], "adapter"),
    ]
    runs = []
    for number, (arrays, options, _) in enumerate(cases):
        np.savez(tmp_path / f"{number}.npz", **arrays)
        base = ["--weights", str(models / "gqa"), "--ids", str(tmp_path / f"{number}.npz")]
        runs.append([*base, "--out", str(tmp_path / "out" / "out.npz"), *options])
    for args, (_, _, says) in zip(runs, cases):
        assert tool.run_cli(tool.main, args) == 2
        message = capsys.readouterr().err
        assert says in message and "Traceback" not in message
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_command_line_from_another_folder(repo, tmp_path, models):
    np.savez(tmp_path / "ids.npz", input_ids=random_ids(1, 6).numpy())
    command = [sys.executable, str(repo / "tools" / "logits.py"), "--weights", str(models / "gqa")]
    command += ["--out", str(tmp_path / "out.npz"), "--ids"]
    done = subprocess.run([*command, str(tmp_path / "ids.npz")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "out.npz")["logits"].shape == (1, 6, 101)
    failed = subprocess.run([*command, str(tmp_path / "none.npz")], capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
