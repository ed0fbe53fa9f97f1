"""tools/generate.py as another program calls it: a folder in, a JSON file out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from research.core.errors import run_cli
from tests.conftest import load_script

PROMPTS = [[5, 9, 2, 77, 31], [4], [7, 11, 3, 8, 9, 10, 42, 6, 1, 0, 98], [3, 2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    path = tmp_path_factory.mktemp("weights")
    model.save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    return path


@pytest.fixture(scope="module")
def program(repo):
    return load_script(repo / "tools" / "generate.py")


def _call(program, tmp_path: Path, weights: Path, prompts, *extra: str, new: int = 40) -> tuple[int, Path]:
    source, out = tmp_path / "prompts.json", tmp_path / "out.json"
    source.write_text(prompts if isinstance(prompts, str) else json.dumps({"prompts": prompts}))
    words = ["--weights", weights, "--input", source, "--max-new-tokens", new, "--output", out, *extra]
    return run_cli(program.main, [str(word) for word in words]), out


def _transformers(model, eos, new: int = 40) -> list[list[int]]:
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        rows.append(
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=eos,
                pad_token_id=0,
            )[0].tolist()
        )
    return rows


@pytest.mark.slow
def test_a_subprocess_writes_prompt_and_greedy_tokens_in_order(repo, folder, tmp_path):
    from transformers import AutoModelForCausalLM

    (tmp_path / "prompts.json").write_text(json.dumps({"prompts": PROMPTS}))
    command = [sys.executable, str(repo / "tools" / "generate.py"), "--weights", str(folder), "--input", "prompts.json"]
    command += ["--max-new-tokens", "40", "--output", "out.json", "--batch", "3"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert json.loads((tmp_path / "out.json").read_text()) == {"ids": _transformers(model, None)}


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_rows_end_at_any_of_the_folders_end_tokens_and_keep_it(program, folder, tmp_path, place):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    free = _transformers(model, None)
    eos = [free[0][len(PROMPTS[0]) + 4], free[2][len(PROMPTS[2]) + 9]]
    weights = tmp_path / "weights"
    weights.mkdir()
    for file in folder.iterdir():
        (weights / file.name).write_bytes(file.read_bytes())
    if place == "config.json":
        (weights / place).write_text(json.dumps(json.loads((folder / place).read_text()) | {"eos_token_id": eos}))
    else:
        (weights / place).write_text(json.dumps({"eos_token_id": eos}))
    status, out = _call(program, tmp_path, weights, PROMPTS)
    got = json.loads(out.read_text())["ids"]
    assert status == 0
    assert got == _transformers(model, eos) != free


def test_an_adapter_gives_pefts_tokens(program, folder, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = _transformers(base, None)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "adapter")
    status, out = _call(program, tmp_path, folder, PROMPTS, "--adapter", str(tmp_path / "adapter"))
    assert status == 0
    assert json.loads(out.read_text())["ids"] == _transformers(model, None) != plain


def test_no_prompts_give_no_rows(program, folder, tmp_path):
    status, out = _call(program, tmp_path, folder, [])
    assert status == 0 and json.loads(out.read_text()) == {"ids": []}


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ('{"prompts": [[1, 2],\n [3, }', 5, "prompts.json:2"),
        ('{"ids": [[1]]}', 5, '"prompts"'),
        ("[[1]]", 5, '"prompts"'),
        ([[1], [2, "x"]], 5, "prompt 1"),
        ([[1], [True]], 5, "prompt 1"),
        ([[1], []], 5, "prompt 1: is empty"),
        ([[1], [2], [99]], 5, "prompt 2: token id 99 is outside the model's vocabulary of 99"),
        ([[1], [2] * 120], 20, "prompt 1: 120 tokens and 20 new ones are more than the model's 128"),
        ([[1]], 0, "--max-new-tokens"),
    ],
)
def test_bad_input_ends_with_status_2_and_no_output(program, folder, tmp_path, capsys, prompts, new, message):
    status, out = _call(program, tmp_path, folder, prompts, new=new)
    assert status == 2
    assert message in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_missing_files_and_folders_are_named(program, folder, tmp_path, capsys):
    status, _ = _call(program, tmp_path, tmp_path / "nowhere", [[1]])
    assert status == 2 and "nowhere" in capsys.readouterr().err
    words = ["--weights", str(folder), "--max-new-tokens", "3", "--output"]
    assert run_cli(program.main, [*words, str(tmp_path / "o.json"), "--input", str(tmp_path / "absent.json")]) == 2
    assert "absent.json" in capsys.readouterr().err
    (tmp_path / "in.json").write_text('{"prompts": []}')
    assert run_cli(program.main, [*words, str(tmp_path / "no" / "o.json"), "--input", str(tmp_path / "in.json")]) == 2
    assert str(tmp_path / "no") in capsys.readouterr().err


@pytest.mark.slow
def test_trained_weights_tell_the_story_that_transformers_tells(program, shared_data, tmp_path):
    from transformers import AutoModelForCausalLM

    found = sorted(shared_data.glob("weights/stories260K/**/config.json"))
    weights = next((f.parent for f in found if json.loads(f.read_text()).get("model_type") == "qwen2"), None)
    if weights is None:
        pytest.skip("the trained weights are not there in Qwen2 layout")
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    ids = torch.tensor([[1, 403]])
    eos = model.generation_config.eos_token_id or model.config.eos_token_id
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, do_sample=False, eos_token_id=eos
    )
    status, out = _call(program, tmp_path, weights, [[1, 403]], new=100)
    assert status == 0
    assert json.loads(out.read_text())["ids"] == expected.tolist()
