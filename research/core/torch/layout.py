"""Layout: which tokens of a batch see which, built once per step and shared by all layers.

Shape letters: B batch rows, T time of this call, S key slots, N tokens of the batch (B * T), G rows of a group,
L padded length of a group. A *document* is a run of tokens that see each other: the whole row, the real part of a
padded row, or one of several packed in a row.

Documents shorter than the row are gathered into groups of like length and attended as ``[G, L]`` batches: no work
is spent on pairs of tokens from different documents, and the result is exact because a document's tokens come first
in its row, so that a causal mask (or, without one, a key mask) hides the filling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from research.core.torch.native.ops import Documents

# A document joins a group when it fills this share of the group's length; a shorter one starts the next group.
GROUP_FILL = 0.7
# Lengths are rounded up to this multiple before grouping, which costs little and saves groups.
GROUP_STEP = 16


@dataclass(eq=False)
class Groups:
    """Where the documents' tokens go: ``to_slot`` [slots] holds token numbers (0..N-1), ``to_token`` [N] slot numbers.

    ``slot_real`` / ``token_real`` mark entries that are not filling (None: all are). ``shapes`` lists (G, L) of each
    group in slot order; ``lengths`` [documents] the real lengths in the same order. The rest is for operators that
    take cumulative lengths: the real tokens in order of row and document.
    """

    to_slot: Tensor
    to_token: Tensor
    slot_real: Tensor | None
    token_real: Tensor | None
    shapes: list[tuple[int, int]]
    lengths: Tensor
    real_tokens: Tensor  # token numbers of the real tokens, document by document
    real_back: Tensor  # [N] place of each token in that order; filling points at 0
    starts: Tensor  # [documents + 1] int32, where each document begins in that order, and the end
    ends: list[int]
    longest: int


@dataclass(eq=False)
class Layout:
    """What attention and the rotary need to know about one call. Build with the class methods.

    ``positions`` [B or 1, T] int64 count real tokens of the document from 0. ``lengths`` is the number of tokens of
    each position's document (an int, [B, 1] or [B, T]): dynamic NTK reads it. ``real`` [B, T] bool, None when every
    token is. ``documents`` [B, T] numbers the documents of a row from 1, 0 for filling, None when a row is one.
    ``against_cache``: keys are cache slots ``0 .. horizon-1``; ``slots`` [B, T] are the ones this call writes (None:
    ``start .. start+T-1`` in every row).
    """

    batch: int
    time: int
    positions: Tensor
    lengths: int | Tensor
    real: Tensor | None = None
    documents: Tensor | None = None
    groups: Groups | None = None
    against_cache: bool = False
    start: int = 0
    horizon: int = 0
    slots: Tensor | None = None
    added: Tensor | None = None  # [B] real tokens of this call per row (None: T)
    # Attention of its own, for a cache in blocks: (q_BTHD, k pool, v pool, window) -> [B, T, H, D]. ``lengths`` are then
    # those of each token's first forward, and what the cache's ``update`` returns are the layer's pools.
    paged: Callable[[Tensor, Tensor, Tensor, int | None], Tensor] | None = None
    _masks: dict = field(default_factory=dict)
    _runs: Documents | bool | None = None

    @classmethod
    def full(cls, batch: int, time: int, device: torch.device | str = "cpu") -> Layout:
        """Every row is one document of ``time`` tokens."""
        return cls(batch, time, torch.arange(time, device=device)[None], time)

    @classmethod
    def padded(cls, attention_mask: Tensor, device: torch.device | str | None = None) -> Layout:
        """Rows padded left or right (or with holes): ``attention_mask`` [B, T], non-zero where a token is real."""
        device = attention_mask.device if device is None else device
        mask = attention_mask.detach().to("cpu").bool()
        batch, time = mask.shape
        if bool(mask.all()):
            return cls.full(batch, time, device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        lengths = mask.sum(1, keepdim=True)
        return cls(
            batch,
            time,
            positions.to(device),
            lengths.to(device),
            real=mask.to(device),
            documents=mask.long().to(device),
            groups=_group(mask.long(), device),
        )

    @classmethod
    def packed(cls, position_ids: Tensor, doc_ids: Tensor, device: torch.device | str | None = None) -> Layout:
        """Several documents in a row: ``doc_ids`` [B, T] 1, 2, .. in order and 0 for filling; ``position_ids`` [B, T]
        restart with every document. Give CPU tensors and ``device`` to build without a device synchronisation."""
        device = position_ids.device if device is None else device
        documents = doc_ids.detach().to("cpu").long()
        batch, time = documents.shape
        if bool((documents == documents[:, :1]).all()) and bool((documents != 0).all()):
            # One document per row; its positions may still start anywhere.
            return cls(batch, time, position_ids.long().to(device), time)
        if not bool(documents.any()):
            # Nothing but filling (a card's share of a last batch may be): attended like text, counted by nobody.
            real = torch.zeros(batch, time, dtype=torch.bool, device=device)
            return cls(batch, time, position_ids.long().to(device), time, real=real)
        width = int(documents.max()) + 1
        counts = torch.zeros(batch, width, dtype=torch.long).scatter_add_(1, documents, torch.ones_like(documents))
        real = documents != 0
        return cls(
            batch,
            time,
            position_ids.long().to(device),
            counts.gather(1, documents).to(device),
            real=None if bool(real.all()) else real.to(device),
            documents=documents.to(device),
            groups=_group(documents, device),
        )

    @classmethod
    def cached(cls, cache, time: int, attention_mask: Tensor | None = None) -> Layout:
        """``time`` new tokens in every row of ``cache``; ``attention_mask`` [B, time] marks the real ones.

        Real tokens take the next free slots of their row; filling goes behind them, is seen by nobody, and is
        overwritten by the next call. Into an empty cache the call is an ordinary prefill: tokens see only each other.
        """
        device, batch = cache.lengths.device, cache.batch
        mask = None
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            mask = attention_mask.to(device).bool()
        empty = cache.used == 0
        if empty:
            layout = cls.full(batch, time, device) if mask is None else cls.padded(mask, device)
        else:
            rank = torch.arange(time, device=device)[None]
            positions = rank + cache.used if cache.uniform else cache.lengths[:, None] + rank
            layout = cls(batch, time, positions, time, against_cache=True)
        layout.start, layout.horizon = cache.used, cache.used + time
        if mask is not None:
            real = mask.long()
            layout.real, layout.added = mask, real.sum(1)
            before = real.cumsum(1) - real
            rank = torch.where(mask, before, layout.added[:, None] + (1 - real).cumsum(1) - 1)
            layout.slots = cache.lengths[:, None] + rank
            if not empty:
                layout.positions = cache.lengths[:, None] + before
                layout.lengths = layout.added[:, None]
        elif not cache.uniform:
            layout.slots = layout.positions
        return layout

    def allowed(self, causal: bool, window: int | None) -> Tensor:
        """Boolean mask [B or 1, 1, T, S], True where query may see key; filling sees itself, so no row is empty."""
        key = (causal, window)
        if key not in self._masks:
            self._masks[key] = self._allowed(causal, window)
        return self._masks[key]

    def _allowed(self, causal: bool, window: int | None) -> Tensor:
        device = self.positions.device
        if self.against_cache:
            assert causal, "a cache holds the past only"
            query = self.positions[:, :, None]
            slot = torch.arange(self.horizon, device=device)[None, None]
        else:
            query = torch.arange(self.time, device=device)[None, :, None]
            slot = query.transpose(1, 2)
        mask = slot <= query if causal else torch.ones_like(slot <= query)
        if window is not None:
            mask = mask & (slot > query - window)
        if self.documents is not None and not self.against_cache:
            documents = self.documents
            mask = mask & (documents[:, :, None] == documents[:, None]) & (documents[:, None] != 0)
            mask = mask | (slot == query)
        return mask[:, None]

    def runs(self) -> Documents | None:
        """The documents as runs of consecutive tokens (of B * T), for the CPU kernel; None where one has holes."""
        if self._runs is None:
            self._runs = self._find_runs()
        return self._runs or None

    def _find_runs(self) -> Documents | bool:
        tokens = self.batch * self.time
        if self.groups is None:
            begins = torch.arange(0, tokens, self.time)
            return Documents(begins, torch.full_like(begins, self.time), self.time, True)
        starts = self.groups.starts.long()
        lengths = starts.diff()
        begins = self.groups.real_tokens[starts[:-1]]
        if not torch.equal(self.groups.real_tokens[starts[1:] - 1], begins + lengths - 1):
            return False
        return Documents(begins, lengths, self.groups.longest, int(lengths.sum()) == tokens)

    def needs_mask(self, causal: bool, window: int | None) -> bool:
        """Whether a plain causal (or full) attention over ungrouped tokens would be wrong."""
        if self.against_cache:
            return self.time > 1 or self.slots is not None or (window is not None and self.horizon > window)
        return window is not None and self.time > window


def _group(documents: Tensor, device: torch.device | str) -> Groups:
    """Group the documents of ``documents`` [B, T] (CPU, int64, 0 for filling) by length."""
    batch, time = documents.shape
    flat = documents.reshape(-1)
    real_tokens = flat.nonzero().squeeze(1)
    # A document is the tokens of one row that carry one number; rows are kept apart by an offset.
    owner = flat[real_tokens] + (real_tokens // time) * (int(flat.max()) + 1)
    _, owner, counts = torch.unique(owner, return_inverse=True, return_counts=True)
    order = torch.argsort(owner, stable=True)
    real_tokens = real_tokens[order]  # document by document, in time order
    begins = counts.cumsum(0) - counts

    by_length = torch.argsort(counts, descending=True, stable=True)
    sorted_lengths = counts[by_length].tolist()
    shapes: list[tuple[int, int]] = []
    group_of: list[int] = []
    slot_base: list[int] = []
    used = 0
    index = 0
    while index < len(sorted_lengths):
        longest = min(-(-sorted_lengths[index] // GROUP_STEP) * GROUP_STEP, time)
        last = index
        while last < len(sorted_lengths) and sorted_lengths[last] >= GROUP_FILL * longest - GROUP_STEP:
            last += 1
        longest = sorted_lengths[index]
        shapes.append((last - index, longest))
        group_of.extend([len(shapes) - 1] * (last - index))
        slot_base.extend(used + row * longest for row in range(last - index))
        used += (last - index) * longest
        index = last

    lengths = counts[by_length]
    base = torch.tensor(slot_base, dtype=torch.long)
    within = torch.arange(len(real_tokens)) - begins.repeat_interleave(counts)
    base_of_document = torch.empty_like(base)
    base_of_document[by_length] = base
    slot = base_of_document.repeat_interleave(counts) + within

    to_slot = torch.zeros(used, dtype=torch.long)
    to_slot[slot] = real_tokens
    to_token = torch.zeros(batch * time, dtype=torch.long)
    to_token[real_tokens] = slot
    slot_real = torch.zeros(used, dtype=torch.bool)
    slot_real[slot] = True
    token_real = flat != 0
    real_back = torch.zeros(batch * time, dtype=torch.long)
    real_back[real_tokens] = torch.arange(len(real_tokens))
    return Groups(
        to_slot.to(device),
        to_token.to(device),
        None if bool(slot_real.all()) else slot_real.to(device),
        None if bool(token_real.all()) else token_real.to(device),
        shapes,
        lengths.to(device),
        real_tokens.to(device),
        real_back.to(device),
        torch.cat((begins[:1] * 0, counts.cumsum(0))).to(device=device, dtype=torch.int32),
        counts.cumsum(0).tolist(),
        int(counts.max()) if len(counts) else 0,
    )
