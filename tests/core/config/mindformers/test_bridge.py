"""The bridge both ways: what is written is read back the same, and what a file says is translated, named or refused."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from research.core.config.compose import compose, group_options
from research.core.config.flags import translate
from research.core.config.mindformers.grid import Ranks
from research.core.config.mindformers.keys import targets_from_mindformers, targets_to_mindformers
from research.core.config.mindformers.read import read_file
from research.core.config.mindformers.write import RELEASES, write_config
from research.core.config.mindformers.yaml_file import Job, dump
from research.core.errors import ConfigError
from research.registry import model_config, model_spec

VOCABULARY = 2048
RECIPES = ("pretrain", "finetune", "lora", "predict")
MODELS = [name for name in group_options("model") if name != "gte_qwen2_7b"]
# How often something is saved or told: 0 means "at the end" here, and MindFormers' files have no such value.
NOT_COMPARED = {"save_every", "log_every", "eval_every", "sample_every"}


def spec_of(config):
    return model_spec(config.model, tokens=VOCABULARY)


def again(content: dict, *words: str, **job) -> object:
    """The configuration that a written file comes to."""
    text = dump(content)
    reading = read_file(yaml.safe_load(text), "file.yaml", Job(accelerator=True, splits_layers=True, **job))
    return compose([*reading.as_words(), "backend=mindspore", *words])


def composed(model: str, task: str, *words: str):
    return compose([f"model={model}", f"task={task}", "backend=mindspore", *words])


# --- round trips ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_read_back_as_itself(model):
    task = RECIPES[MODELS.index(model) % len(RECIPES)]
    config = composed(model, task)
    back = again(write_config(config, spec_of(config)), family=config.model.family)
    assert back.model.name == model and back.task.name == task
    assert spec_of(back) == spec_of(config)


GRIDS = [(), ("parallel.cards=8",), ("parallel.cards=8", "parallel.tensor=2", "parallel.shard=optimizer")]


@pytest.mark.slow
@pytest.mark.parametrize("task", RECIPES)
@pytest.mark.parametrize(("number", "model"), enumerate(["qwen_7b", "qwen1_5_7b", "qwen2_57b_a14b", "qwen2_5_tiny"]))
def test_every_recipe_and_grid_is_read_back_the_same(number, model, task):
    grid = GRIDS[(number + RECIPES.index(task)) % len(GRIDS)]
    if task == "predict":
        grid = ("parallel.cards=2", "parallel.tensor=2") if grid else ()
    settings = {
        "pretrain": ["data.seq_length=1024", "train.lr=3e-4", "train.dtype=bf16", "train.weight_decay=0.05"],
        "finetune": ["train.micro_batch=2", "train.accumulation=3", "train.warmup_steps=7", "train.dtype=fp16"],
        "lora": ["lora.rank=64", "lora.alpha=16", "lora.dropout=0.05", "lora.target_modules=[q_proj,v_proj,gate_proj]"],
        "predict": [
            "generate.temperature=0.7",
            "generate.top_k=20",
            "generate.repetition_penalty=1.05",
            "generate.dtype=bf16",
        ],
    }[task]
    settings += ["data.eval_records=0"] if task != "predict" else []
    length = ["data.seq_length=512", "train.steps=null", "train.epochs=2", "train.max_minutes=null"]
    length = length if model == "qwen2_5_tiny" and task != "pretrain" else []
    config = composed(model, task, *settings, *grid, *length, *(["train.dtype=fp32"] if task == "lora" else []))
    back = again(write_config(config, spec_of(config)), family=config.model.family)
    assert spec_of(back) == spec_of(config)
    assert back.task.name == task
    assert _grid(back) == _grid(config)
    if task == "predict":
        for name in ("temperature", "top_k", "repetition_penalty", "max_new_tokens", "dtype", "batch", "seed"):
            assert getattr(back.generate, name) == getattr(config.generate, name), name
        return
    for field in dataclasses.fields(config.train):
        if field.name not in NOT_COMPARED and field.name != "router_aux":
            assert getattr(back.train, field.name) == pytest.approx(getattr(config.train, field.name)), field.name
    if spec_of(config).moe:
        assert back.train.router_aux == spec_of(config).moe.aux_coefficient
    assert back.data.seq_length == config.data.seq_length and back.data.eval_records == 0
    if task == "lora":
        assert back.lora == config.lora


def _grid(config):
    parallel = config.parallel
    return parallel.cards, parallel.tensor, parallel.pipeline, parallel.shard


def test_pipeline_stages_are_filled_by_the_accumulation():
    grid = ["parallel.cards=16", "parallel.tensor=4", "parallel.pipeline=2", "train.accumulation=16"]
    config = composed("qwen1_5_7b", "finetune", *grid)
    content = write_config(config, spec_of(config))
    assert content["parallel_config"]["micro_batch_num"] == 16
    assert content["parallel_config"]["data_parallel"] == 2 and content["parallel_config"]["pipeline_stage"] == 2
    assert "gradient_accumulation_steps" not in content["runner_config"]
    back = again(content)
    assert back.train.accumulation == 16 and back.parallel.pipeline == 2


@pytest.mark.parametrize("release", sorted(RELEASES))
def test_every_release_is_read_back_the_same(release):
    config = composed(
        "qwen_7b" if RELEASES[release].v1 else "qwen1_5_7b", "finetune", "train.beta2=0.98", "train.keep_last=3"
    )
    content = write_config(config, spec_of(config), release)
    back = again(content)
    assert back.train.beta2 == 0.98 and back.train.keep_last == 3
    assert content["callbacks"][1]["type"] == ("CheckpointMointor" if release == "r1.0" else "CheckpointMonitor")


def test_yarn_and_linear_scaling_are_read_back():
    for scaling in (
        "{rope_type:yarn,factor:4.0,original_max_position_embeddings:32768}",
        "{rope_type:linear,factor:2.0}",
    ):
        config = composed("qwen2_5_7b", "predict", f"model.hf.rope_scaling={scaling}")
        content = write_config(config, spec_of(config))
        back = again(content)
        assert spec_of(back).rope_scaling == spec_of(config).rope_scaling
    # MindFormers asks for exactly these keys.
    yarn = write_config(composed("qwen2_5_7b", "predict", "model.hf.rope_scaling={rope_type:yarn,factor:4.0}"), _yarn())
    assert set(yarn["model"]["model_config"]["scaling_factor"]) == {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    }  # fmt: skip


def _yarn():
    return spec_of(composed("qwen2_5_7b", "predict", "model.hf.rope_scaling={rope_type:yarn,factor:4.0}"))


@pytest.mark.parametrize(
    ("model", "words", "says"),
    [
        ("gte_qwen2_7b", [], "embedding"),
        ("qwen2_5_7b", ["train.schedule=wsd"], "cosine"),
        ("qwen2_5_7b", ["model.hf.use_sliding_window=true", "model.hf.sliding_window=4096"], "sliding"),
    ],
)
def test_what_mindformers_has_no_key_for_is_refused(model, words, says):
    config = composed(model, "finetune", *words)
    with pytest.raises(ConfigError, match=says):
        write_config(config, spec_of(config))


def test_a_release_without_the_model_is_refused():
    config = composed("qwen_7b", "finetune")
    with pytest.raises(ConfigError, match=r"r1\.3"):
        write_config(config, spec_of(config), "r1.5")
    config = composed("qwen2_57b_a14b", "finetune")
    with pytest.raises(ConfigError, match="experts"):
        write_config(config, spec_of(config), "r1.0")


# --- numbers of the documents and of the model table ------------------------------------------------------------


def test_qwen1_5_7b_has_the_documents_numbers():
    config = compose([*translate(["--config", "finetune_qwen1_5_7b.yaml"], as_written=True).words])
    content = write_config(config, spec_of(config))
    model, grid = content["model"]["model_config"], content["parallel_config"]
    # models.md: 32 layers, hidden 4096, 32 heads, 32 kv heads, ffn 11008, vocabulary 151936, theta 1e6, not tied
    assert (model["num_layers"], model["hidden_size"], model["num_heads"], model["n_kv_heads"]) == (32, 4096, 32, 32)
    assert (model["intermediate_size"], model["vocab_size"], model["theta"]) == (11008, 151936, 1e6)
    assert model["tie_word_embeddings"] is False and model["qkv_has_bias"] is True
    assert model["seq_length"] == 4096  # its table of performance
    assert (grid["data_parallel"], grid["model_parallel"], grid["pipeline_stage"]) == (8, 1, 1)  # one host, eight cards
    assert content["train_dataset"]["input_columns"] == ["input_ids", "target_ids", "attention_mask"]
    assert content["model"]["arch"]["type"] == "LlamaForCausalLM" and content["run_mode"] == "finetune"


def test_qwen_7b_lora_has_the_documents_numbers():
    config = compose([*translate(["--config", "run_qwen_7b_lora.yaml"], as_written=True).words])
    content = write_config(config, spec_of(config))
    model = content["model"]["model_config"]
    # models.md: 32 layers, hidden 4096, 32 heads, ffn 11008 (one half), theta 1e4, kv_channels 128
    assert (model["num_layers"], model["hidden_size"], model["num_heads"], model["intermediate_size"]) == (
        32,
        4096,
        32,
        11008,
    )
    assert (model["rotary_emb_base"], model["kv_channels"], model["seq_length"]) == (1e4, 128, 2048)
    assert model["pet_config"] == {
        "pet_type": "lora", "lora_rank": 64, "lora_alpha": 16.0, "lora_dropout": 0.05,
        "target_modules": ".*wq|.*wk|.*wv|.*wo|.*w1|.*w3|.*w2",
    }  # fmt: skip
    assert content["train_dataset"]["input_columns"] == ["input_ids", "labels", "attention_mask"]
    assert (model["type"], content["model"]["arch"]["type"]) == ("QwenConfig", "QwenForCausalLM")
    assert content["parallel_config"]["data_parallel"] == 8


@pytest.mark.parametrize("name", ["finetune_qwen1_5_7b", "run_qwen_7b_lora"])
def test_the_written_text_is_the_golden_one(name, repo):
    config = compose([*translate(["--config", f"{name}.yaml"], as_written=True).words])
    golden = repo / "tests" / "core" / "config" / "mindformers" / f"{name}.golden.yaml"
    assert dump(write_config(config, spec_of(config))) == golden.read_text(encoding="utf-8")


def test_a_mixture_of_experts_has_the_model_tables_numbers():
    config = composed("qwen2_57b_a14b", "finetune")
    content = write_config(config, spec_of(config))
    moe, model = content["moe_config"], content["model"]["model_config"]
    # models.md: 64 experts, 8 chosen, expert ffn 2560, shared ffn 20480 = 8 x 2560
    assert (moe["expert_num"], moe["num_experts_chosen"], moe["shared_expert_num"]) == (64, 8, 8.0)
    assert model["intermediate_size"] == 2560 and moe["norm_topk_prob"] is False


# --- a file as users have it ------------------------------------------------------------------------------------

# The sections that the documents show, for a tiny model.
DOCUMENT = """
load_checkpoint: 'model_dir'
auto_trans_ckpt: True
use_parallel: True
run_mode: 'finetune'
trainer:
  type: CausalLanguageModelingTrainer
  model_name: 'qwen2_5_tiny'
runner_config: {epochs: 3, batch_size: 2, sink_mode: True, sink_size: 2}
runner_wrapper:
  type: MFTrainOneStepCell
  scale_sense: {type: DynamicLossScaleUpdateCell, loss_scale_value: 4096, scale_factor: 2, scale_window: 500}
  use_clip_grad: True
optimizer: {type: FP32StateAdamWeightDecay, beta1: 0.9, beta2: 0.95, eps: 1.e-8, learning_rate: 1.e-6, weight_decay: 0.01}
lr_schedule: {type: CosineWithWarmUpLR, learning_rate: 8e-5, lr_end: 2.e-5, warmup_ratio: 0.01, total_steps: -1}
train_dataset: &train_dataset
  data_loader: {type: MindDataset, dataset_dir: "/data/alpaca.mindrecord", shuffle: True}
  input_columns: ["input_ids", "target_ids", "attention_mask"]
  batch_size: 4
train_dataset_task: {type: CausalLanguageModelDataset, dataset_config: *train_dataset}
parallel: {parallel_mode: 1, enable_parallel_optimizer: True, full_batch: True}
parallel_config: {data_parallel: 4, model_parallel: 2, pipeline_stage: 1, micro_batch_num: 1, vocab_emb_dp: True}
recompute_config: {recompute: True, select_recompute: False}
callbacks:
  - type: MFLossMonitor
  - {type: CheckpointMointor, prefix: "qwen2", save_checkpoint_steps: 500, keep_checkpoint_max: 3, async_save: False}
context: {mode: 0, device_target: "Ascend", max_device_memory: "31GB", device_id: 0}
model:
  model_config:
    type: LlamaConfig
    batch_size: 1
    seq_length: 256
    hidden_size: HIDDEN
    num_layers: LAYERS
    num_heads: HEADS
    n_kv_heads: KV
    vocab_size: 2048
    intermediate_size: FFN
    qkv_has_bias: True
    rms_norm_eps: 1.0e-6
    theta: THETA
    rotary_emb_base: 77
    compute_dtype: "float16"
    param_init_type: "float16"
    use_flash_attention: True
    some_new_switch: 7
  arch: {type: LlamaForCausalLM}
processor:
  tokenizer: {vocab_file: "/{path}/vocab.json", merges_file: "/{path}/merges.txt", type: Qwen2Tokenizer}
"""


@pytest.fixture
def document(tmp_path):
    hf = model_config("qwen2_5_tiny").hf
    text = DOCUMENT
    for mark, key in (
        ("HIDDEN", "hidden_size"),
        ("LAYERS", "num_hidden_layers"),
        ("HEADS", "num_attention_heads"),
        ("KV", "num_key_value_heads"),
        ("FFN", "intermediate_size"),
        ("THETA", "rope_theta"),
    ):
        text = text.replace(f": {mark}\n", f": {hf[key]}\n")

    def write(*changes):
        changed = text
        for old, new in changes:
            assert old in changed, old
            changed = changed.replace(old, new)
        path = tmp_path / "finetune.yaml"
        path.write_text(changed)
        return path

    return write


def test_a_files_settings_arrive(document):
    translation = translate(["--config", str(document())], as_written=True)
    config = compose(translation.words)
    train, data = config.train, config.data
    assert config.model.name == "qwen2_5_tiny" and config.task.name == "finetune" and config.backend == "mindspore"
    assert (train.epochs, train.micro_batch, train.lr, train.min_lr_ratio) == (3, 2, 8e-5, 0.25)
    assert (train.warmup_ratio, train.schedule, train.eps, train.weight_decay) == (0.01, "cosine", 1e-8, 0.01)
    assert (train.loss_scale, train.loss_scale_window, train.clip_norm) == (4096, 500, 1.0)
    assert (train.dtype, train.master, train.checkpointing) == ("fp16", "same", "full")
    assert (train.save_every, train.keep_last, train.async_save) == (500, 3, False)
    assert (data.source, data.seq_length) == ("/data/alpaca.mindrecord", 256)
    assert _grid(config) == (8, 2, 1, "optimizer") and config.auto_transform
    assert config.weights is None and config.tokenizer is None, "placeholders are no paths"
    notes = "\n".join(translation.notes)
    assert "some_new_switch" in notes and "not known" in notes
    assert "max_device_memory" in notes and "use_flash_attention" in notes


def test_flags_count_over_the_file_and_settings_over_both(document):
    path = str(document())
    flags = ["--epochs", "7", "--load_checkpoint", "/w", "--optimizer_parallel", "False", "--seed", "5"]
    config = compose(translate(["--config", path, *flags, "train.lr=1e-3", "train.seed=6"]).words)
    assert (config.train.epochs, config.weights, config.train.lr, config.train.seed) == (7, "/w", 1e-3, 6)
    assert config.parallel.shard == "none"


def test_dotted_flags_and_options_change_the_file(document):
    path = str(document())
    words = ["--config", path, "--parallel_config.data_parallel", "1", "--model.model_config.seq_length=128"]
    config = compose(translate([*words, "--options", "runner_config.epochs=9", "optimizer.beta2=0.99"]).words)
    assert config.parallel.cards == 2 and config.data.seq_length == 128
    assert config.train.epochs == 9 and config.train.beta2 == 0.99
    with pytest.raises(ConfigError, match="no keys below"):
        translate(["--config", path, "--run_mode.x", "1"])


def test_without_an_accelerator_dtypes_are_left_to_the_machine(document):
    config = compose(translate(["--config", str(document())]).words)
    assert (config.train.dtype, config.train.master) == ("auto", "fp32")


def test_the_same_file_predicts_exports_and_evaluates(document):
    path = str(
        document(
            (
                "    use_flash_attention",
                "    do_sample: True\n    top_k: 3\n    max_decode_length: 64\n    use_flash_attention",
            )
        )
    )
    flags = ["--config", path, "--use_parallel", "False"]
    config = compose(translate([*flags, "--run_mode", "predict", "--predict_data", "你好"]).words)
    assert (config.task.name, config.prompt, config.generate.temperature, config.generate.top_k) == (
        "predict",
        "你好",
        1.0,
        3,
    )
    assert config.generate.max_new_tokens == 64 and config.parallel.cards == 1
    config = compose(translate([*flags, "--run_mode", "predict", "--do_sample", "False"]).words)
    assert config.generate.temperature == 0.0
    config = compose(
        translate([*flags, "--run_mode", "export", "--paged_attention", "True", "--batch_size", "4"]).words
    )
    assert (
        config.task.name == "export"
        and (config.mindir.seq_length, config.mindir.batch) == (256, 4)
        and config.mindir.paged
    )
    config = compose(translate([*flags, "--run_mode", "eval", "--eval_dataset_dir", "/data/eval.mindrecord"]).words)
    assert config.task.name == "perplexity" and config.data.source == "/data/eval.mindrecord"


@pytest.mark.parametrize(
    ("change", "words", "says"),
    [
        (("hidden_size: ", "hidden_size: 9"), ["model=qwen2_5_tiny"], "hidden_size"),
        (("hidden_size: ", "hidden_size: 9"), [], "qwen2_5_tiny"),
        (("    rotary_emb_base", "    tie_word_embeddings: 5\n    rotary_emb_base"), ["model=qwen2_5_tiny"], "tie_word_embeddings"),
        (("type: LlamaForCausalLM", "type: GPT2LMHeadModel"), [], "GPT2LMHeadModel is not a Qwen"),
        (("FP32StateAdamWeightDecay", "Lamb"), [], "AdamW"),
        (("CosineWithWarmUpLR", "PolynomialWithWarmUpLR"), [], "CosineWithWarmUpLR"),
        (("compute_dtype: \"float16\"", "compute_dtype: half"), [], "bfloat16"),
        (("epochs: 3", "epochs: three"), [], "runner_config.epochs"),
        (("auto_trans_ckpt: True", "auto_trans_ckpt: perhaps"), [], "auto_trans_ckpt"),
        (("run_mode: 'finetune'", "run_mode: 'fintune'"), [], "finetune"),
        (("micro_batch_num: 1,", "micro_batch_num: 1, context_parallel: 2,"), [], "context_parallel: 1"),
        (("load_checkpoint:", "base_config: x.yaml\nload_checkpoint:"), [], "base_config"),
        (("model_config:\n    type", "model_config:\n    pet_config: {pet_type: prefix}\n    type"), [], "pet_type"),
        (("model:\n", "modell:\n"), [], "not a configuration of MindFormers"),
        (("epochs: 3,", "epochs: 3, ["), [], "not YAML"),
    ],
)  # fmt: skip
def test_contradictions_and_mistakes_name_the_key(document, change, words, says):
    with pytest.raises(ConfigError, match=says):
        compose(translate(["--config", str(document(change)), *words]).words)


def test_another_models_file_names_the_model_that_it_describes(document):
    with pytest.raises(ConfigError) as caught:
        translate(["--config", str(document()), "model=qwen2_5_7b"])
    assert "hidden_size" in str(caught.value) and "model=qwen2_5_tiny" in str(caught.value)


def test_sizes_that_the_command_line_changes_are_no_contradiction(document):
    path = str(document(("num_layers: ", "num_layers: 1")))
    layers = int("1" + str(model_config("qwen2_5_tiny").hf["num_hidden_layers"]))
    config = compose(translate(["--config", path, "model=qwen2_5_tiny", f"model.hf.num_hidden_layers={layers}"]).words)
    assert spec_of(config).layers == layers


def test_a_missing_tie_is_announced_and_not_a_contradiction():
    config = composed("qwen1_5_0_5b", "finetune")
    content = write_config(config, spec_of(config))
    del content["model"]["model_config"]["tie_word_embeddings"]
    reading = read_file(content, "f.yaml", Job())
    assert any("tie_word_embeddings is missing" in note for note in reading.notes)
    content["model"]["model_config"]["tie_word_embeddings"] = False
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        read_file(content, "f.yaml", Job(model="qwen1_5_0_5b"))


# --- grids ------------------------------------------------------------------------------------------------------


def test_a_files_grid_must_make_the_ranks_that_were_started():
    config = composed("qwen2_5_tiny", "finetune", "parallel.cards=8", "parallel.tensor=2")
    content = write_config(config, spec_of(config))
    assert "parallel.cards" not in read_file(content, "f.yaml", Job(ranks=Ranks(8))).words
    with pytest.raises(ConfigError, match=r"--parallel_config\.data_parallel 1"):
        read_file(content, "f.yaml", Job(ranks=Ranks(2)))
    with pytest.raises(ConfigError, match="--use_parallel True"):
        read_file(content | {"use_parallel": False}, "f.yaml", Job(ranks=Ranks(8)))
    assert read_file(content, "f.yaml", Job(ranks=Ranks(None, False))).words.get("parallel.cards") is None


def test_training_whole_layers_keeps_the_sequences_of_a_step():
    grid = [
        "parallel.cards=16",
        "parallel.tensor=4",
        "parallel.pipeline=2",
        "train.accumulation=16",
        "train.micro_batch=2",
    ]
    config = composed("qwen1_5_7b", "finetune", *grid)  # 2 x 2 x 16 = 64 sequences a step
    reading = read_file(write_config(config, spec_of(config)), "f.yaml", Job(backend="torch"))
    back = compose([*reading.as_words(), "backend=torch"])
    assert _grid(back) == (16, 1, 1, "full")
    assert back.train.micro_batch * back.train.accumulation * 16 == 64
    assert "becomes parallel.shard=full" in "\n".join(reading.notes)


def test_more_cards_than_sequences_are_announced():
    config = composed("qwen1_5_7b", "lora", "parallel.cards=8", "parallel.tensor=4")
    reading = read_file(write_config(config, spec_of(config)), "f.yaml", Job(backend="torch"))
    assert "8 sequences a step, where the grid has 2" in "\n".join(reading.notes)


def test_mindspore_trains_with_the_layers_split_as_the_grid_has_them():
    grid = ["parallel.cards=16", "parallel.tensor=4", "parallel.pipeline=2", "train.accumulation=16"]
    config = composed("qwen1_5_7b", "finetune", *grid)
    reading = read_file(write_config(config, spec_of(config)), "f.yaml", Job())
    back = compose([*reading.as_words(), "backend=mindspore"])
    assert _grid(back)[:3] == (16, 4, 2) and back.train.accumulation == 16


def test_uneven_stages_are_mindformers_offset():
    grid = ["parallel.cards=5", "parallel.pipeline=5", "parallel.stage_layers=[6,7,7,7,5]"]
    config = composed("qwen1_5_7b", "finetune", *grid)
    content = write_config(config, spec_of(config))
    assert content["model"]["model_config"]["offset"] == [0, 1, 1, 1, -1]  # of 32 // 5
    back = compose([*read_file(content, "f.yaml", Job()).as_words(), "backend=mindspore"])
    assert back.parallel.stage_layers == [6, 7, 7, 7, 5]
    content["model"]["model_config"]["offset"] = [1, 1, 1, 1, 1]
    with pytest.raises(ConfigError, match=r"offset[\s\S]*\[1, 1, 0, 0, 0\]"):
        read_file(content, "f.yaml", Job())


def test_torch_answers_with_the_grids_cards():
    config = composed("qwen1_5_7b", "predict", "parallel.cards=2", "parallel.tensor=2")
    back = compose(read_file(write_config(config, spec_of(config)), "f.yaml", Job(backend="torch")).as_words())
    assert back.parallel.cards == 2


# --- adapters' modules ------------------------------------------------------------------------------------------


def test_module_names_of_both_generations():
    all_of_them = ".*wq|.*wk|.*wv|.*wo|.*w1|.*w2|.*w3"
    assert targets_from_mindformers(all_of_them, 4, v1=False) == "all-linear"
    assert targets_from_mindformers(".*wq|.*wv", 4, v1=True) == ["q_proj", "v_proj"]
    # formats.md: Qwen v1 keeps its gate in w3, the others in w1.
    assert targets_from_mindformers(".*w1", 4, v1=False) == ["gate_proj"]
    assert targets_from_mindformers(".*w3", 4, v1=True) == ["gate_proj"]
    for v1 in (False, True):
        for targets in (["q_proj"], ["gate_proj", "down_proj"], ["o_proj", "up_proj"]):
            written = targets_to_mindformers(targets, v1)
            assert sorted(targets_from_mindformers(written, 3, v1)) == sorted(targets)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [("(", "regular expression"), (".*w9", "matches none"), (r".*layers\.0\..*wq", "1 of 4 layers")],
)
def test_expressions_that_choose_no_layer_or_some_are_refused(pattern, says):
    with pytest.raises(ConfigError, match=says):
        targets_from_mindformers(pattern, 4, v1=False)
    with pytest.raises(ConfigError, match="all-linear"):
        targets_to_mindformers("model.*q_proj", v1=False)
