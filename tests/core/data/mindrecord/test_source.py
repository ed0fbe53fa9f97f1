"""MindRecord as a source: it becomes the dataset that its JSON becomes, and what does not fit is told before any work."""

from __future__ import annotations

import json
import shutil
import sqlite3

import numpy as np
import pytest

from research.core.data.dataset import PackedDataset, read_meta
from research.core.data.mindrecord.columns import Note
from research.core.data.mindrecord.export import write_blocks, write_rows
from research.core.data.sources import expand_sources
from research.core.errors import DataError
from tests.core.data.conftest import chat
from tests.core.data.mindrecord.files import padded, write_file
from tests.core.data.test_prepare import digest, documents, records


def rows_of(n, width, label="target_ids", pad=0):
    return [padded([7, 8 + i, 9], [-100, 8 + i, 9], width, label, pad) for i in range(n)]


# --- the same job as on JSON ---


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_file_of_ours_becomes_the_dataset_that_its_json_becomes(write, prepare, tmp_path, packing, shards):
    source = write("x.jsonl", records(400))
    ours = prepare(source, tmp_path / "json", packing=False)
    write_rows(ours.folder / "train", tmp_path / "x.mindrecord", "qwen2_5", 129, shards=shards)
    straight = prepare(source, tmp_path / "again", packing=packing, eval_records=30)
    back = prepare(tmp_path / "x.mindrecord", tmp_path / "back", packing=packing, eval_records=30, workers=2)
    assert digest(back.folder) == digest(straight.folder)
    assert back.splits == straight.splits and back.splits["eval"]["documents"] > 10
    assert back.read == ours.splits["train"]["documents"] > 390 and back.formats == ["mindrecord"]
    assert any("data.supervise and data.system have no effect" in note for note in back.notes)


def test_packed_rows_are_read_as_one_document_each_and_that_is_said(write, prepare, tmp_path):
    ours = prepare(write("x.jsonl", records(100)), tmp_path / "json", packing=True)
    write_rows(ours.folder / "train", tmp_path / "x.mindrecord", "qwen2_5", 129)
    back = prepare(tmp_path / "x.mindrecord", tmp_path / "back")
    assert back.splits["train"]["documents"] == ours.splits["train"]["rows"]
    assert any("see each other" in note for note in back.notes)
    stored = [PackedDataset(report.folder / "train").stored for report in (ours, back)]
    assert sorted(np.abs(stored[0]).tolist()) == sorted(np.abs(stored[1]).tolist())


def test_blocks_of_text_become_documents_whose_every_token_but_the_first_is_trained(
    write, prepare, tmp_path, tokenizer
):
    text = "One two three. " * 200
    ours = prepare(write("x.txt", text), tmp_path / "text", seq_length=64, packing=False)
    written, left = write_blocks(ours.folder / "train", tmp_path / "x.mindrecord", 65)
    tokens = [*tokenizer.encode(text.strip()), tokenizer.eos_id]
    assert (written.rows, left) == divmod(len(tokens), 65)
    back = prepare(tmp_path / "x.mindrecord", tmp_path / "back", seq_length=65, packing=False)
    for number, (ids, labels) in enumerate(documents(back.folder)):
        assert list(ids) == tokens[number * 65 : (number + 1) * 65]
        assert list(labels) == [-100, *ids[1:]]


# --- what a row is taken for ---


def test_end_of_text_inside_a_text_is_trained_and_only_the_tail_is_padding(prepare, tokenizer, tmp_path):
    pad = tokenizer.pad_id
    ids = [5, pad, 6, 7, pad]  # the text has two end-of-text tokens of its own, the last at its end
    ours = padded(ids, [-100, pad, -100, 7, pad], 9, pad=pad)
    by_id = {**ours, "attention_mask": [1, 0, 1, 1, 0, 0, 0, 0, 0]}  # as the originals made the mask: from the ids
    report = prepare(write_file(tmp_path / "x.mindrecord", [ours, by_id]), seq_length=8, packing=False)
    first, second = documents(report.folder)
    assert first == ([5, pad, 6, 7, pad], [-100, pad, -100, 7, pad])
    assert second == ([5, pad, 6, 7], [-100, pad, -100, 7])


def test_a_record_of_seq_length_plus_one_loses_its_last_token_and_that_is_counted(prepare, tmp_path):
    full = padded(range(10, 19), [-100, *range(11, 19)], 9)
    path = write_file(tmp_path / "x.mindrecord", [full, *rows_of(1, 9)])
    report = prepare(path, tmp_path / "eight", seq_length=8)
    assert (report.truncated, report.truncated_tokens, report.longest) == (1, 1, 9)
    assert prepare(path, tmp_path / "nine", seq_length=9).truncated == 0


def test_rows_without_labels_or_with_padding_only_are_dropped_by_reason(prepare, tmp_path):
    silent, empty = padded([5, 6], [-100, -100], 9), padded([], [], 9)
    report = prepare(write_file(tmp_path / "x.mindrecord", [silent, *rows_of(2, 9), empty]), seq_length=8)
    assert report.dropped == {"nothing supervised": [2, f"{tmp_path}/x.mindrecord, record 1"]}
    assert report.splits["train"]["documents"] == 2


def test_without_a_mask_the_unlabelled_padding_at_the_end_goes(prepare, tokenizer, tmp_path):
    pad = tokenizer.pad_id
    row = {"input_ids": [5, 6, pad, 7, 8, pad, pad], "target_ids": [-100, 6, pad, 7, -100, -100, -100]}
    report = prepare(write_file(tmp_path / "x.mindrecord", [row]), seq_length=7, packing=False)
    assert documents(report.folder) == [([5, 6, pad, 7, 8], [-100, 6, pad, 7, -100])]


# --- which files are read ---


def test_one_file_of_a_set_or_its_common_name_stands_for_all_of_them(prepare, tmp_path):
    base = tmp_path / "x.mindrecord"
    write_file(base, rows_of(10, 9), shards=3)
    files = [tmp_path / f"x.mindrecord{i}" for i in range(3)]
    for given in (base, files[1], f"{files[2]},{files[0]}", f"{base}*", f"{tmp_path}"):
        assert expand_sources(str(given)) == files, given
    assert prepare(base, tmp_path / "d", seq_length=8).read == 10
    with pytest.raises(DataError, match="index of a MindRecord file"):
        expand_sources(f"{files[0]}.db")
    files[1].unlink()
    with pytest.raises(DataError, match=r"1 of the 3 files of this set are not beside it: x\.mindrecord1"):
        expand_sources(str(base))


def test_a_renamed_file_is_read_and_a_renamed_part_of_a_set_is_refused(prepare, tmp_path):
    write_file(tmp_path / "x.mindrecord", rows_of(3, 9))
    for suffix in ("", ".db"):
        shutil.move(tmp_path / f"x.mindrecord{suffix}", tmp_path / f"mine.mindrecord{suffix}")
    assert prepare(tmp_path / "mine.mindrecord", tmp_path / "d", seq_length=8).read == 3
    write_file(tmp_path / "y.mindrecord", rows_of(4, 9), shards=2)
    shutil.move(tmp_path / "y.mindrecord0", tmp_path / "z.mindrecord0")
    with pytest.raises(DataError, match=r"one of 2 files that were called y\.mindrecord0"):
        expand_sources(str(tmp_path / "z.mindrecord0"))


def test_a_file_under_any_name_is_known_by_its_content(prepare, tmp_path):
    write_file(tmp_path / "x.mindrecord", rows_of(3, 9))
    for suffix in ("", ".db"):
        shutil.move(tmp_path / f"x.mindrecord{suffix}", tmp_path / f"data.bin{suffix}")
    assert prepare(tmp_path / "data.bin", tmp_path / "d", seq_length=8).formats == ["mindrecord"]
    with pytest.raises(DataError, match=r"data\.format=alpaca is not"):
        prepare(tmp_path / "data.bin", tmp_path / "d", seq_length=8, format="alpaca")


# --- what does not fit ---


def refusal(prepare, path, **settings) -> DataError:
    with pytest.raises(DataError) as error:
        prepare(path, path.parent / "refused", **{"seq_length": 8, **settings})
    assert not (path.parent / "refused").exists()
    return error.value


def test_a_missing_index_is_named(prepare, tmp_path):
    path = write_file(tmp_path / "x.mindrecord", rows_of(3, 9))
    (tmp_path / "x.mindrecord.db").unlink()
    error = refusal(prepare, path)
    assert "its index x.mindrecord.db is not beside it" in error.what and "copy x.mindrecord.db" in error.hint


def test_an_index_of_another_file_or_a_damaged_one_is_refused(prepare, tmp_path):
    path = write_file(tmp_path / "x.mindrecord", rows_of(3, 9))
    other = write_file(tmp_path / "y.mindrecord", rows_of(4, 9))
    shutil.copy(f"{other}.db", f"{path}.db")
    error = refusal(prepare, path)
    assert "4 rows, x.mindrecord has 3" in error.what and error.where == f"{path}.db"
    longer = write_file(tmp_path / "z.mindrecord", [padded(range(9), [-100, *range(1, 9)], 9)] * 3)
    shutil.copy(f"{longer}.db", f"{path}.db")
    with sqlite3.connect(f"{path}.db") as index:
        index.execute("UPDATE INDEXES SET PAGE_OFFSET_BLOB = PAGE_OFFSET_BLOB + 1")
    assert "no record where the index says one is" in refusal(prepare, path).what
    (tmp_path / "x.mindrecord.db").write_bytes(b"SQLite format 3\0" + b"\0" * 100)
    assert "the index is damaged" in refusal(prepare, path).what


def test_a_file_cut_off_or_of_another_kind_is_refused(prepare, tmp_path):
    path = write_file(tmp_path / "x.mindrecord", rows_of(3, 9))
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert (
        f"the file is cut off: {len(whole) - 30:,} bytes, its header says {len(whole):,}" in refusal(prepare, path).what
    )
    path.write_bytes(whole[:300])
    assert "the header is damaged" in refusal(prepare, path).what
    path.write_bytes(b"")
    assert "no MindRecord file" in refusal(prepare, path).what
    path.write_text("hello")
    assert "no MindRecord file" in refusal(prepare, path).what
    assert "no MindRecord file" in refusal(prepare, path.rename(tmp_path / "x.json"), format="mindrecord").what


@pytest.mark.parametrize(
    ("seq_length", "hint"), [(16, "data.seq_length=8"), (7, "data.seq_length=8"), (10, "--seq_length 10")]
)
def test_another_sequence_length_names_the_one_to_use(prepare, tmp_path, seq_length, hint):
    error = refusal(prepare, write_file(tmp_path / "x.mindrecord", rows_of(3, 9)), seq_length=seq_length)
    assert f"a record of 9 tokens (made with --seq_length 8), data.seq_length is {seq_length}" in error.what
    assert hint in error.hint


@pytest.mark.parametrize(("label", "family"), [("labels", "qwen2_5"), ("target_ids", "qwen")])
def test_columns_of_another_family_are_refused_unless_the_user_vouches_for_them(
    tmp_path, tokenizer, template, label, family
):
    from research.core.config.schema import DataConfig
    from research.core.data.prepare import prepare_dataset

    path = write_file(tmp_path / "x.mindrecord", rows_of(3, 9, label))

    def go(fmt, folder):
        cfg = DataConfig(source=str(path), format=fmt, seq_length=8, workers=1, eval_records=0)
        limits = {"model_length": None, "vocab_size": None}
        return prepare_dataset(
            cfg, tokenizer, template, tmp_path / folder, family=family, log=lambda line: None, **limits
        )

    with pytest.raises(DataError, match=f"{label}, attention_mask|attention_mask, input_ids, {label}") as error:
        go("auto", "refused")
    assert f"{family} reads" in error.value.what and f"{family}_preprocess.py" in error.value.hint
    assert go("mindrecord", "trusted").read == 3
    assert read_meta(tmp_path / "trusted")["template"] is None  # no template to disagree with later


def test_a_file_of_another_vocabulary_is_refused(prepare, tmp_path):
    note = Note(8, "qwen2_5", "f" * 64, "assistant", packed=False).to_text()
    path = write_file(tmp_path / "x.mindrecord", rows_of(3, 9), note=note)
    assert "another vocabulary (ffffffffffff" in refusal(prepare, path).what
    assert prepare(path, tmp_path / "d", seq_length=8, format="mindrecord").read == 3


def test_ids_that_the_model_does_not_have_are_refused(prepare, tmp_path):
    path = write_file(tmp_path / "x.mindrecord", [padded([5, 151643], [-100, 151643], 9)])
    assert "token id 151643 does not exist in the model" in refusal(prepare, path, vocab_size=3072).what


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"target_ids": [8, 9, 9, -100, -100, -100, -100, -100, -100]}, "target_ids[0] is 8, input_ids[0] is 7"),
        ({"input_ids": [7, -3, 9, 0, 0, 0, 0, 0, 0]}, "-3 is no token id"),
        ({"attention_mask": [0, 0, 1, 1, 1, 0, 0, 0, 0]}, "begins with 2 zeros"),
    ],
)
def test_a_row_that_cannot_be_trained_names_its_record(prepare, tmp_path, change, says):
    rows = rows_of(5, 9)
    rows[3] = {**rows[3], **change}
    error = refusal(prepare, write_file(tmp_path / "x.mindrecord", rows))
    assert says in error.what and error.where == f"{tmp_path}/x.mindrecord, record 4"


def test_a_file_without_token_ids_lists_its_columns(prepare, tmp_path):
    path = write_file(tmp_path / "x.mindrecord", [{"image": [1, 2], "size": [3, 4]}])
    assert "the columns are image, size; training needs input_ids" in refusal(prepare, path).what


def test_sources_of_both_kinds_make_one_dataset(write, prepare, tmp_path):
    path = write_file(tmp_path / "x.mindrecord", rows_of(3, 129))
    source = write("y.jsonl", [chat("q", "a")])
    report = prepare(f"{path},{source}", tmp_path / "d", packing=False)
    assert report.formats == ["mindrecord", "messages"] and report.splits["train"]["documents"] == 4
    assert json.loads((report.folder / "meta.json").read_text())["template_name"] == "qwen2_5"
