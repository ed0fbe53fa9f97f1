"""The incremental JSON reader against json.loads, and its line numbers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.data import json_stream, sources
from research.core.data.json_stream import json_records
from research.core.errors import DataError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
record_lists = st.lists(st.dictionaries(st.text(), values, max_size=4), max_size=12)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    records=record_lists,
    chunk=st.integers(1, 60),
    indent=st.sampled_from([None, 0, 2]),
    lines=st.booleans(),
    ascii_only=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_every_chunk_size_reads_the_same_records_as_json_loads(
    tmp_path_factory, records, chunk, indent, lines, ascii_only, end
):
    def dump(value):
        return json.dumps(value, indent=indent, ensure_ascii=ascii_only).replace("\n", end)

    text = end.join(dump(record) for record in records) if lines else dump(records)
    text = text.encode("utf-8", "surrogatepass") if ascii_only else text.encode("utf-8", "replace")
    path = tmp_path_factory.mktemp("json") / "x.json"
    path.write_bytes(text)
    expected = [json.loads(dump(r).encode("utf-8", "replace")) for r in records]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK", chunk)
        patch.setattr(json_stream, "CHUNK", chunk)
        found = list(json_records(path))
    assert [record.raw for record in found] == expected
    # The line of a record is the number of line ends before it.
    shown = text.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    for record in found:
        assert shown[record.where.line - 1].lstrip("[ ,").startswith("{")
    assert [record.where.record for record in found] == list(range(1, len(found) + 1))


@pytest.mark.parametrize("chunk", [5, 1 << 20])
@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('[{"a": 1},\n {"a": 2,}\n]', 2, "malformed"),
        ('[{"a": 1},\n {"a": 2}\n {"a": 3}]', 3, "expected ,"),
        ('[{"a": 1},\n\n {"a"  2}]', 3, "Expecting ':'"),
        ('[{"a": 1},\n {"a": 2},\n]', 3, "comma"),
        ('[{"a": 1},\n {"a": 2}', 2, "cut off"),
        ('[{"a": 1},\n {"a": "not closed', 2, "Unterminated"),
        ('[{"a": 1}]\n{"a": 2}', 2, "after the end"),
        ('{"a": 1}\n{"a": nope}\n{"a": 3}\n', 2, "Expecting value"),
        ('{"a": 1}\n{"a": "x\ny"}\n', 2, "control character"),
        ('{"a": 1}\n{"a": 2\n{"a": 3}\n', 3, "starts on line 2"),
        ('{"a": 1}\n]\n', 2, "Expecting value"),
        ('{"a": ' + "[" * 100_000, 1, ""),
    ],
)
def test_malformed_json_is_reported_with_its_line(write, monkeypatch, text, line, says, chunk):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    path = write("x.json", text)
    with pytest.raises(DataError) as error:
        list(json_records(path))
    assert error.value.where == f"{path}:{line}"
    assert says in error.value.what


def test_a_record_above_the_limit_is_refused_before_it_fills_the_memory(write, monkeypatch):
    monkeypatch.setattr(json_stream, "RECORD_LIMIT", 1000)
    monkeypatch.setattr(sources, "CHUNK", 100)
    monkeypatch.setattr(json_stream, "CHUNK", 100)
    path = write("x.jsonl", [{"a": "short"}, {"a": "x" * 100_000}])
    with pytest.raises(DataError, match="more than 1,000 characters") as error:
        list(json_records(path))
    assert error.value.where == f"{path}:2"
