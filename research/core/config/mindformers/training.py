"""A YAML's training sections as settings."""

from __future__ import annotations

from typing import Any

from research.core.config.mindformers.keys import DTYPES
from research.core.config.mindformers.published import ADAM, CLIP_NORM, Published
from research.core.config.mindformers.yaml_file import Job, Reading, YamlFile
from research.core.errors import ConfigError

_OPTIMIZERS = ("AdamW", "AdamWeightDecay", "AdamWeightDecayX", "FP32StateAdamWeightDecay", "FusedAdamWeightDecay")
_SCHEDULES = {"CosineWithWarmUpLR": "cosine", "LinearWithWarmUpLR": "linear", "ConstantWarmUpLR": "constant"}
# The class was misspelt until r1.2.
_CHECKPOINTS = ("CheckpointMonitor", "CheckpointMointor")


def read_training(file: YamlFile, out: Reading, job: Job) -> None:
    """``runner_config``, ``runner_wrapper``, ``optimizer``, ``lr_schedule``, ``train_dataset``, ``callbacks`` and the rest."""
    out.copy(file.whole("seed"), "train.seed")
    if file.truth("resume_training"):
        out.set("train.resume", True)
    out.copy(file.number("runner_config.epochs"), "train.epochs")
    out.copy(file.whole("runner_config.batch_size"), "train.micro_batch")
    out.copy(file.whole("runner_config.gradient_accumulation_steps"), "train.accumulation")
    out.copy(file.whole("model.model_config.seq_length"), "data.seq_length")
    file.take("model.model_config.batch_size", "train_dataset.batch_size")  # that of runner_config counts
    out.copy(file.path("train_dataset.data_loader.dataset_dir"), "data")
    out.copy(file.truth("train_dataset.data_loader.shuffle"), "data.shuffle")
    out.copy(file.whole("train_dataset.data_loader.num_samples"), "data.max_records")
    _read_wrapper(file, out)
    _read_optimizer(file, out)
    _read_schedule(file, out)
    _read_dtypes(file, out, job)
    _read_evaluation(file, out)
    _read_recompute(file, out)
    _read_callbacks(file, out)
    if file.section("moe_config"):
        out.copy(file.number("moe_config.aux_loss_factor"), "train.router_aux")


def published_training(row: Published, out: Reading, job: Job) -> None:
    """The settings of one of the documents' files for training."""
    out.set("data.seq_length", row.seq)
    out.set("data.eval_records", 0)
    if row.lr is None:
        return  # a file for answers: the task's own settings
    out.set("train.seed", row.seed)
    out.set("train.epochs", row.epochs)
    out.set("train.micro_batch", row.batch)
    for key, value in ADAM.items():
        out.set(key, value)
    out.set("train.lr", row.lr)
    out.set("train.schedule", "cosine")
    out.set("train.min_lr_ratio", round((row.lr_end or 0.0) / row.lr, 12))
    out.set("train.warmup_ratio", row.warmup)
    out.set("train.weight_decay", row.decay)
    out.set("train.eps", row.eps)
    out.set("train.clip_norm", CLIP_NORM)
    out.set("train.checkpointing", row.recompute)
    _set_dtypes(out, row.compute, row.params, job, row.file)
    if row.rank is not None:
        out.set("lora.rank", row.rank)
        out.set("lora.alpha", row.alpha)
        out.set("lora.dropout", row.dropout)
        out.set("lora.target_modules", "all-linear")


def _read_wrapper(file: YamlFile, out: Reading) -> None:
    at = "runner_wrapper"
    if file.section(f"{at}.scale_sense"):
        out.copy(file.number(f"{at}.scale_sense.loss_scale_value"), "train.loss_scale")
        out.copy(file.whole(f"{at}.scale_sense.scale_window"), "train.loss_scale_window")
        file.take(f"{at}.scale_sense.type")
        factor = file.number(f"{at}.scale_sense.scale_factor")
        if factor not in (None, 1.0, 2.0):
            out.notes.append(f"{file.where}: {at}.scale_sense.scale_factor={factor:g} has no effect: the factor is 2")
    else:
        out.copy(file.number(f"{at}.scale_sense"), "train.loss_scale")
    clips, norm = file.truth(f"{at}.use_clip_grad"), file.number(f"{at}.max_grad_norm")
    if clips is False:
        out.set("train.clip_norm", 1e9)
        out.notes.append(f"{file.where}: use_clip_grad=False: train.clip_norm=1e9, which no gradient reaches")
    elif clips or norm is not None:
        out.set("train.clip_norm", CLIP_NORM if norm is None else norm)


def _read_optimizer(file: YamlFile, out: Reading) -> None:
    kind = file.take("optimizer.type")
    if kind not in (None, *_OPTIMIZERS):
        raise ConfigError(
            f"{kind} is not had here", where=f"{file.where}: optimizer.type", hint="AdamW, in all its spellings"
        )
    betas = file.take("optimizer.betas")
    for at, key in enumerate(("beta1", "beta2")):
        value = file.number(f"optimizer.{key}")
        if isinstance(betas, list) and len(betas) == 2:
            value = float(betas[at])
        if value is None and kind is not None:
            value = ADAM[f"train.{key}"]
        out.copy(value, f"train.{key}")
    out.copy(file.number("optimizer.eps"), "train.eps")
    out.copy(file.number("optimizer.weight_decay"), "train.weight_decay")
    out.copy(file.number("optimizer.learning_rate"), "train.lr")  # lr_schedule's comes after it, and counts


def _read_schedule(file: YamlFile, out: Reading) -> None:
    kind = file.take("lr_schedule.type")
    if kind is not None:
        if kind not in _SCHEDULES:
            raise ConfigError(
                f"{kind} is not had here", where=f"{file.where}: lr_schedule.type", hint=", ".join(_SCHEDULES)
            )
        out.set("train.schedule", _SCHEDULES[kind])
    peak, end = file.number("lr_schedule.learning_rate"), file.number("lr_schedule.lr_end")
    out.copy(peak, "train.lr")
    if peak is None and "train.lr" in out.words:
        peak = float(out.words["train.lr"])
    if end is not None and peak:
        out.set("train.min_lr_ratio", round(end / peak, 12))
    elif kind is not None:
        out.set("train.min_lr_ratio", 0.0)
    ratio, steps = file.number("lr_schedule.warmup_ratio"), file.whole("lr_schedule.warmup_steps")
    if ratio is not None:
        out.set("train.warmup_ratio", ratio)
    elif steps is not None or kind is not None:
        out.set("train.warmup_steps", steps or 0)
    total = file.whole("lr_schedule.total_steps")
    if total is not None and total > 0:
        out.set("train.steps", total)
        out.notes.append(f"{file.where}: lr_schedule.total_steps={total} ends the training too, whatever the epochs")
    start = file.number("lr_schedule.warmup_lr_init")
    if start:
        out.notes.append(f"{file.where}: lr_schedule.warmup_lr_init={start:g} has no effect: the warm-up begins at 0")


def _read_dtypes(file: YamlFile, out: Reading, job: Job) -> None:
    found = {}
    for key in ("compute_dtype", "param_init_type"):
        value = file.take(f"model.model_config.{key}")
        if value not in (None, *DTYPES):
            raise ConfigError(
                f"{value!r} is no dtype", where=f"{file.where}: model.model_config.{key}", hint=", ".join(DTYPES)
            )
        found[key] = DTYPES.get(value)
    _set_dtypes(out, found["compute_dtype"], found["param_init_type"], job, file.where)


def _set_dtypes(out: Reading, compute: str | None, params: str | None, job: Job, where: str) -> None:
    if compute is not None:
        if not job.accelerator and compute != "fp32":
            compute = "auto"  # a CPU without fast 16-bit arithmetic takes fp32
        elif compute == "fp16" and job.backend == "torch":
            compute = "bf16"
            out.notes.append(
                f"{where}: compute_dtype float16 becomes train.dtype=bf16 on torch, which needs no loss scaling"
            )
        out.set("train.dtype", compute)
    if params is not None:
        out.set("train.master", "fp32" if params == "fp32" or not job.accelerator else "same")


def _read_evaluation(file: YamlFile, out: Reading) -> None:
    evaluates, every = file.truth("do_eval"), file.whole("eval_step_interval")
    if evaluates is False:
        out.set("data.eval_records", 0)
    elif evaluates and every is not None and every > 0:
        out.set("train.eval_every", every)
    if evaluates and file.path("eval_dataset.data_loader.dataset_dir") is not None:
        out.notes.append(
            f"{file.where}: eval_dataset.data_loader.dataset_dir has no effect: what is evaluated is held out of the "
            "training data (data.eval_records)"
        )
    else:
        file.ignore("eval_dataset")
    file.ignore("train_dataset_task", "eval_dataset_task")  # copies of the sections above


def _read_recompute(file: YamlFile, out: Reading) -> None:
    everything = file.take("recompute_config.recompute")
    selected = file.take("recompute_config.select_recompute")
    if everything is not None or selected is not None:
        out.set("train.checkpointing", "full" if _asks(everything) else "selective" if _asks(selected) else "none")


def _asks(value: Any) -> bool:
    """Whether a switch, a number of layers, or lists and tables of them ask for anything."""
    if isinstance(value, dict):
        return any(_asks(item) for item in value.values())
    if isinstance(value, list):
        return any(_asks(item) for item in value)
    return bool(value)


def _read_callbacks(file: YamlFile, out: Reading) -> None:
    callbacks = file.content.get("callbacks")
    for callback in callbacks if isinstance(callbacks, list) else []:
        if not isinstance(callback, dict) or callback.get("type") not in _CHECKPOINTS:
            continue
        for key, setting in (
            ("save_checkpoint_steps", "save_every"),
            ("keep_checkpoint_max", "keep_last"),
            ("async_save", "async_save"),
        ):
            out.copy(callback.get(key), f"train.{setting}")
            file.ignore(f"callbacks.{key}")
