"""WikiText as the MindFormers scripts cleaned it: the stream equals the rules applied to the whole file."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.data import readers
from research.core.data.readers import cut_text, read_file
from research.core.data.wikitext import cleaned_paragraphs

PAIRED = r"\( \) | \[ \] | { } | \" \" | ' '"


def whole_file(text: str) -> list[str]:
    """The paragraphs by regular expressions over all of the text at once, as scripts.md and the original describe them."""
    text = re.sub(r"/' [0-9]/", "/'[0-9]/", text.replace("s '", "s'"))
    for sign in "-,.":
        text = text.replace(f" @{sign}@ ", sign)
    for sign in ":;.!?,":
        text = text.replace(f" {sign} ", f"{sign} ")
    for pair in PAIRED.split(" | "):
        left, right = pair.split()
        text = re.sub(rf"{left}\s*([^{right}]*?)\s*{right}", lambda m: m[0][0] + m[1] + m[0][-1], text)
    for equals in (4, 3, 2):
        text = text.replace(" ".join("=" * equals), "=" * equals)
    for old, new in ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        text = text.replace(old, new)
    return [part for part in text.split("\n\n") if part and not part.strip().startswith("=")]


def in_pieces(text: str, seed: int):
    lengths, at = random.Random(seed), 0
    while at < len(text):
        size = lengths.randint(1, 9)
        yield text[at : at + size]
        at += size


def joined(paragraphs) -> list[str]:
    done, held = [], ""
    for text, last in paragraphs:
        held += text
        if last:
            done.append(held)
            held = ""
    assert not held
    return done


BITS = ["s", "'", " ", "\n", "=", "(", ")", "[", "]", "{", "}", '"', "@-@", "@,@", ".", ",", "!", "N", "°", "3"]
BITS += ["/' 5/", " \n", "\t", "word", "\u3000", "'s", " \n \n", "= ", " ° "]


@settings(max_examples=400, deadline=None)
@given(bits=st.lists(st.sampled_from(BITS), max_size=80), seed=st.integers(0, 5), limit=st.sampled_from([2, 1000]))
def test_cleaning_a_stream_equals_cleaning_the_whole_file(bits, seed, limit):
    text = "".join(bits)
    assert joined(cleaned_paragraphs(lambda: in_pieces(text, seed), limit, cut_text)) == whole_file(text)


def test_headings_go_and_spaces_between_signs_close_up():
    text = (
        ' \n = Title = \n \n One thing , ( or " two " ) ; 1 @,@ 000 @-@ fold \'s . \n \n = = Part = = \n \n'
        " It 's 40 ° C ; dogs ' N bones . \n Next line . \n \n = = = Deep = = = \n"
    )
    assert joined(cleaned_paragraphs(lambda: iter([text]), 1000, cut_text)) == [
        'One thing, (or "two"); 1,000-fold\'s.',
        "It's 40°C; dogs' 1 bones.\nNext line.",  # the third apostrophe has none to pair up with
    ]


WIKI = [
    " \n",
    " = First = \n",
    " \n",
    ' Some " text " here . \n',
    " \n",
    " = = Part = = \n",
    " \n",
    " More , yes . \n",
    " \n",
]


def test_the_three_spellings_of_wikitext_clean_to_the_same_paragraphs(write):
    quoted = "".join('"' + line.replace('"', '""') + '"\n' if line.strip() else '""\n' for line in WIKI)
    for path in (
        write("wiki.txt", "".join(WIKI)),
        write("wiki.tokens", quoted),
        write("wiki.jsonl", [{"text": line if line.strip() else ""} for line in WIKI]),
    ):
        seen = []
        fmt, records = read_file(path, on_bytes=seen.append, mindformers=True)
        found = list(records)
        assert fmt == "wikitext"
        assert [record.raw.text.strip() for record in found] == ['Some "text" here.', "More, yes."], path.name
        assert [record.where.record for record in found] == [1, 2]
        assert seen == sorted(seen) and seen[-1] == path.stat().st_size  # one of the two passes is shown


@pytest.mark.parametrize("name", ["wikitext103/wiki.test.tokens", "wikitext2/wiki.valid.txt"])
def test_a_real_file_cleans_to_what_the_whole_file_rules_make_of_it(shared_data, name, monkeypatch):
    import csv

    monkeypatch.setattr(readers, "PART", 5000)
    path = shared_data / name
    text = path.read_text(encoding="utf-8")
    if text.startswith('"'):  # every line is one field of a CSV file
        with open(path, encoding="utf-8", newline="") as file:
            text = "".join("".join(row) or "\n" for row in csv.reader(file))
    expected = whole_file(text)
    records = list(read_file(path, mindformers=True)[1])
    assert joined(record.raw for record in records) == expected
    assert len(expected) > 500 and not any(part.strip().startswith("=") for part in expected)
