"""Composition: a typo costs a second, text is taken to the letter, and every configuration there is composes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.config.backends import without_effect
from research.core.config.compose import compose, from_yaml, group_options, to_yaml
from research.core.errors import ConfigError
from research.registry import model_files, model_spec


@pytest.mark.parametrize("model", sorted(model_files()))
def test_every_model_composes_and_is_its_own_name(model):
    config = compose([f"model={model}"])
    assert config.model.name == model
    assert model_spec(config.model, tokens=1000).layers == config.model.hf["num_hidden_layers"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "word",
    [
        f"{group}={name}"
        for group in ("task", "data", "train", "parallel", "device", "debug")
        for name in group_options(group)
        if name != "file"  # data=file is chosen by data=PATH, which gives its source
    ],
)
def test_every_group_option_composes(word):
    assert compose([word])


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.lrr=1", "train.lr?"),
        ("modle=qwen_7b", "model?"),
        ("model=qwen2_5_tny", "qwen2_5_tiny?"),
        ("task=fintune", "finetune?"),
        ("train.schedule=cosin", "cosine?"),
        ("data=wikitxt", "wikitext?"),
        ("--run_mod=predict", "--run_mode?"),
        ("--run_mode=predikt", "predict?"),
        ("train.lr=abc", "train.lr"),
        ("train.lr=0", "greater than 0"),
        ("train.lr=-1e-5", "greater than 0"),
        ("train.lr=nan", "greater than 0"),
        ("train.steps=1.5", "train.steps"),
        ("lora.rank=0", "at least 1"),
        ("generate.top_p=1.5", "at most 1"),
        ("model.hff=1", "model.hf?"),
        ("train", "setting=value"),
        ("train.lr=[1", "[1"),
        ("train.resume=true", "RUN=<folder>"),
    ],
)
def test_wrong_setting_names_itself_and_what_to_write(word, says):
    with pytest.raises(ConfigError) as caught:
        compose([word])
    assert says in str(caught.value)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="node_rank"):
        compose(["parallel.node_rank=2", "parallel.nodes=2", "parallel.master_addr=10.0.0.1"])
    with pytest.raises(ConfigError, match="loopback"):
        compose(["parallel.nodes=2"])
    with pytest.raises(ConfigError, match="needs an end"):
        compose(["task=lora", "train.epochs=null"])


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(lambda text: text != "null"))
def test_prompt_is_taken_to_the_letter(tmp_path_factory, text):
    config = compose([f"prompt={text}"])
    assert config.prompt == text
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(path) == config


def test_prompt_with_the_grammar_of_every_tool_in_between():
    text = "it's \"${HOME}\" [a, b] = \\' c:\\dir \\${x} \n 你好"
    assert compose([f"prompt={text}"]).prompt == text


def test_data_may_be_a_file(tmp_path):
    source = tmp_path / "my data, 1.jsonl"
    source.write_text("{}")
    config = compose([f"data={source}"])
    assert config.data.source == str(source)
    assert config.data.format == "auto"  # nothing inherited from the default data set


def test_mindformers_flags_become_settings(tmp_path):
    config = compose(
        ["--run_mode", "predict", "--load_checkpoint", "/w", "--predict_data", "hello, world", "--predict_length=128"]
        + ["--vocab_file", "/v/vocab.json", "--merges_file", "/v/merges.txt"]
    )
    assert config.task.name == "predict"
    assert (config.weights, config.prompt, config.generate.max_new_tokens) == ("/w", "hello, world", 128)
    assert config.tokenizer == "/v"


def test_importing_the_ground_floor_loads_no_framework():
    code = (
        "import sys, research.core.config.compose, research.core.data.dataset, research.core.text.tokenizer, "
        "research.core.weights.keys, research.core.run.folder, research.tasks.cli, research.registry\n"
        "print([name for name in ('torch', 'mindspore', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_several_prompts_are_taken_to_the_letter():
    texts = ['what is "a, b"?', "[1, 2] ${x}", "第三"]
    assert compose([f"prompt_list={json.dumps(texts)}"]).prompt_list == texts
    assert compose(["prompt_list=[one,two]"]).prompt_list == ["one", "two"]
    with pytest.raises(ConfigError, match="exclude each other"):
        compose(["prompt=x", 'prompt_list=["y"]'])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["parallel.tensor=2"], "CARDS=2"),
        (["parallel.cards=6", "parallel.tensor=4", "backend=mindspore"], "CARDS=4"),
        (["parallel.cards=8", "parallel.data=2", "parallel.tensor=2", "backend=mindspore"], "parallel.data=4"),
        (["parallel.cards=2", "parallel.tensor=2"], "parallel.shard=full"),
        (["parallel.cards=2", "parallel.shard=optimizer"], "parallel.shard=full"),
        (["train.dtype=fp16"], "train.dtype=bf16"),
        (["parallel.cards=2", "parallel.shard=full", "backend=mindspore"], "parallel.shard=optimizer"),
    ],
)
def test_a_grid_that_the_backend_cannot_follow_is_refused_with_one_that_it_can(words, says):
    with pytest.raises(ConfigError) as caught:
        compose(words)
    assert says in str(caught.value)


def test_settings_without_effect_are_named():
    config = compose(["auto_transform=false", "mindir.paged=true", "parallel.cards=2", "device.index=1"])
    notes = "\n".join(without_effect(config))
    for name in ("auto_transform", "mindir", "device.index"):
        assert name in notes
    assert without_effect(compose([])) == []


def test_ranks_take_their_number_and_backend_from_the_launcher(monkeypatch):
    for name, value in {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "4", "MS_NODE_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="started 4 ranks"):
        compose(["parallel.cards=2", "backend=mindspore"])
    with pytest.raises(ConfigError, match=r"torchrun_launcher\.sh"):
        compose(["backend=torch"])
    monkeypatch.setenv("MS_WORKER_NUM", "four")
    with pytest.raises(ConfigError, match="MS_WORKER_NUM"):
        compose([])
    monkeypatch.delenv("MS_ROLE")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert compose([]).parallel.cards == 3


def test_a_recipe_can_be_left_out():
    with_recipe, without = compose(["model=qwen2_5_tiny"]), compose(["model=qwen2_5_tiny", "recipe=null"])
    assert with_recipe.train.steps is not None and without.train.steps is None
