"""The workers of one run, with the collectives that exist on the CPU and on Ascend alike: AllReduce, AllGather, Broadcast.

MindSpore's collectives act on tensors of numbers; what else the workers tell each other travels as bytes.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from research.core.config.schema import Config, DeviceConfig
from research.core.errors import ConfigError
from research.core.launch.environment import place
from research.core.mindspore import runtime
from research.core.mindspore.collectives import Group
from research.core.mindspore.plan import Plan
from research.core.run.folder import write_text
from research.core.spec import DecoderSpec
from research.core.weights.grid import Grid, Place, shard_model

_ASK_S = 0.5
_groups: set[str] = set()  # that MindSpore knows, for the life of the process


@dataclass
class World:
    """This process among all workers, which stand in a grid (:class:`research.core.weights.grid.Grid`): those of one row of its
    tensor axis share a layer, ``pipeline`` stages share the layers, and ``data_size`` groups of these see different sequences.
    With one worker every method is the identity."""

    device: str = "cpu"  # as users call it: cpu or npu
    rank: int = 0
    size: int = 1
    shard_optimizer: bool = False
    folder: str = "."  # the run's, which all workers see
    tensor: int = 1  # workers that share each layer
    pipeline: int = 1  # stages that share the layers
    stage_layers: tuple[int, ...] = ()  # of each stage; empty: even

    @classmethod
    def join(cls, cfg: Config) -> World:
        """Start MindSpore, and meet the workers that msrun or a rank table announced in the environment, or be alone.

        Raises :class:`ConfigError` when ``parallel.tensor`` and ``pipeline`` do not divide their number."""
        world = cls.meet(cfg.device)
        world.stand(cfg)
        return world

    def stand(self, cfg: Config) -> None:
        """Take the places of the grid that ``cfg.parallel`` asks for."""
        parallel = cfg.parallel
        self.tensor, self.pipeline, self.stage_layers = parallel.tensor, parallel.pipeline, tuple(parallel.stage_layers)
        self.shard_optimizer = parallel.shard == "optimizer"
        inner = self.tensor * self.pipeline
        if self.size % inner:
            raise ConfigError(
                f"{self.size} workers are no multiple of the {inner} that share the model",
                where=f"parallel.tensor={self.tensor} parallel.pipeline={self.pipeline}",
                hint=f"CARDS={inner}, or parallel.tensor=1 parallel.pipeline=1",
            )

    @classmethod
    def meet(cls, device: DeviceConfig) -> World:
        """:meth:`join` with nothing but a device; every worker sees sequences of its own."""
        here = place()
        local_rank, sharing = (0, 1) if here is None else (here.local_rank, here.local_size)
        if device.index is not None and sharing == 1:
            local_rank = device.index
        started = runtime.start(device, local_rank=local_rank, sharing=sharing)
        kind = "cpu" if started.on_cpu else "npu"
        if here is None or here.size == 1:
            return cls(kind)
        from mindspore.communication import GlobalComm, get_group_size, get_rank, init

        if not GlobalComm.INITED:
            init()
        return cls(kind, get_rank(), get_group_size())

    def leave(self) -> None:
        if self.size > 1:
            self.sum(0.0)  # nobody leaves before the others have what they wait for

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def target(self) -> str:
        """MindSpore's name of the device."""
        return "CPU" if self.on_cpu else "Ascend"

    # --- the grid ---

    @property
    def grid(self) -> Grid:
        data = self.size // (self.tensor * self.pipeline)
        return Grid(data, self.tensor, self.pipeline, self.stage_layers)

    @property
    def place(self) -> Place:
        return self.grid.place(self.rank)

    @property
    def data_size(self) -> int:
        """How many different sets of sequences a step sees."""
        return self.grid.data

    @property
    def data_rank(self) -> int:
        return self.place.data

    @property
    def sharded(self) -> bool:
        """Whether a worker lacks a part of the weights."""
        return self.tensor * self.pipeline > 1

    def plan(self, spec: DecoderSpec) -> Plan | None:
        """How the workers share the layers of a model; None where each has all of it. Raises :class:`ConfigError` naming the
        numbers of cards that can."""
        if not self.sharded:
            return None
        sharding = shard_model(spec, self.grid)
        here = self.place
        return Plan(sharding, self.group(self._ranks([here.stage], [here.data], range(self.tensor))), here.stage)

    def neighbours(self, copies: int = 1, stages: tuple[int, ...] = ()) -> Group:
        """Whom the gradients of a parameter are summed with of which ``copies`` workers of every row hold the same part, in
        these ``stages`` (none said: in this one)."""
        first = self.place.tensor // copies * copies
        tensors = range(first, first + copies)
        return self.group(self._ranks(stages or [self.place.stage], range(self.data_size), tensors))

    def model_group(self) -> Group:
        """The workers that together hold one copy of the model."""
        return self.group(self._ranks(range(self.pipeline), [self.place.data], range(self.tensor)))

    def column(self) -> Group:
        """This worker's counterparts in all stages, in the stages' order."""
        return self.group(self._ranks(range(self.pipeline), [self.place.data], [self.place.tensor]))

    def link(self, earlier: int) -> Group:
        """This worker and its counterpart where one of them is in stage ``earlier`` and the other in the next."""
        return self.group(self._ranks([earlier, earlier + 1], [self.place.data], [self.place.tensor]))

    def _ranks(self, stages: Iterable[int], data: Iterable[int], tensors: Iterable[int]) -> tuple[int, ...]:
        return tuple(self.grid.rank(Place(*place)) for place in itertools.product(stages, data, tensors))

    def group(self, ranks: tuple[int, ...]) -> Group:
        """The workers ``ranks`` (rising, this one among them) as a group; each of them has to ask for it, and all that share
        several groups for these in one order."""
        if len(ranks) == 1:
            return Group("", 1, 0, False)
        from mindspore.communication import GlobalComm, create_group

        if len(ranks) == self.size:
            return Group(GlobalComm.WORLD_COMM_GROUP, self.size, self.rank, True)
        name = "ranks-" + "-".join(map(str, ranks))
        if name not in _groups:
            create_group(name, list(ranks))
            _groups.add(name)
        return Group(name, len(ranks), ranks.index(self.rank), False)

    # --- what the workers tell each other ---

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the grid's data axis in float64, in its order. Workers that see the same sequences say the same,
        or some of them say more than the others' zero: the largest counts."""
        if self.size == 1:
            return list(values)
        # The collectives know no float64: its bytes are gathered, and added up here.
        own = np.array(values, np.float64).view(np.int32)
        every = np.ascontiguousarray(self._gather(own).reshape(self.size, -1)).view(np.float64)
        return every.reshape(self.pipeline, self.data_size, self.tensor, -1).max((0, 2)).sum(0).tolist()

    def tell(self, value: Any) -> Any:
        """The main rank's ``value`` (anything that JSON holds), on every rank."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.main else b""
        return json.loads(self._spread(text))

    def _spread(self, text: bytes) -> bytes:
        length = int(self._broadcast(np.array([len(text)], np.int32))[0])
        words = np.zeros(-(-length // 4), np.int32)
        if self.main:
            words.view(np.uint8)[:length] = np.frombuffer(text, np.uint8)
        return self._broadcast(words).tobytes()[:length] if length else b""

    def collect(self, value: Any) -> list[Any]:
        """The ``value`` (anything that JSON holds) of every rank, on every rank."""
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode()
        lengths = self._gather(np.array([len(text)], np.int32))
        words = np.zeros(-(-int(lengths.max()) // 4), np.int32)
        words.view(np.uint8)[: len(text)] = np.frombuffer(text, np.uint8)
        rows = np.ascontiguousarray(self._gather(words).reshape(self.size, -1))
        return [json.loads(row.tobytes()[:length]) for row, length in zip(rows, lengths)]

    def after_main(self, name: str, work: Callable[[], str]) -> str:
        """What ``work`` returns on the main rank, on every rank, however long it takes. A collective that nobody joins for
        a while ends in an error, so the others look for a file instead, in ``folder``, which every node has to see."""
        if self.size == 1:
            return work()
        token = self.tell(f"{os.getpid()}-{time.time_ns()}")  # an earlier run in this folder may have left a file
        path = Path(self.folder) / f".{name.replace(' ', '-')}-{token}.answer"
        if self.main:
            answer = work()
            write_text(path, answer)
        else:
            while not path.is_file():
                time.sleep(_ASK_S)
            answer = path.read_text(encoding="utf-8")
        self.sum(0.0)  # everybody has read it
        if self.main:
            path.unlink()
        return answer

    def gather(self, table: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """The ``table`` of every rank, on every rank; names, shapes and dtypes must be the same on all."""
        if self.size == 1:
            return [table]
        tables: list[dict[str, np.ndarray]] = [{} for _ in range(self.size)]
        for name, value in table.items():
            value = np.ascontiguousarray(value)
            padded = np.zeros(-(-value.nbytes // 4) * 4 or 4, np.uint8)
            padded[: value.nbytes] = value.reshape(-1).view(np.uint8)
            every = self._gather(padded.view(np.int32)).reshape(self.size, -1)
            for rank, row in enumerate(every):
                bits = np.ascontiguousarray(row).view(np.uint8)[: value.nbytes]
                tables[rank][name] = bits.view(value.dtype).reshape(value.shape)
        return tables

    def _gather(self, values: np.ndarray) -> np.ndarray:
        from mindspore import Tensor, ops

        return ops.AllGather()(Tensor(values)).asnumpy()

    def _broadcast(self, values: np.ndarray) -> np.ndarray:
        from mindspore import Tensor, ops

        return ops.Broadcast(0)((Tensor(values),))[0].asnumpy()


def keep_fewer_activations(decoder, checkpointing: str) -> None:
    """``train.checkpointing`` as a pass over the decoder, before it is first called: ``full`` computes each layer again in
    the backward pass; ``selective`` only the norms and the feed-forward's product, and keeps the matmuls' outputs."""
    if checkpointing == "full":
        for layer in decoder.model.layers:
            layer.recompute()
    elif checkpointing == "selective":
        for layer in decoder.model.layers:
            layer.input_layernorm.recompute()
            layer.post_attention_layernorm.recompute()
            for cell in (layer.mlp, getattr(layer.mlp, "shared_expert", None)):
                if hasattr(cell, "product"):
                    cell.product.recompute()
