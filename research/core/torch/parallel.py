"""The cards of one run, and the parallel plan as one ordered pass: checkpointing, then compile, then sharding."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from research.core.config.schema import Config, TrainConfig
from research.core.torch.device import resolve_device

_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}
_BUCKET = 64 * 2**20  # bytes of gradient that travel together


@dataclass
class World:
    """This process among all cards. With one card every method is the identity."""

    device: torch.device
    rank: int = 0
    size: int = 1
    sharded: bool = False  # weights, gradients and optimiser state are split over the cards
    store: dist.Store | None = None
    folder: str = "."  # the run's

    @classmethod
    def join(cls, cfg: Config) -> World:
        """Join the process group that torchrun described in the environment, or be alone. NPUs use hccl."""
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank, sharing = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        device = resolve_device(cfg.device, local_rank, sharing)
        store = None
        if size > 1:
            timeout = timedelta(seconds=cfg.parallel.timeout_s)
            store, rank, size = next(rendezvous("env://", timeout=timeout))
            group = dist.PrefixStore("group", store)
            dist.init_process_group(_BACKENDS[device.type], store=group, rank=rank, world_size=size, timeout=timeout)
        return cls(device, rank, size, size > 1 and cfg.parallel.shard == "full", store)

    def leave(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Every card sees rows of its own."""
        return self.rank

    @property
    def data_size(self) -> int:
        return self.size

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the cards, in float64, over the CPU's group."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def tell(self, value: Any) -> Any:
        """The main rank's ``value``, on every rank (any picklable object)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def after_main(self, name: str, work: Callable[[], str]) -> str:
        """What ``work`` returns on the main rank, on every rank. It may take longer than the cards' time limit: the
        others ask every now and then instead of waiting in a collective. ``name`` is used once."""
        if self.size == 1:
            return work()
        if self.main:
            answer = work()
            self.store.set(name, answer)
            return answer
        while not self.store.check([name]):
            time.sleep(0.5)
        return self.store.get(name).decode()

    def gather(self, table: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The ``table`` of every rank, on every rank."""
        if self.size == 1:
            return [table]
        tables: list = [None] * self.size
        dist.all_gather_object(tables, table)
        return tables

    @property
    def loss_scale(self) -> float:
        """What a rank multiplies its loss by so that the reduced gradient is the sum over cards: FSDP2 takes the mean."""
        return float(self.size) if self.sharded else 1.0

    def reduce_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Sum gradients over the cards, in place, in buckets; nothing to do when sharding has done it in the backward."""
        if self.size == 1 or self.sharded:
            return
        bucket: list[Tensor] = []
        used = 0
        for gradient in [*gradients, None]:
            if bucket and (gradient is None or used + gradient.nbytes > _BUCKET or gradient.dtype != bucket[0].dtype):
                flat = torch._utils._flatten_dense_tensors(bucket)
                dist.all_reduce(flat)
                for mine, summed in zip(bucket, torch._utils._unflatten_dense_tensors(flat, bucket)):
                    mine.copy_(summed)
                bucket, used = [], 0
            if gradient is not None:
                bucket.append(gradient)
                used += gradient.nbytes


def parallelize(objective: nn.Module, cfg: TrainConfig, world: World) -> nn.Module:
    """Apply the plan to ``objective`` (with its ``decoder``) in place: each layer checkpointed, compiled, sharded.

    Parameter names do not change.
    """
    layers = objective.decoder.model.layers
    if cfg.checkpointing != "none":
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, **_what_to_keep(cfg))
    if cfg.compile:
        for layer in layers:
            layer.compile()
    if world.sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(world.device.type, (world.size,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(objective, mesh=mesh)
    return objective


def _what_to_keep(cfg: TrainConfig) -> dict:
    if cfg.checkpointing == "full":
        return {}
    return {"context_fn": functools.partial(create_selective_checkpoint_contexts, _keep_matmuls)}


# Matmuls and attention are kept, what lies between them (norms, activations, rotary) is computed again: most of the
# memory is in the latter, most of the time in the former (the policy of torchtitan and arXiv 2205.05198).
_KEPT = {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "linear",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(torch.ops.aten, name)
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _KEPT.add(torch.ops.mkldnn._linear_pointwise.default)


def _keep_matmuls(context, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
