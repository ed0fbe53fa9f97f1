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
from research.tasks import atb, run_fa, run_pa
from tests import small_model

OWN = ["device=cpu", "generate.dtype=fp32"]
QUESTION = "What is deep learning?"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A tiny chat model as the documents have one: weights, vocabulary, lora_adapter.json with one adapter beside it."""
    from research.core.torch.lora import add_lora, lora_layers, save_adapter

    folder = tmp_path_factory.mktemp("serving")
    small_model.save(folder / "chat", "qwen1_5_tiny", eos=True)
    decoder = small_model.make("qwen1_5_tiny")
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


@pytest.mark.slow
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


# --- the document qwen_7b_atb_pytorch ---------------------------------------------------------------------------------


@pytest.fixture
def script_path(weights, tmp_path, monkeypatch) -> Path:
    """The folder of main.py's config.ini, as edited by a user, with an exam of two subjects."""
    exam = tmp_path / "ceval"
    mapping = {"law": ["Law", "法学", "Humanities"], "college_physics": ["Physics", "大学物理", "STEM"]}
    for split, count in (("dev", 2), ("val", 3)):
        (exam / "data" / split).mkdir(parents=True)
        for name in mapping:
            rows = [["id", "question", "A", "B", "C", "D", "answer"]]
            rows += [[str(n), f"{name} {split} 问题{n}____。", "甲", "乙", "丙", "丁", "ABC"[n]] for n in range(count)]
            with (exam / "data" / split / f"{name}_{split}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(rows)
    (exam / "subject_mapping.json").write_text(json.dumps(mapping))
    (tmp_path / "config.ini").write_text(
        f"[model]\nmodel_path={weights}\nlog_dir=logs\n[precision]\nmode=ceval\nwork_dir=ceval\nbatch=2\nshot=2\n"
        "seq_len_out=8\n[performance]\nmodel_name=qwen_7b\nbatch_size=1,2\ncase_pair=[[16,4],[8,2]]\nperf_mode=detail\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_main_continues_texts_and_measures_with_timeit(script_path, weights, capsys, monkeypatch):
    assert atb.main(["--task", "inference", *OWN, 'prompt_list=["Hello"]', "generate.max_new_tokens=6"]) == 0
    assert capsys.readouterr().out == f"Hello{expected(weights, ['Hello'], 6)[0]}\n"
    assert "6 tokens in" in (script_path / "logs" / "device0.log").read_text()

    assert run_cli(atb.main, ["--task", "performance", *OWN]) == 2
    assert "TIMEIT=1" in capsys.readouterr().err
    monkeypatch.setenv("TIMEIT", "1")
    monkeypatch.setenv("MAX_SEQ_LEN", "32")
    assert atb.main(["--task", "performance", *OWN]) == 0
    (path,) = script_path.glob("performance_test_cpu_qwen_7b_*.csv")
    with path.open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == [
        "batch_size",
        "input_seq_len(Encoding)",
        "output_seq_len(Decoding)",
        "ResponseTime(s)",
        "forward_first_token_time(ms)",
        "forward_next_token_time(ms)",
        "pre_next_token_time(ms)",
        "post_next_token_time_post(ms)",
    ]
    assert [row[:3] for row in rows[1:]] == [["1", "16", "4"], ["1", "8", "2"], ["2", "16", "4"], ["2", "8", "2"]]
    for row in rows[1:]:
        total, first, later, before, after = map(float, row[3:])
        parts = first + (int(row[2]) - 1) * (later + before + after)
        assert first > 0 and later > 0 and parts <= 1000 * total + 1  # the parts lie within the whole

    monkeypatch.setenv("MAX_SEQ_LEN", "16")
    assert run_cli(atb.main, ["--task", "performance", *OWN]) == 2
    assert "16 tokens and 4 new ones are more than 16" in capsys.readouterr().err


def test_main_scores_the_exam_by_first_letters_and_goes_on_where_it_stopped(script_path, weights, capsys):
    assert atb.main(["--task", "precision", *OWN]) == 0
    capsys.readouterr()
    result = script_path / "ceval" / "test_result"
    with (result / "cache0.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["question_id", "task", "truth", "pred"] and len(rows) == 7
    asked = "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n"
    for number in range(2):
        asked += f"\nlaw dev 问题{number}____。\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：{'AB'[number]}\n"
    asked += "\nlaw val 问题0____。\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案："
    letters = [letter.upper() for letter in expected(weights, [asked], 8)[0] if letter.isascii() and letter.isalpha()]
    assert next(row for row in rows if row[:2] == ["0", "law"])[2:] == ["A", "".join(letters[:1])]
    share = {name: sum(r[2] == r[3] for r in rows if r[1] == name) / 3 for name in ("law", "college_physics")}
    assert json.loads((result / "result_0_subject_acc.json").read_text()) == share
    mean = (share["law"] + share["college_physics"]) / 2
    by_class = {"STEM": share["college_physics"], "Humanities": share["law"], "Hard": share["college_physics"]}
    assert json.loads((result / "result_0_classes_acc.json").read_text()) == by_class | {"Avg acc": mean}
    assert "law: " in (result / "device0.log").read_text()

    lines = (result / "cache0.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    changed = [line.replace(line.rstrip("\n")[-1:], "Z") if line.startswith("2,law") else line for line in lines[:-1]]
    (result / "cache0.csv").write_text("".join(changed), encoding="utf-8")
    assert atb.main(["--task", "precision", *OWN]) == 0
    again = (result / "cache0.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    assert again[:-1] == changed and again[-1] == lines[-1]  # only what was missing has been asked
    config = script_path / "config.ini"
    config.write_text(config.read_text().replace("shot=2", "shot=1"))
    assert run_cli(atb.main, ["--task", "precision", *OWN]) == 2
    assert "of other weights or settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("work_dir=ceval", "work_dir=nowhere", "work_dir is not a folder"),
        ("mode=ceval", "mode=mmlu", "is not a choice in this version"),
        ("shot=2", "shots=2", "did you mean shot"),
        ("[precision]", "[precison]", "did you mean precision"),
        ("batch=2", "batch=many", "a whole number"),
        ("case_pair=[[16,4],[8,2]]", "case_pair=[[16]]", "[[256,256],[512,512]]"),
    ],
)
def test_mistakes_in_config_ini_name_file_section_and_key(script_path, capsys, old, new, message):
    config = script_path / "config.ini"
    config.write_text(config.read_text().replace(old, new))
    assert run_cli(atb.main, ["--task", "precision", *OWN]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_cut_model_and_run_measures_over_two_parts(repo, script_path, weights):
    command = ["bash", str(repo / "scripts" / "cut_model_and_run.sh"), "performance", "--config", "config.ini", *OWN]
    parts = script_path / "parts"
    variables = {"input_dir": str(weights), "output_dir": str(parts), "world_size": "2", "TIMEIT": "1"}
    program(command, script_path, **variables)
    assert {"0", "1"} <= {path.name for path in parts.iterdir()}
    (path,) = script_path.glob("performance_test_cpu_qwen_7b_*.csv")
    assert len(path.read_text().splitlines()) == 5
