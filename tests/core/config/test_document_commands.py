"""Every launch, fine-tune, predict and export command of the documents: which settings it comes to.

The words are those behind the script's name, as the documents print them; the files they name are not here.
"""

from __future__ import annotations

import shlex

import pytest

from research.core.config.backends import check_sharing
from research.core.config.compose import compose, groups, setting_type
from research.core.config.flag_actions import FLAGS
from research.core.config.flags import translate
from research.core.config.mindformers.published import published
from research.core.errors import ConfigError
from research.registry import model_files

GROUPS = groups()
CAR = "/path/alpaca.mindrecord"
POEM = "帮助我制定一份去上海的旅游攻略"
BOOKS = "比较适合深度学习入门的书籍有"
MINDFORMER = "--register_path research/qwen1_5"


def _grid(cards, tensor=1, pipeline=1):
    return {"parallel.cards": cards, "parallel.tensor": tensor, "parallel.pipeline": pipeline}


# (script's family, ranks that the launcher starts or None, words, settings)
COMMANDS = {
    # qwen_mindformers
    "qwen 7b finetune": (
        "qwen", 8,
        "--config qwen/run_qwen_7b.yaml --load_checkpoint /path/model_dir --use_parallel True --run_mode finetune "
        f"--auto_trans_ckpt True --train_data {CAR}",
        {"task.name": "finetune", "model.name": "qwen_7b", "weights": "/path/model_dir", "data.source": CAR,
         "auto_transform": True, "data.seq_length": 2048, "train.lr": 1e-5, **_grid(8)},
    ),
    "qwen 7b lora": (
        "qwen", 8,
        "--config qwen/run_qwen_7b_lora.yaml --load_checkpoint /path/model_dir --use_parallel True --run_mode finetune "
        f"--auto_trans_ckpt True --train_data {CAR}",
        {"task.name": "lora", "model.name": "qwen_7b", "lora.rank": 64, "lora.alpha": 16, "lora.dropout": 0.05,
         "lora.target_modules": "all-linear", "data.seq_length": 2048, "train.lr": 3e-4, "train.min_lr_ratio": 0.1, **_grid(8)},
    ),
    "qwen 7b predict": (
        "qwen", None,
        f"--config /path/run_qwen_7b.yaml --predict_data '{BOOKS}' --run_mode predict "
        "--load_checkpoint /path/qwen_7b_base.ckpt --device_id 0",
        {"task.name": "predict", "prompt": BOOKS, "weights": "/path/qwen_7b_base.ckpt", "device.index": 0,
         "generate.temperature": 0.0, "generate.max_new_tokens": 512, **_grid(1)},
    ),
    "qwen 14b predict on two cards": (
        "qwen", 2,
        "--config qwen/run_qwen_14b.yaml --run_mode predict --use_parallel True --load_checkpoint /path/model_dir "
        f"--auto_trans_ckpt True --predict_data {BOOKS}",
        {"task.name": "predict", "model.name": "qwen_14b", "prompt": BOOKS, **_grid(2, tensor=2)},
    ),
    "qwen 7b export": (
        "qwen", None, "--run_mode export --config_path /path/run_qwen_7b.yaml",
        {"task.name": "export", "mindir.seq_length": 2048, "mindir.batch": 1, "mindir.paged": False, "mindir.past": True},
    ),
    "qwen 14b export on two cards": (
        "qwen", 2,
        "--run_mode export --config run_qwen_14b.yaml --use_parallel True --auto_trans_ckpt True  "
        "--load_checkpoint /path/to/qwen_14b_base.ckpt",
        {"task.name": "export", "weights": "/path/to/qwen_14b_base.ckpt", "auto_transform": True, **_grid(2, tensor=2)},
    ),
    "qwen 14b export of split weights": (
        "qwen", 2,
        "--run_mode export --config run_qwen_14b.yaml --use_parallel True --auto_trans_ckpt False "
        "--load_checkpoint /path/to/previous/transformed_checkpoint/qwen_14b_base/",
        {"task.name": "export", "auto_transform": False, **_grid(2, tensor=2)},
    ),
    "qwen 7b export paged": (
        "qwen", None, "--run_mode export --config_path /path/run_qwen_7b.yaml --paged_attention True",
        {"task.name": "export", "mindir.paged": True},
    ),
    # qwen1_5_910a_mindformers
    "qwen1.5 7b lora": (
        "qwen1_5", 8,
        "--config qwen1_5/run_qwen1_5_7b_lora.yaml --load_checkpoint model_dir --use_parallel True --run_mode finetune "
        f"--auto_trans_ckpt True --train_data {CAR}",
        {"task.name": "lora", "model.name": "qwen1_5_7b", "weights": "model_dir", "data.seq_length": 2048, **_grid(8, tensor=2)},
    ),
    "qwen1.5 7b finetune, the file misspelt": (
        "qwen1_5", 16,
        "--config qwen1_5/run_qwen1_5_7b_fintune.yaml --load_checkpoint model_dir --use_parallel True --run_mode finetune "
        f"--auto_trans_ckpt True --train_data {CAR}",
        {"task.name": "finetune", "data.seq_length": 4096, "train.accumulation": 16, "train.micro_batch": 2,
         **_grid(16, tensor=4, pipeline=2)},
    ),
    "qwen1.5 7b predict on one card": (
        "qwen1_5", None,
        "--config qwen1_5/run_qwen1_5_7b_infer.yaml --run_mode predict --use_parallel True --load_checkpoint /path/model_dir "
        f"--predict_data {POEM}",
        {"task.name": "predict", "prompt": POEM, **_grid(1)},
    ),
    # qwen1_5_mindformers
    "qwen1.5 7b pretrain": (
        None, 8,
        f"{MINDFORMER} --config research/qwen1_5/qwen1_5_7b/pretrain_qwen1_5_7b.yaml --load_checkpoint /path/qwen1.5_7b.ckpt "
        "--train_dataset_dir /path/wiki.mindrecord --run_mode train",
        {"task.name": "pretrain", "weights": "/path/qwen1.5_7b.ckpt", "data.source": "/path/wiki.mindrecord",
         "data.seq_length": 32768, **_grid(8, tensor=8)},
    ),
    "qwen1.5 14b pretrain on two hosts": (
        None, 16,
        f"{MINDFORMER} --config research/qwen1_5/qwen1_5_14b/pretrain_qwen1_5_14b.yaml --use_parallel True --run_mode train "
        "--train_data /path/wiki.mindrecord",
        {"task.name": "pretrain", "model.name": "qwen1_5_14b", "data.seq_length": 32768, **_grid(16, tensor=4)},
    ),
    "qwen1.5 72b pretrain on eight hosts": (
        None, 64,
        f"{MINDFORMER} --config research/qwen1_5/qwen1_5_72b/pretrain_qwen1_5_72b.yaml --use_parallel True --run_mode train "
        "--train_data /path/wiki.mindrecord",
        {"task.name": "pretrain", "model.name": "qwen1_5_72b", "train.accumulation": 64, **_grid(64, tensor=8, pipeline=8)},
    ),
    "qwen1.5 7b finetune with msrun": (
        None, 8,
        f"{MINDFORMER} --config research/qwen1_5/qwen1_5_7b/finetune_qwen1_5_7b.yaml --load_checkpoint /path/qwen1.5_7b.ckpt "
        f"--auto_trans_ckpt True --train_dataset {CAR} --run_mode finetune",
        {"task.name": "finetune", "data.source": CAR, "data.seq_length": 4096, "train.checkpointing": "full", **_grid(8)},
    ),
    "qwen1.5 72b finetune on four hosts": (
        None, 32,
        f"{MINDFORMER} --config finetune_qwen1_5_72b.yaml --load_checkpoint /path/model_dir --use_parallel True "
        f"--run_mode finetune --auto_trans_ckpt True --train_data {CAR}",
        {"task.name": "finetune", "data.seq_length": 2048, "train.accumulation": 48, **_grid(32, tensor=8, pipeline=4)},
    ),
    "qwen1.5 7b predict": (
        None, None,
        f"{MINDFORMER} --config research/qwen1_5/qwen1_5_7b/predict_qwen1_5_7b.yaml --load_checkpoint /path/model_dir "
        f"--run_mode predict --use_parallel False --auto_trans_ckpt False --predict_data '{POEM}'",
        {"task.name": "predict", "prompt": POEM, "auto_transform": False, **_grid(1)},
    ),
    "qwen1.5 72b predict on four cards": (
        None, 4,
        f"{MINDFORMER} --config research/qwen1_5/qwen1_5_72b/predict_qwen1_5_72b.yaml --load_checkpoint /path/model_dir "
        f"--run_mode predict --use_parallel True --auto_trans_ckpt True --predict_data {POEM}",
        {"task.name": "predict", "generate.max_new_tokens": 2048, **_grid(4, tensor=4)},
    ),
}  # fmt: skip


def _value(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.fixture
def ranks(monkeypatch):
    """Be one of so many ranks of msrun."""

    def start(number):
        for name, value in {
            "MS_ROLE": "MS_WORKER",
            "MS_WORKER_NUM": str(number),
            "MS_NODE_ID": "0",
            "DEVICE_ID": "0",
        }.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_of_the_documents_comes_to_its_settings(name, ranks):
    family, started, words, expected = COMMANDS[name]
    if started is not None:
        ranks(started)
    translation = translate(shlex.split(words), family, as_written=True)
    config = compose([*translation.words, *([] if started else ["backend=mindspore"])])
    assert {key: _value(config, key) for key in expected} == expected
    assert config.backend == "mindspore"
    assert all("has no effect" not in note for note in translation.notes), translation.notes


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_of_the_documents_asks_for_nothing_that_its_backend_cannot_do(name, ranks):
    family, started, words, expected = COMMANDS[name]
    if started is not None:
        ranks(started)
    config = compose([*translate(shlex.split(words), family).words, *([] if started else ["backend=mindspore"])])
    assert config.task.name == expected["task.name"]
    if config.task.name in ("pretrain", "finetune", "lora"):
        check_sharing(config)
        grid = [key for key in expected if key.startswith("parallel.")]
        assert {key: _value(config, key) for key in grid} == {key: expected[key] for key in grid}


def test_the_published_grid_is_fitted_to_the_ranks_that_there_are(ranks):
    ranks(2)
    words = shlex.split(COMMANDS["qwen1.5 7b lora"][2])
    translation = translate(words, "qwen1_5", as_written=True)
    assert compose(translation.words).parallel.tensor == 2
    assert "fitted to 2 cards: data 1 x tensor 2" in "\n".join(translation.notes)


def test_without_a_launcher_the_published_grid_starts_its_cards():
    config = compose([*translate(["--config", "finetune_qwen1_5_7b.yaml"]).words, "backend=mindspore"])
    assert config.parallel.cards == 8
    config = compose(
        translate(["--config", "finetune_qwen1_5_7b.yaml", "--use_parallel", "False", "backend=mindspore"]).words
    )
    assert config.parallel.cards == 1
    config = compose(translate(["--config", "finetune_qwen1_5_7b.yaml", "parallel.cards=2", "backend=mindspore"]).words)
    assert config.parallel.cards == 2


def test_use_parallel_false_under_a_launcher_is_refused(ranks):
    ranks(4)
    for words in (["--use_parallel", "False"], ["--config", "finetune_qwen1_5_7b.yaml", "--use_parallel", "False"]):
        with pytest.raises(ConfigError, match="4 ranks"):
            translate(words)


@pytest.mark.parametrize("name", sorted(published()))
def test_every_published_name_is_read_in_every_mode(name):
    row = published()[name]
    assert row.model in model_files()
    for mode in ("train", "finetune", "predict", "export", "eval"):
        words = translate(["--config", f"some/where/{row.file}.yaml", "--run_mode", mode], as_written=True).words
        found = dict(word.split("=", 1) for word in words)
        assert found["model"] == row.model
        assert all(key in GROUPS or setting_type(key) is not None for key in found)
        if mode in ("train", "finetune") and row.recipe != "predict":
            grid = tuple(int(found.get(f"parallel.{key}", 1)) for key in ("cards", "tensor", "pipeline"))
            assert grid == (row.data * row.tensor * row.pipeline, row.tensor, row.pipeline)
            assert float(found["train.lr"]) * float(found["train.min_lr_ratio"]) == pytest.approx(row.lr_end or 0.0)


@pytest.mark.parametrize(
    ("file", "seq_length", "blocks"),
    [  # models.md, "Sequence lengths and KV blocks in the document configs"
        ("finetune_qwen1_5_0_5b", 8192, None), ("finetune_qwen1_5_1_8b", 8192, None), ("finetune_qwen1_5_4b", 8192, None),
        ("finetune_qwen1_5_7b", 4096, None), ("pretrain_qwen1_5_7b", 32768, None), ("finetune_qwen1_5_14b", 4096, None),
        ("pretrain_qwen1_5_14b", 32768, None), ("finetune_qwen1_5_32b", 8192, None), ("finetune_qwen1_5_72b", 2048, None),
        ("pretrain_qwen1_5_72b", 32768, None), ("predict_qwen1_5_0_5b_chat", 8192, (32, 1024)),
        ("predict_qwen1_5_1_8b_chat", 8192, (32, 1024)), ("predict_qwen1_5_4b_chat", 8192, (32, 1024)),
        ("predict_qwen1_5_7b", 4096, (32, 1024)), ("predict_qwen1_5_7b_chat", 8192, (32, 1024)),
        ("predict_qwen1_5_14b", 8192, (16, 1024)), ("predict_qwen1_5_14b_chat", 8192, (32, 1024)),
        ("predict_qwen1_5_32b_chat", 8192, (32, 1024)), ("predict_qwen1_5_72b", 8192, (32, 512)),
        ("predict_qwen1_5_72b_chat", 8192, (32, 512)),
    ],
)  # fmt: skip
def test_published_lengths_and_blocks_are_the_model_tables(file, seq_length, blocks):
    row = published()[file]
    assert row.seq == seq_length
    assert blocks is None or (row.block_size, row.num_blocks) == blocks


# --- single flags -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--do_sample", "true", "--top_k", "3", "--top_p=0.8"], ["generate.temperature=1.0", "generate.top_k=3", "generate.top_p=0.8"]),
        (["--run_mode", "predict", "--batch_size", "4"], ["task=predict", "generate.batch=4"]),
        (["--run_mode", "train", "--batch_size", "4"], ["task=pretrain", "train.micro_batch=4"]),
        (["--run_mode", "export", "--batch_size", "4", "--seq_length", "64", "--dynamic", "True"],
         ["task=export", "mindir.batch=4", "mindir.seq_length=64", "mindir.dynamic=true"]),
        (["--run_mode", "export", "--use_past", "False"], ["task=export", "mindir.past=False"]),
        (["--optimizer_parallel", "True"], ["parallel.shard=optimizer"]),
        (["--src_strategy_path_or_dir", "/s"], ["reshard.strategy=/s"]),
        (["--num_samples", "7", "--epochs", "2", "--gradient_accumulation_steps", "4", "--seed", "9"],
         ["data.max_records=7", "train.epochs=2", "train.accumulation=4", "train.seed=9"]),
        (["--device_target", "Ascend", "--output_dir", "runs/x"], ["device=npu", "run=runs/x"]),
        (["--do_eval", "False"], ["data.eval_records=0"]),
        (["--predict_data", "one", "two three", "four"], ['prompt_list=["one", "two three", "four"]']),
        (["--predict_data", "a=b is an equation", "train.lr=1 too", "train.steps=3"],
         ['prompt=a=b is an equation', "train.lr=1 too", "train.steps=3"]),
        (["--predict_data", "line\\nbreak"], ["prompt=line\nbreak"]),
        (["--vocab_file", "qwen.tiktoken"], ["tokenizer=."]),
        (["--task", "text_generation", "--modal_type", "text"], []),
        (["--epochs", "1", "train.epochs=5"], ["train.epochs=5"]),
        (["--predict_batch_size", "3"], ["generate.batch=3"]),
    ],
)  # fmt: skip
def test_a_flag_becomes_a_setting(words, expected):
    assert translate(words).words == expected


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--remote_save_url", "obs://x"], "uploaded"),
        (["--mode", "1"], "graphs"),
        (["--profile", "True"], "profiler"),
        (["--sink_mode", "True"], "fed"),
        (["--transform_process_num", "4"], "one process transforms"),
        (["--only_save_strategy", "True"], "reshard"),
        (["--use_past", "True"], "training keeps no keys"),
        (["--run_mode", "predict", "--seq_length", "2048"], "room"),
        (["--eval_dataset_dir", "/e"], "held out"),
        (["--use_parallel", "True"], "how many cards"),
    ],
)
def test_a_flag_without_effect_is_announced_with_the_reason(words, says):
    assert any(says in note for note in translate(words).notes)


def test_flags_that_ask_for_nothing_are_not_announced():
    words = ["--mode", "0", "--profile", "False", "--only_save_strategy", "False", "--transform_process_num", "1"]
    assert translate(words).notes == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--predict_dta", "x"], "--predict_data"),
        (["--run_mode", "predikt"], "predict"),
        (["--task", "image_classification"], "text_generation"),
        (["--modal_type", "image"], "read text"),
        (["--auto_trans_ckpt", "maybe"], "True or False"),
        (["--register_path", "research/lama"], "research/qwen"),
        (["--register_path", "research/qwen2", "--config", "finetune_qwen1_5_7b.yaml"], "research/qwen1_5"),
        (["--config", "finetune_qwen1_5_7bb.yaml"], "finetune_qwen1_5_7b.yaml"),
        (["--config", "finetune_qwen1_5_7b.yaml", "model=qwen_7b"], "model=qwen1_5_7b"),
        (["--resume_training", "step-5"], "newest checkpoint"),
        (["--vocab_file", "/a/vocab.json", "--merges_file", "/b/merges.txt"], "one folder"),
        (["--adapter_id", "law"], "lora_adapter.json"),
        (["--adapter_id", "a", "b"], "one adapter"),
        (["--model.model_config.seq_length", "4"], "--config FILE"),
        (["--options", "a"], "key=value"),
        (["--seed"], "needs a value"),
        (["--seed", "--epochs", "3"], "needs a value"),
        (["--device_id", "x"], "--device_id 0"),
        (
            ["--config", "finetune_qwen1_5_7b.yaml", "--model.model_config.hidden_size", "512"],
            "hidden_size: 4096 expected",
        ),
    ],
)
def test_a_wrong_flag_or_value_names_what_to_write(words, says):
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        compose(translate(words).words)


def test_an_adapter_is_found_by_its_id(tmp_path):
    (tmp_path / "law").mkdir()
    (tmp_path / "lora_adapter.json").write_text(f'{{"law": "{tmp_path / "law"}"}}')
    words = translate(["--load_checkpoint", str(tmp_path), "--adapter_id", "law"]).words
    assert f"adapter={tmp_path / 'law'}" in words


def test_resuming_takes_the_run_folder_from_load_checkpoint(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    words = translate(["--load_checkpoint", str(tmp_path), "--resume_training", "True"]).words
    assert sorted(words) == sorted(["train.resume=true", f"run={tmp_path}"])


def test_the_card_is_taken_from_the_environment(monkeypatch):
    monkeypatch.setenv("DEVICE_ID", "5")
    assert translate(["--device_id", "-1"]).words == ["device.index=5"]
    assert translate(["--device_id", "3"]).words == ["device.index=3"]


# scripts.md: the flags of run_qwen.py, run_qwen1_5.py and run_mindformer.py
SCRIPTS = {
    "run_qwen": "task config run_mode load_checkpoint auto_trans_ckpt remote_save_url vocab_file seq_length batch_size device_id "
    "predict_data predict_length use_past do_sample top_k top_p train_dataset optimizer_parallel use_parallel paged_attention "
    "dynamic merges_file",
    "run_mindformer": "config mode device_id device_target run_mode do_eval train_dataset_dir eval_dataset_dir predict_data "
    "modal_type predict_batch_size adapter_id load_checkpoint src_strategy_path_or_dir auto_trans_ckpt transform_process_num "
    "only_save_strategy resume_training strategy_load_checkpoint remote_save_url seed use_parallel profile options epochs "
    "batch_size gradient_accumulation_steps sink_mode num_samples output_dir register_path do_sample",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_of_the_scripts_is_known(script):
    assert set(SCRIPTS[script].split()) <= FLAGS.keys()
