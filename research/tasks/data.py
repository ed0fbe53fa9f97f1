"""`make data`: source -> tokens, labels and packed rows in a dataset folder, and the audit."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from research.core.config.schema import Config
from research.core.data.audit import AuditError, Report, print_audit
from research.core.data.dataset import SPLITS, read_meta
from research.core.data.mindrecord.write import check_output, existing_files
from research.core.data.prepare import Progress as State
from research.core.data.prepare import open_prepared, prepare_dataset
from research.core.data.sources import expand_sources, source_bytes
from research.core.run.folder import RunFolder
from research.core.run.progress import Progress
from research.core.run.terminal import Terminal
from research.core.spec import DecoderSpec, spec_from_hf
from research.registry import model_spec
from research.tasks.mindrecord import write_split
from research.tasks.sources import (
    from_hub,
    read_json,
    resolve_data,
    resolve_template,
    resolve_tokenizer,
    resolve_weights,
)

_VOCABULARY_FILES = ("*.json", "*.txt", "*.tiktoken", "*.jinja")
_MB = 1 << 20
OVERWRITE = "data.overwrite=true"


def run(cfg: Config) -> int:
    from research.core.config.compose import to_yaml

    if cfg.data.mindrecord:
        for output in _outputs(cfg):
            check_output(output, cfg.data.file_partition, cfg.data.overwrite, OVERWRITE)
    weights = _files(cfg)
    tokenizer, template = resolve_tokenizer(cfg, weights), resolve_template(cfg, weights)
    spec = _spec(cfg, weights, tokenizer)
    with RunFolder(cfg.run, task="data", model=cfg.model.name) as folder:
        folder.write_text("config.yaml", to_yaml(cfg))
        dataset, report = dataset_for(cfg, folder, tokenizer, template, spec)
        if report is not None:
            folder.write_report(report.to_json())
        folder.say(f"dataset: {dataset}")
        if cfg.data.mindrecord:
            _write_mindrecord(cfg, dataset, folder)
        words = [f"MODEL={cfg.model.name}"]
        words += [
            f"{name}={shlex.quote(v)}" for name, v in (("WEIGHTS", cfg.weights), ("TOKENIZER", cfg.tokenizer)) if v
        ]
        settings = f"data.folder={dataset} data.seq_length={cfg.data.seq_length}"
        folder.say(f"next: make finetune {' '.join(words)} ARGS={shlex.quote(settings)}")
    return 0


def dataset_for(
    cfg: Config, run: RunFolder, tokenizer: Any, template: Any, spec: DecoderSpec
) -> tuple[Path, Report | None]:
    """The dataset folder that this configuration trains on: ``data.folder``, checked, or one prepared now.

    A new one is ``data.output``, else ``dataset/`` in the run folder; its audit is printed. Raises
    :class:`~research.core.errors.DataError`; nothing is left under the folder's name then.
    """
    limits = {"model_length": spec.usable_length, "vocab_size": spec.vocab}
    if cfg.data.folder:
        return open_prepared(cfg.data, tokenizer, template, log=run.say, **limits), None
    cfg.data.source = resolve_data(cfg)
    folder = Path(cfg.data.output).expanduser() if cfg.data.output else run.path / "dataset"
    megabytes = source_bytes(expand_sources(cfg.data.source)) // _MB
    with Progress(run, megabytes or None, "prepare", "MB") as bar:
        try:
            report = prepare_dataset(
                cfg.data,
                tokenizer,
                template,
                folder,
                family=cfg.model.family,
                allow_special=cfg.allow_special,
                progress=preparation_shown(bar),
                **limits,
            )
        except AuditError as error:
            print_report(error.report, run)
            raise
    print_report(report, run)
    return folder, report


def _outputs(cfg: Config) -> list[Path]:
    """Names of the MindRecord sets: of the trained rows, and of the held-out ones."""
    output = Path(cfg.data.mindrecord).expanduser()
    return [output, output.with_name(f"{output.stem}_eval{output.suffix}")]


def _write_mindrecord(cfg: Config, dataset: Path, run: RunFolder) -> None:
    meta, width = read_meta(dataset), cfg.data.seq_length + 1
    for split, output in zip(SPLITS, _outputs(cfg)):
        counts = meta["splits"][split]
        if split == "eval" and (not counts["rows"] or (meta.get("text_only") and counts["tokens"] < width)):
            for path in existing_files(output):  # of an earlier run: it would not go with the new rows
                path.unlink()
            run.say(f"mindrecord: no {output.name}: {counts['tokens']:,} tokens are held out")
            continue
        write_split(
            dataset / split,
            output,
            run,
            family=cfg.model.family,
            width=width,
            shards=cfg.data.file_partition if split == "train" else 1,  # few rows are held out
            overwrite=cfg.data.overwrite,
            option=OVERWRITE,
        )


def preparation_shown(bar: Progress) -> Callable[[State], None]:
    """Show the preparation's state on ``bar``: megabytes read of all, and records a second."""
    began = last = time.monotonic()

    def show(state: State) -> None:
        nonlocal last
        now = time.monotonic()
        note = f"{state.records:,} records, {state.records / max(now - began, 1e-9):,.0f}/s"
        bar.update(state.done // _MB, note)
        if now - last > 10:
            last = now
            bar.line(note, routine=True)

    return show


def print_report(report: Report, run: RunFolder | Terminal) -> None:
    from rich.console import Console

    print_audit(report, Console(file=sys.stderr, width=None if run.terminal.isatty() else 120))


def _files(cfg: Config) -> Path | None:
    """The folder with the vocabulary and config.json: only these small files are fetched from the hub."""
    if cfg.weights:
        return resolve_weights(cfg)
    if cfg.tokenizer or cfg.model.tokenizer == "builtin" or cfg.model.hub_id is None:
        return None
    return from_hub(cfg.model.hub_id, _VOCABULARY_FILES)


def _spec(cfg: Config, weights: Path | None, tokenizer: Any) -> DecoderSpec:
    if weights is not None:
        return spec_from_hf(read_json(weights / "config.json"), where=str(weights / "config.json"))
    return model_spec(cfg.model, tokens=tokenizer.vocab_size)
