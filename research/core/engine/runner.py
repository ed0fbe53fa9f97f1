"""The device's part of a step: a plan of integers in, logits and hidden states out."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from research.core.config.schema import EngineConfig
from research.core.engine import cuda_graphs
from research.core.engine.attention import paged_attention, resolve_backend
from research.core.engine.batch import PagedBatch, StepPlan
from research.core.engine.cache import PagedCache
from research.core.engine.native_step import NativePagedStep
from research.core.torch.decoder import Decoder
from research.core.torch.layout import Layout
from research.core.torch.tensor_parallel import PartHead

_SCORED_TOGETHER = 64  # places of a prompt whose logits lie in memory at one time


@dataclass
class StepOutput:
    """Of the plan's ``sampled`` rows float32 logits [S, V] (or, with ``greedy``, perhaps only the best tokens [S], int64),
    of its ``embedded`` rows float32 hidden states [E, H] after the final norm; None where there are no such rows. Of its
    ``scored`` rows, in order, the :class:`Scores`."""

    logits: Tensor | None = None
    hidden: Tensor | None = None
    scores: list[Scores] = field(default_factory=list)


class Scores(NamedTuple):
    """Float32 log-probabilities of T targets [T], and of the likeliest tokens [T, B] with these (int64), the best first."""

    targets: Tensor
    best: Tensor
    tokens: Tensor


class ModelRunner:
    """A decoder and its cache in blocks. All device work of a step goes through :meth:`execute`, whose argument can be
    sent to the other ranks of a tensor-parallel decoder. ``adapters``: told of every plan before it is computed."""

    def __init__(
        self,
        decoder: Decoder,
        settings: EngineConfig,
        num_blocks: int,
        kv_heads: int | None = None,
        adapters: Any = None,
    ):
        self.decoder, self.settings, self.adapters = decoder.eval(), settings, adapters
        weight = decoder.model.embed_tokens.weight
        self.dtype, self.device = weight.dtype, weight.device
        self.backend = resolve_backend(settings.attention, self.device, self.dtype, decoder.spec.head_dim)
        self.block_size, self.num_blocks = settings.block_size, num_blocks
        self.scale = decoder.spec.head_dim**-0.5
        alone = kv_heads in (None, decoder.spec.kv_heads)
        graphs = settings.cuda_graphs and alone and cuda_graphs.fits(decoder.spec, self.device, self.backend)
        # Captured steps have rows that nobody asked for: they write into one block more.
        blocks = num_blocks + graphs
        self.cache = PagedCache(decoder.spec, blocks, self.block_size, self.dtype, self.device, kv_heads)
        self._graphs = self._new_graphs() if graphs else None
        native = settings.native_step and self.backend == "native" and alone and NativePagedStep.fits(decoder)
        self._native_step = NativePagedStep(decoder, self.cache.k, self.cache.v) if native else None

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepOutput:
        if plan.copies:
            self.cache.copy(plan.copies)
        adapted = plan.adapters is not None and any(plan.adapters)
        if adapted and self._native_step is not None and not all(plan.adapters):
            return self._apart(plan)
        if self.adapters is not None:
            self.adapters.select(plan)
        if plan.whole:
            return StepOutput(hidden=self._whole(plan))
        batch = PagedBatch.of(plan, self.block_size, self.device)
        if self._native_step is not None and not adapted:
            return self._run_native(plan, batch)
        if self._graphs is not None and plan.decode and not adapted and not plan.embedded and not plan.scored:
            logits_RV = self._graphs(plan, batch)
            return StepOutput(logits_RV if plan.sampled == list(range(len(logits_RV))) else logits_RV[plan.sampled])
        hidden_NH = self._forward(plan, batch)
        ends = batch.query_starts[1:] - 1
        output = StepOutput()
        if plan.sampled:
            rows = hidden_NH[ends[plan.sampled]]
            head = self.decoder.lm_head
            # Ranks that each hold a part of the vocabulary agree on the best token without sending logits.
            short = plan.greedy and isinstance(head, PartHead)
            output.logits = head.best(rows) if short else self.decoder.logits(rows).float()
        if plan.embedded:
            output.hidden = hidden_NH[ends[plan.embedded]].float()
        if plan.scored:
            output.scores = self._score(plan, hidden_NH[batch.first_tokens(plan.scored, list(map(len, plan.targets)))])
        return output

    def _score(self, plan: StepPlan, hidden_TH: Tensor) -> list[Scores]:
        """What the plan's targets are likely to be behind ``hidden_TH``, the logits of a few places at a time."""
        counts = list(map(len, plan.targets))
        targets_T = torch.tensor([t for targets in plan.targets for t in targets], device=hidden_TH.device)
        found = []
        for rows_sH, targets_s in zip(hidden_TH.split(_SCORED_TOGETHER), targets_T.split(_SCORED_TOGETHER)):
            logits_sV = self.decoder.logits(rows_sH).float()
            total_s = torch.logsumexp(logits_sV, -1)
            values, tokens = logits_sV.topk(min(plan.best, logits_sV.shape[-1]))
            found.append((logits_sV.gather(1, targets_s[:, None])[:, 0] - total_s, values - total_s[:, None], tokens))
        parts = [torch.cat(part).split(counts) for part in zip(*found)]
        return [Scores(*row) for row in zip(*parts)]

    def _apart(self, plan: StepPlan) -> StepOutput:
        """The native step knows no adapters: it computes the rows without one, to the bit as if they were alone, and
        torch's operators the others."""
        output, scores = StepOutput(), {}
        for adapted in (False, True):
            rows = [row for row, slot in enumerate(plan.adapters) if bool(slot) == adapted]
            done = self.execute(plan.part(rows))
            if plan.greedy and done.logits is not None and done.logits.ndim == 2:
                done.logits = best_or_none(done.logits)
            inside = set(rows)
            for name, wanted in (("logits", plan.sampled), ("hidden", plan.embedded)):
                part = getattr(done, name)
                if part is not None:
                    if getattr(output, name) is None:
                        setattr(output, name, part.new_empty(len(wanted), *part.shape[1:]))
                    getattr(output, name)[[place for place, row in enumerate(wanted) if row in inside]] = part
            scores |= zip((row for row in plan.scored if row in inside), done.scores)
        output.scores = [scores[row] for row in plan.scored]
        return output

    def _forward(self, plan: StepPlan, batch: PagedBatch) -> Tensor:
        """-> hidden states [N, H] after the final norm."""
        ids_1N = torch.tensor(plan.tokens, dtype=torch.long)[None].to(self.device)
        self.cache.batch = batch
        return self.decoder.hidden(ids_1N, self._layout(plan, batch), self.cache)[0]

    def _run_native(self, plan: StepPlan, batch: PagedBatch) -> StepOutput:
        """The whole step as one call, which computes nothing behind the last layer but what is wanted."""
        step, output = self._native_step, StepOutput()
        rope = None
        if step.needs_rope:
            rope = self.decoder.rope(self._layout(plan, batch), self.dtype, self.cache)
        if plan.embedded or plan.scored:
            # The kernel gives logits or hidden states: where both are wanted, the head is applied here.
            scored = batch.first_tokens(plan.scored, list(map(len, plan.targets)))
            wanted = batch.last_tokens(plan.sampled + plan.embedded)
            hidden = step.hidden(plan.tokens, batch, [*wanted, *scored], rope)
            sampled, embedded, scored = hidden.split([len(plan.sampled), len(plan.embedded), len(scored)])
            if plan.sampled:
                output.logits = self.decoder.logits(sampled.to(self.dtype)).float()
            if plan.embedded:
                output.hidden = embedded
            if plan.scored:
                output.scores = self._score(plan, scored.to(self.dtype))
        elif plan.greedy:
            output.logits = step.best(plan.tokens, batch, batch.last_tokens(plan.sampled), rope)
        else:
            output.logits = step(plan.tokens, batch, batch.last_tokens(plan.sampled), rope)
        return output

    def _new_graphs(self) -> cuda_graphs.DecodeGraphs:
        spec, settings = self.decoder.spec, self.settings
        longest = min(settings.max_length or spec.usable_length, spec.usable_length)
        blocks = min(-(-longest // self.block_size), self.num_blocks)
        return cuda_graphs.DecodeGraphs(
            self._decode,
            settings.max_batch,
            blocks,
            self.block_size,
            self.num_blocks,
            self.device,
        )

    def _decode(self, ids_R: Tensor, batch: PagedBatch) -> Tensor:
        """A step of decode rows from tensors alone, as a graph records it -> float32 logits [R, V]."""
        self.cache.batch = batch
        return self.decoder.logits(self.decoder.hidden(ids_R[None], self._layout_of(batch, 1), self.cache)[0]).float()

    def _layout(self, plan: StepPlan, batch: PagedBatch) -> Layout:
        lengths: Tensor | int = 1
        if plan.prompt_lengths is not None:
            lengths = torch.tensor(plan.prompt_lengths).repeat_interleave(torch.tensor(plan.queries))[None]
            lengths = lengths.to(self.device)
        return self._layout_of(batch, lengths)

    def _layout_of(self, batch: PagedBatch, lengths: Tensor | int) -> Layout:
        layout = Layout(1, len(batch.positions), batch.positions[None], lengths, against_cache=True)
        layout.paged = partial(self._attend, batch)
        return layout

    def _attend(self, batch: PagedBatch, q_1NHD: Tensor, k_PKbD: Tensor, v_PKbD: Tensor, window: int | None) -> Tensor:
        return paged_attention(q_1NHD[0], k_PKbD, v_PKbD, batch, self.scale, window, self.backend)[None]

    def _whole(self, plan: StepPlan) -> Tensor:
        """Texts without a cache -> the last token's hidden state of each, float32 [E, H]."""
        longest = max(plan.queries)
        ids = torch.zeros(len(plan.queries), longest, dtype=torch.long)
        mask, begin = torch.zeros_like(ids), 0
        for row, length in enumerate(plan.queries):
            ids[row, :length] = torch.tensor(plan.tokens[begin : begin + length])
            mask[row, :length] = 1
            begin += length
        return self.decoder.embed(ids.to(self.device), mask, normalize=False)


def best_or_none(logits_SV: Tensor) -> Tensor:
    """The best token of each row, int64 [S]; -1 where a logit is no number."""
    value, token = logits_SV.max(-1)
    return token.masked_fill(value.isnan(), -1)
