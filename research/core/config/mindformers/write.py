"""The YAML that MindFormers' run_mindformer.py reads, for any MODEL, recipe and grid of cards.

The sections and their spelling are those of the releases that :data:`RELEASES` names; what differs between them is in
:class:`Release`. :mod:`read` reads the result back to the same architecture and settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from research.core.config.mindformers.keys import DTYPE_NAMES, targets_to_mindformers
from research.core.config.schema import Config
from research.core.errors import ConfigError
from research.core.spec import DecoderSpec
from research.core.weights.grid import Grid

ENDOFTEXT, IM_END = 151643, 151645
_MODES = {"pretrain": "train", "finetune": "finetune", "lora": "finetune", "predict": "predict"}
_SCHEDULES = {"cosine": "CosineWithWarmUpLR", "linear": "LinearWithWarmUpLR", "constant": "ConstantWarmUpLR"}


@dataclass(frozen=True)
class Release:
    """What a release calls things. ``v1``: it has the model of the first generation; ``moe``: one with experts."""

    checkpoint_callback: str
    optimizer: str
    v1: bool
    moe: bool
    auto_register: bool  # the tokenizer is found by its file's name


RELEASES = {
    "r1.0": Release("CheckpointMointor", "FP32StateAdamWeightDecay", v1=True, moe=False, auto_register=False),
    "r1.3": Release("CheckpointMonitor", "AdamW", v1=True, moe=True, auto_register=True),
    "r1.5": Release("CheckpointMonitor", "AdamW", v1=False, moe=True, auto_register=True),
}


def default_release(spec: DecoderSpec) -> str:
    """The newest release that has the model."""
    return "r1.3" if spec.model_type == "qwen" else "r1.5"


def write_config(config: Config, spec: DecoderSpec, release: str | None = None) -> dict[str, Any]:
    """The content of the file for ``config.task`` (pretrain, finetune, lora or predict) on ``config.parallel``'s grid.

    Raises :class:`ConfigError` for what MindFormers has no key for.
    """
    release = release or default_release(spec)
    if release not in RELEASES:
        raise ConfigError(f"no release is called {release!r}", where="--release", hint=" | ".join(RELEASES))
    of = RELEASES[release]
    _check(config, spec, release, of)
    task = config.task.name
    predicts = task == "predict"
    parallel = config.parallel
    cards = parallel.cards * parallel.nodes
    out: dict[str, Any] = {
        "seed": config.generate.seed if predicts else config.train.seed,
        "output_dir": "./output",
        "load_checkpoint": config.weights or "",
        "src_strategy_path_or_dir": config.reshard.strategy or "",
        "auto_trans_ckpt": config.auto_transform,
        "only_save_strategy": False,
        "resume_training": False,
        "use_parallel": cards > 1,
        "run_mode": _MODES[task],
        "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": config.model.name},
    }
    if not predicts:
        out |= _training(config, spec, of)
    out |= _grid(config, predicts)
    if spec.moe is not None:
        out["moe_config"] = _experts(config, spec, predicts)
    out["model"] = {"model_config": _model(config, spec, of), "arch": {"type": _arch(spec)}}
    out["processor"] = _processor(config, spec, of, predicts)
    out["context"] = _context(config)
    if not predicts:
        out["metric"] = {"type": "PerplexityMetric"}
    return out


def not_written(config: Config) -> list[str]:
    """One line for each setting that the file cannot say as it is meant."""
    train, notes = config.train, []
    if config.task.name == "predict":
        return notes
    if train.steps:
        notes.append(
            f"train.steps={train.steps}: MindFormers ends after its epochs; total_steps only shapes the learning rate"
        )
    if train.max_minutes:
        notes.append(f"train.max_minutes={train.max_minutes:g}: MindFormers has no limit of time")
    if config.data.source and not config.data.source.endswith(".mindrecord"):
        notes.append(
            "train_dataset.data_loader.dataset_dir is empty: `make data ARGS=data.mindrecord=FILE` writes a MindRecord"
        )
    return notes


def _check(config: Config, spec: DecoderSpec, release: str, of: Release) -> None:
    task = config.task.name
    if task not in _MODES:
        raise ConfigError(f"MindFormers has no {task}", where=f"task={task}", hint=" | ".join(_MODES))
    if spec.model_type == "qwen" and not of.v1:
        raise ConfigError("this release has no Qwen v1 any more", where=f"--release {release}", hint="--release r1.3")
    if spec.moe is not None and not of.moe:
        raise ConfigError("this release has no model with experts", where=f"--release {release}", hint="--release r1.5")
    if config.model.embedding:
        raise ConfigError("MindFormers has no embedding model of this kind", where=f"model={config.model.name}")
    for what, there in (
        ("sliding windows", spec.sliding_window is not None),
        ("attention in both directions", not spec.causal),
        ("tied head before r1.3", spec.tied and release == "r1.0"),
        (
            "layers without experts among those with",
            bool(spec.moe and (spec.moe.dense_layers or spec.moe.sparse_step != 1)),
        ),
    ):
        if there:
            raise ConfigError(f"MindFormers has no {what}", where=f"model={config.model.name}")
    if config.parallel.shard == "full":
        raise ConfigError(
            "MindFormers does not spread weights (FSDP)", where="parallel.shard=full", hint="parallel.shard=optimizer"
        )
    if config.train.schedule not in _SCHEDULES:
        raise ConfigError(
            "MindFormers has no such schedule",
            where=f"train.schedule={config.train.schedule}",
            hint=" | ".join(_SCHEDULES),
        )


# --- sections ---------------------------------------------------------------------------------------------------


def _training(config: Config, spec: DecoderSpec, of: Release) -> dict[str, Any]:
    train, data = config.train, config.data
    # With stages, the micro batches that fill them are the accumulation; without, it has a key of its own.
    accumulates = {} if config.parallel.pipeline > 1 else {"gradient_accumulation_steps": train.accumulation}
    schedule = {
        "type": _SCHEDULES[train.schedule],
        "learning_rate": train.lr,
        "lr_end": float(f"{train.lr * train.min_lr_ratio:.12g}"),
        "total_steps": train.steps or -1,
    }
    if train.warmup_steps is None:
        schedule["warmup_ratio"] = float(train.warmup_ratio)
    else:
        schedule["warmup_steps"] = train.warmup_steps
    if train.schedule == "constant":
        del schedule["lr_end"]
    adam = (
        {"betas": [train.beta1, train.beta2]}
        if of.optimizer == "AdamW"
        else {"beta1": train.beta1, "beta2": train.beta2}
    )
    columns = ["input_ids", "labels" if spec.model_type == "qwen" else "target_ids", "attention_mask"]
    return {
        "do_eval": False,
        "runner_config": {
            "epochs": int(train.epochs) if train.epochs and train.epochs == int(train.epochs) else train.epochs or 1,
            "batch_size": train.micro_batch,
            **accumulates,
            "sink_mode": True,
            "sink_size": 1,
        },
        "runner_wrapper": {
            "type": "MFTrainOneStepCell",
            "scale_sense": {
                "type": "DynamicLossScaleUpdateCell",
                "loss_scale_value": train.loss_scale,
                "scale_factor": 2,
                "scale_window": train.loss_scale_window,
            },
            "use_clip_grad": True,
            "max_grad_norm": train.clip_norm,
        },
        "optimizer": {"type": of.optimizer, **adam, "eps": train.eps, "weight_decay": train.weight_decay},
        "lr_schedule": schedule,
        **_dataset(
            "train_dataset",
            data.source,
            data.shuffle,
            ["input_ids"] if config.task.name == "pretrain" else columns,
            train,
        ),
        "recompute_config": {
            "recompute": train.checkpointing == "full",
            "select_recompute": train.checkpointing == "selective",
            "parallel_optimizer_comm_recompute": False,
            "mp_comm_recompute": True,
            "recompute_slice_activation": False,
        },
        "callbacks": [
            {"type": "MFLossMonitor"},
            {
                "type": of.checkpoint_callback,
                "prefix": config.model.name,
                "save_checkpoint_steps": train.save_every or 10000,
                "keep_checkpoint_max": train.keep_last,
                "integrated_save": False,
                "async_save": train.async_save,
            },
        ],
    }


def _dataset(name: str, source: str, shuffle: bool, columns: list[str], train) -> dict[str, Any]:
    files = source if source.endswith(".mindrecord") else ""
    content = {
        "data_loader": {"type": "MindDataset", "dataset_dir": files, "shuffle": shuffle},
        "input_columns": columns,
        "num_parallel_workers": 8,
        "python_multiprocessing": False,
        "drop_remainder": True,
        "batch_size": train.micro_batch,
        "repeat": 1,
        "numa_enable": False,
        "prefetch_size": 1,
    }
    # The task's copy: MindFormers reads both.
    return {name: content, f"{name}_task": {"type": "CausalLanguageModelDataset", "dataset_config": content}}


def _grid(config: Config, predicts: bool) -> dict[str, Any]:
    parallel = config.parallel
    cards = parallel.cards * parallel.nodes
    stages = parallel.pipeline
    return {
        "parallel": {
            "parallel_mode": 1,  # semi-automatic: the grid below
            "gradients_mean": False,
            "enable_alltoall": False,
            "full_batch": True,
            "search_mode": "sharding_propagation",
            "enable_parallel_optimizer": parallel.shard == "optimizer" and not predicts,
            "strategy_ckpt_config": {"save_file": "./ckpt_strategy.ckpt", "only_trainable_params": False},
            "parallel_optimizer_config": {"gradient_accumulation_shard": False, "parallel_optimizer_threshold": 64},
        },
        "parallel_config": {
            "data_parallel": cards // (parallel.tensor * stages),
            "model_parallel": parallel.tensor,
            "pipeline_stage": stages,
            "micro_batch_num": config.train.accumulation if stages > 1 and not predicts else 1,
            "vocab_emb_dp": parallel.tensor == 1,
            "gradient_aggregation_group": 4,
        },
        "micro_batch_interleave_num": 1,
    }


def _experts(config: Config, spec: DecoderSpec, predicts: bool) -> dict[str, Any]:
    moe = spec.moe
    aux = moe.aux_coefficient if config.train.router_aux is None else config.train.router_aux
    return {
        "expert_num": moe.experts,
        "capacity_factor": -1 if predicts else 1.1,
        "aux_loss_factor": aux,
        "num_experts_chosen": moe.top_k,
        "routing_policy": "TopkRouterV2",
        "enable_sdrop": True,
        "router_dense_type": "float32",
        "shared_expert_num": moe.shared_ffn / moe.expert_ffn,
        "use_shared_expert_gating": True,
        "use_fused_ops_topkrouter": not predicts,
        "norm_topk_prob": moe.norm_topk,
    }


def _offset(config: Config, spec: DecoderSpec, predicts: bool) -> int | list[int]:
    """How many layers each stage has beyond layers // stages; 0 where that is all of them."""
    stages = config.parallel.pipeline
    if predicts or (spec.layers % stages == 0 and not config.parallel.stage_layers):
        return 0
    layers = Grid(pipeline=stages, stage_layers=tuple(config.parallel.stage_layers)).layers_per_stage(spec.layers)
    return [count - spec.layers // stages for count in layers]


def _model(config: Config, spec: DecoderSpec, of: Release) -> dict[str, Any]:
    predicts, v1 = config.task.name == "predict", spec.model_type == "qwen"
    train, answers = config.train, config.generate
    compute = _compute(answers.dtype if predicts else train.dtype)
    out: dict[str, Any] = {
        "type": "QwenConfig" if v1 else "LlamaConfig",
        "batch_size": answers.batch if predicts else 1,
        "seq_length": _predict_length(config, spec) if predicts else config.data.seq_length,
        "hidden_size": spec.hidden,
        "num_layers": spec.layers,
        "num_heads": spec.heads,
        "vocab_size": spec.vocab,
        "intermediate_size": spec.moe.expert_ffn if spec.moe else spec.ffn,
        "rms_norm_eps": spec.norm_eps,
        "max_position_embedding": spec.max_positions,
        "init_method_std": spec.init_range,
    }
    if v1:
        out |= {
            "rotary_pct": 1.0,
            "rotary_emb_base": spec.rope_theta,
            "theta": spec.rope_theta,
            "kv_channels": spec.head_dim,
        }
    else:
        out |= {"n_kv_heads": spec.kv_heads, "qkv_has_bias": spec.qkv_bias, "theta": spec.rope_theta}
        out["tie_word_embeddings"] = spec.tied
    out |= {
        "emb_dropout_prob": 0.0,
        "eos_token_id": [IM_END, ENDOFTEXT] if predicts and not answers.raw else ENDOFTEXT,
        "pad_token_id": ENDOFTEXT,
        "compute_dtype": compute,
        "layernorm_compute_type": "float32",
        "softmax_compute_type": "float32",
        "rotary_dtype": "float32",
        "param_init_type": compute if predicts or train.master == "same" else "float32",
        "use_past": predicts,
        "use_flash_attention": True,
        "qkv_concat": False,
        "offset": _offset(config, spec, predicts),
        "checkpoint_name_or_path": "",
    }
    out |= _rope(spec)
    if predicts:
        temperature = answers.temperature or 0.0
        out |= {
            "block_size": config.mindir.block_size,
            "num_blocks": config.mindir.num_blocks,
            "is_dynamic": True,
            "max_decode_length": answers.max_new_tokens,
            "repetition_penalty": 1.0 if answers.repetition_penalty is None else answers.repetition_penalty,
            "do_sample": temperature > 0,
            "temperature": temperature or 1.0,
            "top_k": answers.top_k or 0,
            "top_p": 1.0 if answers.top_p is None else answers.top_p,
        }
    if config.task.name == "lora":
        lora = config.lora
        if lora.rank_pattern or lora.alpha_pattern or lora.rslora:
            raise ConfigError(
                "MindFormers has one rank and one alpha", where="lora.rank_pattern, lora.alpha_pattern, lora.rslora"
            )
        out["pet_config"] = {
            "pet_type": "lora",
            "lora_rank": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": targets_to_mindformers(lora.target_modules, v1),
        }
    return out


def _predict_length(config: Config, spec: DecoderSpec) -> int:
    """Prompt and answer together: what the blocks hold, at most what the model is made for."""
    held = config.mindir.block_size * config.mindir.num_blocks // (config.generate.batch or 8)
    return min(held, spec.usable_length, max(config.mindir.seq_length or 8192, config.generate.max_new_tokens))


def _compute(dtype: str) -> str:
    return DTYPE_NAMES.get(dtype, "bfloat16")  # auto: what an NPU of these releases takes


def _rope(spec: DecoderSpec) -> dict[str, Any]:
    scaling = spec.rope_scaling
    if scaling is None:
        return {"extend_method": "None"}
    if scaling.kind == "linear":
        return {"extend_method": "PI", "scaling_factor": scaling.factor}
    if scaling.attention_factor is not None:
        raise ConfigError("MindFormers has no attention_factor of YaRN", where="rope_scaling")
    return {
        "extend_method": "YARN",
        "scaling_factor": {
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_positions,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            # mscale over mscale_all_dim: with these, 0.1 ln(factor) + 1
            "mscale": 1.0,
            "mscale_all_dim": 0.0,
        },
    }


def _arch(spec: DecoderSpec) -> str:
    return "QwenForCausalLM" if spec.model_type == "qwen" else "LlamaForCausalLM"


def _processor(config: Config, spec: DecoderSpec, of: Release, predicts: bool) -> dict[str, Any]:
    folder = config.tokenizer or "/path"
    length = config.data.seq_length if not predicts else spec.usable_length
    if spec.model_type == "qwen":
        tokenizer = {"model_max_length": length, "vocab_file": f"{folder}/qwen.tiktoken", "pad_token": "<|endoftext|>"}
        return {"return_tensors": "ms", "tokenizer": tokenizer | {"type": "QwenTokenizer"}, "type": "QwenProcessor"}
    tokenizer = {
        "model_max_length": length,
        "vocab_file": f"{folder}/vocab.json",
        "merges_file": f"{folder}/merges.txt",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>" if predicts and not config.generate.raw else "<|endoftext|>",
        "type": "Qwen2Tokenizer",
    }
    if of.auto_register and config.model.family in ("qwen1_5", "qwen2"):  # Qwen2.5's is MindFormers' own
        tokenizer["auto_register"] = f"{config.model.family}_tokenizer.Qwen2Tokenizer"
    return {"return_tensors": "ms", "tokenizer": tokenizer, "type": "Qwen2Processor"}


def _context(config: Config) -> dict[str, Any]:
    return {
        "mode": 0,
        "device_target": {"cpu": "CPU", "cuda": "GPU"}.get(config.device.kind, "Ascend"),
        "max_call_depth": 10000,
        "max_device_memory": "58GB",
        "save_graphs": False,
        "save_graphs_path": "./graph",
        "device_id": config.device.index or 0,
        "ascend_config": {"precision_mode": "must_keep_origin_dtype"},
    }
