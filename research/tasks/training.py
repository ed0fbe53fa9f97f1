"""The steps that pretrain, finetune and lora are made of, in the order in which they happen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from research.core.config.compose import to_yaml
from research.core.config.schema import Config
from research.core.errors import ConfigError, UserError
from research.core.run.folder import RunFolder
from research.core.spec import DecoderSpec
from research.core.weights.grid import Grid
from research.registry import model_spec
from research.tasks.exporting import export_options, is_chat, note
from research.tasks.framework import half
from research.tasks.sources import (
    check_architecture,
    check_grid,
    read_json,
    resolve_template,
    resolve_tokenizer,
    resolve_weights,
    spec_of_weights,
)

if TYPE_CHECKING:
    from research.core.evaluation.skills import Exam, Score
    from research.core.run.loop import Loop, Summary
    from research.core.text.template import ChatTemplate
    from research.core.text.tokenizer import Tokenizer


@dataclass
class Job:
    """One training run and what it works with."""

    cfg: Config
    half: ModuleType  # core/torch/training.py or core/mindspore/training.py
    run: RunFolder
    world: Any
    weights: Path | None
    tokenizer: Tokenizer
    template: ChatTemplate
    spec: DecoderSpec
    dtype: Any
    report: dict[str, Any] = field(default_factory=dict)


@contextmanager
def start(cfg: Config) -> Iterator[Job]:
    """Find everything the run needs, check it, and open the run folder; at the end write ``report.json``.

    Everything a user can have got wrong is found here or in :func:`prepare_data`, before any long work.
    """
    weights, spec, beside = resolve_weights(cfg), None, None
    if weights is not None:
        check_grid(cfg, weights)
        spec = spec_of_weights(cfg, weights)
        check_architecture(cfg, weights, spec)
        cfg.weights = str(weights.resolve())
        beside = weights if weights.is_dir() else weights.parent
    tokenizer, template = resolve_tokenizer(cfg, beside), resolve_template(cfg, beside)
    if spec is None:
        spec = model_spec(cfg.model, tokens=tokenizer.vocab_size)
    check_training(cfg, spec, weights)

    framework = half(cfg.backend, "training")
    world = framework.World.join(cfg)
    names = {"task": cfg.task.name, "model": cfg.model.name, "resume": cfg.train.resume}
    try:
        dtype = framework.resolve_dtype(cfg, world)
        run = RunFolder(cfg.run, main=world.main, **names)
        run = run if world.main else RunFolder(world.tell(None), main=False, **names)
        if world.main:
            world.tell(str(run.path))
        with run:
            world.folder = run.path
            job = Job(cfg, framework, run, world, weights, tokenizer, template, spec, dtype)
            if world.main:
                if cfg.task.name != "perplexity":
                    check_disk(cfg, spec, run.path)
                if cfg.train.resume and (run.path / "report.json").is_file():
                    job.report.update(read_json(run.path / "report.json"))
                run.write_text("config.yaml", to_yaml(cfg))
                announce(job)
            try:
                yield job
            finally:
                if world.main and job.report:
                    run.write_report(job.report)
    finally:
        world.leave()


# --- checks -----------------------------------------------------------------------------------------------------


def check_training(cfg: Config, spec: DecoderSpec, weights: Path | None) -> None:
    """Raise :class:`ConfigError` for settings that cannot train this model."""
    if cfg.model.embedding:
        raise ConfigError(
            "an embedding model has no output matrix to train", where=f"model={cfg.model.name}", hint="another MODEL"
        )
    if cfg.data.seq_length > spec.usable_length:
        raise ConfigError(
            f"{cfg.model.name} is made for sequences of at most {spec.usable_length} tokens",
            where=f"data.seq_length={cfg.data.seq_length}",
            hint=f"data.seq_length={spec.usable_length}",
        )
    if not cfg.train.lr > 0:
        raise ConfigError("must be greater than 0", where=f"train.lr={cfg.train.lr}", hint="train.lr=1e-5")
    if cfg.task.name == "lora" and weights is None:
        raise ConfigError(
            "an adapter is trained on weights, and there are none", where="task=lora", hint="WEIGHTS=<folder>"
        )


def check_disk(cfg: Config, spec: DecoderSpec, path: Path) -> None:
    """Raise :class:`UserError` when checkpoints and exported weights will not fit on the disk."""
    total = spec.parameters()
    trained = total if cfg.task.name != "lora" else total // 50  # adapters are about a hundredth
    checkpoint = 12 * trained  # fp32 weights and two moments
    need = checkpoint * (cfg.train.keep_last + 1) + (4 * trained if cfg.train.export else 0)
    free = shutil.disk_usage(path).free
    if need > free:
        raise UserError(
            f"{cfg.train.keep_last + 1} checkpoints and the exported weights need about {need / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free",
            where=path,
            hint="RUN=<a folder on a larger disk>" + (", or train.keep_last=1" if cfg.train.keep_last > 1 else ""),
        )


def announce(job: Job) -> None:
    """Say what will be trained, and which settings have no effect here."""
    cfg, spec, say = job.cfg, job.spec, job.run.say
    origin = f"from {job.weights}" if job.weights else "from scratch"
    kind = str(job.dtype).removeprefix("torch.").lower()
    say(
        f"{cfg.model.name}, {spec.parameters():,} parameters, {origin}; {kind} on {job.world.size} x {job.world.device}"
    )
    if cfg.train.router_aux is not None and spec.moe is None:
        say("note: train.router_aux has no effect: this model has no experts")
    if cfg.train.min_lr_ratio and cfg.train.schedule == "constant":
        say("note: train.min_lr_ratio has no effect with a constant schedule")
    if job.world.sharded and cfg.train.sample_every:
        say(f"note: no samples while training with {_splitting(cfg)}: a card has only its part of the weights")
    if cfg.parallel.pipeline > 1 and cfg.task.name != "perplexity":
        say(_stages(cfg, spec))
    if cfg.parallel.shard == "full" and job.world.size == 1:
        say("note: parallel.shard=full has no effect on one card")
    if cfg.train.eval_every and not cfg.data.eval_records:
        say("note: train.eval_every has no effect with data.eval_records=0")


def _splitting(cfg: Config) -> str:
    if cfg.backend == "torch":
        return "parallel.shard=full"
    sizes = {"tensor": cfg.parallel.tensor, "pipeline": cfg.parallel.pipeline}
    return " ".join(f"parallel.{axis}={size}" for axis, size in sizes.items() if size > 1)


def _stages(cfg: Config, spec: DecoderSpec) -> str:
    """The stages' layers, and how long they wait for each other (arXiv 1811.06965, section 2.3)."""
    stages, micro = cfg.parallel.pipeline, cfg.train.accumulation
    layers = Grid(pipeline=stages, stage_layers=tuple(cfg.parallel.stage_layers)).layers_per_stage(spec.layers)
    idle = (stages - 1) / (micro + stages - 1)
    line = f"{stages} pipeline stages of {' + '.join(map(str, layers))} layers, {micro} micro batches: idle {idle:.0%} of the time"
    return line + (
        f"; train.accumulation={4 * stages} would be {(stages - 1) / (5 * stages - 1):.0%}" if idle > 0.2 else ""
    )


# --- steps ------------------------------------------------------------------------------------------------------


def prepare_data(job: Job) -> Path:
    """The dataset folder: ``data.folder``, the one a resumed run left in its folder, or one prepared now."""
    from research.tasks.data import dataset_for

    def prepare() -> str:
        left = job.run.path / "dataset"
        if job.cfg.train.resume and job.cfg.data.folder is None and (left / "meta.json").is_file():
            job.cfg.data.folder = str(left)
        folder, audit = dataset_for(job.cfg, job.run, job.tokenizer, job.template, job.spec)
        if audit is not None:
            job.report["data"] = audit.to_json()
        return str(folder)

    return Path(job.world.after_main("dataset", prepare))


def build_decoder(job: Job) -> Any:
    """The decoder with the weights to start from: a folder's, or random ones drawn from ``train.seed``."""
    return job.half.build_decoder(job.cfg, job.spec, job.weights, job.dtype, job.world)


def add_adapter(job: Job, decoder: Any) -> None:
    """Put a new adapter on the decoder, or the one of ``lora.adapter`` to go on with."""
    job.half.add_adapter(job.cfg, decoder, job.run.say)


def train(job: Job, decoder: Any, data: Path) -> Loop:
    """Run the training loop; the summary is in ``job.report`` afterwards."""
    from research.core.data.dataset import PackedDataset
    from research.core.run.identity import data_fingerprint

    held_out = PackedDataset(data / "eval")
    identity = {
        "tokenizer": job.tokenizer.fingerprint,
        "template": job.template.fingerprint if is_chat(job.cfg) else None,
        "data": data_fingerprint(data),
    }
    sample = Sampler(job, held_out) if job.cfg.train.sample_every else None
    trainer = job.half.Trainer(
        job.cfg, decoder, PackedDataset(data / "train"), held_out, job.run, job.world, identity=identity, sample=sample
    )
    summary: Summary = trainer.fit()
    job.report["training"] = asdict(summary)
    job.run.say(
        f"trained {summary.steps} steps, {summary.tokens:,} tokens in {summary.seconds:.0f} s: loss {summary.loss:.4f}, "
        f"{summary.tokens_per_second:,.0f} tokens/s ({summary.supervised_per_second:,.0f} supervised), "
        f"{summary.mfu:.0%} of the GEMM roofline"
    )
    return trainer


class Sampler:
    """Lets the model continue the beginnings of a few held-out documents while it trains."""

    def __init__(self, job: Job, held_out, count: int = 2, room: int = 48):
        self.tokenizer, self.room, self.generate = job.tokenizer, room, job.half.generate
        self.eos_ids = job.tokenizer.eos_ids(chat=is_chat(job.cfg))
        self.prompts = []
        for number in range(min(count, held_out.documents)):
            ids, labels = held_out.document(number)
            supervised = int((labels != -100).argmax())
            self.prompts.append(ids[: supervised if supervised > 1 else max(1, len(ids) // 4)].tolist())

    def __call__(self, decoder: Any) -> str:
        lines = []
        for prompt, answer in zip(self.prompts, self.generate(decoder, self.prompts, None, self.room, self.eos_ids)):
            before = self.tokenizer.decode(prompt, skip_special=True)[-120:].replace("\n", " ")
            lines.append(f"  {before} -> {self.tokenizer.decode(answer, skip_special=True)!r}")
        return "\n".join(lines)


def export(job: Job, trainer: Loop) -> Path | None:
    """Write ``weights/`` in Hugging Face format, or ``adapter/`` in PEFT's."""
    if not job.cfg.train.export:
        return None
    from research.core.weights.write import write_json

    folder = job.half.export(
        trainer, job.run.path, job.cfg, job.dtype, lambda: export_options(job.cfg, job.tokenizer, job.template)
    )
    if job.world.main:
        if folder.name == "adapter":
            write_json(folder / "workbench.json", note(job.cfg, job.tokenizer, job.template))
        job.run.say(f"{folder.name}: {folder}")
    return folder


# --- the built-in skills ----------------------------------------------------------------------------------------


def skills_exam(job: Job, folder: Path) -> Exam | None:
    """The held-out questions when the built-in skills are what the dataset ``folder`` was made of."""
    from research.core.data.dataset import read_meta

    data = job.cfg.data
    if read_meta(folder)["settings"].get("source") != "skills" or not data.eval_records:
        return None
    if job.world.sharded:
        job.run.say(f"note: no exact match with {_splitting(job.cfg)}: a card has only its part of the weights")
        return None
    from research.core.evaluation.skills import Exam

    return Exam(
        job.tokenizer, job.template, names=data.skills, count=data.eval_records, seed=data.seed, system=data.system
    )


def examine(job: Job, exam: Exam | None, decoder: Any, when: str) -> Score | None:
    """Ask the held-out questions on the main card and print the share of right answers; ``when`` is before or after.

    A resumed run was asked before at its first start, and has not loaded its checkpoint yet.
    """
    if exam is None or (when == "before" and job.cfg.train.resume):
        return None
    score: Score | None = None

    def ask() -> str:
        nonlocal score
        score = exam.ask(decoder, job.tokenizer.eos_ids(), job.half.generate)
        job.report[f"exact_match_{when}"] = {"all": score.exact_match, **score.by_skill()}
        return (
            f"exact match {when} training: {100 * score.exact_match:.1f} % of {len(score.answers)} held-out questions "
            f"({score.seconds:.1f} s)"
        )

    job.run.say(job.world.after_main(f"exam {when}", ask))
    return score


def conclude(job: Job, after: Score | None = None) -> None:
    """The skills' table, sample answers, and what to try next."""
    if not job.world.main:
        return
    say, run = job.run.say, job.run.path
    if after is not None:
        first = job.report.get("exact_match_before", {})
        say(f"\n{'skill':<12}{'before':>9}{'after':>9}")
        for skill, share in {**after.by_skill(), "all": after.exact_match}.items():
            was = f"{100 * first[skill]:.1f} %" if skill in first else "-"
            say(f"{skill:<12}{was:>9}{100 * share:>7.1f} %")
        say("\nsample answers")
        for sample in after.samples():
            mark = "right" if sample.right else f"wrong, expected {sample.expected}"
            say(f"  {sample.question}\n    -> {sample.answer}   ({mark})")
    question = after.answers[0].question if after else "What is 2 + 3?"
    say("\nnext")
    if job.cfg.train.export and is_chat(job.cfg):
        say(f"  make predict RUN={run} PROMPT={_quoted(question)}")
        say(f"  make chat RUN={run}")
    elif job.cfg.train.export:
        say(f"  make predict RUN={run} PROMPT='Once upon a time' ARGS=generate.raw=true")
    if (run / "adapter").is_dir():
        say(f"  make merge RUN={run} OUTPUT={run / 'merged'}")
    say(f"  tensorboard --logdir {run}")


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
