"""The whole preparation: what is written, what is held out, what stops it, and what it leaves behind."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from research.core.config.schema import DataConfig
from research.core.data.audit import AuditError
from research.core.data.dataset import PackedDataset, check_dataset
from research.core.data.folder import writing
from research.core.data.prepare import open_prepared
from research.core.data.readers import cut_text
from research.core.errors import ConfigError, DataError
from tests.core.data.conftest import chat


def records(n, seed=0, words=30):
    rng = random.Random(seed)
    vocabulary = ["the", "quick", "brown", "fox", "jumps", "over", "dogs", "1", "2", "3", "你好", "世界", "café"]

    def text():
        return " ".join(rng.choices(vocabulary, k=rng.randint(1, words)))

    return [{**chat(text(), text()), "id": f"r{i}"} for i in range(n)]


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*.bin"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def documents(folder, split="train"):
    data = PackedDataset(folder / split)
    return [tuple(array.tolist() for array in data.document(i)) for i in range(data.documents)]


def read_dump(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_folder_does_not_depend_on_the_number_of_workers(write, prepare, tmp_path):
    source = write("x.jsonl", records(1500))
    digests, reports = [], []
    for workers in (1, 2, 3):
        folder = tmp_path / f"w{workers}"
        dump = tmp_path / f"w{workers}.jsonl"
        report = prepare(source, folder, workers=workers, eval_records=20, dump=str(dump))
        digests.append({**digest(folder), "dump": hashlib.sha256(dump.read_bytes()).hexdigest()})
        reports.append({k: v for k, v in report.to_json().items() if k not in ("folder", "seconds")})
    assert digests[0] == digests[1] == digests[2]
    assert reports[0] == reports[1] == reports[2]


def test_dump_rows_and_documents_hold_the_same_tokens_and_labels(write, prepare, tokenizer, template, tmp_path):
    source = records(300, words=12)
    dump = tmp_path / "dump.jsonl"
    report = prepare(write("x.jsonl", source), dump=str(dump), eval_records=10)
    dumped = read_dump(dump)
    assert [line["id"] for line in dumped] == [record["id"] for record in source]
    for line, record in zip(dumped, source):
        encoded = template.encode(tokenizer, record["messages"])
        if len(encoded.ids) <= 128:
            assert line["input_ids"] == encoded.ids
        assert line["labels"][0] == -100
        assert all(label in (-100, token) for token, label in zip(line["input_ids"], line["labels"]))
    folder = report.folder
    kept = documents(folder) + documents(folder, "eval")
    assert sorted(kept) == sorted((line["input_ids"], line["labels"]) for line in dumped)
    assert len(documents(folder, "eval")) == 10
    # The batches show every document once, with positions that restart and padding that is masked.
    data = PackedDataset(folder / "train")
    batch = data.rows(range(len(data)))
    assert batch.input_ids.shape == (len(data), 128)
    seen = []
    for b in range(len(data)):
        for number in range(1, batch.doc_ids[b].max() + 1):
            here = np.flatnonzero(batch.doc_ids[b] == number)
            assert here.tolist() == list(range(here[0], here[-1] + 1))
            assert batch.position_ids[b, here].tolist() == list(range(len(here)))
            seen.append((batch.input_ids[b, here].tolist(), batch.labels[b, here].tolist()))
        padding = batch.doc_ids[b] == 0
        assert (batch.labels[b, padding] == -100).all() and (batch.input_ids[b, padding] == tokenizer.pad_id).all()
        assert not padding[: np.flatnonzero(~padding)[-1]].any()
    assert sorted(seen) == sorted(documents(folder))
    counts = report.splits["train"]
    assert batch.tokens == counts["tokens"] and batch.supervised == counts["supervised"]
    assert counts["density"] == pytest.approx(counts["tokens"] / (len(data) * 128))


def test_without_packing_each_row_is_one_document(write, prepare):
    report = prepare(write("x.jsonl", records(40)), packing=False)
    data = PackedDataset(report.folder / "train")
    assert len(data) == data.documents == 40
    batch = data.rows([3, 1], pad_to=0)
    assert batch.input_ids.shape[1] == max(data.lengths([3, 1])) and batch.doc_ids.max() == 1
    assert data.rows([3]).input_ids.shape == (1, 128)


def test_held_out_records_are_a_seeded_sample_with_their_copies(write, prepare, tmp_path):
    source = records(400, words=8)
    source += [dict(record, id=f"copy-{record['id']}") for record in source[:200]]
    path = write("x.jsonl", source)
    report = prepare(path, tmp_path / "a", eval_records=60, eval_fraction=0.5)
    held, trained = documents(report.folder, "eval"), documents(report.folder)
    assert 0 < len(held) <= 60 and len(held) + len(trained) == 600
    assert not {str(d) for d in held} & {str(d) for d in trained}
    other = prepare(path, tmp_path / "b", eval_records=60, eval_fraction=0.5, seed=5)
    assert documents(other.folder, "eval") != held
    assert len(documents(prepare(path, tmp_path / "c", eval_records=60, eval_fraction=0.01).folder, "eval")) <= 6


def test_long_text_is_split_without_losing_a_token(write, prepare, tokenizer, tmp_path):
    text = "All words of this text are kept, in order. " * 9000  # several parts and many pieces
    short = "A short one."
    dump = tmp_path / "d.jsonl"
    report = prepare(write("x.jsonl", [{"text": text}, {"text": short}]), dump=str(dump), seq_length=1000)
    lines = read_dump(dump)
    *pieces, last = [line["input_ids"] for line in lines]
    assert [token for piece in pieces for token in piece] == [*tokenizer.encode(text), tokenizer.eos_id]
    assert {len(piece) for piece in pieces[:-1]} == {1000}
    assert last == [*tokenizer.encode(short), tokenizer.eos_id]
    assert all(line["labels"] == [-100, *line["input_ids"][1:]] for line in lines)
    assert [line["id"] for line in lines[:3]] == ["x-1", "x-1#1", "x-1#2"]
    assert report.read == 2 and report.truncated == 0
    assert len(list(cut_text(text))) > 3


def test_text_has_its_end_of_text_trained(write, prepare, tokenizer, tmp_path):
    dump = tmp_path / "d.jsonl"
    prepare(write("x.txt", "one\n\ntwo\n"), dump=str(dump))
    assert [line["labels"][-1] for line in read_dump(dump)] == [tokenizer.eos_id] * 2


def test_skills_are_prepared_with_their_own_held_out_split(prepare, tokenizer):
    report = prepare("skills", skills_records=400, eval_records=20, skills=["copy:3"], system="")
    assert report.splits["train"]["documents"] == 400 and report.splits["eval"]["documents"] == 20
    asked = {str(ids) for ids, _ in documents(report.folder, "eval")}
    assert not asked & {str(ids) for ids, _ in documents(report.folder)}


def test_max_records_and_several_sources(write, prepare, tmp_path):
    a, b = write("a.jsonl", records(30)), write("b.json", [{"instruction": "q", "input": "", "output": "a"}] * 30)
    report = prepare(f"{a},{b}", max_records=40)
    assert report.read == 40 and report.formats == ["messages", "alpaca"]


def test_meta_names_what_it_was_made_from(write, prepare, tokenizer, template):
    report = prepare(write("x.jsonl", records(20)))
    meta = json.loads((report.folder / "meta.json").read_text())
    assert meta["tokenizer"] == tokenizer.fingerprint and meta["template"] == template.fingerprint
    assert meta["settings"]["supervise"] == "assistant"
    audit = json.loads((report.folder / "audit.json").read_text())
    assert audit["read"] == 20 and audit["splits"] == meta["splits"]


# --- audit ---


def bad_mixture():
    mixture = records(8, words=8)
    mixture.insert(2, chat("", "x"))
    mixture.insert(3, chat("q", " "))
    mixture.append(chat("q", "long " * 400))
    return mixture


def test_the_audit_counts_drops_with_reasons_and_truncated_tokens(write, prepare, tokenizer, template):
    path = write("x.jsonl", bad_mixture())
    report = prepare(path)
    assert report.read == 11
    assert report.dropped == {"empty instruction": [1, f"{path}:3"], "empty answer": [1, f"{path}:4"]}
    whole = len(template.encode(tokenizer, bad_mixture()[-1]["messages"]).ids)
    assert (report.truncated, report.truncated_tokens, report.longest) == (1, whole - 128, whole)
    assert sum(count for _, _, count in report.histogram) == 9
    shown = "".join(text for text, _ in report.example)
    assert "<|im_start|>assistant" in shown
    supervised = [text for text, yes in report.example if yes]
    assert supervised == [bad_mixture()[0]["messages"][1]["content"] + "<|im_end|>"]


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"max_dropped": 0.1}, "data.max_dropped"),
        ({"max_truncated": 0.0}, "data.max_truncated"),
        ({"min_supervised": 0.99}, "data.min_supervised"),
    ],
)
def test_findings_over_the_limits_are_errors_and_nothing_is_written(write, prepare, tmp_path, settings, where):
    path = write("x.jsonl", bad_mixture())
    with pytest.raises(AuditError) as error:
        prepare(path, dump=str(tmp_path / "dump.jsonl"), **settings)
    assert error.value.where == where and error.value.report.read == 11
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.jsonl"]
    # The hint's value is one that works.
    hint = error.value.hint.split()[0]
    assert hint.startswith(where)
    value = float(hint.split("=")[1])
    prepare(path, **{where.removeprefix("data."): value})


def test_nothing_supervised_is_always_an_error_that_says_why(write, prepare, tmp_path):
    with pytest.raises(AuditError, match="empty instruction: 3"):
        prepare(write("x.json", [{"instruction": "", "input": "", "output": "a"}] * 3))
    with pytest.raises(AuditError, match="no supervised tokens"):
        prepare(write("y.json", [chat("q " * 300, "a")]))
    assert not (tmp_path / "dataset").exists()


def test_print_audit_marks_the_supervised_text_with_and_without_colour(write, prepare):
    import io

    from rich.console import Console

    from research.core.data.audit import print_audit

    report = prepare(write("x.jsonl", bad_mixture()))
    plain, colour = io.StringIO(), io.StringIO()
    print_audit(report, Console(file=plain, width=100))
    print_audit(report, Console(file=colour, width=100, force_terminal=True, color_system="standard"))
    answer = bad_mixture()[0]["messages"][1]["content"]
    assert f"⟦{answer}<|im_end|>⟧" in plain.getvalue()
    assert f"\x1b[1;32m{answer}<|im_end|>\x1b[0m" in colour.getvalue() and "⟦" not in colour.getvalue()
    for part in ("records read", "empty instruction", "tokens cut off", "supervised", "masked", "full"):
        assert part in plain.getvalue()


# --- settings and files that cannot work ---


def test_settings_that_cannot_work_are_refused(write, prepare, tmp_path):
    path = write("x.jsonl", records(5))
    with pytest.raises(ConfigError, match="longer than the model's 64"):
        prepare(path, model_length=64)
    with pytest.raises(ConfigError, match="did you mean assistant"):
        prepare(path, supervise="asistant")
    with pytest.raises(DataError, match=r"record|tokens"):
        prepare(path, seq_length=16, on_long="error")
    assert not (tmp_path / "dataset").exists()


def test_a_vocabulary_larger_than_the_models_is_refused(write, prepare, tmp_path):
    with pytest.raises(DataError, match="does not exist in the model: it has 300"):
        prepare(write("x.jsonl", records(5)), vocab_size=300)
    assert not (tmp_path / "dataset").exists()


def test_a_malformed_record_in_the_middle_leaves_nothing(write, prepare, tmp_path):
    lines = [json.dumps(record) for record in records(600)]
    lines[599] = lines[599][:-5]
    path = write("x.jsonl", "\n".join(lines))
    with pytest.raises(DataError) as error:
        prepare(path, workers=2, dump=str(tmp_path / "dump.jsonl"))
    assert error.value.where == f"{path}:600"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.jsonl"]


def test_a_folder_that_another_process_writes_is_refused(write, prepare, tmp_path):
    path = write("x.jsonl", records(5))
    with writing(tmp_path / "dataset"), pytest.raises(DataError, match=f"process {os.getpid()} is writing"):
        prepare(path)


def test_a_dataset_is_replaced_and_any_other_folder_is_not(write, prepare, tmp_path):
    first = digest(prepare(write("a.jsonl", records(20))).folder)
    second = digest(prepare(write("b.jsonl", records(20, seed=1))).folder)
    assert first != second == digest(tmp_path / "dataset")
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="not a dataset folder"):
        prepare(write("c.jsonl", records(5)), other)
    assert (other / "thesis.txt").read_text() == "precious"


def test_a_failed_run_keeps_the_old_dataset(write, prepare, tmp_path):
    before = digest(prepare(write("a.jsonl", records(20))).folder)
    with pytest.raises(DataError):
        prepare(write("b.jsonl", '{"messages": ['))
    assert digest(tmp_path / "dataset") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "dataset"]


def test_what_a_killed_run_left_is_cleaned_up_and_recovered(write, prepare, tmp_path):
    prepare(write("a.jsonl", records(20)))
    os.rename(tmp_path / "dataset", tmp_path / ".dataset.old")  # killed between the two renames
    (tmp_path / ".dataset.partial").mkdir()
    (tmp_path / ".dataset.partial" / "half").write_text("x")
    with pytest.raises(DataError):
        prepare(write("b.jsonl", "{"))
    assert (tmp_path / "dataset" / "meta.json").exists()
    assert not (tmp_path / ".dataset.partial").exists()


def run_python(code, *args, **more):
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **more)


_PREPARE = """
import resource, sys
from research.core.config.schema import DataConfig
from research.core.data.prepare import prepare_dataset
from research.core.errors import run_cli
from research.core.text.builtin import builtin_tokenizer
from research.core.text.template import get_template

def main(argv):
    source, folder, seq_length, limit = argv
    if int(limit):
        tokenizer = builtin_tokenizer()
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    cfg = DataConfig(source=source, seq_length=int(seq_length), workers=2, on_long="truncate")
    report = prepare_dataset(cfg, builtin_tokenizer(), get_template("qwen2_5"), folder,
                             model_length=None, vocab_size=None)
    # Not ru_maxrss: that starts from the size of the process that started this one.
    status = open("/proc/self/status").read()
    own = int(status.split("VmHWM:")[1].split()[0])
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(report.read, own // 1024, worker // 1024)

sys.exit(run_cli(main))
"""


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(write, tmp_path):
    """A file-size limit refuses writes as a full disk does: with an error from the operating system."""
    path = write("x.jsonl", records(3000))
    done = run_python(_PREPARE, path, tmp_path / "dataset", 128, 100_000)
    assert done.returncode == 2, done.stderr
    assert "no space left" in done.stderr and "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["array", "lines", "text"])
def test_memory_stays_small_for_a_large_file(tmp_path, kind):
    """240 MB of source, read and tokenised by two workers: main process and both workers stay under 600 MB together."""
    size, path = 240 << 20, tmp_path / ("x.txt" if kind == "text" else "x.json")
    if kind == "text":
        block = (b"word " * 200 + b"\n") * 100 + b" " * 7_000_000 + b"\n"
        with open(path, "wb") as file:
            while file.tell() < size:
                file.write(block)
    else:
        notes = "n" * 20_000  # a field that is read and not used, so that the test is about memory, not about time
        line = json.dumps({**chat("What is it?", "It is what it is. " * 3), "notes": notes}).encode()
        separator = b",\n" if kind == "array" else b"\n"
        with open(path, "wb") as file:
            file.write(b"[" if kind == "array" else b"")
            while file.tell() < size:
                file.write(line + separator)
            file.write(line + (b"]" if kind == "array" else b""))
    done = run_python(_PREPARE, path, tmp_path / "dataset", 512, 0)
    path.unlink()
    assert done.returncode == 0, done.stderr
    read, own, worker = map(int, done.stdout.splitlines()[-1].split())  # progress lines come before
    assert read >= 1 if kind == "text" else read > 11_000
    assert own + 2 * worker < 600, f"main {own} MB, each worker {worker} MB"


# --- a prepared folder that is used again ---


def test_a_prepared_folder_is_refused_when_it_does_not_fit(write, prepare, tokenizer, template):
    folder = prepare(write("x.jsonl", records(20))).folder
    cfg = DataConfig(folder=str(folder), seq_length=128, eval_records=0, supervise="last")
    limits = {"model_length": 4096, "vocab_size": 3072}
    said = []
    assert open_prepared(cfg, tokenizer, template, log=said.append, **limits) == folder
    assert said == [f"{folder} was made with data.supervise=assistant; data.supervise=last has no effect"]
    for kind, override in (("vocabulary", {"tokenizer": "0" * 64}), ("template", {"template": "0" * 64})):
        with pytest.raises(DataError, match=kind):
            check_dataset(folder, **override)
    with pytest.raises(DataError, match="sequence length"):
        open_prepared(DataConfig(folder=str(folder), seq_length=256), tokenizer, template, **limits)
    with pytest.raises(DataError, match="ids"):
        open_prepared(cfg, tokenizer, template, model_length=4096, vocab_size=100)
    with pytest.raises(ConfigError, match="longer than the model's"):
        open_prepared(cfg, tokenizer, template, model_length=64, vocab_size=3072)
    with pytest.raises(DataError, match="not a finished dataset"):
        open_prepared(DataConfig(folder=str(folder.parent), seq_length=128), tokenizer, template, **limits)
    tokens = folder / "train" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"tokens\.bin"):
        PackedDataset(folder / "train")


@pytest.mark.slow
def test_real_alpaca_records_with_the_real_vocabulary(shared_data, tmp_path, prepare, monkeypatch):
    """2,000 of the 52,002; their token count follows from transformers' fast tokenizer on the rendered text."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, normalizers, pre_tokenizers

    from research.core.data.messages import alpaca_prompt
    from research.core.data.prepare import prepare_dataset
    from research.core.text.template import get_template
    from research.core.text.tokenizer import load_tokenizer

    folder = shared_data / "tokenizer_qwen"
    ours, template = load_tokenizer(folder, "qwen2_5"), get_template("qwen2_5")
    path = shared_data / "alpaca" / "alpaca_data.json.gz"
    dump = tmp_path / "d.jsonl"
    cfg = DataConfig(source=str(path), seq_length=512, max_records=2000, workers=2, dump=str(dump))
    report = prepare_dataset(cfg, ours, template, tmp_path / "d", model_length=32768, vocab_size=151936)
    assert report.splits["train"]["density"] > 0.98

    from tokenizers import Regex

    facts = json.loads((folder / "special_tokens.json").read_text())
    fast = Fast(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(facts["pre_tokenizer_regex"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    with gzip.open(path) as file:
        raw = json.load(file)[:2000]
    kept = [record for record in raw if record["output"].strip()]
    system = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    lines = read_dump(dump)
    assert len(lines) == len(kept)
    for line, record in zip(lines, kept):
        prompt = alpaca_prompt(record["instruction"], record["input"])
        head = f"{system}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        whole = fast.encode(f"{head}{record['output']}<|im_end|>\n").ids
        assert line["input_ids"] == whole[:512]
        start = len(fast.encode(head).ids)
        if record["output"][0] != "\n":
            assert line["labels"] == ([-100] * start + whole[start:-1] + [-100])[: len(line["labels"])]
