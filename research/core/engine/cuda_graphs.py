"""Decode steps on CUDA replayed from graphs: one launch for a step whose kernels take less time than their launches.

A graph has fixed shapes. There is one for each of a few numbers of rows; a step takes the next larger one, and the rows
that nobody asked for read one key and write into a block of their own behind the pool. Graphs are captured when they are
first needed. NOT RUN HERE on a card: tests run everything but the capture itself, with a stand-in for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from research.core.engine.batch import PagedBatch, StepPlan
from research.core.spec import DecoderSpec

_log = logging.getLogger("research.engine")

# (ids [R], their batch) -> logits [R, V]
Forward = Callable[[Tensor, PagedBatch], Tensor]


def row_buckets(most: int) -> list[int]:
    """1, 2, 4, 8 and then every 8 up to ``most``: less than 8 rows of waste, and few graphs."""
    return sorted({size for size in (1, 2, 4, *range(8, most + 8, 8)) if size < most} | {most})


def fits(spec: DecoderSpec, device: torch.device, backend: str) -> bool:
    """Whether a step of this decoder can be captured: nothing in it may ask the device for a number, as routed experts do,
    or bring one from the host, as dynamic NTK does."""
    return device.type == "cuda" and backend == "triton" and spec.moe is None and not spec.dynamic_ntk


def capture(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record ``work`` on the current device -> (what replays it, its result, rewritten by each replay)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled and workspaces allocated before anything is recorded
        work()
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result


@dataclass(eq=False)
class _Captured:
    ids: Tensor
    batch: PagedBatch
    replay: Callable[[], None]
    logits: Tensor


class DecodeGraphs:
    """Captured decode steps over one cache, whose block number ``spare`` belongs to nobody.

    ``most_blocks``: of the longest table. ``forward`` computes a step from tensors alone; ``record`` is :func:`capture`.
    """

    def __init__(
        self,
        forward: Forward,
        most_rows: int,
        most_blocks: int,
        block_size: int,
        spare: int,
        device: torch.device | str,
        record: Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]] = capture,
    ):
        self._forward, self._record, self._device = forward, record, device
        self.buckets = row_buckets(most_rows)
        self._most_blocks, self._block_size, self._spare = most_blocks, block_size, spare
        self._captured: dict[int, _Captured] = {}

    def __call__(self, plan: StepPlan, batch: PagedBatch) -> Tensor:
        """A plan of decode rows alone -> logits [R, V] of all of them, overwritten by the next step of this size."""
        rows = len(plan.tokens)
        size = next(bucket for bucket in self.buckets if bucket >= rows)
        static = self._captured.get(size)
        if static is None:
            _log.info("decode steps of up to %d rows are captured as a CUDA graph", size)
            static = self._captured[size] = self._capture(size)
        static.ids[:rows].copy_(torch.tensor(plan.tokens), non_blocking=True)
        for name in ("contexts", "positions", "slots", "blocks", "offsets"):
            getattr(static.batch, name)[:rows].copy_(getattr(batch, name), non_blocking=True)
        static.batch.block_tables[:rows, : batch.block_tables.shape[1]].copy_(batch.block_tables, non_blocking=True)
        self._idle(static, rows)
        static.replay()
        return static.logits[:rows]

    def _idle(self, static: _Captured, rows: int) -> None:
        """Rows that nobody asked for: one token in the spare block."""
        batch = static.batch
        batch.contexts[rows:] = 1
        batch.positions[rows:] = 0
        batch.offsets[rows:] = 0
        batch.blocks[rows:] = self._spare
        batch.slots[rows:] = self._spare * self._block_size
        batch.block_tables[rows:, 0] = self._spare

    def _capture(self, size: int) -> _Captured:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self._device)

        longest = self._most_blocks * self._block_size
        batch = PagedBatch(
            block_tables=zeros(size, self._most_blocks, dtype=torch.int32),
            query_starts=torch.arange(size + 1, dtype=torch.int32, device=self._device),
            contexts=zeros(size, dtype=torch.int32),
            slots=zeros(size),
            blocks=zeros(size),
            offsets=zeros(size),
            positions=zeros(size),
            queries=[1] * size,
            context_list=[longest] * size,
            block_size=self._block_size,
            longest_query=1,
            longest_context=longest,
            ends=list(range(size)),
        )
        static = _Captured(zeros(size), batch, lambda: None, torch.empty(0))
        self._idle(static, 0)
        static.replay, static.logits = self._record(lambda: self._forward(static.ids, batch))
        return static
