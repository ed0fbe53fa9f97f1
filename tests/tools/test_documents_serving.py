"""The inference commands of the documents qwen_mindie_llm and qwen_7b_atb_pytorch, with tiny models and paths filled in."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from research.core.config.schema import LoraConfig
from research.core.errors import run_cli
from research.core.launch.host import free_port
from research.core.torch.generate import generate
from research.core.torch.weights import load_decoder
from research.tasks import run_fa, run_pa

OWN = ["device=cpu", "generate.dtype=fp32"]
QUESTION = "What is deep learning?"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A tiny chat model as the documents have one: weights, vocabulary, lora_adapter.json with one adapter beside it."""
    from research.core.text.builtin import builtin_tokenizer
    from research.core.text.template import get_template
    from research.core.torch.decoder import Decoder
    from research.core.torch.lora import add_lora, lora_layers, save_adapter
    from research.core.torch.weights import save_decoder
    from research.registry import model_config, model_spec
    from research.tasks.exporting import tokenizer_files

    folder = tmp_path_factory.mktemp("serving")
    tokenizer = builtin_tokenizer()
    decoder = Decoder(model_spec(model_config("qwen1_5_tiny"), tokens=tokenizer.vocab_size)).init_weights(3)
    for layer in decoder.model.layers:  # strong enough for answers that depend on the prompt
        layer.self_attn.v_proj.weight.data *= 30
        layer.mlp.down_proj.weight.data *= 30
    files = tokenizer_files(tokenizer, get_template("qwen1_5"))
    save_decoder(decoder, folder / "chat", files=files, eos=list(tokenizer.eos_ids(chat=True)))
    cfg = LoraConfig(rank=4, alpha=12, target_modules="all-linear")
    add_lora(decoder, cfg, seed=5)
    for _, layer in lora_layers(decoder):
        layer.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    save_adapter(decoder, folder / "adapter1", cfg)
    (folder / "chat" / "lora_adapter.json").write_text(json.dumps({"qwen_lora1": str(folder / "adapter1")}))
    return folder / "chat"


def expected(weights: Path, texts: list[str], new: int = 20, chat: bool = False, adapter: bool = False) -> list[str]:
    """The plain decoder's greedy answers."""
    from research.core.text.template import get_template
    from research.core.text.tokenizer import load_tokenizer
    from research.core.torch.lora import load_adapter

    tokenizer, decoder = load_tokenizer(weights, "qwen1_5"), load_decoder(weights, torch.float32)
    if adapter:
        load_adapter(decoder, weights.parent / "adapter1")
    template = get_template("qwen1_5")
    prompts = [
        list(template.encode(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True).ids)
        if chat
        else tokenizer.encode(text)
        for text in texts
    ]
    rows = generate(decoder, prompts, max_new_tokens=new, eos_ids=tokenizer.eos_ids(chat=True))
    return [tokenizer.decode(row, skip_special=True) for row in rows]


def answers(out: str) -> list[str]:
    """The texts behind ``Answer[N]:`` of a program's output."""
    parts = out.split("\nGenerate[")
    return [part.split("]: ", 1)[1] for part in parts if "Answer[" in part]


def test_run_pa_takes_texts_ids_conversations_and_a_dict_with_an_adapter_per_prompt(weights, capsys, tmp_path):
    base = ["--model_path", str(weights), *OWN]
    assert run_pa.main(base) == 0  # the document's own question
    assert answers(capsys.readouterr().out) == expected(weights, ["What's deep learning?"])

    texts = ["Hello", "A much longer prompt with many more words in it", "x"]
    (tmp_path / "text.txt").write_text(texts[1])
    words = ["--input_texts", texts[0], str(tmp_path / "text.txt"), texts[2]]
    assert run_pa.main([*base, *words, "--max_batch_size", "2", "--max_output_length", "9"]) == 0
    plain = expected(weights, texts, 9)
    assert answers(capsys.readouterr().out) == plain and len(set(plain)) > 1

    chat = [*base, "--is_chat_model", "--max_output_length", "9"]
    asked = [{"prompt": QUESTION, "adapter": "qwen_lora1"}, {"prompt": QUESTION}, {"prompt": "x", "adapter": "base"}]
    assert run_pa.main([*chat, "--max_batch_size", "3", "--input_dict", json.dumps(asked)]) == 0
    own = expected(weights, [QUESTION], 9, chat=True, adapter=True)
    found = answers(capsys.readouterr().out)
    assert found == [*own, *expected(weights, [QUESTION, "x"], 9, chat=True)] and found[0] != found[1]

    (tmp_path / "talk.jsonl").write_text(json.dumps([{"role": "user", "content": QUESTION}]) + "\n")
    assert run_pa.main([*chat, "--input_file", str(tmp_path / "talk.jsonl")]) == 0
    assert answers(capsys.readouterr().out) == found[1:2]

    ids = ["--load_tokenizer", "False", "--input_ids", "5,6,7", "9", "--max_output_length", "4", "--ignore_eos"]
    assert run_pa.main([*base, *ids]) == 0
    rows = generate(load_decoder(weights, torch.float32), [[5, 6, 7], [9]], max_new_tokens=4)
    assert [json.loads(text) for text in answers(capsys.readouterr().out)] == rows


def test_run_pa_writes_an_embedding_and_the_times(weights, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ["--model_path", str(weights), *OWN, "--input_ids", "5,6,7,8"]
    assert run_pa.main([*base, "--is_embedding_model", "--max_output_length", "1"]) == 0
    vector = torch.load(tmp_path / "embedding_tensor_0.pth", weights_only=True)
    with torch.no_grad():
        hidden = load_decoder(weights, torch.float32).hidden(torch.tensor([[5, 6, 7, 8]]))
    assert torch.allclose(vector, hidden[0, -1], atol=1e-4, rtol=1e-4)  # fp32, other kernels

    monkeypatch.setenv("ATB_LLM_BENCHMARK_ENABLE", "1")
    assert run_pa.main([*base, "--ignore_eos", "--max_output_length", "5"]) == 0
    with (tmp_path / "benchmark_result" / "benchmark.csv").open() as file:
        row = next(csv.DictReader(file))
    assert (row["batch_size"], row["input_seq_len"], row["output_seq_len"]) == ("1", "4", "5")
    assert len(row["decode_token_times"].split(",")) == 4 and float(row["e2e_time(ms)"]) > 0


def test_run_fa_answers_from_the_contiguous_cache(weights, capsys):
    words = ["--model_path", str(weights), *OWN, "--input_text", "Hello", "x", "--max_output_length", "7"]
    assert run_fa.main([*words, "--batch_size", "2"]) == 0
    assert answers(capsys.readouterr().out) == expected(weights, ["Hello", "x"], 7)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input_dict", '[{"prompt": "a", "adapter": "qwen_lora2"}]'], "'qwen_lora2' is not a loaded adapter"),
        (["--max_position_embeddings", "24", "--max_output_length", "30"], "are more than the engine's 24"),
        (["--max_input_length", "2"], "more than --max_input_length 2"),
        (["engine.num_blocks=1", "--block_size", "16", "--max_output_length", "40"], "are more than the engine's 16"),
        (["generate.temperature=-1"], "generate.temperature"),
        (["--max_batch_sise", "2"], "did you mean --max_batch_size"),
        (["--pp", "2"], "tensor parallelism only"),
        (["--input_ids", "1,x"], "is no list of token ids"),
        (["--input_ids", "99999999"], "outside the model's vocabulary"),
        (["--input_file", "talk.jsonl"], "--is_chat_model"),
        (["--model_path", "/nowhere"], "weight folder not found"),
        (["--lora_modules", '{"other": "/nowhere"}'], "/nowhere"),
        (["engine.mode=flash"], "run_fa"),
    ],
)
def test_wrong_input_ends_with_status_2_and_says_what_to_change(weights, capsys, flags, message):
    assert run_cli(run_pa.main, ["--model_path", str(weights), *OWN, *flags]) == 2
    assert message in capsys.readouterr().err


def test_quantised_weights_and_an_adapter_of_another_shape_are_refused(weights, capsys, tmp_path):
    from safetensors.torch import load_file, save_file

    quantised, wrong = tmp_path / "quantised", tmp_path / "wrong"
    for source, target in ((weights, quantised), (weights.parent / "adapter1", wrong)):
        target.mkdir()
        for file in source.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((quantised / "config.json").read_text()) | {"quantize": "w8a8"}
    (quantised / "config.json").write_text(json.dumps(config))
    assert run_cli(run_pa.main, ["--model_path", str(quantised), *OWN]) == 2
    assert "quantised (w8a8)" in capsys.readouterr().err

    tensors = load_file(wrong / "adapter_model.safetensors")
    save_file(
        {name: value[..., :-1].contiguous() for name, value in tensors.items()}, wrong / "adapter_model.safetensors"
    )
    words = ["--model_path", str(weights), *OWN, "--lora_modules", json.dumps({"wrong": str(wrong)})]
    assert run_cli(run_pa.main, words) == 2
    assert "wrong" in capsys.readouterr().err


def program(command: list[str], repo: Path, **variables: str) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PY": sys.executable} | variables
    done = subprocess.run(command, capture_output=True, text=True, cwd=repo, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_documents_command_lines_at_world_size_1_and_2(repo, weights):
    script = ["bash", "examples/models/qwen/run_pa.sh", "-m", str(weights), "--trust_remote_code", "true", "-c", "true"]
    one = program([*script, *OWN], repo)
    assert answers(one) == expected(weights, ["What's deep learning?"], chat=True)

    asked = [{"prompt": QUESTION, "adapter": "qwen_lora1"}, {"prompt": QUESTION}]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command += ["-m", "examples.run_pa", "--model_path", str(weights), "--is_chat_model", "--max_output_length", "24"]
    two = program([*command, "--max_batch_size", "2", "--input_dict", json.dumps(asked), *OWN], repo, BIND_CPU="1")
    own = expected(weights, [QUESTION], 24, chat=True, adapter=True)
    assert answers(two) == [*own, *expected(weights, [QUESTION], 24, chat=True)]
