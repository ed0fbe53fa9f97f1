"""The training loop: evaluate, sample, checkpoint, step, log. What a framework does of it is in the subclasses."""

from __future__ import annotations

import json
import math
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np

from research.core.config.schema import Config
from research.core.data.dataset import IGNORE, Batch, PackedDataset
from research.core.data.sampler import SeekableSampler
from research.core.errors import Interrupted, UserError
from research.core.run.checkpoint import Checkpoint, Checkpoints, Tables, load_checkpoint
from research.core.run.flops import document_pairs
from research.core.run.folder import RunFolder
from research.core.run.identity import check_identity
from research.core.run.meter import Meter
from research.core.run.metrics import Metrics
from research.core.run.plot import plot_losses
from research.core.run.progress import Progress
from research.core.run.schedule import learning_rate
from research.core.run.signals import StopRequest
from research.core.spec import DecoderSpec


@dataclass
class Progressed:
    """Where the training stands; saved with every checkpoint."""

    step: int = 0  # optimiser updates done
    position: int = 0  # rows of the data read, over all epochs and cards
    tokens: int = 0  # real tokens trained on
    targets: int = 0  # supervised ones
    seconds: float = 0.0  # wall clock of the training, over all its processes
    loss: float = math.nan  # of the last step


@dataclass
class Agreed:
    """What all cards know before a step: totals of the global batch, and whether to stop."""

    targets: int
    tokens: int
    pairs: int  # sum over documents of length^2
    stop: bool
    time_share: float  # of max_minutes


@dataclass
class Summary:
    """What a training came to, for report.json."""

    steps: int
    tokens: int
    targets: int
    seconds: float
    loss: float
    eval_loss: float | None
    tokens_per_second: float
    supervised_per_second: float
    mfu: float
    memory: int


class Loop(ABC):
    """One training of a decoder on ``data``; a backend's ``Trainer`` fills in what a framework computes.

    Build it, then call :meth:`fit` once. ``world`` is the backend's: this process among all cards, with ``rank``, ``size``,
    ``main``, ``sum``, ``tell`` and ``gather``; ``data_rank`` of ``data_size`` is its place among those that see different
    rows. Random draws may differ between cards; everything else must not.
    """

    backend: str
    tables: Tables
    world: Any
    pad_to: int | None = 0  # width of a batch: 0 the longest row's, None the data's seq_length

    def prepare(
        self,
        cfg: Config,
        spec: DecoderSpec,
        data: PackedDataset,
        held_out: PackedDataset | None,
        run: RunFolder,
        *,
        lora: bool,
        base: str | None,
        identity: dict[str, Any] | None,
        sample: Callable[[Any], str] | None,
    ) -> None:
        """What no framework is needed for; call it before anything else. ``base`` is the fingerprint of what LoRA leaves
        frozen, ``identity`` names further things that a resumed run must share."""
        train = cfg.train
        self.train, self.run, self.sample = train, run, sample
        self.data, self.held_out = data, held_out
        self.identity = {
            "model": asdict(spec),
            "method": "lora" if lora else "full",
            "lora": asdict(cfg.lora) if lora else None,
            "base": base,
            "seq_length": data.seq_length,
            "shuffle": [cfg.data.shuffle, cfg.data.seed],
            "global_batch": train.micro_batch * train.accumulation * self.world.data_size,
            **(identity or {}),
        }
        self.router_aux = 0.0 if spec.moe is None else spec.moe.aux_coefficient
        if train.router_aux is not None:
            self.router_aux = train.router_aux
        self.sampler = SeekableSampler(len(data), cfg.data.seed, cfg.data.shuffle)
        self.rows_per_step = self.identity["global_batch"]
        self.steps = planned_steps(cfg, len(data), self.rows_per_step)
        self.checkpoints = Checkpoints(
            run.path / "checkpoints", self.tables, keep_last=train.keep_last, background=train.async_save, say=run.say
        )
        self.at, self.eval_loss = Progressed(), None
        self.meter: Meter

    def begin(self) -> None:
        """Go on from the newest checkpoint where ``train.resume`` asks for it; call it when everything is built."""
        if self.train.resume:
            self.restore()
        self.first_step, self.seconds_before = self.at.step, self.at.seconds

    def fit(self) -> Summary:
        """Train to the end. Raises :class:`Interrupted` after Ctrl-C or SIGTERM, with everything saved, and
        :class:`UserError` when loss or gradient norm is not finite, before that update."""
        train, at = self.train, self.at
        self.started = time.perf_counter()
        self.metrics = Metrics(self.run.path, from_step=at.step) if self.world.main else None
        self.progress = Progress(self.run, self.steps, "train", done=at.step)
        try:
            with StopRequest() as stop, self.progress:
                self.set_train(True)
                while True:
                    micro_batches = self.next_batch()
                    agreed = self.agree(micro_batches, stop.requested)
                    done = self.finished(agreed)

                    if done or self.due(train.eval_every):
                        self.evaluate()
                    if self.due(train.sample_every):
                        self.show_sample()
                    if done or agreed.stop or self.due(train.save_every):
                        self.save()
                    if done:
                        break
                    if agreed.stop:
                        raise Interrupted(how_to_resume(self.run))

                    numbers = self.update(micro_batches, agreed)
                    if self.due(train.log_every) or at.step == 1:
                        self.log(numbers)
                self.checkpoints.wait()
        finally:
            self.close()
        return self.summary()

    # --- what a framework does ---

    @abstractmethod
    def set_train(self, on: bool) -> None:
        """Dropout and the like on, or off for evaluation."""

    @abstractmethod
    def backward(self, micro_batches: list[Batch], agreed: Agreed) -> tuple[float, float | None, float]:
        """Gradients of this step, summed over accumulation and cards -> the global batch's loss and router balance (None
        for dense models) and the gradients' norm."""

    @abstractmethod
    def apply(self, rate: float) -> None:
        """Clip, update with the learning rate ``rate``, clear the gradients, and wait until it is done."""

    @abstractmethod
    def held_out_loss(self, batch: Batch) -> float:
        """Sum of the cross-entropies over the supervised targets, without gradient and in evaluation mode."""

    @abstractmethod
    def answer(self) -> str:
        """What ``sample`` returns, with the random state as it was before."""

    @abstractmethod
    def capture(self) -> tuple[dict, dict, list[dict]] | None:
        """Copies of the weights, the optimiser's state and every rank's random state as CPU tensors; None on ranks above 0.
        Every rank has to call it."""

    @abstractmethod
    def load(self, found: Checkpoint, random: dict) -> None:
        """Put a checkpoint's weights and state back; ``random`` is this rank's random state, empty where it has none."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """The framework's version, by name."""

    def extra_state(self) -> dict[str, Any]:
        """Further JSON values that a checkpoint's meta.json keeps under ``extra``."""
        return {}

    # --- one step ---

    def next_batch(self) -> list[Batch]:
        """This card's micro batches of the next step."""
        train, world = self.train, self.world
        starts = (
            self.at.position + (micro * world.data_size + world.data_rank) * train.micro_batch
            for micro in range(train.accumulation)
        )
        return [self.data.rows(self.sampler.take(start, train.micro_batch), pad_to=self.pad_to) for start in starts]

    def agree(self, micro_batches: list[Batch], stop: bool) -> Agreed:
        """Add up the global batch over accumulation and cards; the main rank's clock counts for all."""
        self.at.seconds = self.seconds_before + time.perf_counter() - self.started
        limit = self.train.max_minutes
        targets, tokens, pairs, stop, share = self.world.sum(
            sum(batch.supervised for batch in micro_batches),
            sum(batch.tokens for batch in micro_batches),
            sum(document_pairs(batch.doc_ids) for batch in micro_batches),
            stop,
            self.at.seconds / (60 * limit) if limit and self.world.main else 0.0,
        )
        return Agreed(int(targets), int(tokens), int(pairs), stop > 0, share)

    def finished(self, agreed: Agreed) -> bool:
        return (self.steps is not None and self.at.step >= self.steps) or agreed.time_share >= 1.0

    def due(self, every: int) -> bool:
        return every > 0 and self.at.step % every == 0 and self.at.step > self.first_step

    def update(self, micro_batches: list[Batch], agreed: Agreed) -> dict[str, float]:
        """One optimiser step; the loss is the mean over all supervised targets of the global batch."""
        at = self.at
        started = time.perf_counter()
        loss, balance, norm = self.backward(micro_batches, agreed)
        numbers = {"loss": loss, "lr": self.learning_rate(agreed.time_share), "grad_norm": norm}
        if balance is not None:
            numbers["router_balance"] = balance
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.stop_before_update(micro_batches, numbers)
        self.apply(numbers["lr"])

        self.meter.add(agreed.tokens, agreed.targets, agreed.pairs, time.perf_counter() - started)
        at.step, at.position, at.loss = at.step + 1, at.position + self.rows_per_step, loss
        at.tokens, at.targets = at.tokens + agreed.tokens, at.targets + agreed.targets
        self.progress.update(at.step, f"loss {loss:.3f}  {self.meter.speed():,.0f} tok/s")
        return numbers

    def learning_rate(self, time_share: float) -> float:
        train = self.train
        return learning_rate(
            self.at.step,
            peak=train.lr,
            kind=train.schedule,
            steps=self.steps,
            warmup_steps=train.warmup_steps,
            warmup_ratio=train.warmup_ratio,
            min_ratio=train.min_lr_ratio,
            decay_ratio=train.decay_ratio,
            time_share=time_share,
        )

    def stop_before_update(self, micro_batches: list[Batch], numbers: dict[str, float]) -> None:
        """Keep the batch and what was measured, and end the training with the weights as they were."""
        path = self.run.path / f"nonfinite-step{self.at.step + 1}-rank{self.world.rank}.npz"
        arrays = {
            f"{name}_{micro}": getattr(batch, name)
            for micro, batch in enumerate(micro_batches)
            for name in ("input_ids", "labels", "position_ids", "doc_ids")
        }
        rows = {"step": self.at.step + 1, "position": self.at.position, **numbers}
        np.savez_compressed(path, info=json.dumps(rows), **arrays)
        raise UserError(
            f"step {self.at.step + 1}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}; "
            f"the update was not made and the batch is kept in {path}",
            where="train",
            hint=f"a lower train.lr (now {self.train.lr:g}), more train.warmup_steps, or train.dtype=fp32",
        )

    # --- around the steps ---

    def evaluate(self) -> None:
        """Mean loss over all supervised targets of the held-out split."""
        if self.held_out is None or len(self.held_out) == 0:
            return
        world, rows = self.world, self.train.micro_batch
        self.set_train(False)
        total, targets = 0.0, 0
        first, every = world.data_rank * rows, rows * world.data_size
        for start in range(first, len(self.held_out) + first, every):
            mine = range(start, min(start + rows, len(self.held_out)))
            batch = self.held_out.rows(mine or [0], pad_to=self.pad_to)
            if not mine:  # every card takes part in every forward, some without a row of their own
                batch.labels[:] = IGNORE
            total, targets = total + self.held_out_loss(batch), targets + batch.supervised
        self.set_train(True)
        total, targets = world.sum(total, targets)
        self.eval_loss = total / max(1, targets)
        if self.metrics is not None:
            self.metrics.write(self.at.step, "eval", {"loss": self.eval_loss, "targets": int(targets)})
        self.progress.line(f"held-out loss {self.eval_loss:.4f} over {targets:,.0f} targets")

    def show_sample(self) -> None:
        """Let the model answer while it trains; the random state stays as it was."""
        if self.sample is None or self.world.sharded:
            return
        text = self.world.after_main(f"sample {self.at.step}", self.answer)
        self.set_train(True)
        if self.metrics is not None:
            self.metrics.write(self.at.step, "sample", {"text": text})
        self.run.say(f"sample at step {self.at.step}:\n{text}")

    def log(self, numbers: dict[str, float]) -> None:
        """Write this step's numbers and the rates since the last time."""
        if self.metrics is None:
            return
        rates = self.meter.rates()
        epoch = self.at.position / len(self.data)
        self.metrics.write(self.at.step, "train", {**numbers, **rates, "tokens": self.at.tokens, "epoch": epoch})
        self.progress.line(
            f"loss {numbers['loss']:.4f}  lr {numbers['lr']:.2e}  grad {numbers['grad_norm']:.3g}  "
            f"{rates['tokens_per_second']:,.0f} tok/s, {rates['supervised_per_second']:,.0f} supervised  "
            f"MFU {rates['mfu']:.0%}  {rates['memory'] / 2**30:.2f} GiB",
            routine=True,
        )

    def close(self) -> None:
        """Metrics and plot also of a training that failed."""
        if self.metrics is not None:
            self.metrics.close()
            plot_losses(self.run.path, f"{self.run.task}  {self.run.path.parent.name}")

    def summary(self) -> Summary:
        at = self.at
        rates = self.meter.of(self.meter.total)
        return Summary(at.step, at.tokens, at.targets, at.seconds, at.loss, self.eval_loss, **rates)

    # --- checkpoints ---

    def save(self) -> None:
        """Copy the state and let it be written; what is saved already is not written again."""
        if self.checkpoints.last_step == self.at.step:
            return
        state = self.capture()
        if state is not None:
            model, optimizer, randoms = state
            random = {
                f"rank{rank}.{name}": value for rank, table in enumerate(randoms) for name, value in table.items()
            }
            self.checkpoints.save(Checkpoint(self.meta(), model, optimizer, random))
        self.checkpoints.last_step = self.at.step

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says in plain words."""
        return {
            **asdict(self.at),
            "epoch": round(self.at.position / len(self.data), 4),
            "written": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
            "backend": self.backend,
            "versions": {**self.versions(), "python": platform.python_version()},
            "extra": self.extra_state(),
            "identity": self.identity,
        }

    def restore(self) -> None:
        """Go on from the newest whole checkpoint, whichever backend and number of cards wrote it.

        Without any checkpoint the training starts at its beginning, and says so. Raises :class:`UserError` naming every
        setting that the checkpoint contradicts.
        """
        world, run = self.world, self.run
        found = self.checkpoints.newest() if world.main else None
        step = world.tell(None if found is None else found.meta["step"])
        if step is None:
            run.say("no checkpoint in this run folder yet: the training starts at its beginning")
            return
        if found is None:
            found = load_checkpoint(self.checkpoints.folder / f"step-{step:08d}", self.tables)
        check_identity(found.meta["identity"], self.identity, str(self.checkpoints.folder), run.say)
        mine = f"rank{world.rank}."
        random = {name.removeprefix(mine): value for name, value in found.random.items() if name.startswith(mine)}
        self.load(found, random)
        maker = found.meta.get("backend", "torch")
        if maker != self.backend:
            run.say(
                f"note: the checkpoint is from {maker}: weights, optimiser and data position go on; the random state of "
                f"{maker}, which only dropout reads, does not"
            )
        self.checkpoints.last_step = step
        run.say(f"resumed at step {step} (checkpoint of {found.meta['written']}, loss {found.meta['loss']:.4f})")
        self.at = Progressed(**{field: found.meta[field] for field in asdict(self.at)})


def planned_steps(cfg: Config, rows: int, rows_per_step: int) -> int | None:
    """``train.steps``, else those of ``train.epochs``; None when only the clock ends the training."""
    if cfg.train.steps is not None:
        return cfg.train.steps
    if cfg.train.epochs is not None:
        return max(1, math.ceil(cfg.train.epochs * rows / rows_per_step))
    if cfg.train.max_minutes is None:
        raise UserError(
            "train.steps, train.epochs and train.max_minutes are all null", where="train", hint="train.epochs=1"
        )
    return None


def how_to_resume(run: RunFolder) -> str:
    return f"stopped and saved; go on with:\n  make {run.task} RUN={run.path} ARGS=train.resume=true"
