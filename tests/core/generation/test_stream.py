"""Text as tokens come: whole characters, stop strings, hidden tokens."""

from __future__ import annotations

import codecs

import pytest

from research.core.generation.stream import TextStream

TEXT = "naïve 你好 🙂 end"


class _Bytes:
    """A tokenizer whose tokens are bytes; 256 is a control token."""

    class _Stream:
        def __init__(self):
            self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def push(self, token: int) -> str:
            return "" if token > 255 else self.decoder.decode(bytes([token]))

        def flush(self) -> str:
            return self.decoder.decode(b"", final=True)

    def stream(self, skip_special: bool = False):
        assert skip_special
        return self._Stream()


def _run(text: str, stop=(), hidden=(), tokens=None) -> tuple[list[str], TextStream]:
    stream = TextStream(_Bytes(), hidden=hidden, stop=stop)
    shown = []
    for token in tokens if tokens is not None else text.encode():
        shown.append(stream.push(token))
        if stream.stopped:
            break
    shown.append(stream.flush())
    return shown, stream


def test_pieces_join_to_the_text_and_no_character_is_broken():
    shown, stream = _run(TEXT)
    assert "".join(shown) == stream.text == TEXT
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(shown)
    assert len([piece for piece in shown if piece]) == len(TEXT)


@pytest.mark.parametrize("stop", ["好", " e", "🙂 end", "ï"])
def test_nothing_from_a_stop_string_on_is_shown(stop):
    shown, stream = _run(TEXT, stop=["never", stop])
    assert stream.stopped
    assert "".join(shown) == stream.text == TEXT[: TEXT.index(stop)]


def test_the_first_of_several_stop_strings_counts():
    assert "".join(_run("one two three", stop=["three", "two", "e t"])[0]) == "on"


def test_a_beginning_of_a_stop_string_that_comes_to_nothing_is_shown():
    shown, stream = _run("ab abc ab", stop=["abcd"])
    assert "".join(shown) == "ab abc ab" and not stream.stopped


def test_text_that_could_begin_a_stop_string_waits():
    stream = TextStream(_Bytes(), stop=["\n\n"])
    assert [stream.push(b) for b in b"a\nb\n"] == ["a", "", "\nb", ""]
    assert stream.flush() == "\n"


def test_overlapping_beginnings_of_a_stop_string_are_found():
    shown, stream = _run("xaaab!", stop=["aab"])
    assert "".join(shown) == "xa" and stream.stopped


def test_end_tokens_become_no_text():
    shown, _ = _run("", hidden={10}, tokens=[*b"ok", 10, 256])
    assert "".join(shown) == "ok"


def test_bytes_that_never_become_a_character_end_as_one_replacement():
    shown, _ = _run("", tokens="你".encode()[:2])
    assert "".join(shown) == "\N{REPLACEMENT CHARACTER}"
