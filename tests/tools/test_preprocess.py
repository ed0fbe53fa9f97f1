"""The documents' data scripts: their commands, what they write to the last token, and how they refuse bad input."""

from __future__ import annotations

import base64
import gzip
import json
import runpy
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from research.core.data.mindrecord.read import MindRecord
from research.core.data.sources import Where
from research.core.errors import run_cli
from research.core.text.builtin import builtin_tokenizer
from research.tasks.preprocess_scripts import chatml_alpaca, preprocess, qwen_alpaca, sharegpt_alpaca
from tests.conftest import REPO

ALPACA = [
    {"instruction": "Give three tips.", "input": "", "output": "One.\nTwo."},
    {"instruction": "Translate.", "input": "good day", "output": "你好"},
    {"instruction": "Why?", "input": "Because", "output": ""},
    {"instruction": "", "input": "no instruction", "output": "x"},
    {"instruction": "Say é", "output": "é 3"},
]
PROMPTS = ["Give three tips.", "Translate: good day", "Why?: Because", None, "Say é"]
SYSTEM = "You are a helpful assistant."


def read(path) -> list[dict]:
    """Rows by our reader; another test compares it with MindSpore's."""
    file = MindRecord(path)
    rows = []
    for number, row in enumerate(file.index(), 1):
        blobs = file.blobs(row, Where(str(path), None, number))
        rows.append({name: file.array(name, blob).tolist() for name, blob in blobs.items()})
    return rows


def chatml(messages) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def turns(prompt, answer, system=None):
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with vocab.json and merges.txt of a few thousand tokens."""
    folder = tmp_path_factory.mktemp("vocabulary")
    builtin_tokenizer().save(folder)
    return folder


@pytest.fixture
def go(small, tmp_path, capsys):
    """go(records, *words, status=0) runs the Qwen1.5 script on a JSON Lines file; returns what it said."""

    def run(records, *words, status=0, family="qwen1_5", output="x.mindrecord"):
        source = tmp_path / "x.jsonl"
        if records is not None:
            source.write_text("".join(json.dumps(record) + "\n" for record in records))
        flags = ["--input_glob", str(source), "--vocab_file", str(small / "vocab.json"), "--merges_file"]
        flags += [str(small / "merges.txt"), "--seq_length", "40", "--workers", "1"]
        flags += ["--output_file", str(tmp_path / output)]
        found = run_cli(partial(preprocess, family), [*flags, *map(str, words)])
        said = capsys.readouterr().err
        assert found == status, said
        return said

    return run


# --- alpaca_converter.py ---


def test_qwen_converter_writes_the_originals_bytes(tmp_path, capsys):
    source, output = tmp_path / "alpaca.json", tmp_path / "out" / "conversation.json"
    source.write_text(json.dumps(ALPACA, indent=1))
    assert run_cli(qwen_alpaca, ["--data_path", str(source), "--output_path", str(output)]) == 0
    expected = [
        {
            "id": str(number),
            "conversations": [{"from": "user", "value": prompt}, {"from": "assistant", "value": record["output"]}],
        }
        for number, (prompt, record) in enumerate(zip(PROMPTS, ALPACA), 1)
        if prompt
    ]
    assert output.read_text() == json.dumps(expected, indent=2)
    said = capsys.readouterr().err
    assert f"dropped: 1 records, empty instruction (first: {source}:17)" in said and "4 records" in said


def test_the_other_converters_write_the_originals_bytes(tmp_path):
    source = tmp_path / "alpaca.json.gz"
    source.write_bytes(gzip.compress(json.dumps(ALPACA).encode()))
    kept = [(prompt, record["output"]) for prompt, record in zip(PROMPTS, ALPACA) if prompt]
    words = ["--data_path", str(source), "--output_path", str(tmp_path / "messages.json")]
    assert run_cli(chatml_alpaca, words) == 0
    lines = [json.dumps({"type": "chatml", "messages": turns(*pair, SYSTEM)}) + "\n" for pair in kept]
    assert (tmp_path / "messages.json").read_text() == "".join(lines)
    words[-1] = str(tmp_path / "dynamic.json")
    assert run_cli(sharegpt_alpaca, words) == 0
    expected = [
        {"type": "chatml", "conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]}
        for a, b in kept
    ]
    assert (tmp_path / "dynamic.json").read_text() == json.dumps(expected, ensure_ascii=False, indent=2)


def test_converter_refuses_other_records_and_existing_outputs(tmp_path, capsys):
    source, output = tmp_path / "alpaca.jsonl", tmp_path / "out.json"
    source.write_text(json.dumps({"messages": turns("a", "b")}))
    words = ["--data_path", str(source), "--output_path", str(output)]
    assert run_cli(qwen_alpaca, words) == 2 and not output.exists()
    assert "the records are of the format messages, not Alpaca's" in capsys.readouterr().err
    source.write_text("".join(json.dumps(r) + "\n" for r in ALPACA))
    assert run_cli(qwen_alpaca, words) == 0
    assert run_cli(qwen_alpaca, words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run_cli(qwen_alpaca, [*words, "--overwrite"]) == 0
    source.write_text(json.dumps(ALPACA[0]) + "\n" + json.dumps({"instruction": 3}) + "\n")
    before = output.read_text()
    assert run_cli(qwen_alpaca, [*words, "--overwrite"]) == 2
    assert f"{source}:2: 'instruction' must be a string" in capsys.readouterr().err
    assert output.read_text() == before and sorted(p.name for p in tmp_path.iterdir()) == ["alpaca.jsonl", "out.json"]


# --- what is written, beside the published tokenisers ---


@pytest.fixture(scope="session")
def tiktoken_qwen(shared_data):
    """Qwen v1's published encoding."""
    import tiktoken

    folder = shared_data / "tokenizer_qwen"
    facts = json.loads((folder / "special_tokens.json").read_text(encoding="utf-8"))
    lines = (folder / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    specials = facts["families"]["qwen_v1"]["special_tokens"]
    return tiktoken.Encoding("q", pat_str=facts["pre_tokenizer_regex"], mergeable_ranks=ranks, special_tokens=specials)


def first_generation_row(encoding, conversation, width):
    """ids, labels, mask turn by turn, as the Qwen v1 fine-tuning script lays them out."""
    start, end, pad, newline = 151644, 151645, 151643, encoding.encode_ordinary("\n")
    role = {name: encoding.encode_ordinary(name) for name in ("system", "user", "assistant")}
    ids, labels = [], []
    for turn in [{"from": "system", "value": SYSTEM}, *conversation]:
        content = encoding.encode_ordinary(turn["value"])
        ids += [start, *role[turn["from"]], *newline, *content, end, *newline]
        hidden = [-100] * (len(role[turn["from"]]) + 1)
        labels += [start, *hidden, *(content if turn["from"] == "assistant" else [-100] * len(content)), end, *newline]
    ids += [pad] * (width - len(ids))
    labels += [-100] * (width - len(labels))
    ids, labels = ids[:width], labels[:width]
    return {"input_ids": ids, "labels": labels, "attention_mask": [int(token != pad) for token in ids]}


@pytest.mark.slow
def test_qwen_preprocess_writes_the_ids_and_labels_of_the_qwen_fine_tuning_script(
    shared_data, tiktoken_qwen, tmp_path, capsys
):
    raw = json.loads(gzip.decompress((shared_data / "alpaca" / "alpaca_data.json.gz").read_bytes()))[:1500]
    source, conversation = tmp_path / "alpaca.json", tmp_path / "conversation.json"
    source.write_text(json.dumps(raw))
    assert run_cli(qwen_alpaca, ["--data_path", str(source), "--output_path", str(conversation)]) == 0
    records = json.loads(conversation.read_text())
    more = json.loads((shared_data / "sft_format" / "qwen_v1_conversations.json").read_text())
    several = [turn for record in more for turn in record["conversations"]]
    records += [*more, {"id": "many", "conversations": several * 3}]
    conversation.write_text(json.dumps(records, ensure_ascii=False))
    words = ["--input_glob", str(tmp_path / "conv*.json"), "--output_file", str(tmp_path / "x.mindrecord")]
    words += ["--model_file", str(shared_data / "tokenizer_qwen" / "qwen.tiktoken"), "--seq_length", "127"]
    assert run_cli(partial(preprocess, "qwen"), words) == 0
    rows = read(tmp_path / "x.mindrecord")
    expected = [first_generation_row(tiktoken_qwen, record["conversations"], 128) for record in records]
    assert len(rows) == len(expected) == 1503
    assert rows == [{name: row[name] for name in sorted(row)} for row in expected]
    whole = [first_generation_row(tiktoken_qwen, record["conversations"], 4096) for record in records]
    cut = sum(sum(row["attention_mask"]) > 128 for row in whole)
    assert f"records truncated {cut}" in " ".join(capsys.readouterr().err.split()) and cut > 100


@pytest.mark.slow
def test_later_preprocess_scripts_label_every_token_that_transformers_makes(shared_data, tmp_path, capsys):
    from transformers import Qwen2Tokenizer

    folder = shared_data / "tokenizer_qwen"
    oracle = Qwen2Tokenizer.from_pretrained(folder, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    raw = json.loads(gzip.decompress((shared_data / "alpaca" / "alpaca_data.json.gz").read_bytes()))[:800]
    source, messages = tmp_path / "alpaca.json", tmp_path / "messages.json"
    source.write_text(json.dumps(raw))
    assert run_cli(chatml_alpaca, ["--data_path", str(source), "--output_path", str(messages)]) == 0
    records = [json.loads(line)["messages"] for line in messages.read_text().splitlines()]
    records.append(turns("no system turn", "none is added"))
    with open(messages, "a") as file:
        file.write(json.dumps({"type": "chatml", "messages": records[-1]}) + "\n")
    expected, cut = [], 0
    for record in records:
        ids = oracle(chatml(record), add_special_tokens=False).input_ids
        cut += len(ids) > 128
        ids, rest = ids[:128], 128 - len(ids[:128])
        row = {"attention_mask": [1] * len(ids) + [0] * rest, "input_ids": ids + [151643] * rest}
        expected.append({**row, "target_ids": ids + [-100] * rest})
    words = ["--input_glob", str(messages), "--output_file", str(tmp_path / "x.mindrecord"), "--seq_length", "127"]
    words += ["--vocab_file", str(folder / "vocab.json"), "--merges_file", str(folder / "merges.txt")]
    for family in ("qwen1_5", "qwen2", "qwen2_5"):
        assert run_cli(partial(preprocess, family), [*words, "--overwrite"]) == 0
        assert read(tmp_path / "x.mindrecord") == expected, family
        said = " ".join(capsys.readouterr().err.split())
        assert f"records truncated {cut}" in said and cut > 50


@pytest.mark.slow
def test_wiki_blocks_equal_the_whole_file_cleaned_and_tokenised_by_transformers(shared_data, tmp_path, capsys):
    from transformers import Qwen2Tokenizer

    from tests.core.data.test_wikitext import whole_file

    folder, path = shared_data / "tokenizer_qwen", shared_data / "wikitext2" / "wiki.valid.txt"
    oracle = Qwen2Tokenizer.from_pretrained(folder)
    tokens = []
    for paragraph in whole_file(path.read_text(encoding="utf-8")):
        tokens += oracle(paragraph, add_special_tokens=False).input_ids
    words = ["--dataset_type", "wiki", "--input_glob", str(path), "--seq_length", "512", "--repeat", "2"]
    words += ["--vocab_file", str(folder / "vocab.json"), "--merges_file", str(folder / "merges.txt")]
    assert run_cli(partial(preprocess, "qwen1_5"), [*words, "--output_file", str(tmp_path / "w.mindrecord")]) == 0
    rows = read(tmp_path / "w.mindrecord")
    count, left = divmod(2 * len(tokens), 513)
    assert [set(row) for row in rows] == [{"input_ids"}] * count and count > 800
    assert np.concatenate([row["input_ids"] for row in rows]).tolist() == (tokens * 2)[: count * 513]
    assert f"{left:,} tokens left over" in capsys.readouterr().err


# --- the other supervision, counts, several files ---


def test_supervise_assistant_labels_the_answer_and_its_end_only(go, tmp_path):
    tokenizer = builtin_tokenizer()
    go([{"messages": turns("one two", "three", "Be brief.")}], "--supervise", "assistant")
    (row,) = read(tmp_path / "x.mindrecord")
    answer = [*tokenizer.encode("three"), tokenizer.im_end_id]
    assert [label for label in row["target_ids"] if label != -100] == answer
    place = row["target_ids"].index(answer[0])
    assert row["input_ids"][place : place + len(answer)] == answer and len(row["input_ids"]) == 41
    assert sum(row["attention_mask"]) == place + len(answer) + 1  # and the newline


def test_dropped_and_truncated_records_are_counted_and_the_table_shows_them(go, tmp_path):
    records = [{"messages": turns(*pair)} for pair in (("q", "a"), ("", "a"), ("q", "word " * 99), ("q", ""))]
    said = " ".join(go(records).split())
    for part in ("records read 4", "records dropped 1", "empty instruction 1 first: ", "records truncated 1"):
        assert part in said, part
    assert "3 records of 41 tokens (input_ids, target_ids, attention_mask; int32)" in said
    rows = read(tmp_path / "x.mindrecord")
    assert len(rows) == 3 and sum(rows[1]["attention_mask"]) == 41
    assert rows[2]["target_ids"][:3] == rows[2]["input_ids"][:3]  # an empty answer stays: the originals trained it


def test_partitions_repeats_globs_and_gzip(go, tmp_path):
    for n in range(3):
        lines = [json.dumps({"messages": turns(f"q{n}{i}", "a")}) + "\n" for i in range(2)]
        (tmp_path / f"part{n}.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    words = ["--input_glob", tmp_path / "part*.gz", "--file_partition", "2", "--repeat", "3"]
    go(None, *words)
    names = sorted(p.name for p in tmp_path.glob("x.*"))
    assert names == ["x.mindrecord0", "x.mindrecord0.db", "x.mindrecord1", "x.mindrecord1.db"]
    rows = [row["input_ids"] for i in (0, 1) for row in read(tmp_path / f"x.mindrecord{i}")]
    assert len(rows) == 18 and rows[:6] == rows[6:12] == rows[12:]
    tokenizer = builtin_tokenizer()
    assert [tokenizer.decode(row).split("user\n")[1][:3] for row in rows[:6]] == [
        "q00",
        "q01",
        "q10",
        "q11",
        "q20",
        "q21",
    ]


def test_control_tokens_in_a_text_stay_text_unless_allowed(go, tmp_path):
    records, tokenizer = [{"messages": turns("say <|endoftext|>", "<|endoftext|>!")}], builtin_tokenizer()
    go(records)
    (plain,) = read(tmp_path / "x.mindrecord")
    assert tokenizer.eos_id not in plain["input_ids"][: sum(plain["attention_mask"])]
    go(records, "--allow_special", "--overwrite")
    (row,) = read(tmp_path / "x.mindrecord")
    real = sum(row["attention_mask"])
    assert row["input_ids"][:real].count(tokenizer.eos_id) == 2  # real tokens, unlike the padding with the same id
    labels = [label for token, label in zip(row["input_ids"][:real], row["target_ids"]) if token == tokenizer.eos_id]
    assert labels == [-100, -100]  # the model of the originals masked the padding id wherever it was


def test_training_on_the_file_is_the_same_job_as_on_the_json(go, tmp_path, small, capsys):
    """tests/core/data/mindrecord has the round trip of datasets; here: down to `make data` and its settings."""
    from research.core.data.dataset import PackedDataset
    from research.tasks.cli import main

    records = [{"messages": turns(f"question {i}", f"answer {i}", SYSTEM)} for i in range(30)]
    go(records, "--supervise", "assistant", family="qwen2_5")
    for name, source in (("json", tmp_path / "x.jsonl"), ("mindrecord", tmp_path / "x.mindrecord")):
        words = ["task=data", f"run={tmp_path / name}", f"data={source}", "data.seq_length=40", f"tokenizer={small}"]
        assert main([*words, "model=qwen2_5_tiny", "data.workers=1"]) == 0
    stored = [PackedDataset(tmp_path / name / "dataset" / "train").stored.tolist() for name in ("json", "mindrecord")]
    assert stored[0] == stored[1] and len(stored[0]) > 300


# --- bad input ---


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--seq_lenght", "40"], "did you mean --seq_length?"),
        (["stray"], "'stray' belongs to no flag"),
        (["--dataset_type", "chat"], "invalid choice: 'chat'"),
        (["--seq_length", "long"], "invalid int value: 'long'"),
        (["--seq_length", "0"], "--seq_length 0: must be at least 1"),
        (["--repeat", "0"], "--repeat 0: must be at least 1"),
        (["--file_partition", "0"], "0 is not between 1 and 1000"),
        (["--file_partition", "9"], "2 records cannot fill 9 files"),
        (["--vocab_file", "/nowhere/vocab.json"], "/nowhere/vocab.json: vocabulary file not found"),
        (["--merges_file", "/nowhere/merges.txt"], "/nowhere/merges.txt: merges file not found"),
        (["--input_glob", "/nowhere/x.json"], "data source not found"),
        (["--input_glob", "/nowhere/*.json"], "no file matches this pattern"),
        (["--dataset_type", "wiki"], "'text' must be a string"),
        (["--dataset_type", "wiki", "--supervise", "last"], "has no effect on running text"),
    ],
)
def test_wrong_words_are_one_clear_error_with_status_2_and_no_file(go, tmp_path, words, says):
    said = go([{"messages": turns("q", "a")}] * 2, *words, status=2)
    assert says in said and "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_malformed_record_names_its_line_and_leaves_no_file(go, tmp_path):
    records = [{"messages": turns("q", "a")}] * 2 + [{"messages": [{"role": "usr", "content": "x"}]}]
    said = go(records, status=2)
    assert f"{tmp_path}/x.jsonl:3: message 1: role 'usr' is not known" in said and "did you mean user?" in said
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_an_existing_output_is_refused_before_any_work_and_replaced_on_request(go, tmp_path):
    records = [{"messages": turns("q", "a")}]
    go(records)
    before = (tmp_path / "x.mindrecord").read_bytes()
    said = go([{"messages": 3}], status=2)  # which would fail if it were read
    assert "x.mindrecord: exists already\n  try: --overwrite" in said
    assert (tmp_path / "x.mindrecord").read_bytes() == before
    go(records * 5, "--overwrite")
    assert len(read(tmp_path / "x.mindrecord")) == 5
    said = go(records, "--file_partition", "2", status=2)
    assert "x.mindrecord: exists already" in said  # files of another number would lie beside the old ones


def test_text_and_mindrecord_are_no_conversations(go, tmp_path):
    (tmp_path / "notes.txt").write_text("Just text.\n")
    assert "--dataset_type wiki" in go(None, "--input_glob", tmp_path / "notes.txt", status=2)
    go([{"messages": turns("q", "a")}], output="a.mindrecord")
    said = go(None, "--input_glob", tmp_path / "a.mindrecord", status=2)
    assert "this is MindRecord already" in said


# --- the documents' own commands ---

COMMANDS = {
    # qwen_mindformers.md, at the repository's root
    ("", "qwen"): """
        {python} research/qwen/alpaca_converter.py \\
        --data_path {path}/alpaca_data.json \\
        --output_path {path}/alpaca-data-conversation.json
        {python} research/qwen/qwen_preprocess.py \\
        --input_glob {path}/alpaca-data-conversation.json \\
        --model_file {vocabulary}/qwen.tiktoken \\
        --seq_length 2048 \\
        --output_file {path}/alpaca.mindrecord
    """,
    # qwen1_5_mindformers.md, in research/qwen1_5
    ("research/qwen1_5", "qwen1_5"): """
        {python} alpaca_converter.py \\
         --data_path {path}/alpaca_data.json \\
         --output_path {path}/alpaca-data-messages.json
        {python} qwen1_5_preprocess.py \\
         --dataset_type 'qa' \\
         --input_glob {path}/alpaca-data-messages.json \\
         --vocab_file {vocabulary}/vocab.json \\
         --merges_file {vocabulary}/merges.txt \\
         --seq_length 4096 \\
         --output_file {path}/alpaca.mindrecord
        {python} qwen1_5_preprocess.py \\
         --dataset_type 'wiki' \\
         --input_glob {path}/wiki.train.tokens \\
         --vocab_file {vocabulary}/vocab.json \\
         --merges_file {vocabulary}/merges.txt \\
         --seq_length 32768 \\
         --output_file {path}/wiki.mindrecord
    """,
    # qwen1_5_910a_mindformers.md, in research
    ("research", "qwen1_5"): """
        {python} qwen1_5/alpaca_converter.py \\
        --data_path {path}/alpaca_data.json \\
        --output_path {path}/alpaca-data-messages.json
        # data_path: where the data lie
        {python} qwen1_5/qwen1_5_preprocess.py \\
        --input_glob {path}/alpaca-data-messages.json \\
        --vocab_file {vocabulary}/vocab.json \\
        --merges_file {vocabulary}/merges.txt \\
        --seq_length 2048 \\
        --output_file {path}/alpaca.mindrecord
    """,
}


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "family"), list(COMMANDS), ids=[folder or "root" for folder, _ in COMMANDS])
def test_the_documents_commands_work_as_they_stand(shared_data, tmp_path, folder, family, monkeypatch):
    pytest.importorskip("mindspore", reason="reads the files as the documents' users do")
    from mindspore.dataset import MindDataset

    (tmp_path / "alpaca_data.json").write_text(json.dumps(ALPACA * 3))
    (tmp_path / "wiki.train.tokens").write_bytes((shared_data / "wikitext103" / "wiki.valid.tokens").read_bytes())
    python, handed = sys.executable, tmp_path / "words"
    if folder:  # the shell hands the words over and the programs run here; at the root they are started as they stand
        python = tmp_path / "hand_over"
        python.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" >> '{handed}'\necho >> '{handed}'\n")
        python.chmod(0o755)
    names = {"python": python, "path": tmp_path, "vocabulary": shared_data / "tokenizer_qwen"}
    script = "set -e\n" + COMMANDS[folder, family].format(**names)
    done = subprocess.run(["bash", "-c", script], cwd=REPO / folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(REPO / folder)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the programs put the repository there
    for line in handed.read_text().splitlines() if folder else ():
        monkeypatch.setattr(sys, "argv", line.split("\0")[:-1])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(sys.argv[0], run_name="__main__")
        assert not end.value.code, sys.argv
    label, length = ("labels", 2049) if family == "qwen" else ("target_ids", 4097 if "4096" in script else 2049)
    data = MindDataset(str(tmp_path / "alpaca.mindrecord"), columns_list=["input_ids", label, "attention_mask"])
    rows = list(data.create_dict_iterator(num_epochs=1, output_numpy=True))
    assert len(rows) == 12  # three of the fifteen have no instruction
    for row in rows:
        assert [(array.dtype, array.shape) for array in row.values()] == [(np.dtype("int32"), (length,))] * 3
    if "wiki" in script:
        rows = list(MindDataset(str(tmp_path / "wiki.mindrecord")).create_dict_iterator(output_numpy=True))
        assert [(set(row), row["input_ids"].shape) for row in rows] == [({"input_ids"}, (32769,))] * len(rows) and rows


def test_a_comment_behind_a_backslash_is_left_out_with_a_word_about_it(small, tmp_path):
    """qwen1_5_910a_mindformers.md writes `--seq_length 2048 \\ #...`: the shell hands the comment over as a word, and
    takes the line after it for another command."""
    (tmp_path / "x.json").write_text(json.dumps({"messages": turns("q", "a")}) + "\n")
    script = f"""
        {sys.executable} {REPO}/research/qwen1_5/qwen1_5_preprocess.py \\
        --input_glob x.json \\
        --vocab_file {small}/vocab.json \\
        --merges_file {small}/merges.txt \\
        --seq_length 48 \\ #此样例lora用的2k数据，finetune用的4k数据，生成不同长度数据集修改此处
        --output_file /path/alpaca-messages.mindrecord
    """
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert "left out: '#此样例lora" in done.stderr and "their flags did not arrive here" in done.stderr
    assert "--output_file: " in done.stderr and done.returncode == 127  # the shell's own complaint
    assert len(read(tmp_path / "alpaca-fastchat-qwen.mindrecord")[0]["input_ids"]) == 49
