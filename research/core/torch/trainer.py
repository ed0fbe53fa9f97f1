"""Training on torch: what a step of the loop (:mod:`research.core.run.loop`) computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from research.core.config.schema import Config
from research.core.data.dataset import Batch, PackedDataset
from research.core.run.checkpoint import Checkpoint
from research.core.run.folder import RunFolder
from research.core.run.identity import frozen_fingerprint, sample_step
from research.core.run.loop import Agreed, Loop
from research.core.run.meter import Meter
from research.core.torch.checkpoint import TorchTables, random_state, restore_random_state
from research.core.torch.decoder import Decoder
from research.core.torch.device import gemm_flops, peak_memory, synchronize
from research.core.torch.layout import Layout
from research.core.torch.lora import has_lora
from research.core.torch.loss import Objective
from research.core.torch.optimizer import Optimizer, whole
from research.core.torch.parallel import World, parallelize


class Trainer(Loop):
    """One training of ``decoder`` on ``data``. Build it, then call :meth:`fit` once.

    The decoder holds its weights already (and its adapters, for LoRA: then only they train). ``identity`` names
    further things that a resumed run must share, such as fingerprints. ``sample`` lets the decoder answer for
    ``train.sample_every`` and returns the text to show.
    """

    backend = "torch"
    tables = TorchTables()

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
        self.decoder, self.world = decoder, world
        lora = has_lora(decoder)
        if not lora:
            decoder.requires_grad_(True)
        base = frozen_fingerprint(_frozen_samples(decoder)) if lora else None
        self.prepare(cfg, spec, data, held_out, run, lora=lora, base=base, identity=identity, sample=sample)
        self.pad_to = None if train.compile else 0  # compiled layers want one shape

        self.objective = parallelize(Objective(decoder, train.head_chunk, spec.moe is not None), train, world)
        self.optimizer = Optimizer(dict(decoder.named_parameters()), train)
        trainable = sum(p.numel() for p in self.optimizer.parameters.values())
        dtype, device = decoder.model.embed_tokens.weight.dtype, world.device
        roofline = world.size * gemm_flops(device, dtype)
        self.meter = Meter(spec, roofline, lambda: peak_memory(device), trainable if lora else None)
        torch.manual_seed(train.seed + world.rank)  # dropout differs between cards
        self.begin()

    def set_train(self, on: bool) -> None:
        self.decoder.train(on)

    def backward(self, micro_batches: list[Batch], agreed: Agreed) -> tuple[float, float | None, float]:
        world, train = self.world, self.train
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
        self.norm = self.optimizer.norm()

        loss, balance = world.sum(float(total), float(balance))
        return loss, balance if self.objective.router else None, float(self.norm)

    def apply(self, rate: float) -> None:
        self.optimizer.step(rate, self.norm)
        synchronize(self.world.device)

    @torch.no_grad()
    def held_out_loss(self, batch: Batch) -> float:
        return float(self.objective(*self.to_device(batch))[0])

    def to_device(self, batch: Batch) -> tuple[Tensor, Tensor, Layout]:
        device = self.world.device
        layout = Layout.packed(torch.from_numpy(batch.position_ids), torch.from_numpy(batch.doc_ids), device)
        ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
        return ids.to(device, non_blocking=True), labels.to(device, non_blocking=True), layout

    def answer(self) -> str:
        state = torch.get_rng_state()
        text = self.sample(self.decoder)
        torch.set_rng_state(state)
        return text

    # --- checkpoints ---

    def capture(self) -> tuple[dict, dict, list[dict]] | None:
        main = self.world.main
        model = {name: _copy(tensor, main) for name, tensor in self.optimizer.weights().items()}
        optimizer = {name: _copy(tensor, main) for name, tensor in self.optimizer.state().items()}
        states = self.world.gather(random_state(self.world.device))
        return (model, optimizer, states) if main else None

    def load(self, found: Checkpoint, random: dict[str, Tensor]) -> None:
        self.optimizer.load(found.model, found.optimizer)
        if random:
            restore_random_state(random, self.world.device)

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}


def _copy(tensor: Tensor, keep: bool) -> Tensor | None:
    tensor = whole(tensor.detach())
    return tensor.to("cpu", copy=True).contiguous() if keep else None


def _frozen_samples(decoder: Decoder):
    for name, parameter in decoder.named_parameters():
        if not parameter.requires_grad:
            flat = parameter.detach().reshape(-1)
            yield name, tuple(parameter.shape), flat[:: sample_step(flat.numel())].float().cpu().numpy()
