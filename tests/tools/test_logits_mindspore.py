"""tools/logits.py --backend mindspore against transformers and the plain Qwen v1."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mindspore", reason="requirements/mindspore.txt is not installed")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.core.torch.peers import random_ids
from tests.core.torch.test_decoder_qwen1 import CONFIG as QWEN1
from tests.core.torch.test_decoder_qwen1 import TRAINED, make_weights
from tests.reference import qwen1_plain
from tests.tools.test_logits import logits, save_models, tool  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow
NAME = ("--backend", "mindspore")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One layer where one shows it: every call of the program compiles its graphs."""
    return save_models(tmp_path_factory.mktemp("models"), {"gqa": 1, "tied": 1, "window": 2, "moe": 1})


@pytest.mark.parametrize(
    ("variant", "calls"), [("tied", [()]), ("window", [("--prefill", 7)]), ("moe", [(), ("--prefill", 7)])]
)
def test_logits_equal_transformers_whole_and_stepwise(tool, tmp_path, models, variant, calls):  # noqa: F811
    ids = random_ids(2, 18)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(models / variant)(ids).logits.numpy()
    for options in calls:
        found = logits(tool, tmp_path, models / variant, *NAME, *options, input_ids=ids.numpy())
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prefill", [None, 5])
def test_padded_rows_equal_the_rows_alone(tool, tmp_path, models, prefill, monkeypatch):  # noqa: F811
    """Left, right, a row that begins after the prompt; and rows in two forwards, the second filled up."""
    monkeypatch.setattr(tool, "TOKENS_AT_ONCE", 28)
    monkeypatch.setattr(tool, "LOGITS_AT_ONCE", 5 * 101)
    theirs, ids = AutoModelForCausalLM.from_pretrained(models / "gqa"), random_ids(3, 14)
    mask = np.ones((3, 14), dtype=np.int64)
    mask[0, :8] = mask[1, 10:] = 0
    options = [] if prefill is None else ["--prefill", prefill]
    out = logits(tool, tmp_path, models / "gqa", *NAME, *options, input_ids=ids.numpy(), attention_mask=mask)
    assert np.isfinite(out).all()
    for row, real in enumerate(mask.astype(bool)):
        with torch.no_grad():
            alone = theirs(ids[row : row + 1, torch.from_numpy(real)]).logits[0].numpy()
        np.testing.assert_allclose(out[row, real], alone, atol=1e-4, rtol=0)


def test_first_generation_takes_its_base_from_the_prompt(tool, tmp_path, models):  # noqa: F811
    ids = random_ids(1, 2 * TRAINED + 6, vocab=71)
    for options, prompt in (((), 2 * TRAINED + 6), (("--prefill", TRAINED + 3), TRAINED + 3)):
        out = logits(tool, tmp_path, models / "qwen1", *NAME, *options, input_ids=ids.numpy())
        expected = qwen1_plain.logits(make_weights(), QWEN1, ids[0].tolist(), prompt).numpy()
        np.testing.assert_allclose(out[0], expected, atol=1e-4, rtol=0)


def test_adapter_gives_the_logits_of_peft(tool, tmp_path, models):  # noqa: F811
    theirs, ids = AutoModelForCausalLM.from_pretrained(models / "gqa"), random_ids(1, 11)
    adapted = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        plain = theirs(ids).logits.numpy()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
        expected = adapted(ids).logits.numpy()
    adapted.save_pretrained(tmp_path / "adapter")
    options = (*NAME, "--adapter", tmp_path / "adapter")
    found = logits(tool, tmp_path, models / "gqa", *options, input_ids=ids.numpy())
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_bfloat16_on_the_cpu_is_refused_by_name(tool, tmp_path, models, capsys):  # noqa: F811
    np.savez(tmp_path / "ids.npz", input_ids=random_ids(1, 6).numpy())
    words = ["--weights", models / "gqa", "--ids", tmp_path / "ids.npz", "--out", tmp_path / "x.npz", *NAME]
    assert tool.run_cli(tool.main, [str(word) for word in (*words, "--dtype", "bfloat16")]) == 2
    assert "float32 on the CPU" in capsys.readouterr().err and not (tmp_path / "x.npz").exists()
