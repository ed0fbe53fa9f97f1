"""The built-in vocabulary is deterministic, cached safely, and splits digits and Chinese sensibly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from research.core.text import builtin
from research.core.text.builtin import builtin_tokenizer
from research.core.text.specials import FAMILY_SPECIALS
from research.core.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A cache that held nothing before the vocabulary was trained here."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trained") / "cache"
        patch.setenv("QWEN_CACHE", str(folder))
        builtin_tokenizer.cache_clear()
        builtin_tokenizer()
        yield folder
    builtin_tokenizer.cache_clear()


@pytest.fixture
def cache(trained, tmp_path, monkeypatch):
    """A copy of it, which a new process finds."""
    shutil.copytree(trained, tmp_path / "cache")
    monkeypatch.setenv("QWEN_CACHE", str(tmp_path / "cache"))
    builtin_tokenizer.cache_clear()
    yield tmp_path / "cache"
    builtin_tokenizer.cache_clear()


def test_names_sizes_and_round_trip(cache):
    tokenizer = builtin_tokenizer()
    assert list(tokenizer.special_tokens) == list(FAMILY_SPECIALS["qwen2_5"])
    assert sorted(tokenizer.special_tokens.values()) == list(range(builtin.BASE_TOKENS, tokenizer.vocab_size))
    assert tokenizer.vocab_size == builtin.BASE_TOKENS + 22 == 3072
    for text in ("Sort 12, 7 and 305.", "把12和7从小到大排列。", "🦄\x00 é\n\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_and_common_chinese_characters_are_single_tokens(cache):
    tokenizer = builtin_tokenizer()
    assert len(tokenizer.encode("1234567890")) == 10
    text = "把下面的数字从小到大排列：苹果，星期三，米和厘米"
    assert [tokenizer.decode([index]) for index in tokenizer.encode(text)] == list(text)
    english = "The list is sorted in the order of the numbers"
    assert len(tokenizer.encode(english)) < len(english) / 2


@pytest.mark.slow
def test_training_gives_the_same_vocabulary_in_another_process(cache):
    code = "from research.core.text.builtin import train_builtin; print(train_builtin().fingerprint())"
    environment = os.environ | {"PYTHONHASHSEED": "77", "RAYON_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.strip() == builtin_tokenizer().fingerprint


def test_cache_is_used_and_holds_nothing_half_written(cache, monkeypatch):
    first = builtin_tokenizer()
    files = list(cache.iterdir())  # as the training left them
    assert len(files) == 1 and json.loads(files[0].read_text(encoding="utf-8"))["model"]
    builtin_tokenizer.cache_clear()
    monkeypatch.setattr(builtin, "train_builtin", lambda: pytest.fail("trained again"))
    assert builtin_tokenizer().fingerprint == first.fingerprint


@pytest.mark.slow
def test_two_processes_at_once_agree(cache):
    shutil.rmtree(cache)
    code = "from research.core.text.builtin import builtin_tokenizer; print(builtin_tokenizer().fingerprint)"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        for _ in range(2)
    ]
    printed = {run.communicate()[0].strip() for run in runs}
    assert len(printed) == 1 and all(run.returncode == 0 for run in runs)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.slow
def test_a_damaged_cache_file_is_trained_again(cache):
    first = builtin_tokenizer().fingerprint
    path = next(cache.iterdir())
    path.write_text(path.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    builtin_tokenizer.cache_clear()
    assert builtin_tokenizer().fingerprint == first and path.stat().st_size > 1000


def test_works_without_a_writable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWEN_CACHE", str(tmp_path / "file" / "below"))
    builtin_tokenizer.cache_clear()
    assert builtin_tokenizer().vocab_size == 3072
    builtin_tokenizer.cache_clear()


def test_saved_beside_weights_it_loads_for_every_family(cache, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = builtin_tokenizer()
    tokenizer.save(tmp_path / "weights", "{{ 1 }}")
    for family in ("qwen", "qwen1_5", "qwen2_5", "auto"):
        assert load_tokenizer(tmp_path / "weights", family).fingerprint == tokenizer.fingerprint, family
    theirs = AutoTokenizer.from_pretrained(tmp_path / "weights")
    text = "Hi <|im_end|> 你好 123"
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text, "all")
