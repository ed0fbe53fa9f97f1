"""Training on MindSpore: what a step of the loop (:mod:`research.core.run.loop`) computes.

Three graphs, each compiled once: forward and backward of a micro batch, which adds to the gradients
(:mod:`research.core.mindspore.passes`; :mod:`~research.core.mindspore.pipeline` where stages share the layers); their sum over
the workers with its norm; the update. Between them the host looks at the numbers, so that a loss or a norm that is not finite
stops the run before the update. That is why steps are not sunk into the data graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from research.core.config.schema import Config
from research.core.data.dataset import Batch, PackedDataset
from research.core.errors import ConfigError
from research.core.mindspore.checkpoint import NumpyTables, random_state, restore_random_state
from research.core.mindspore.collectives import sum_now
from research.core.mindspore.decoder import Decoder
from research.core.mindspore.dropout import KEY, set_key
from research.core.mindspore.feed import Feed
from research.core.mindspore.lora import has_lora
from research.core.mindspore.optimizer import Optimizer
from research.core.mindspore.parallel import World, keep_fewer_activations
from research.core.mindspore.pipeline import make_passes
from research.core.mindspore.roofline import gemm_flops, peak_memory, wait
from research.core.mindspore.scaling import LossScale
from research.core.mindspore.tensor_parallel import parallelize
from research.core.mindspore.weights import to_numpy
from research.core.run.checkpoint import Checkpoint
from research.core.run.folder import RunFolder
from research.core.run.identity import frozen_fingerprint, sample_step
from research.core.run.loop import Agreed, Loop
from research.core.run.meter import Meter
from research.core.weights.keys import parameter_shapes


class Trainer(Loop):
    """One training of ``decoder`` on ``data``. Build it, then call :meth:`fit` once; the same arguments as torch's.

    The decoder holds its weights already (and its adapters, for LoRA: then only they train) and has not been called with
    gradients yet.
    """

    backend = "mindspore"
    tables = NumpyTables()
    pad_to = None  # one shape, one graph

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
        self.decoder, self.world, self.auto_transform = decoder, world, cfg.auto_transform
        lora = has_lora(decoder)
        base = frozen_fingerprint(_frozen_samples(decoder, world)) if lora else None
        self.prepare(cfg, spec, data, held_out, run, lora=lora, base=base, identity=identity, sample=sample)

        parallelize(decoder)
        keep_fewer_activations(decoder, train.checkpointing)
        splits = [data, held_out] if held_out is not None and len(held_out) else [data]
        self.feed = Feed(spec, splits, train.micro_batch, decoder.kernels)
        trained = [parameter for parameter in decoder.get_parameters() if parameter.requires_grad]
        self.optimizer = Optimizer(trained, train, world, decoder.plan)
        self.router = spec.moe is not None and decoder.sparse
        self.passes = make_passes(decoder, world, train.head_chunk, router=self.router, optimizer=self.optimizer)
        half = decoder.dtype == ms.float16
        self.loss_scale = LossScale(train.loss_scale, train.loss_scale_window) if half else LossScale()
        trainable = self.optimizer.trainable
        roofline = world.size * gemm_flops(decoder.dtype)
        self.meter = Meter(spec, roofline, peak_memory, trainable if lora else None)
        ms.set_seed(train.seed + world.rank)
        self.begin()

    def set_train(self, on: bool) -> None:
        self.decoder.set_train(on)
        self.decoder.block = self.feed.block  # for these rows; prompts know no such limit

    def close(self) -> None:
        self.decoder.block = None
        super().close()

    def backward(self, micro_batches: list[Batch], agreed: Agreed) -> tuple[float, float | None, float]:
        inputs = [self.feed(batch) for batch in micro_batches]
        while True:
            loss, balance = self.accumulate(inputs, agreed)
            loss, balance = self.world.sum(loss, balance)
            norm = self.optimizer.norm(self.loss_scale.value)
            if math.isfinite(norm) or not math.isfinite(loss) or not self.loss_scale.overflow():
                return loss, balance if self.router else None, norm
            self.run.say(f"step {self.at.step + 1}: fp16 overflow, the loss scale is now {self.loss_scale.value:g}")
            self.optimizer.clear()

    def accumulate(self, inputs: list[tuple], agreed: Agreed) -> tuple[float, float]:
        """Gradients of this worker's micro batches -> their part of the global batch's loss and router balance."""
        per_target = 1.0 / max(1, agreed.targets)
        per_forward = 1.0 / (self.train.accumulation * self.world.data_size)
        scale = Tensor(per_target * self.loss_scale.value, ms.float32)
        router_scale = Tensor(self.router_aux * per_forward * self.loss_scale.value, ms.float32)

        def begin(number: int) -> None:
            set_key(self.decoder, self.train.seed, self.at.step, number * self.world.data_size + self.world.data_rank)

        totals = self.passes.gradients(inputs, scale, router_scale, begin)
        return sum(t for t, _ in totals) * per_target, sum(b for _, b in totals) * per_forward

    def apply(self, rate: float) -> None:
        self.optimizer.step(rate)
        self.loss_scale.succeeded()
        wait()

    def held_out_loss(self, batch: Batch) -> float:
        return self.passes.loss(self.feed(batch, evaluation=True))

    def answer(self) -> str:
        state = random_state()
        self.decoder.block = None
        text = self.sample(self.decoder)
        restore_random_state(state)
        return text

    # --- checkpoints ---

    def capture(self) -> tuple[dict, dict, list[dict]] | None:
        model, optimizer = self.optimizer.trained(), self.optimizer.state()
        states = self.world.gather(random_state())
        return (model, optimizer, states) if self.world.main else None

    def load(self, found: Checkpoint, random: dict) -> None:
        self.check_grid(found)
        self.optimizer.load(found.model, found.optimizer)
        if random:
            restore_random_state(random)
        self.loss_scale.restore(found.meta.get("extra", {}))

    def extra_state(self) -> dict[str, Any]:
        return {"grid": str(self.world.grid), **self.loss_scale.state()}

    def check_grid(self, found: Checkpoint) -> None:
        """Checkpoints are whole, and any grid goes on with them; not so where ``auto_transform=false`` asks for its own."""
        mine, theirs = str(self.world.grid), found.meta.get("extra", {}).get("grid")
        if self.auto_transform or theirs in (None, mine):
            return
        name = self.checkpoints.folder / f"step-{found.meta['step']:08d}"
        raise ConfigError(
            f"the checkpoint is of the grid {theirs}, this run's is {mine}",
            where=f"auto_transform=false with {name}",
            hint=f"auto_transform=true (--auto_trans_ckpt True), or the workers of {theirs}",
        )

    def versions(self) -> dict[str, str]:
        return {"mindspore": ms.__version__}


def _frozen_samples(decoder: Decoder, world: World):
    """What :func:`frozen_fingerprint` reads; of the whole model, however many workers share it."""
    frozen = {p.name: p for p in decoder.get_parameters() if not p.requires_grad and p.name != KEY}
    plan = decoder.plan
    if plan is None:
        for name, parameter in frozen.items():
            flat = to_numpy(parameter).reshape(-1)
            yield name, tuple(parameter.shape), flat[:: sample_step(flat.size)]
        return
    shapes = parameter_shapes(plan.spec)
    own = [
        plan.sample(name, to_numpy(frozen[name]) if name in frozen else None, shape, sample_step(math.prod(shape)))
        for name, shape in shapes.items()
    ]
    found = sum_now(world.model_group(), np.concatenate(own))  # of each value, what one worker has and zeros
    parts = np.split(found, np.cumsum([len(values) for values in own])[:-1])
    yield from ((name, shape, values) for (name, shape), values in zip(shapes.items(), parts))
