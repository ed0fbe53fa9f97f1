"""A YAML's keys for answers, for exported graphs, and for evaluation as settings."""

from __future__ import annotations

from research.core.config.mindformers.keys import DTYPES
from research.core.config.mindformers.published import Published
from research.core.config.mindformers.yaml_file import Job, Reading, YamlFile

_AT = "model.model_config"


def read_answers(file: YamlFile, out: Reading, job: Job) -> None:
    """``run_mode: predict``. Lengths count tokens; MindFormers counts the prompt in ``max_decode_length``, we do not."""
    out.copy(file.whole("seed"), "generate.seed")
    if file.truth(f"{_AT}.use_past") is False:
        out.notes.append(f"{file.where}: {_AT}.use_past=False has no effect: keys and values are always kept")
    out.copy(file.whole(f"{_AT}.batch_size"), "generate.batch")
    out.copy(file.whole(f"{_AT}.max_decode_length"), "generate.max_new_tokens")
    out.copy(file.whole(f"{_AT}.top_k"), "generate.top_k")
    out.copy(file.number(f"{_AT}.top_p"), "generate.top_p")
    out.copy(file.number(f"{_AT}.repetition_penalty"), "generate.repetition_penalty")
    samples, temperature = file.truth(f"{_AT}.do_sample"), file.number(f"{_AT}.temperature")
    if samples is not None:
        out.set("generate.temperature", _temperature(samples, temperature))
    else:
        out.copy(temperature, "generate.temperature")
    compute = DTYPES.get(file.take(f"{_AT}.compute_dtype"))
    if compute in ("fp32", "bf16") and job.accelerator:
        out.set("generate.dtype", compute)


def read_export(file: YamlFile, out: Reading) -> None:
    """``run_mode: export``: the shapes of the graphs."""
    out.copy(file.whole(f"{_AT}.seq_length"), "mindir.seq_length")
    out.copy(file.whole(f"{_AT}.batch_size"), "mindir.batch")
    out.copy(file.truth(f"{_AT}.use_past"), "mindir.past")
    out.copy(file.truth(f"{_AT}.is_dynamic"), "mindir.dynamic")
    out.copy(file.truth(f"{_AT}.use_paged_attention"), "mindir.paged")
    out.copy(file.whole(f"{_AT}.block_size"), "mindir.block_size")
    out.copy(file.whole(f"{_AT}.num_blocks"), "mindir.num_blocks")


def read_eval(file: YamlFile, out: Reading) -> None:
    """``run_mode: eval``: the data set whose loss is measured."""
    out.copy(file.whole(f"{_AT}.seq_length"), "data.seq_length")
    out.copy(file.path("eval_dataset.data_loader.dataset_dir", "train_dataset.data_loader.dataset_dir"), "data")


def published_answers(row: Published, out: Reading, job: Job, mode: str) -> None:
    """The settings of one of the documents' files for predict, export or eval."""
    if mode == "eval":
        out.set("data.seq_length", row.seq)
        return
    if mode == "export":
        out.set("mindir.seq_length", row.seq)
        out.set("mindir.batch", row.batch)
        out.copy(row.block_size, "mindir.block_size")
        out.copy(row.num_blocks, "mindir.num_blocks")
        return
    if row.answer is None:
        return
    out.set("generate.seed", row.seed)
    out.set("generate.batch", row.batch)
    out.set("generate.max_new_tokens", row.answer)
    out.copy(row.top_k, "generate.top_k")
    out.copy(row.top_p, "generate.top_p")
    out.copy(row.penalty, "generate.repetition_penalty")
    out.set("generate.temperature", _temperature(bool(row.sample), row.temperature))
    if job.accelerator and row.compute != "fp16":
        out.set("generate.dtype", row.compute)


def _temperature(samples: bool, temperature: float | None) -> float:
    return (1.0 if temperature is None else temperature) if samples else 0.0
