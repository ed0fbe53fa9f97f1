"""Files of every accepted kind become the records they hold."""

from __future__ import annotations

import gzip
import json

import pytest

from research.core.data import readers
from research.core.data.readers import PART, cut_text, read_file
from research.core.data.sources import expand_sources
from research.core.errors import ConfigError, DataError

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}


def texts(records):
    """Documents, parts joined."""
    documents, held = [], ""
    for record in records:
        held += record.raw.text
        if record.raw.last:
            documents.append(held)
            held = ""
    assert not held
    return documents


@pytest.mark.slow
@pytest.mark.parametrize(("fmt", "record"), [("alpaca", ALPACA), ("messages", CHAT), ("sharegpt", SHAREGPT)])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.json.gz", "x.parquet", "x"])
def test_format_is_found_by_content(write, tmp_path, fmt, record, name):
    import pyarrow as pa
    import pyarrow.parquet as pq

    if name.endswith(".parquet"):
        path = tmp_path / name
        pq.write_table(pa.Table.from_pylist([record] * 3), path)
    elif name.endswith(".gz"):
        path = write(name, gzip.compress(json.dumps([record] * 3).encode()))
    else:
        path = write(name, [record] * 3)
    found, records = read_file(path)
    assert found == fmt
    assert [r.raw for r in records] == [record] * 3


def test_bom_and_crlf_do_not_reach_the_text(write):
    path = write("x.txt", b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r")
    assert texts(read_file(path)[1]) == ["one\ntwo", "three"]
    path = write("x.jsonl", b"\xef\xbb\xbf" + json.dumps(CHAT).encode() + b"\r\n" + json.dumps(CHAT).encode())
    assert [r.raw for r in read_file(path)[1]] == [CHAT, CHAT]


@pytest.mark.parametrize("content", [b"", b" \n\r\n ", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["x.json", "x.txt", "x.jsonl"])
def test_empty_file_is_an_error(write, name, content):
    with pytest.raises(DataError, match="empty"):
        read_file(write(name, content))


def test_a_file_that_starts_with_much_white_space_is_not_empty(write):
    assert texts(read_file(write("x.txt", "\n" * 10_000 + "here"))[1]) == ["here"]
    assert [r.raw for r in read_file(write("x", " \n" * 10_000 + json.dumps([CHAT])))[1]] == [CHAT]


def test_an_array_without_records_is_an_error(write):
    with pytest.raises(DataError, match="no records"):
        read_file(write("x.json", "[ ]"))


def test_bytes_that_are_not_utf8_are_reported_with_their_line(write):
    path = write("x.txt", b"first\nsecond\n" + "第三".encode("gb18030"))
    with pytest.raises(DataError) as error:
        list(read_file(path)[1])
    assert error.value.where == f"{path}:3"


def test_damaged_gzip_is_an_error(write):
    whole = gzip.compress(json.dumps([CHAT] * 200).encode() + bytes(range(256)) * 50)
    with pytest.raises(DataError, match="gzip"):
        list(read_file(write("x.json.gz", whole[: len(whole) // 2]))[1])


def test_damaged_parquet_is_an_error(write):
    with pytest.raises(DataError, match="parquet"):
        read_file(write("x.parquet", b"PAR1 and then nothing like it" * 20))


def test_records_of_no_known_shape_name_the_keys_that_would_do(write):
    with pytest.raises(DataError) as error:
        read_file(write("x.json", [{"question": "?", "response": "!"}]))
    assert "'question'" in error.value.what and "'instruction'" in error.value.hint
    with pytest.raises(DataError, match="an array"):
        read_file(write("x.json", [["a"]]))


def test_an_unknown_format_suggests_the_nearest(write):
    with pytest.raises(ConfigError, match="did you mean alpaca"):
        read_file(write("x.json", [ALPACA]), "alpacca")


def test_plain_text_documents_by_blank_line_line_and_file(write):
    path = write("x.txt", "\n\n a b\nc\n\n\n\nd\n")
    assert texts(read_file(path)[1]) == ["a b\nc", "d"]
    assert texts(read_file(path, documents="line")[1]) == ["a b", "c", "d"]
    assert texts(read_file(path, documents="file")[1]) == ["a b\nc\n\n\n\nd"]
    assert [r.where.line for r in read_file(path)[1]] == [3, 8]


def test_json_text_records_keep_their_white_space(write):
    path = write("x.jsonl", [{"text": " a\n\nb "}, {"text": "c"}])
    fmt, records = read_file(path)
    assert fmt == "text"
    assert texts(records) == [" a\n\nb ", "c"]


def test_a_long_document_comes_in_parts_that_join_to_it(write):
    line = "word " * 40 + "\n"
    document = (line * (5 * PART // len(line))).rstrip()
    for path in (write("x.txt", document), write("x.jsonl", [{"text": document}])):
        records = list(read_file(path)[1])
        assert len(records) > 4
        assert max(len(r.raw.text) for r in records) < 2 * PART
        assert texts(records) == [document]


def test_a_line_without_end_is_read_in_parts(write, monkeypatch):
    from research.core.data import sources

    monkeypatch.setattr(sources, "CHUNK", 1000)
    monkeypatch.setattr(readers, "PART", 500)
    text = "word " * 3000 + "end"
    records = list(read_file(write("x.txt", text))[1])
    assert len(records) > 5
    assert texts(records) == [text]
    assert texts(read_file(write("x.txt", text), documents="line")[1]) == [text]


def test_parts_are_cut_where_tokens_never_reach_across(tokenizer):
    text = "Some words, 12345 and\n\n  more;\tthat 例子 do café. x_1 go on\nEnd " * 60
    parts = list(cut_text(text, 50))
    assert "".join(parts) == text and len(parts) > 20
    whole = tokenizer.encode(text)
    assert [token for part in parts for token in tokenizer.encode(part)] == whole


WIKI = [" \n", " = First = \n", " \n", ' Some "text" here . \n', " \n", " = = Part = = \n", " More . \n", " \n"]
WIKI += [" = Second title = \n", " \n", " Text = with signs = in it . \n"]
WIKI_DOCUMENTS = ['= First = \n \n Some "text" here . \n \n = = Part = = \n More .']
WIKI_DOCUMENTS += ["= Second title = \n \n Text = with signs = in it ."]


def test_wikitext_is_read_alike_from_its_three_spellings(write):
    quoted = "".join('"' + line.replace('"', '""') + '"\n' if line.strip() else '""\n' for line in WIKI)
    for path in (
        write("wiki.txt", "".join(WIKI)),
        write("wiki.tokens", quoted),
        write("wiki.jsonl", [{"text": line if line.strip() else ""} for line in WIKI]),
    ):
        fmt, records = read_file(path)
        assert fmt == "wikitext"
        found = [" ".join(document.split()) for document in texts(records)]
        assert found == [" ".join(document.split()) for document in WIKI_DOCUMENTS], path.name


def test_real_wikitext_files_hold_sixty_articles_each(shared_data):
    """The published valid splits hold 60 articles (Merity et al. 2016, table 1)."""
    for name in (
        "wikitext103/wiki.valid.tokens",
        "wikitext2/wiki.valid.txt",
        "wikitext2_raw/wiki.validation.raw.jsonl",
    ):
        fmt, records = read_file(shared_data / name)
        documents = texts(records)
        assert fmt == "wikitext"
        assert len(documents) == 60
        assert documents[0].startswith("= Homarus gammarus =")


def test_sources_expand_lists_folders_and_globs(write, tmp_path):
    a, b = write("a.jsonl", [CHAT]), write("b.json", [CHAT])
    write("notes.md", "x")
    write(".hidden.json", "x")
    assert expand_sources(f"{a},{b}") == [a, b]
    assert expand_sources(str(tmp_path)) == [a, b]
    assert expand_sources(f"{tmp_path}/*.json, skills") == [b, "skills"]
    with pytest.raises(DataError, match=r"did you mean a\.jsonl"):
        expand_sources(f"{tmp_path}/a.json")
    for nothing in (f"{tmp_path}/*.csv", " , "):
        with pytest.raises(DataError):
            expand_sources(nothing)
