"""finetune, lora, merge, export and pretrain as a user starts them, on the smallest model there is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from research.core.run.folder import RunFolder
from research.core.run.metrics import read_metrics
from research.core.torch.lora import load_adapter
from research.core.torch.weights import load_decoder
from research.tasks import training
from research.tasks.cli import main

SMALL = [
    "model.hf.hidden_size=32",
    "model.hf.num_hidden_layers=2",
    "model.hf.num_attention_heads=2",
    "model.hf.num_key_value_heads=1",
    "model.hf.intermediate_size=48",
    "train.dtype=fp32",
    "train.lr=1e-3",
    "train.max_minutes=null",
    "train.epochs=null",
    "train.log_every=1",
    "data.seq_length=128",
    "data.eval_records=7",
    "data.workers=1",
    "device.threads=1",
]
IDS = torch.arange(60).view(2, 30)


def _records(path: Path, count: int = 30) -> Path:
    with open(path, "w") as file:
        for n in range(count):
            messages = [
                {"role": "user", "content": f"Say {n}."},
                {"role": "assistant", "content": f"{n} it is, again {n}."},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def _run(task: str, folder: Path, *words: str) -> int:
    return main([f"task={task}", f"run={folder}", *SMALL, *words])


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetuned")
    data = _records(folder / "mine.jsonl")
    words = ["train.steps=6", "train.eval_every=3", "train.sample_every=3", f"data={data}"]
    assert _run("finetune", folder / "run", *words) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, finetuned) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    data = _records(folder / "mine.jsonl")
    words = [f"weights={finetuned}", "train.steps=5", "lora.rank=4", "train.lr=1e-2", f"data={data}"]
    assert _run("lora", folder / "run", *words) == 0
    return folder / "run"


# --- what a run leaves ---


def test_run_folder_is_complete(finetuned):
    names = {path.name for path in finetuned.iterdir()}
    expected = {"config.yaml", "command.txt", "log.txt", "metrics.jsonl", "tensorboard", "loss.png", "checkpoints"}
    assert expected | {"report.json", "weights", "dataset"} <= names and "lock" not in names
    report = json.loads((finetuned / "report.json").read_text())
    assert report["training"]["steps"] == 6 and report["data"]
    assert [r["step"] for r in read_metrics(finetuned, "eval")] == [3, 6]
    assert "->" in next(read_metrics(finetuned, "sample"))["text"]
    log = (finetuned / "log.txt").read_text()
    assert log.count(f"run folder: {finetuned}") == 2 and f"make predict RUN={finetuned}" in log


def test_exported_weights_are_those_trained_and_load_in_transformers(finetuned):
    weights = finetuned / "weights"
    model = AutoModelForCausalLM.from_pretrained(weights).eval()
    ours = load_decoder(weights, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), model(IDS).logits, rtol=0, atol=1e-4)
    saved = load_file(finetuned / "checkpoints" / "step-00000006" / "model.safetensors")
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, saved[name]), name


def test_exported_folder_ends_answers_at_the_end_of_turn_and_says_what_it_was_made_with(finetuned):
    weights = finetuned / "weights"
    tokenizer = AutoTokenizer.from_pretrained(weights)
    end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert json.loads((weights / "generation_config.json").read_text())["eos_token_id"] == end
    note = json.loads((weights / "workbench.json").read_text())
    meta = json.loads((finetuned / "dataset" / "meta.json").read_text())
    assert (note["model"], note["template_name"]) == ("qwen2_5_tiny", "qwen2_5")
    assert (note["tokenizer"], note["template"]) == (meta["tokenizer"], meta["template"])
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_pretrained_model_ends_at_end_of_text_only(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"This is line {n} of a story.\n\n" for n in range(200)))
    assert _run("pretrain", tmp_path / "run", f"data={tmp_path / 'text.txt'}", "train.steps=3") == 0
    weights = tmp_path / "run" / "weights"
    end = AutoTokenizer.from_pretrained(weights).convert_tokens_to_ids("<|endoftext|>")
    assert json.loads((weights / "generation_config.json").read_text())["eos_token_id"] == end
    assert json.loads((weights / "workbench.json").read_text())["template"] is None


def test_skills_print_exact_match_before_and_after_samples_and_next_commands(tmp_path, capsys):
    words = ["data=skills", "data.seq_length=128", "data.skills_records=100", "train.steps=2"]
    assert _run("finetune", tmp_path / "run", *words) == 0
    err = capsys.readouterr().err
    for part in (
        "exact match before training: ",
        "exact match after training: ",
        "sample answers",
        "next\n  make predict RUN=",
    ):
        assert part in err
    assert err.index("exact match before") < err.index("train step 1/2") < err.index("exact match after")
    assert err.count("    -> ") == 5
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert 0 <= report["exact_match_after"]["all"] <= 1 and len(report["exact_match_after"]) == 8


def test_system_prompt_of_the_training_is_used_for_answers(tmp_path):
    from research.core.config.compose import compose
    from research.tasks.answering import load_model

    words = ["train.steps=1", "data.system=Be brief.", f"data={_records(tmp_path / 'd.jsonl')}"]
    assert _run("finetune", tmp_path / "run", *words) == 0
    for words, expected in (([], "Be brief."), (["generate.system=Other."], "Other.")):
        cfg = compose(["task=predict", "prompt=x", f"weights={tmp_path / 'run' / 'weights'}", *SMALL, *words])
        load_model(cfg)
        assert cfg.generate.system == expected


# --- LoRA, merge, export ---


def test_lora_run_loads_in_peft_with_our_logits(finetuned, adapted):
    assert not (adapted / "weights").exists()
    ours = load_decoder(finetuned / "weights", torch.float32)
    plain = ours(IDS)
    load_adapter(ours, adapted / "adapter")
    base = AutoModelForCausalLM.from_pretrained(finetuned / "weights")
    theirs = peft.PeftModel.from_pretrained(base, str(adapted / "adapter")).eval()
    with torch.no_grad():
        logits = ours(IDS)
        torch.testing.assert_close(logits, theirs(IDS).logits, rtol=0, atol=1e-4)
    assert (logits - plain).abs().max() > 1e-3
    settings = json.loads((adapted / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(finetuned / "weights")


@pytest.mark.parametrize("way", ["merge", "export"])
def test_merged_and_exported_weights_give_the_adapters_logits(tmp_path, finetuned, adapted, way):
    if way == "merge":
        words = [f"weights={finetuned / 'weights'}", f"adapter={adapted / 'adapter'}"]
    else:
        words = [f"run={adapted}"]
    assert main([f"task={way}", f"output={tmp_path / 'out'}", *words]) == 0
    ours = load_decoder(finetuned / "weights", torch.float32)
    load_adapter(ours, adapted / "adapter")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(merged(IDS).logits, ours(IDS), rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|im_end|>") > 0
    assert len(json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]) == 2
    assert json.loads((tmp_path / "out" / "workbench.json").read_text())["model"] == "qwen2_5_tiny"


def test_merge_of_a_lora_run_finds_base_and_adapter_itself(tmp_path, adapted):
    assert main(["task=merge", f"run={adapted}", f"output={tmp_path / 'out'}"]) == 0
    assert load_decoder(tmp_path / "out").spec.hidden == 32


def test_merge_with_an_adapter_of_another_model_writes_nothing(tmp_path, finetuned, capsys):
    words = ["model.hf.hidden_size=64", "train.steps=1", f"data={_records(tmp_path / 'd.jsonl')}"]
    assert _run("finetune", tmp_path / "wide", *words) == 0
    lora = [f"weights={tmp_path / 'wide'}", "train.steps=1", f"data={tmp_path / 'd.jsonl'}"]
    assert _run("lora", tmp_path / "lora", *lora, "model.hf.hidden_size=64") == 0
    words = [
        f"weights={finetuned / 'weights'}",
        f"adapter={tmp_path / 'lora' / 'adapter'}",
        f"output={tmp_path / 'out'}",
    ]
    assert main(["task=merge", *words]) == 2
    assert "this model needs" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_merge_that_changes_logits_is_refused_before_anything_is_written(tmp_path, finetuned, adapted, capsys):
    bad = tmp_path / "bad"
    shutil.copytree(adapted / "adapter", bad)
    tensors = load_file(bad / "adapter_model.safetensors")
    from safetensors.torch import save_file

    save_file({name: value * float("nan") for name, value in tensors.items()}, bad / "adapter_model.safetensors")
    words = [f"weights={finetuned / 'weights'}", f"adapter={bad}", f"output={tmp_path / 'out'}"]
    assert main(["task=merge", *words]) == 2
    assert "other logits" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_export_writes_the_newest_checkpoint(tmp_path, finetuned):
    assert main(["task=export", f"run={finetuned}", f"output={tmp_path / 'out'}"]) == 0
    a, b = load_file(finetuned / "weights" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_lora_goes_on_from_an_adapter(tmp_path, finetuned, adapted):
    words = [f"weights={finetuned}", f"lora.adapter={adapted / 'adapter'}", "train.steps=1", "train.lr=1e-9"]
    assert _run("lora", tmp_path / "run", *words, f"data={_records(tmp_path / 'd.jsonl')}") == 0
    a = load_file(adapted / "adapter" / "adapter_model.safetensors")
    b = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


# --- resume ---


@pytest.mark.slow
@pytest.mark.parametrize("task", ["finetune", "lora"])
def test_resume_by_run_folder_alone_takes_the_runs_own_settings(tmp_path, finetuned, task):
    words = ["train.schedule=constant", "train.warmup_steps=0", f"data={_records(tmp_path / 'd.jsonl')}", "data.seed=9"]
    if task == "lora":
        words += [f"weights={finetuned}", "lora.dropout=0.2", "lora.rank=2"]
    assert _run(task, tmp_path / "a", *words, "train.steps=8") == 0
    assert _run(task, tmp_path / "b", *words, "train.steps=4") == 0
    assert main([f"task={task}", f"run={tmp_path / 'b'}", "train.resume=true", "train.steps=8"]) == 0
    a, b = (load_file(tmp_path / run / "checkpoints" / "step-00000008" / "model.safetensors") for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    result = ("weights", "model.safetensors") if task == "finetune" else ("adapter", "adapter_model.safetensors")
    a, b = (load_file(tmp_path.joinpath(run, *result)) for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [r["step"] for r in read_metrics(tmp_path / "b", "train")] == list(range(1, 9))


def test_resume_of_another_model_is_refused(finetuned, capsys):
    assert main(["task=finetune", "model=qwen1_5_tiny", f"run={finetuned}", "train.resume=true"]) == 2
    assert "the run trains qwen2_5_tiny" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_exits_130_and_its_own_command_goes_on(tmp_path, repo, number):
    data, run = _records(tmp_path / "d.jsonl"), tmp_path / "run"
    words = ["task=finetune", f"run={run}", *SMALL, "train.steps=100000", f"data={data}"]
    command = [sys.executable, "research/qwen2_5/run_qwen2_5.py"]
    process = subprocess.Popen(
        [*command, *words], cwd=repo, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("train step 3/"):
            process.send_signal(number)
    assert process.wait(timeout=60) == 130
    assert f"make finetune RUN={run} ARGS=train.resume=true" in lines[-1] and "Traceback" not in "".join(lines)
    step = json.loads(next((run / "checkpoints").glob("*/meta.json")).read_text())["step"]
    assert main(["task=finetune", f"run={run}", "train.resume=true", f"train.steps={step + 1}"]) == 0
    assert [r["step"] for r in read_metrics(run, "train")] == list(range(1, step + 2))


@pytest.mark.slow
def test_two_cards_start_from_one_command(tmp_path, repo):
    data, run = _records(tmp_path / "d.jsonl"), tmp_path / "run"
    words = ["task=finetune", f"run={run}", *SMALL, "train.steps=2", f"data={data}", "parallel.cards=2", "device=cpu"]
    command = [sys.executable, "research/qwen2_5/run_qwen2_5.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words], cwd=repo, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        done.stderr.startswith("torchrun --standalone --nproc-per-node=2 ") and done.stderr.count("run folder: ") == 2
    )
    assert load_decoder(run / "weights").spec.hidden == 32
    assert (run / "checkpoints" / "step-00000002").is_dir()


# --- wrong input ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.lr=0"], "train.lr"),
        (["train.lr=-1e-4"], "train.lr"),
        (["data.seq_length=100000"], "at most"),
        (["train.steps=null"], "needs an end"),
        (["train.shedule=cosine"], "did you mean train.schedule"),
        (["model=qwen2_5_tinny"], "qwen2_5_tiny"),
        (["data.seq_length=8", "data.on_long=error"], "d.jsonl:1"),
    ],
)
def test_wrong_settings_end_with_status_2_and_no_result(tmp_path, capsys, words, message):
    data = _records(tmp_path / "d.jsonl")
    assert _run("finetune", tmp_path / "run", "train.steps=1", f"data={data}", *words) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    run = tmp_path / "run"
    assert not any((run / name).exists() for name in ("weights", "checkpoints", "dataset", "lock"))


def test_unknown_lora_target_names_the_nearest_and_writes_no_adapter(tmp_path, finetuned, capsys):
    words = [
        f"weights={finetuned}",
        "lora.target_modules=[q_prj]",
        "train.steps=1",
        f"data={_records(tmp_path / 'd.jsonl')}",
    ]
    assert _run("lora", tmp_path / "run", *words) == 2
    assert "did you mean q_proj" in capsys.readouterr().err and not (tmp_path / "run" / "adapter").exists()


def test_folder_with_a_result_and_folder_in_use_are_refused(tmp_path, finetuned, capsys):
    data = _records(tmp_path / "d.jsonl")
    before = sorted(finetuned.rglob("*"))
    assert _run("finetune", finetuned, "train.steps=1", f"data={data}") == 2
    assert "already holds" in capsys.readouterr().err and sorted(finetuned.rglob("*")) == before
    with RunFolder(tmp_path / "busy", task="finetune", model="m"):
        assert _run("finetune", tmp_path / "busy", "train.steps=1", f"data={data}") == 2
    assert "in use by pid" in capsys.readouterr().err


def test_disk_too_small_is_found_before_the_work(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda path: usage)
    assert _run("finetune", tmp_path / "run", "train.steps=1", f"data={_records(tmp_path / 'd.jsonl')}") == 2
    assert "GB are free" in capsys.readouterr().err and not (tmp_path / "run" / "dataset").exists()


def test_full_disk_while_saving_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    from research.core.torch import checkpoint

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert _run("finetune", tmp_path / "run", "train.steps=2", f"data={_records(tmp_path / 'd.jsonl')}") == 2
    assert "no space left" in capsys.readouterr().err
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == [] and not (tmp_path / "run" / "weights").exists()
