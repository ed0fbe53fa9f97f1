"""MindRecord files beside MindSpore's own writer and readers: the same bytes, columns and dtypes."""

from __future__ import annotations

import filecmp
import os
import shutil
import sqlite3

import numpy as np
import pytest

from research.core.data.mindrecord import write as writing
from research.core.data.mindrecord.export import write_blocks, write_rows
from research.core.data.mindrecord.format import pack_rows, unpack
from research.core.data.mindrecord.read import MindRecord
from research.core.data.mindrecord.write import MindRecordWriter
from research.core.data.sources import Where
from research.core.errors import ConfigError, DataError
from tests.core.data.mindrecord.files import padded, write_file
from tests.core.data.test_prepare import records

mindspore = pytest.importorskip("mindspore", reason="compares with MindSpore's own MindRecord reader and writer")

THREE = ("input_ids", "labels", "attention_mask")


def read_with_mindspore(path, columns=None):
    """``{column: array}`` of every record, in order, by ``mindspore.dataset.MindDataset``."""
    from mindspore.dataset import MindDataset

    data = MindDataset(str(path), columns_list=columns, shuffle=False, num_parallel_workers=1)
    return list(data.create_dict_iterator(num_epochs=1, output_numpy=True))


def write_with_mindspore(path, rows, dtype="int32", shards=1, note="", at_once=1):
    from mindspore.mindrecord import FileWriter

    writer = FileWriter(str(path), shard_num=shards)
    writer.add_schema({name: {"type": dtype, "shape": [-1]} for name in rows[0]}, note)
    rows = [{name: np.array(values, dtype) for name, values in row.items()} for row in rows]
    for first in range(0, len(rows), at_once):
        writer.write_raw_data(rows[first : first + at_once])
    writer.commit()
    return path


def random_rows(n, width, columns=THREE, seed=0):
    """Values of every stored size, edges included."""
    rng = np.random.default_rng(seed)
    edges = np.array([0, 1, 127, 128, -128, -129, -100, 32767, 32768, -32768, -32769, 151643, 2**31 - 1, -(2**31)])
    return [{name: rng.choice(edges, width) for name in columns} for _ in range(n)]


def read_with_ours(path):
    file = MindRecord(path)
    rows = []
    for number, row in enumerate(file.index(), 1):
        blobs = file.blobs(row, Where(str(path), None, number))
        rows.append({name: file.array(name, blob).tolist() for name, blob in blobs.items()})
    return rows


# --- the layout ---


@pytest.mark.parametrize(
    ("n", "width", "columns", "at_once"),
    [
        pytest.param(7, 5, THREE, 1, id="three columns"),
        pytest.param(1, 1, ("input_ids",), 1, id="one value"),
        pytest.param(40, 33, ("input_ids",), 40, id="one column"),
        pytest.param(14, 350_000, THREE, 1, id="two pages", marks=pytest.mark.slow),
    ],
)
def test_a_file_has_the_bytes_that_mindspore_writes(tmp_path, n, width, columns, at_once):
    rows = random_rows(n, width, columns)
    (tmp_path / "theirs").mkdir()
    theirs = write_with_mindspore(tmp_path / "theirs" / "x.mindrecord", rows, note="a note", at_once=at_once)
    ours = write_file(tmp_path / "x.mindrecord", rows, note="a note")
    assert filecmp.cmp(ours, theirs, shallow=False)
    for query in ("SELECT * FROM INDEXES ORDER BY ROW_ID", "SELECT * FROM SHARD_NAME", "SELECT sql FROM sqlite_master"):
        found = []
        for path in (ours, theirs):
            with sqlite3.connect(f"{path}.db") as index:
                found.append(index.execute(query).fetchall())
        assert found[0] == found[1] != []


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("shards", [1, 3])
def test_files_that_mindspore_wrote_are_read_in_its_order(tmp_path, dtype, shards):
    rows = random_rows(10, 21)
    if dtype == "int64":
        rows[2]["input_ids"][4] = -(2**40)
    path = write_with_mindspore(tmp_path / "x.mindrecord", rows, dtype, shards, at_once=10)
    files = [path] if shards == 1 else [tmp_path / f"x.mindrecord{i}" for i in range(shards)]
    found = [row for file in files for row in read_with_ours(file)]
    assert found == [{name: row[name].tolist() for name in sorted(row)} for row in rows]


def test_rows_of_uneven_length_and_plain_files_of_version_2_are_read(tmp_path):
    rows = [{"input_ids": list(range(i))} for i in (3, 1, 8)]
    path = write_with_mindspore(tmp_path / "x.mindrecord", rows)
    assert read_with_ours(path) == rows
    # Version 2.0 stored arrays as they are; nothing writes it any more, so one is made by hand from a 3.0 file.
    data = bytearray(path.read_bytes())
    data = data.replace(b'"version":"3.0"', b'"version":"2.0"')
    start = 1 << 24
    plain = np.array([5, -1, 151643], "<i4").tobytes()
    data[start : start + 8 + len(plain)] = len(plain).to_bytes(8, "little") + plain
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].replace(b'"end_row_id":3', b'"end_row_id":1')
    data[8 : 8 + len(header)] = header
    path.write_bytes(data)
    with sqlite3.connect(f"{path}.db") as index:
        index.execute("DELETE FROM INDEXES WHERE ROW_ID > 0")
        index.execute("UPDATE INDEXES SET PAGE_OFFSET_BLOB_END = ?", (8 + len(plain),))
    assert read_with_ours(path) == [{"input_ids": [5, -1, 151643]}]


@pytest.mark.slow
def test_more_rows_than_one_page_of_entries_holds_are_all_indexed(tmp_path, monkeypatch):
    """Small pages: several raw pages, each with the entries of whole blob pages, as MindSpore's reader wants them."""
    monkeypatch.setattr(writing, "PAGE_SIZE", 1 << 15)
    rows = [padded([i % 97, i % 89], [-100, i % 89], 3) for i in range(4500)]
    path = write_file(tmp_path / "x.mindrecord", rows)
    found = read_with_mindspore(path)
    assert [row["input_ids"].tolist() for row in found] == [row["input_ids"] for row in rows]
    assert len([page for page in header_pages(path) if page["page_type"] == "RAW_DATA"]) > 1


def header_pages(path):
    import json

    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))["page"]


@pytest.mark.parametrize("limit", [0, 1, 3, 4, 9, None])
def test_the_first_values_of_a_packed_array_can_be_read_alone(limit):
    values = np.array([5, 200, -100, 70000, 3, 151643, -1, 0, 40000], np.int32)
    blob = np.frombuffer(pack_rows(values, np.array([9]), 9, 0)[0], np.uint8)
    assert unpack(blob, limit).tolist() == values[: 9 if limit is None else limit].tolist()
    with pytest.raises(ValueError, match="cut off"):
        unpack(blob[:-1])


# --- from a dataset folder ---


@pytest.mark.parametrize(
    ("family", "label"), [("qwen", "labels"), ("qwen1_5", "target_ids"), ("qwen2_5", "target_ids")]
)
def test_rows_of_a_folder_have_the_documents_columns(write, prepare, tmp_path, tokenizer, family, label):
    folder = prepare(write("x.jsonl", records(50)), packing=True).folder
    written = write_rows(folder / "train", tmp_path / "x.mindrecord", family, 129)
    found = read_with_mindspore(written.files[0])
    assert len(found) == written.rows > 5
    from research.core.data.dataset import PackedDataset

    data = PackedDataset(folder / "train")
    for number, row in enumerate(found):
        assert set(row) == {"input_ids", label, "attention_mask"}
        assert {array.dtype for array in row.values()} == {np.dtype("int32")}
        batch, real = data.rows([number]), data.lengths([number])[0]
        assert row["input_ids"].tolist() == [*batch.input_ids[0].tolist(), tokenizer.pad_id]
        assert row[label].tolist() == [*batch.labels[0].tolist(), -100]
        assert row["attention_mask"].tolist() == [1] * real + [0] * (129 - real)


def test_repeat_writes_the_rows_again_and_partition_spreads_them_in_order(write, prepare, tmp_path):
    folder = prepare(write("x.jsonl", records(11)), packing=False).folder
    once = read_with_mindspore(write_rows(folder / "train", tmp_path / "a.mindrecord", "qwen", 129).files[0])
    written = write_rows(folder / "train", tmp_path / "b.mindrecord", "qwen", 129, repeat=3, shards=4)
    assert [path.name for path in written.files] == [f"b.mindrecord{i}" for i in range(4)]
    assert [sum(1 for _ in MindRecord(path).index()) for path in written.files] == [9, 8, 8, 8]
    thrice = read_with_mindspore(written.files[0])  # one file stands for the set
    assert len(thrice) == 33
    for number, row in enumerate(thrice):
        assert all(np.array_equal(row[name], once[number % 11][name]) for name in row)


def test_blocks_run_on_through_repeats_and_the_rest_is_counted(write, prepare, tmp_path, tokenizer):
    text = "one two three four five " * 40
    folder = prepare(write("x.txt", text), seq_length=16, packing=False).folder
    tokens = [*tokenizer.encode(text.strip()), tokenizer.eos_id] * 2
    written, left = write_blocks(folder / "train", tmp_path / "x.mindrecord", 17, repeat=2)
    found = read_with_mindspore(written.files[0])
    assert (len(found), left) == divmod(len(tokens), 17)
    assert all(set(row) == {"input_ids"} and row["input_ids"].dtype == np.int32 for row in found)
    assert np.concatenate([row["input_ids"] for row in found]).tolist() == tokens[: len(found) * 17]
    with pytest.raises(DataError, match="less than one record of 5,000"):
        write_blocks(folder / "train", tmp_path / "y.mindrecord", 5000)


# --- names ---


def test_an_existing_output_is_kept_unless_overwriting_is_asked_for(tmp_path):
    path = tmp_path / "x.mindrecord"
    write_file(path, random_rows(4, 5), shards=4)
    for shards in (1, 2, 4):
        with pytest.raises(DataError, match=r"x\.mindrecord0: exists already\n  try: --overwrite"):
            write_file(path, random_rows(2, 5), shards=shards)
    write_file(path, random_rows(2, 5, seed=1), shards=2, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"x.mindrecord{i}{end}" for i in (0, 1) for end in ("", ".db")
    ]
    write_file(path, random_rows(3, 5, seed=2), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.mindrecord", "x.mindrecord.db"]
    expected = [row["labels"].tolist() for row in random_rows(3, 5, seed=2)]
    assert [row["labels"].tolist() for row in read_with_mindspore(path)] == expected


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, overwrite):
    path = tmp_path / "x.mindrecord"
    if overwrite:
        write_file(path, random_rows(4, 5))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with (
        pytest.raises(RuntimeError, match="stop"),
        MindRecordWriter(path, ["input_ids"], 3, 5, overwrite=overwrite) as out,
    ):
        out.add(pack_rows(np.arange(5, dtype=np.int32), np.array([5]), 5, 0))
        raise RuntimeError("stop")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("fails_at", range(6))
def test_replacing_a_set_is_undone_when_it_fails_halfway(tmp_path, monkeypatch, fails_at):
    path = tmp_path / "x.mindrecord"
    write_file(path, random_rows(4, 5), shards=2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    renamed, rename, readable = [], os.rename, []

    def failing(source, target):
        if len(renamed) == fails_at:
            renamed.append(None)
            raise OSError("the disk is gone")
        renamed.append(target)
        rename(source, target)
        readable.append(all(p.with_name(p.name.removesuffix(".db")).exists() for p in tmp_path.glob("*.db")))

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        write_file(path, random_rows(2, 5, seed=1), overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert all(readable)  # no index without its file at any time


def test_a_file_moved_to_another_folder_is_still_read_by_mindspore(tmp_path):
    """The index repeats the file's name, not its folder: why files are written aside under their final names."""
    write_file(tmp_path / "x.mindrecord", random_rows(4, 5), shards=2)
    (tmp_path / "other").mkdir()
    for path in sorted(tmp_path.glob("x.*")):
        shutil.move(path, tmp_path / "other" / path.name)
    assert len(read_with_mindspore(tmp_path / "other" / "x.mindrecord0")) == 4


def test_impossible_outputs_are_refused_before_any_work(tmp_path):
    (tmp_path / "folder.mindrecord").mkdir()
    for path, shards, error in (
        (tmp_path / "folder.mindrecord", 1, "is a folder"),
        (tmp_path / "x.mindrecord.db", 1, "the name of an index"),
        (tmp_path / "x.mindrecord", 0, "not between 1 and 1000"),
        (tmp_path / "x.mindrecord", 5, "4 records cannot fill 5 files"),
    ):
        with pytest.raises((DataError, ConfigError), match=error):
            write_file(path, random_rows(4, 5), shards=shards, overwrite=True)
    with pytest.raises(ConfigError, match="does not fit a MindRecord page"):
        MindRecordWriter(tmp_path / "x.mindrecord", THREE, 1, 30_000_000)
    assert os.listdir(tmp_path) == ["folder.mindrecord"]
