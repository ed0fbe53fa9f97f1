"""Checks of values and of settings against each other, before anything starts."""

from __future__ import annotations

from research.core.config.backends import check_backend
from research.core.config.names import did_you_mean
from research.core.config.schema import Config
from research.core.errors import ConfigError

CHOICES = {
    "backend": ("torch", "mindspore"),
    "data.format": ("auto", "alpaca", "messages", "sharegpt", "text", "wikitext", "skills", "mindrecord"),
    "data.documents": ("blank", "line", "file"),
    "data.supervise": ("assistant", "last", "all", "mindformers"),
    "data.on_long": ("truncate", "drop", "error"),
    "train.schedule": ("cosine", "linear", "constant", "wsd"),
    "train.dtype": ("auto", "fp32", "bf16", "fp16"),
    "train.master": ("fp32", "same"),
    "train.checkpointing": ("none", "selective", "full"),
    "generate.dtype": ("auto", "fp32", "bf16"),
    "parallel.shard": ("none", "optimizer", "full"),
    "device.kind": ("auto", "cpu", "cuda", "npu"),
    "device.attention": ("auto", "sdpa", "reference", "npu"),
    "mindir.block_size": (16, 32, 128),
    "model.family": ("qwen", "qwen1_5", "qwen2", "qwen2_5"),
    "model.tokenizer": ("hub", "builtin"),
    "convert.to": ("auto", "huggingface", "mindformers"),
    "convert.dtype": ("keep", "fp32", "bf16", "fp16"),
    "convert.qkv_concat": (None, "none", "stacked", "grouped", "probe"),
    "convert.source_concat": (None, "none", "stacked", "grouped", "probe"),
    "convert.tied_head": ("copy", "omit"),
    "convert.files": ("ckpt", "safetensors"),
    "reshard.to": ("auto", "hf", "parts", "ranks", "dcp"),
    "reshard.kv": ("replicate", "refuse"),
    "reshard.vocab": ("auto", "pad", "replicate", "whole", "refuse"),
    "verify.a_concat": (None, "none", "stacked", "grouped", "probe"),
    "verify.b_concat": (None, "none", "stacked", "grouped", "probe"),
    "engine.mode": ("auto", "paged", "flash", "vllm"),
    "hub.source": ("huggingface", "modelscope"),
}

# key: (lowest, whether the lowest itself is allowed, highest)
RANGES = {
    "train.lr": (0, False, 10),
    "train.min_lr_ratio": (0, True, 1),
    "train.decay_ratio": (0, True, 1),
    "train.steps": (1, True, None),
    "train.epochs": (0, False, None),
    "train.max_minutes": (0, False, None),
    "train.micro_batch": (1, True, None),
    "train.accumulation": (1, True, None),
    "train.warmup_steps": (0, True, None),
    "train.warmup_ratio": (0, True, 1),
    "train.loss_scale": (1, True, None),
    "train.loss_scale_window": (1, True, None),
    "train.weight_decay": (0, True, None),
    "train.beta1": (0, True, 0.9999999),
    "train.beta2": (0, True, 0.9999999),
    "train.eps": (0, False, None),
    "train.clip_norm": (0, False, None),
    "train.head_chunk": (1, True, None),
    "train.log_every": (1, True, None),
    "train.eval_every": (0, True, None),
    "train.sample_every": (0, True, None),
    "train.save_every": (0, True, None),
    "train.keep_last": (1, True, None),
    "train.router_aux": (0, True, None),
    "data.seq_length": (2, True, None),
    "data.max_records": (1, True, None),
    "data.eval_records": (0, True, None),
    "data.eval_fraction": (0, True, 0.9),
    "data.workers": (0, True, None),
    "data.max_truncated": (0, True, 1),
    "data.max_dropped": (0, True, 1),
    "data.min_supervised": (0, True, 1),
    "data.skills_records": (100, True, None),
    "data.file_partition": (1, True, 1000),
    "lora.rank": (1, True, None),
    "lora.alpha": (0, False, None),
    "lora.dropout": (0, True, 0.999),
    "generate.max_new_tokens": (1, True, None),
    "generate.temperature": (0, True, None),
    "generate.top_k": (0, True, None),
    "generate.top_p": (0, False, 1),
    "generate.repetition_penalty": (0, False, None),
    "generate.batch": (1, True, None),
    "parallel.cards": (1, True, None),
    "parallel.nodes": (1, True, None),
    "parallel.node_rank": (0, True, None),
    "parallel.data": (1, True, None),
    "parallel.tensor": (1, True, None),
    "parallel.pipeline": (1, True, None),
    "parallel.master_port": (1, True, 65535),
    "parallel.timeout_s": (1, True, None),
    "device.threads": (0, True, None),
    "device.index": (0, True, None),
    "mindir.seq_length": (2, True, None),
    "mindir.batch": (1, True, None),
    "mindir.num_blocks": (1, True, None),
    "convert.shard_gb": (0, False, None),
    "verify.tolerance": (0, True, None),
    "verify.tokens": (1, True, None),
    "serve.port": (0, True, 65535),
    "serve.max_requests": (1, True, None),
    "serve.requests_per_minute": (0, True, None),
    "serve.max_body_mb": (0, False, None),
    "serve.max_choices": (1, True, None),
    "serve.max_prompts": (1, True, None),
    "serve.max_new_tokens": (1, True, None),
    "serve.read_timeout_s": (0, False, None),
    "serve.write_timeout_s": (0, False, None),
    "serve.drain_s": (0, True, None),
}


def check(config: Config) -> None:
    """Raise :class:`ConfigError` for the first value out of its choices or range, or at odds with another setting."""
    for key, options in CHOICES.items():
        value = _get(config, key)
        if value not in options:
            raise ConfigError(
                f"{value!r} is not a choice",
                where=f"{key}={value}",
                hint=did_you_mean(str(value), [o for o in options if o]),
            )
    for key, (low, low_allowed, high) in RANGES.items():
        _check_range(key, _get(config, key), low, low_allowed, high)
    _check_together(config)


def _check_range(key: str, value, low, low_allowed: bool, high) -> None:
    if value is None:
        return
    if value != value or value < low or (value == low and not low_allowed) or (high is not None and value > high):
        bound = f"at least {low}" if low_allowed else f"greater than {low}"
        bound += "" if high is None else f" and at most {high}"
        raise ConfigError(f"must be {bound}", where=f"{key}={value}", hint=_EXAMPLES.get(key))


_EXAMPLES = {
    "train.lr": "train.lr=1e-5 for full fine-tuning, 1e-4 for LoRA, 1e-3 for a tiny model from scratch",
    "data.seq_length": "data.seq_length=2048",
}


def _check_together(config: Config) -> None:
    parallel, train = config.parallel, config.train
    if parallel.node_rank >= parallel.nodes:
        raise ConfigError(
            f"must be below parallel.nodes={parallel.nodes}",
            where=f"parallel.node_rank={parallel.node_rank}",
            hint=f"NODE_RANK=0 to {parallel.nodes - 1}, one per node",
        )
    if parallel.nodes > 1 and parallel.master_addr in ("127.0.0.1", "localhost"):
        raise ConfigError(
            "several nodes cannot meet at a loopback address",
            where=f"parallel.master_addr={parallel.master_addr}",
            hint="MASTER_ADDR=<address of node 0>",
        )
    if config.task.name in ("pretrain", "finetune", "lora") and not (train.steps or train.epochs or train.max_minutes):
        raise ConfigError(
            "training needs an end: train.steps, train.epochs and train.max_minutes are all null",
            where="train",
            hint="ARGS=train.epochs=1",
        )
    if config.data.mindrecord is None:
        for name, unset in (("overwrite", False), ("file_partition", 1)):
            if getattr(config.data, name) != unset:
                raise ConfigError(
                    "has no effect without data.mindrecord",
                    where=f"data.{name}={getattr(config.data, name)}",
                    hint="data.mindrecord=<file to write>",
                )
    elif config.task.name != "data":
        raise ConfigError(
            "only `make data` writes MindRecord",
            where=f"data.mindrecord={config.data.mindrecord}",
            hint="make data DATA=... ARGS=data.mindrecord=<file>",
        )
    if (config.prompt is not None) + (config.prompts is not None) + bool(config.prompt_list) > 1:
        raise ConfigError(
            "prompt, prompt_list and prompts exclude each other",
            where="prompts",
            hint="give one of PROMPT=..., prompt_list=[...] and prompts=FILE",
        )
    check_backend(config)
    if train.resume and config.run is None:
        raise ConfigError(
            "resuming needs the run folder to go on with",
            where="train.resume=true",
            hint="make finetune RUN=<folder> ARGS=train.resume=true",
        )


def _get(config: Config, key: str):
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
