"""A MindFormers YAML, or the name of one of the documents', as this repository's settings.

Every key is translated, or named as one that changes nothing here (:mod:`keys`), or compared: sizes that contradict the
chosen MODEL are refused with both values. Only what a file says is translated, so that a part of one (the dotted flags of
``run_mindformer.py``) can be read too.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from research.core.config.mindformers.answers import published_answers, read_answers, read_eval, read_export
from research.core.config.mindformers.grid import Ranks, grid_words, stage_words
from research.core.config.mindformers.keys import brief, sort_out, targets_from_mindformers
from research.core.config.mindformers.models import check_model, find_model, preset, set_free_sizes
from research.core.config.mindformers.published import Published, named, published
from research.core.config.mindformers.training import published_training, read_training
from research.core.config.mindformers.yaml_file import Job, Reading, YamlFile, load_yaml, patched
from research.core.config.names import did_you_mean, nearest
from research.core.errors import ConfigError

TASKS = {"train": "pretrain", "finetune": "finetune", "predict": "predict", "export": "export", "eval": "perplexity"}
TRAINING = ("train", "finetune")
_GRID = ("data_parallel", "model_parallel", "pipeline_stage")


def read_config(path: str, job: Job, root: Path) -> Reading:
    """Settings of the file ``path`` (as given, or below ``root``), or of the documents' file of that name.

    Raises :class:`ConfigError` for a file that is neither there nor known.
    """
    for candidate in (Path(path).expanduser(), root / path):
        if candidate.is_file():
            return read_file(load_yaml(candidate), path, job)
    row = named(path)
    if row is None:
        near = nearest(Path(path).stem, published())
        raise ConfigError(
            "is neither a file nor one of the documents' configurations",
            where=f"--config {path}",
            hint=f"did you mean {near}.yaml?" if near else "tools/mindformers_yaml.py --list names them",
        )
    return read_published(row, path, job)


def read_file(content: dict, where: str, job: Job) -> Reading:
    """Settings of a whole file; ``job.patches`` go on top of it first."""
    file, out = YamlFile(patched(content, job.patches), where), Reading()
    own_mode = file.take("run_mode")
    mode = _run_mode(job.run_mode or own_mode, where)
    trainer, name = file.take("trainer.type"), file.take("trainer.model_name")
    if trainer not in (None, "CausalLanguageModelingTrainer"):
        raise ConfigError(
            f"{trainer} trains no Qwen", where=f"{where}: trainer.type", hint="CausalLanguageModelingTrainer"
        )
    if job.model is None:
        model = find_model(file, job.family, name, job.hf)
    else:
        model = job.model
        check_model(model, file, job.hf)
    out.set("model", model)
    set_free_sizes(model, file, out, job.hf)
    lora = bool(file.section("model.model_config.pet_config"))
    out.set("task", _task(mode, lora))
    out.set("recipe", "null")  # the file is one itself
    if lora:
        _read_lora(file, out, model, mode)
    _read_sections(file, out, job, mode)
    _read_grid(file, out, job, mode, model)
    _sort_out(file, out)
    return out


def read_published(row: Published, where: str, job: Job) -> Reading:
    """Settings of one of the documents' files, which is not there itself; ``job.patches`` go on top."""
    out = Reading()
    mode = _run_mode(job.run_mode or row.run_mode, where)
    if job.model not in (None, row.model):
        raise ConfigError(f"is a configuration of {row.model}", where=where, hint=f"model={row.model}, or leave it out")
    release = "as its document sets them" if row.release == "document" else f"MindFormers {row.release}"
    out.notes.append(f"{where} is not here; the settings are those of {row.file}.yaml ({release}), model={row.model}")
    out.set("model", row.model)
    out.set("task", _task(mode, lora=row.rank is not None))
    out.set("recipe", "null")  # the file is one itself
    if mode in TRAINING:
        published_training(row, out, job)
    else:
        published_answers(row, out, job, mode)
    file = YamlFile(patched({}, job.patches), where)
    check_model(row.model, file, job.hf)
    set_free_sizes(row.model, file, out, job.hf)
    if file.section("model.model_config.pet_config"):
        _read_lora(file, out, row.model, mode)
    _read_sections(file, out, replace(job, model=row.model), mode)
    changed = [file.whole(f"parallel_config.{key}") for key in _GRID]
    grid = tuple(new or old for new, old in zip(changed, (row.data, row.tensor, row.pipeline)))
    micro = (file.whole("parallel_config.micro_batch_num") or row.micro) if grid[2] > 1 else None
    exact = any(size is not None for size in changed)
    grid_words(
        out,
        grid,
        job.ranks,
        where,
        mode=mode,
        backend=job.backend,
        exact=exact,
        micro=micro,
        splits_layers=job.splits_layers,
    )
    stage_words(out, file, preset(row.model, job.hf).layers)
    sharded = file.truth("parallel.enable_parallel_optimizer")
    if mode in TRAINING and job.backend == "mindspore" and _several(grid, job.ranks):
        out.words.setdefault("parallel.shard", "none" if sharded is False else "optimizer")
    _sort_out(file, out)
    return out


def _task(mode: str, lora: bool) -> str:
    return "lora" if lora and mode in TRAINING else TASKS[mode]


def _run_mode(mode: Any, where: str) -> str:
    if mode not in TASKS:
        raise ConfigError(f"run_mode is {mode!r}", where=where, hint=did_you_mean(str(mode), TASKS, "--run_mode "))
    return mode


def _several(grid: tuple[int, ...], ranks: Ranks) -> bool:
    cards = grid[0] * grid[1] * grid[2] if ranks.started is None else ranks.started
    return ranks.wanted is not False and cards > 1


def _sort_out(file: YamlFile, out: Reading) -> None:
    known, unknown = sort_out(file.left())
    if unknown:
        out.notes.append(f"{file.where}: not known here, and without effect: {brief(unknown)}")
    if known:
        rows = [f"\n    {brief(keys)}\n      ({reason})" for reason, keys in known.items()]
        out.notes.append(f"{file.where}: without effect here are" + "".join(rows))


# --- sections ---------------------------------------------------------------------------------------------------


def _read_lora(file: YamlFile, out: Reading, model: str, mode: str) -> None:
    at = "model.model_config.pet_config"
    kind = file.take(f"{at}.pet_type")
    if kind not in (None, "lora"):
        raise ConfigError(f"pet_type is {kind!r}", where=f"{file.where}: {at}.pet_type", hint="lora")
    rank, alpha = file.whole(f"{at}.lora_rank"), file.number(f"{at}.lora_alpha")
    dropout, targets = file.number(f"{at}.lora_dropout"), file.take(f"{at}.target_modules")
    frozen = [key for key in ("freeze_include", "freeze_exclude") if file.take(f"{at}.{key}")]
    if mode not in TRAINING:
        out.notes.append(
            f"{file.where}: {at} has no effect in {mode}: adapter=<folder> puts a trained adapter on the weights"
        )
        return
    if frozen:
        out.notes.append(
            f"{file.where}: {at}.{{{','.join(frozen)}}} has no effect: the adapter trains alone, embedding and head stay"
        )
    out.copy(rank, "lora.rank")
    out.copy(alpha, "lora.alpha")
    out.copy(dropout, "lora.dropout")
    if targets is not None:
        spec = preset(model)
        out.set("lora.target_modules", targets_from_mindformers(targets, spec.layers, spec.model_type == "qwen"))


def _read_sections(file: YamlFile, out: Reading, job: Job, mode: str) -> None:
    checkpoint = file.path("load_checkpoint", "model.model_config.checkpoint_name_or_path")
    out.copy(checkpoint, "weights")
    out.copy(file.path("src_strategy_path_or_dir", "parallel.strategy_ckpt_load_file"), "reshard.strategy")
    out.copy(file.truth("auto_trans_ckpt"), "auto_transform")
    vocabulary = file.path("processor.tokenizer.vocab_file", "processor.tokenizer.merges_file")
    if vocabulary is not None:
        out.set("tokenizer", os.path.dirname(vocabulary) or ".")
    _read_device(file, out)
    if mode in TRAINING:
        read_training(file, out, job)
    elif mode == "predict":
        read_answers(file, out, job)
    elif mode == "export":
        read_export(file, out)
    else:
        read_eval(file, out)
    _leave_to_other_modes(file, mode)


def _read_device(file: YamlFile, out: Reading) -> None:
    target = file.take("context.device_target")
    kinds = {"Ascend": None, "CPU": "cpu", "GPU": "cuda"}  # every released file says Ascend: whatever there is
    if target is not None and target not in kinds:
        raise ConfigError(
            f"{target!r} is no device", where=f"{file.where}: context.device_target", hint=", ".join(kinds)
        )
    out.copy(kinds.get(target), "device")
    index = file.whole("context.device_id")
    if index:
        out.set("device.index", index)
    if file.whole("context.mode"):
        out.notes.append(f"{file.where}: context.mode=1 (PyNative) has no effect: training and answers run as graphs")


def _leave_to_other_modes(file: YamlFile, mode: str) -> None:
    """Sections that belong to another run_mode are in every file, and are nothing to speak of."""
    if mode not in TRAINING:
        file.ignore("optimizer", "lr_schedule", "runner_config", "runner_wrapper", "recompute_config", "train_dataset")
        file.ignore(
            "train_dataset_task", "eval_dataset", "eval_dataset_task", "callbacks", "do_eval", "resume_training"
        )
        file.ignore("moe_config.aux_loss_factor", "seed", "model.model_config.param_init_type")
        file.ignore("model.model_config.compute_dtype")
    if mode != "predict":
        keys = ("top_k", "top_p", "temperature", "do_sample", "repetition_penalty", "max_decode_length")
        file.ignore(*(f"model.model_config.{key}" for key in keys))
    if mode != "export":
        keys = ("use_past", "is_dynamic", "block_size", "num_blocks", "use_paged_attention")
        file.ignore(*(f"model.model_config.{key}" for key in keys))
    if mode not in TRAINING and mode != "export":
        file.ignore("model.model_config.seq_length", "model.model_config.batch_size")


def _read_grid(file: YamlFile, out: Reading, job: Job, mode: str, model: str) -> None:
    at = "parallel_config"
    grid = tuple(file.whole(f"{at}.{key}") or 1 for key in _GRID)
    micro = file.whole(f"{at}.micro_batch_num")
    experts, context = file.whole(f"{at}.expert_parallel"), file.whole(f"{at}.context_parallel")
    wanted, sharded = file.truth("use_parallel"), file.truth("parallel.enable_parallel_optimizer")
    file.take("parallel.parallel_mode", f"{at}.context_parallel_algo")
    ranks = job.ranks if job.ranks.wanted is not None else replace(job.ranks, wanted=wanted)
    if context is not None and context > 1 and ranks.wanted is not False:
        raise ConfigError(
            "sequences are not split over cards here",
            where=f"{file.where}: {at}.context_parallel={context}",
            hint="context_parallel: 1, and model_parallel or recompute for what a card cannot hold",
        )
    if experts is not None and experts > 1:
        out.notes.append(
            f"{file.where}: {at}.expert_parallel={experts} has no effect: experts are split as all other weights"
        )
    micro = micro if grid[2] > 1 else None
    grid_words(
        out,
        grid,
        ranks,
        file.where,
        mode=mode,
        backend=job.backend,
        exact=True,
        micro=micro,
        splits_layers=job.splits_layers,
    )
    stage_words(out, file, preset(model, job.hf).layers)
    if mode in TRAINING and job.backend == "mindspore" and sharded is not None and _several(grid, ranks):
        out.words.setdefault("parallel.shard", "optimizer" if sharded else "none")
