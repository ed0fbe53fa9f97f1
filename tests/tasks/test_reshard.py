"""``task=split``, ``merge_shards`` and ``reshard`` as the Makefile calls them, and the mistakes that end with status 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from research.tasks.cli import main
from tests.core.weights.grids import SPECS, assert_same_tensors, write_model


@pytest.fixture
def model(tmp_path) -> Path:
    return write_model(tmp_path / "model", SPECS["tied"])


def task(name: str, source: Path, target: Path, *words: str) -> int:
    return main([f"task={name}", f"weights={source}", f"output={target}", *words])


def test_split_reshard_and_merge_come_back_bit_equal_and_name_their_choices(model, tmp_path, capsys):
    assert task("split", model, tmp_path / "parts", "parallel.cards=4") == 0
    out = capsys.readouterr().out
    assert "2 kv heads over 4 cards: replicated, each head on 2 cards" in out
    assert "padded with zeros to 104" in out and f"written: {tmp_path / 'parts'}" in out
    words = ("reshard.to=ranks", "reshard.grid=dp2-tp2-pp2", "convert.qkv_concat=grouped")
    assert task("reshard", tmp_path / "parts", tmp_path / "ranks", *words) == 0
    assert "layers per stage: 1 1" in capsys.readouterr().out
    assert (tmp_path / "ranks" / "rank_7" / "checkpoint_7.ckpt").is_file()
    assert task("merge_shards", tmp_path / "ranks", tmp_path / "merged") == 0
    assert_same_tensors(model, tmp_path / "merged")


def test_reshard_keeps_the_kind_that_the_source_is(model, tmp_path):
    assert task("reshard", model, tmp_path / "dcp", "reshard.to=dcp", "reshard.grid=2") == 0
    assert task("reshard", tmp_path / "dcp", tmp_path / "more", "reshard.grid=5") == 0
    assert len(list((tmp_path / "more").glob("*.distcp"))) == 5


def test_the_documents_strategy_names(model, tmp_path):
    words = ("reshard.to=ranks", "reshard.document_names=true", "convert.files=safetensors")
    assert task("split", model, tmp_path / "ranks", "parallel.cards=2", *words) == 0
    names = {path.name for path in (tmp_path / "ranks" / "strategy").iterdir()}
    assert "ckpt_strategy_rank_1_rank_1.ckpt" in names
    assert (tmp_path / "ranks" / "rank_1" / "checkpoint_1.safetensors").is_file()
    assert task("merge_shards", tmp_path / "ranks", tmp_path / "back") == 0
    assert_same_tensors(model, tmp_path / "back")


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("split", ("parallel.cards=3",), "widths that work: 2, 4, 8"),
        ("split", ("parallel.cards=4", "reshard.kv=refuse"), "kv=refuse"),
        ("split", ("parallel.cards=4", "reshard.vocab=refuse"), "vocab=refuse"),
        ("split", ("reshard.grid=tp2-pp3",), "3 pipeline stages for 2 layers"),
        ("split", ("reshard.grid=pp2", "reshard.stage_layers=[2,1]"), "the model has 2"),
        ("split", ("reshard.grid=two",), "is no grid of cards"),
        ("split", ("reshard.to=shards",), "is not a choice"),
        ("split", ("reshard.target_strategy=/nowhere",), "reshard.to=ranks"),
        ("reshard", ("reshard.to=ranks", "reshard.target_strategy=/nowhere"), "strategy file or folder not found"),
        ("reshard", ("reshard.to=ranks", "reshard.grid=tp2", "convert.qkv_concat=stacked"), "qkv_concat=grouped"),
        ("merge_shards", ("reshard.to=parts",), "make reshard"),
        ("merge_shards", ("reshard.grid=tp2",), "one folder has no grid"),
    ],
)
def test_mistakes_end_with_status_2_and_write_nothing(model, tmp_path, capsys, name, words, message):
    before = sorted(path.name for path in tmp_path.iterdir())
    assert task(name, model, tmp_path / "out", *words) == 2
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_model_named_wrongly_is_refused(model, tmp_path, capsys):
    assert task("split", model, tmp_path / "out", "model=qwen2_5_7b", "parallel.cards=2") == 2
    assert "hidden" in capsys.readouterr().err


def test_source_and_target_are_needed(capsys):
    assert main(["task=split", "output=x"]) == 2
    assert "make split WEIGHTS=folder OUTPUT=folder" in capsys.readouterr().err
