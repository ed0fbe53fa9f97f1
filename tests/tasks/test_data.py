"""`make data` as a user starts it: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from research.core.data.dataset import PackedDataset, read_meta
from research.tasks.cli import main


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "mine.jsonl"
    with open(path, "w") as file:
        for n in range(60):
            record = {"instruction": f"Say {n}.", "input": "twice" if n % 2 else "", "output": f"{n} it is."}
            file.write(json.dumps(record if n != 7 else {**record, "instruction": " "}) + "\n")
    return path


def words(run: Path, source: Path, *more: str) -> list[str]:
    return ["task=data", f"run={run}", f"data={source}", "data.seq_length=128", "data.workers=1", *more]


def test_data_ends_with_the_audit_the_folder_and_the_next_command(tmp_path, source, capsys):
    run, dump = tmp_path / "run", tmp_path / "records.jsonl"
    assert main(words(run, source, f"data.dump={dump}")) == 0
    said = capsys.readouterr().err
    for part in ("records read", "empty instruction", f"{source}:8", "⟦0 it is.<|im_end|>⟧", f"dataset: {run}/dataset"):
        assert part in said, part
    assert f"ARGS='data.folder={run}/dataset data.seq_length=128'" in said
    assert len(dump.read_text().splitlines()) == 59
    meta = read_meta(run / "dataset")
    assert meta["splits"]["train"]["documents"] + meta["splits"]["eval"]["documents"] == 59
    assert json.loads((run / "report.json").read_text())["read"] == 60
    assert len(PackedDataset(run / "dataset" / "train")) > 0
    for name in ("config.yaml", "command.txt", "log.txt"):
        assert (run / name).read_text()


def test_output_names_the_dataset_folder_and_a_prepared_one_is_checked(tmp_path, source, capsys):
    folder = tmp_path / "mine"
    assert main(words(tmp_path / "a", source, f"data.output={folder}")) == 0
    assert (folder / "meta.json").exists() and not (tmp_path / "a" / "dataset").exists()
    assert main(words(tmp_path / "b", source, f"data.folder={folder}")) == 0
    capsys.readouterr()
    assert main(words(tmp_path / "c", source, f"data.folder={folder}", "data.seq_length=64")) == 2
    assert "prepared with 128, data.seq_length=64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("data.max_dropped=0", "data.max_dropped=0.017"),
        ("data.seq_length=4096", "longer than the model's 2048 positions"),
        ("data.on_long=error data.seq_length=20", "data.on_long=truncate"),
        ("data.supervise=asistant", "did you mean assistant?"),
    ],
)
def test_bad_input_is_one_clear_error_with_status_2_and_no_dataset(tmp_path, source, capsys, setting, says):
    run = tmp_path / "run"
    assert main(words(run, source, *setting.split())) == 2
    assert says in capsys.readouterr().err
    assert not (run / "dataset").exists()


def test_the_audit_is_shown_before_its_findings_stop_the_run(tmp_path, source, capsys):
    assert main(words(tmp_path / "run", source, "data.max_dropped=0")) == 2
    said = capsys.readouterr().err
    assert 0 < said.index("records read") < said.index("1 of 60 records (1.67%) were dropped")


def test_mindrecord_is_written_beside_the_dataset_and_read_as_a_source(tmp_path, source, capsys):
    output = tmp_path / "out" / "x.mindrecord"
    more = [f"data.mindrecord={output}", "data.file_partition=2"]
    assert main(words(tmp_path / "a", source, *more)) == 0
    said = capsys.readouterr().err
    assert f"mindrecord: {output}0 .. x.mindrecord1, each with its .db" in said
    assert "(input_ids, target_ids, attention_mask; int32)" in said
    assert "data.packing=false writes one document a record" in said
    names = {f"{name}{end}" for name in ("x.mindrecord0", "x.mindrecord1", "x_eval.mindrecord") for end in ("", ".db")}
    assert {path.name for path in output.parent.iterdir()} == names
    assert main(words(tmp_path / "b", source, *more)) == 2
    assert "data.overwrite=true" in capsys.readouterr().err
    plain = [f"data.mindrecord={output}", "data.overwrite=true", "data.packing=false", "data.eval_records=0"]
    assert main(words(tmp_path / "c", source, *plain)) == 0
    assert {path.name for path in output.parent.iterdir()} == {
        "x.mindrecord",
        "x.mindrecord.db",
    }  # no stale held-out set
    assert main(words(tmp_path / "d", output, "data.packing=false", "data.eval_records=0")) == 0
    for name in ("tokens.bin", "documents.bin", "rows.bin"):
        ours = [(tmp_path / run / "dataset" / "train" / name).read_bytes() for run in ("c", "d")]
        assert ours[0] == ours[1]
    # A prepared folder can be written too, and the set's common name is enough to name it.
    more = [f"data.folder={tmp_path}/c/dataset", f"data.mindrecord={tmp_path}/y.mindrecord", "data.file_partition=3"]
    assert main(words(tmp_path / "e", source, *more)) == 0
    assert main(words(tmp_path / "f", tmp_path / "y.mindrecord", "data.eval_records=0")) == 0


@pytest.mark.slow
def test_training_on_mindrecord_has_the_losses_of_training_on_its_json(tmp_path, source):
    from research.core.run.metrics import read_metrics

    output = tmp_path / "x.mindrecord"
    more = ["data.packing=false", "data.eval_records=0", f"data.mindrecord={output}"]
    assert main(words(tmp_path / "data", source, *more)) == 0
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    small = [f"model.hf.{name}={size}" for name, size in {**sizes, "intermediate_size": 48}.items()]
    small += ["train.dtype=fp32", "train.lr=1e-3", "train.max_minutes=null", "train.epochs=null", "train.log_every=1"]
    losses = []
    for name, data in (("json", source), ("mindrecord", output)):
        steps = ["task=finetune", "train.steps=4", "device.threads=1", "data.eval_records=5"]
        assert main([*words(tmp_path / name, data, *small), *steps]) == 0
        losses.append([row["loss"] for row in read_metrics(tmp_path / name, "train")])
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_plain_text_becomes_blocks_of_input_ids(tmp_path, capsys):
    source, output = tmp_path / "x.txt", tmp_path / "x.mindrecord"
    source.write_text("One line of text.\n\n" * 200)
    assert main(words(tmp_path / "run", source, f"data.mindrecord={output}")) == 0
    said = capsys.readouterr().err
    assert "(input_ids; int32)" in said and "tokens left over" in said


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("data.overwrite=true", "data.overwrite=True: has no effect without data.mindrecord"),
        ("data.file_partition=2", "data.file_partition=2: has no effect without data.mindrecord"),
        ("data.mindrecord=x.mindrecord data.file_partition=0", "must be at least 1 and at most 1000"),
        ("data.mindrecord=x.mindrecord task=finetune", "only `make data` writes MindRecord"),
    ],
)
def test_mindrecord_settings_that_do_nothing_are_refused(tmp_path, source, capsys, setting, says):
    assert main(words(tmp_path / "run", source, *setting.split())) == 2
    assert says in capsys.readouterr().err


def test_a_mindrecord_of_another_length_family_or_without_index_ends_with_status_2(tmp_path, source, capsys):
    output = tmp_path / "x.mindrecord"
    assert main(words(tmp_path / "a", source, f"data.mindrecord={output}", "data.eval_records=0")) == 0
    capsys.readouterr()
    for more, says in (
        (["data.seq_length=64"], "data.seq_length=128, or the file made again with --seq_length 64"),
        (["model=qwen_tiny"], "qwen reads labels"),
        (["data.format=alpaca"], "this is MindRecord, data.format=alpaca is not"),
    ):
        assert main(words(tmp_path / "b", output, *more)) == 2
        said = capsys.readouterr().err
        assert says in said and "Traceback" not in said
    (tmp_path / "x.mindrecord.db").unlink()
    assert main(words(tmp_path / "b", output)) == 2
    assert "copy x.mindrecord.db from where x.mindrecord came from" in capsys.readouterr().err
    assert not (tmp_path / "b" / "dataset").exists()


def test_malformed_json_names_file_and_line(tmp_path, source, capsys):
    lines = source.read_text().splitlines()
    lines[40] = lines[40].replace('"output"', "output")
    source.write_text("\n".join(lines))
    assert main(words(tmp_path / "run", source)) == 2
    said = capsys.readouterr().err
    assert f"{source}:41: malformed JSON" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_vocabulary_of_another_family_is_refused(tmp_path, source, shared_data, capsys):
    more = [f"tokenizer={shared_data / 'tokenizer_qwen'}", "model.hf.vocab_size=3072"]
    assert main(words(tmp_path / "run", source, *more)) == 2
    assert "does not exist in the model" in capsys.readouterr().err
    assert not (tmp_path / "run" / "dataset").exists()
