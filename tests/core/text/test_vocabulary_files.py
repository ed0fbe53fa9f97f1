"""Damaged, missing and foreign vocabulary files end in an error that names file and line."""

from __future__ import annotations

import json
import shutil

import pytest

from research.core.errors import DataError, UserError
from research.core.text.library import LibraryTokenizer
from research.core.text.tokenizer import has_tokenizer, load_tokenizer
from tests.core.text.small import NAMES, small_tokenizer_json


def damaged(path, tmp_path, change):
    text = path.read_bytes()
    (tmp_path / path.name).write_bytes(change(text))
    return tmp_path


TIKTOKEN_FAULTS = {
    "cut inside a line": (lambda text: text[: len(text) // 2 - 3], r"qwen\.tiktoken:\d+: (not a line|id )"),
    "cut between lines": (lambda text: b"".join(text.splitlines(True)[:1000]), "qwen.tiktoken:1000: 1,000 tokens"),
    "a line left out": (lambda text: text.replace(b"Iw== 2\r\n", b"", 1), "qwen.tiktoken:3: id 3 where 2"),
    "not base64": (lambda text: text.replace(b"Ig==", b"!!==", 1), "qwen.tiktoken:2: not a line"),
    "twice": (lambda text: text.replace(b"Ig== 1\r\n", b"IQ== 1\n", 1), "qwen.tiktoken:2: same token as line 1"),
    "empty": (lambda text: b"", "0 tokens"),
    "json": (lambda text: b'{"a": 1}', "qwen.tiktoken:1: not a line"),
}


@pytest.mark.parametrize("fault", TIKTOKEN_FAULTS)
def test_damaged_tiktoken_file(vocabulary_folder, tmp_path, fault):
    change, what = TIKTOKEN_FAULTS[fault]
    with pytest.raises(DataError, match=what):
        load_tokenizer(damaged(vocabulary_folder / "qwen.tiktoken", tmp_path, change), "qwen")


VOCAB_FAULTS = {
    "vocab cut": ("vocab.json", lambda text: text[: len(text) // 2], r"vocab\.json:1: not valid JSON"),
    "vocab list": ("vocab.json", lambda text: b"[1, 2]", "vocab.json: not a JSON object"),
    "vocab latin-1": ("vocab.json", lambda text: b'{"\xff": 1}', "vocab.json: not UTF-8"),
    "other ids": ("vocab.json", lambda text: text.replace(b'"!":0', b'"!":1', 1), "without a gap"),
    "other size": ("vocab.json", lambda text: b'{"a": 0, "b": 1}', "2 tokens, the vocabulary of qwen2_5 has 151,643"),
    "merges cut between lines": (
        "merges.txt",
        lambda text: b"".join(text.splitlines(True)[:-5]),
        "merges.txt: 151,382 merges; the 151,643 tokens of the vocabulary need 151,387",
    ),
    "merges cut inside a line": ("merges.txt", lambda text: text[:-3], r"merges\.txt:151388: "),
    "merges with a foreign line": (
        "merges.txt",
        lambda text: text.replace(b"\n", b"\nqz xw\n", 1),
        r"merges\.txt:2: merge 'qz xw'",
    ),
    "merges with one token": ("merges.txt", lambda text: text.replace(b"\n", b"\nalone\n", 1), r"merges\.txt:2: not a"),
    "empty merges": ("merges.txt", lambda text: b"", "0 merges"),
}


@pytest.mark.parametrize("fault", VOCAB_FAULTS)
def test_damaged_vocab_and_merges(vocabulary_folder, tmp_path, fault):
    name, change, what = VOCAB_FAULTS[fault]
    for other in ("vocab.json", "merges.txt"):
        shutil.copyfile(vocabulary_folder / other, tmp_path / other)
    with pytest.raises(DataError, match=what):
        load_tokenizer(damaged(vocabulary_folder / name, tmp_path, change), "qwen2_5")


@pytest.mark.slow
def test_vocabulary_of_another_family_is_named(vocabulary_folder, tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    new.mkdir()
    old.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(vocabulary_folder / name, new)
    shutil.copy(vocabulary_folder / "qwen.tiktoken", old)
    with pytest.raises(DataError, match=r"vocabulary of Qwen1\.5 or later"):
        load_tokenizer(new, "qwen")
    for family in ("qwen1_5", "qwen2", "qwen2_5"):
        with pytest.raises(DataError, match="vocabulary of Qwen v1"):
            load_tokenizer(old, family)
    assert load_tokenizer(old).family == "qwen" and load_tokenizer(new).family == "qwen2"
    with pytest.raises(UserError, match="unknown family 'qwen3'"):
        load_tokenizer(new, "qwen3")


def test_missing_files_are_named(vocabulary_folder, tmp_path):
    assert not has_tokenizer(tmp_path) and has_tokenizer(vocabulary_folder)
    with pytest.raises(DataError, match="no vocabulary here"):
        load_tokenizer(tmp_path, "qwen2")
    with pytest.raises(DataError, match="folder not found"):
        load_tokenizer(tmp_path / "nowhere", "qwen2")
    shutil.copy(vocabulary_folder / "vocab.json", tmp_path)
    with pytest.raises(DataError, match=r"vocab.json is here, merges.txt is not"):
        load_tokenizer(tmp_path, "qwen2")
    assert not has_tokenizer(tmp_path)


JSON_FAULTS = {
    "cut": (lambda data: json.dumps(data, indent=1)[:2000], r"tokenizer\.json:\d+: not valid JSON"),
    "no vocabulary": (lambda data: "{}", "no vocabulary in it"),
    "no merges": (lambda data: json.dumps(data | {"model": data["model"] | {"merges": 3}}), "not of the known form"),
    "foreign merge": (
        lambda data: json.dumps(data | {"model": data["model"] | {"merges": [["a", "b"], ["q", "z"]]}}),
        "merge 'q z' is not of this vocabulary",
    ),
    "another family": (
        lambda data: json.dumps(data | {"added_tokens": data["added_tokens"][:1]}),
        "<|im_start|>, <|im_end|> are not in this vocabulary",
    ),
    "control token with a word's id": (
        lambda data: json.dumps(data).replace(
            '{"id": 257, "content": "<|endoftext|>"', '{"id": 7, "content": "<|endoftext|>"'
        ),
        "which is a word's",
    ),
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_damaged_tokenizer_json(tmp_path, fault):
    change, what = JSON_FAULTS[fault]
    data = small_tokenizer_json(merges=[["a", "b"]], tokens=["ab"])
    (tmp_path / "tokenizer.json").write_text(change(data))
    with pytest.raises(DataError, match=what):
        load_tokenizer(tmp_path, "qwen2")


def test_vocabulary_without_some_bytes_equals_the_library(shared_data, tmp_path):
    """2,000 tokens trained on Alpaca: 160 bytes have no token, and text with them loses them."""
    from tokenizers import Tokenizer as Library

    from research.core.text.template import get_template

    path = shared_data / "tiny_tokenizer" / "tiny_bpe_tokenizer.json"
    shutil.copyfile(path, tmp_path / "tokenizer.json")
    tokenizer, library = load_tokenizer(tmp_path, "qwen2"), Library.from_file(str(path))
    assert (tokenizer.vocab_size, tokenizer.im_end_id) == (2003, 2002)
    for text in ("Hello, world! <|im_end|>\n", "naïve 你好 x", ""):
        assert tokenizer.encode(text, "all") == library.encode(text, add_special_tokens=False).ids
    encoded = get_template("qwen2").encode(tokenizer, [{"role": "user", "content": "é Hello"}])
    kinds = [(span.kind, tokenizer.decode(encoded.ids[span.start : span.stop])) for span in encoded.spans]
    assert kinds[4:6] == [("header", "<|im_start|>user\n"), ("content", " Hello")]


def test_vocabulary_of_another_model_is_refused(tmp_path):
    """Byte-level like Qwen's, but with GPT-2's one control token."""
    data = small_tokenizer_json(merges=[["a", "b"]], tokens=["ab"], names=("<|endoftext|>",))
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match="not one of Qwen's"):
        load_tokenizer(tmp_path, "qwen2")


@pytest.fixture
def sentencepiece_like(tmp_path):
    """A ``tokenizer.json`` as converted from SentencePiece (CodeQwen1.5): blanks as '▁', byte fallback, control tokens
    among the first ids and part of the vocabulary.
    """
    words = ["<unk>", "<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz<>|_\n", "▁h", "▁hi", "he"]
    vocab = {word: index for index, word in enumerate([*words, *letters])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    names = ("<unk>", "<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    data = {
        "version": "1.0",
        "added_tokens": [{"id": vocab[name], "content": name, **flags, "special": name != "<s>"} for name in names],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [["▁", "h"], ["▁h", "i"], ["h", "e"]],
            "unk_token": "<unk>",
            "byte_fallback": True,
            "fuse_unk": True,
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return tmp_path


def test_sentencepiece_like_vocabulary(sentencepiece_like):
    from tokenizers import Tokenizer as Library

    from research.core.text.template import get_template

    tokenizer = load_tokenizer(sentencepiece_like, "qwen1_5")
    assert isinstance(tokenizer, LibraryTokenizer)
    assert (tokenizer.eos_id, tokenizer.im_start_id, tokenizer.im_end_id) == (2, 3, 4)
    library = Library.from_file(str(sentencepiece_like / "tokenizer.json"))
    for text in ("he hi<|im_end|> hi", "你好 <|im_start|>", "<s>he</s>", ""):
        assert tokenizer.encode(text, "all") == library.encode(text).ids
        assert not set(tokenizer.encode(text)) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_end|><|im_start|>", ["<|im_end|>"])[0] == 4
    stream = tokenizer.stream()
    ids = tokenizer.encode("hi 你好, hello " * 9)
    shown = [stream.push(index) for index in ids]
    assert "".join(shown) + stream.flush() == "hi 你好, hello " * 9 and not any("\ufffd" in text for text in shown)
    encoded = get_template("qwen1_5").encode(tokenizer, [{"role": "user", "content": "hi <|im_end|>"}])
    kinds = [(span.kind, tokenizer.decode(encoded.ids[span.start : span.stop])) for span in encoded.spans]
    assert kinds[4:6] == [("header", "<|im_start|>user\n"), ("content", "hi <|im_end|>")]
    tokenizer.save(sentencepiece_like / "again", "{{ 1 }}")
    again = load_tokenizer(sentencepiece_like / "again", "qwen1_5")
    assert again.fingerprint == tokenizer.fingerprint and again.chat_template == "{{ 1 }}"


def test_added_tokens_with_stripping_are_left_to_the_library(tmp_path):
    data = small_tokenizer_json(merges=[["a", "b"]], tokens=["ab"])
    data["added_tokens"][2]["lstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, LibraryTokenizer)
    assert tokenizer.encode("ab  <|im_end|>", "all") == [256, tokenizer.im_end_id]


def test_the_longest_control_token_wins(tmp_path):
    from tokenizers import Tokenizer as Library

    data = small_tokenizer_json(merges=[["a", "b"]], tokens=["ab"], names=(*NAMES, "<x", "<x>", "<x>y"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer, library = load_tokenizer(tmp_path), Library.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("<x>y<x>ab<x", "all") == library.encode("<x>y<x>ab<x").ids == [262, 261, 256, 260]


@pytest.mark.slow
def test_added_tokens_file_alone_names_the_control_tokens(vocabulary_folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(vocabulary_folder / name, tmp_path)
    listed = {name: 151643 + at for at, name in enumerate((*NAMES, "<extra>"))}
    (tmp_path / "added_tokens.json").write_text(json.dumps(listed))
    assert load_tokenizer(tmp_path, "qwen2_5").special_tokens == listed
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": "x"}')
    with pytest.raises(DataError, match=r"added_tokens\.json"):
        load_tokenizer(tmp_path, "qwen2_5")
