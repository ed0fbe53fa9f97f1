"""What one step computes, twice: as plain integers that any rank can be sent, and as the tensors made of them.

Shape letters: R rows (answers that take part), N tokens of the step, M blocks of the longest table, S rows that are
sampled.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor


@dataclass
class StepPlan:
    """One forward: the next tokens of R rows, concatenated. Nothing but integers, so that it can be pickled and sent.

    ``contexts`` are the rows' lengths after this step, ``tables`` their blocks, ``sampled`` the rows whose last token's
    logits are wanted, ``embedded`` those whose last hidden state is; ``scored`` the rows of which the log-probabilities of
    ``targets`` are wanted behind their first tokens, and of the ``best`` likeliest ones; ``copies`` are blocks (from, to) to
    copy before anything is written. ``adapters`` has a slot number per row, 0 for none (None: nobody has one).
    ``prompt_lengths``: what Qwen v1's dynamic NTK goes by, per row (None: no such model). ``greedy``: the caller needs
    nothing but each sampled row's best token. ``whole``: rows are whole texts of a model that is not causal, without cache and tables.
    """

    tokens: list[int]
    queries: list[int]
    contexts: list[int]
    tables: list[list[int]]
    sampled: list[int]
    embedded: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    targets: list[list[int]] = field(default_factory=list)
    best: int = 0
    copies: list[tuple[int, int]] = field(default_factory=list)
    adapters: list[int] | None = None
    prompt_lengths: list[int] | None = None
    greedy: bool = False
    whole: bool = False

    @property
    def decode(self) -> bool:
        """Whether every row brings one token."""
        return len(self.tokens) == len(self.queries)

    def part(self, rows: list[int]) -> StepPlan:
        """The plan of some rows (rising numbers) alone, without the copies."""
        ends = np.cumsum(self.queries).tolist()
        place = {row: number for number, row in enumerate(rows)}

        def of(values):
            return None if values is None else [values[row] for row in rows]

        return replace(
            self,
            tokens=[token for row in rows for token in self.tokens[ends[row] - self.queries[row] : ends[row]]],
            queries=of(self.queries),
            contexts=of(self.contexts),
            tables=of(self.tables),
            sampled=[place[row] for row in self.sampled if row in place],
            embedded=[place[row] for row in self.embedded if row in place],
            scored=[place[row] for row in self.scored if row in place],
            targets=[targets for row, targets in zip(self.scored, self.targets) if row in place],
            copies=[],
            adapters=of(self.adapters),
            prompt_lengths=of(self.prompt_lengths),
        )


@dataclass(eq=False)
class PagedBatch:
    """The tensors of a :class:`StepPlan` that attention reads, and the same numbers on the host.

    ``block_tables`` int32 [R, M], filled up with 0; ``query_starts`` int32 [R + 1]; ``contexts`` int32 [R]: lengths after
    this step; ``slots`` int64 [N]: ``block * block_size + offset`` that each token's key and value go to, and its two parts
    ``blocks`` and ``offsets``; ``positions`` int64 [N]. ``queries`` and ``context_list`` repeat the lengths as lists, for operators that loop over rows.
    """

    block_tables: Tensor
    query_starts: Tensor
    contexts: Tensor
    slots: Tensor
    blocks: Tensor
    offsets: Tensor
    positions: Tensor
    queries: list[int]
    context_list: list[int]
    block_size: int
    longest_query: int
    longest_context: int
    ends: list[int]  # each row's last token among the step's

    @property
    def decode(self) -> bool:
        return self.longest_query == 1

    def first_tokens(self, rows: list[int], counts: list[int]) -> list[int]:
        """The numbers of the rows' first tokens, so many of each."""
        begins = [self.ends[row] + 1 - self.queries[row] for row in rows]
        return [token for begin, count in zip(begins, counts) for token in range(begin, begin + count)]

    def last_tokens(self, rows: list[int]) -> list[int]:
        """The numbers of the rows' last tokens among the step's."""
        if self.decode:
            return rows
        ends = self.ends
        return [ends[row] for row in rows]

    @classmethod
    def of(cls, plan: StepPlan, block_size: int, device: torch.device | str = "cpu") -> PagedBatch:
        queries, contexts = np.array(plan.queries, np.int64), np.array(plan.contexts, np.int64)
        width = max(map(len, plan.tables))
        tables = np.zeros((len(plan.tables), width), np.int32)
        for row, table in enumerate(plan.tables):
            tables[row, : len(table)] = table
        starts = np.zeros(len(queries) + 1, np.int32)
        np.cumsum(queries, out=starts[1:])
        if plan.decode:
            positions, rows = contexts - 1, np.arange(len(queries))
        else:
            rows = np.repeat(np.arange(len(queries)), queries)
            positions = np.arange(len(rows)) - starts[rows] + (contexts - queries)[rows]
        blocks, offsets = tables[rows, positions // block_size].astype(np.int64), positions % block_size

        def put(array: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(array)
            return tensor if on_host else tensor.to(device, non_blocking=True)

        on_host = torch.device(device).type == "cpu"

        return cls(
            put(tables),
            put(starts),
            put(contexts.astype(np.int32)),
            put(blocks * block_size + offsets),
            put(blocks),
            put(offsets),
            put(positions),
            plan.queries,
            plan.contexts,
            block_size,
            int(queries.max()),
            int(contexts.max()),
            (starts[1:] - 1).tolist(),
        )
