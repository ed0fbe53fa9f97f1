"""The training loop: evaluate, sample, checkpoint, step, log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from research.core.config.schema import Config
from research.core.data.dataset import IGNORE, Batch, PackedDataset
from research.core.data.sampler import SeekableSampler
from research.core.errors import Interrupted, UserError
from research.core.run.folder import RunFolder
from research.core.run.metrics import Metrics
from research.core.run.plot import plot_losses
from research.core.run.progress import Progress
from research.core.run.signals import StopRequest
from research.core.torch.checkpoint import Checkpoints
from research.core.torch.decoder import Decoder
from research.core.torch.device import synchronize
from research.core.torch.flops import document_pairs
from research.core.torch.layout import Layout
from research.core.torch.lora import has_lora
from research.core.torch.loss import Objective
from research.core.torch.meter import Meter
from research.core.torch.optimizer import Optimizer
from research.core.torch.parallel import World, parallelize
from research.core.torch.resume import capture, frozen_fingerprint, restore
from research.core.torch.schedule import learning_rate


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


class Trainer:
    """One training of ``decoder`` on ``data``. Build it, then call :meth:`fit` once.

    The decoder holds its weights already (and its adapters, for LoRA: then only they train). ``identity`` names
    further things that a resumed run must share, such as fingerprints. ``sample`` lets the decoder answer for
    ``train.sample_every`` and returns the text to show.
    """

    def __init__(
        self,
        cfg: Config,
        decoder: Decoder,
        data: PackedDataset,
        held_out: PackedDataset | None,
        run: RunFolder,
        world: World,
        *,
        identity: dict[str, Any] | None = None,
        sample: Callable[[Decoder], str] | None = None,
    ):
        train, spec = cfg.train, decoder.spec
        self.train, self.run, self.world, self.sample = train, run, world, sample
        self.decoder, self.data, self.held_out = decoder, data, held_out
        lora = has_lora(decoder)
        if not lora:
            decoder.requires_grad_(True)
        self.identity = {
            "model": asdict(spec),
            "method": "lora" if lora else "full",
            "lora": asdict(cfg.lora) if lora else None,
            "base": frozen_fingerprint(decoder) if lora else None,
            "seq_length": data.seq_length,
            "shuffle": [cfg.data.shuffle, cfg.data.seed],
            "global_batch": train.micro_batch * train.accumulation * world.size,
            **(identity or {}),
        }
        self.router_aux = 0.0 if spec.moe is None else spec.moe.aux_coefficient
        if train.router_aux is not None:
            self.router_aux = train.router_aux

        self.objective = parallelize(Objective(decoder, train.head_chunk, spec.moe is not None), train, world)
        self.optimizer = Optimizer(dict(decoder.named_parameters()), train)
        self.sampler = SeekableSampler(len(data), cfg.data.seed, cfg.data.shuffle)
        self.rows_per_step = self.identity["global_batch"]
        self.steps = planned_steps(cfg, len(data), self.rows_per_step)
        trainable = sum(p.numel() for p in self.optimizer.parameters.values())
        dtype = decoder.model.embed_tokens.weight.dtype
        self.meter = Meter(spec, world.device, dtype, world.size, trainable if lora else None)
        self.checkpoints = Checkpoints(
            run.path / "checkpoints", keep_last=train.keep_last, background=train.async_save, say=run.say
        )
        self.at, self.eval_loss = Progressed(), None
        torch.manual_seed(train.seed + world.rank)  # dropout differs between cards
        if train.resume:
            self.at = Progressed(**restore(self))
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
                self.decoder.train()
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

    # --- one step ---

    def next_batch(self) -> list[Batch]:
        """This card's micro batches of the next step."""
        train, world = self.train, self.world
        width = None if train.compile else 0  # compiled layers want one shape; others only the longest row's width
        starts = (
            self.at.position + (micro * world.size + world.rank) * train.micro_batch
            for micro in range(train.accumulation)
        )
        return [self.data.rows(self.sampler.take(start, train.micro_batch), pad_to=width) for start in starts]

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
        world, train, at = self.world, self.train, self.at
        started = time.perf_counter()
        per_target = 1.0 / max(1, agreed.targets)
        per_forward = 1.0 / (train.accumulation * world.size)
        total, balance = 0.0, 0.0
        for batch in micro_batches:
            summed, router = self.objective(*self.to_device(batch))
            loss = summed * (per_target * world.loss_scale)
            if router is not None:
                loss = loss + router * (self.router_aux * per_forward * world.loss_scale)
                balance = balance + router.detach() * per_forward
            loss.backward()
            self.optimizer.gather()
            total = total + summed.detach() * per_target
        world.reduce_gradients(self.optimizer.gradients())
        norm = self.optimizer.norm()

        loss, balance = world.sum(float(total), float(balance))
        numbers = {"loss": loss, "lr": self.learning_rate(agreed.time_share), "grad_norm": float(norm)}
        if self.objective.router:
            numbers["router_balance"] = balance
        if not (math.isfinite(loss) and math.isfinite(numbers["grad_norm"])):
            self.stop_before_update(micro_batches, numbers)
        self.optimizer.step(numbers["lr"], norm)

        synchronize(world.device)
        self.meter.add(agreed.tokens, agreed.targets, agreed.pairs, time.perf_counter() - started)
        at.step, at.position, at.loss = at.step + 1, at.position + self.rows_per_step, loss
        at.tokens, at.targets = at.tokens + agreed.tokens, at.targets + agreed.targets
        self.progress.update(at.step, f"loss {loss:.3f}  {self.meter.speed():,.0f} tok/s")
        return numbers

    def to_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Layout]:
        device = self.world.device
        layout = Layout.packed(torch.from_numpy(batch.position_ids), torch.from_numpy(batch.doc_ids), device)
        ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
        return ids.to(device, non_blocking=True), labels.to(device, non_blocking=True), layout

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

    @torch.no_grad()
    def evaluate(self) -> None:
        """Mean loss over all supervised targets of the held-out split."""
        if self.held_out is None or len(self.held_out) == 0:
            return
        world, rows = self.world, self.train.micro_batch
        self.decoder.eval()
        total, targets = 0.0, 0
        for start in range(world.rank * rows, len(self.held_out) + world.rank * rows, rows * world.size):
            mine = range(start, min(start + rows, len(self.held_out)))
            batch = self.held_out.rows(mine or [0], pad_to=0)
            if not mine:  # every card takes part in every forward, some without a row of their own
                batch.labels[:] = IGNORE
            summed, _ = self.objective(*self.to_device(batch))
            total, targets = total + float(summed), targets + batch.supervised
        self.decoder.train()
        total, targets = world.sum(total, targets)
        self.eval_loss = total / max(1, targets)
        if self.metrics is not None:
            self.metrics.write(self.at.step, "eval", {"loss": self.eval_loss, "targets": int(targets)})
        self.progress.line(f"held-out loss {self.eval_loss:.4f} over {targets:,.0f} targets")

    def show_sample(self) -> None:
        """Let the model answer while it trains; the random state stays as it was."""
        if self.sample is None or self.world.sharded or not self.world.main:
            return
        state = torch.get_rng_state()
        text = self.sample(self.decoder)
        torch.set_rng_state(state)
        self.decoder.train()
        self.metrics.write(self.at.step, "sample", {"text": text})
        self.run.say(f"sample at step {self.at.step}:\n{text}")

    def save(self) -> None:
        """Copy the state and let it be written; what is saved already is not written again."""
        if self.checkpoints.last_step == self.at.step:
            return
        checkpoint = capture(self)
        if self.world.main:
            self.checkpoints.save(checkpoint)
        self.checkpoints.last_step = self.at.step

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
