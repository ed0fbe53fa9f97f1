"""Batches of a data set as tensors of fixed shape, so that one compiled graph serves every step.

Shape letters: B rows of a micro batch, T = seq_length, M target slots. M comes from the data set: no micro batch has more
supervised targets, so the head computes few rows for nothing and none is ever left out.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from research.core.data.dataset import Batch, PackedDataset
from research.core.mindspore.fused import MAX_DOCUMENTS
from research.core.mindspore.layout import Layout, choose_block, rope_base
from research.core.mindspore.loss import shifted_targets
from research.core.spec import DecoderSpec

ROW_STEP = 64


class Feed:
    """Makes the inputs of :class:`research.core.mindspore.loss.Objective` from batches of some data sets."""

    def __init__(self, spec: DecoderSpec, splits: list[PackedDataset], micro_batch: int, kernels: str):
        self.spec, self.time = spec, splits[0].seq_length
        most = max(_largest_sum(split.targets(), micro_batch) for split in splits)
        self.slots = max(1, min(-(-most // ROW_STEP) * ROW_STEP, micro_batch * (self.time - 1)))
        # One more document per row: what fills it up.
        documents = max(_largest_sum(split.documents_of_rows() + 1, micro_batch) for split in splits)
        self.ends = documents if kernels == "ascend" and documents <= MAX_DOCUMENTS else None
        self.block = choose_block(max(split.longest for split in splits), self.time)

    def __call__(self, batch: Batch, evaluation: bool = False) -> tuple[Tensor | None, ...]:
        """``(input_ids, position_ids, doc_ids, where, targets, ends, rope_base)`` of a batch of width T; the last two None
        where the decoder needs none. A batch of fewer rows than a micro batch has a graph of its own."""
        where, targets = shifted_targets(batch.labels, self.slots)
        layout = Layout.packed(batch.position_ids, batch.doc_ids)
        base = rope_base(self.spec, layout.lengths) if evaluation else None  # training never stretches the base
        return (
            Tensor(batch.input_ids.astype(np.int32)),
            Tensor(layout.positions),
            Tensor(layout.documents),
            Tensor(where),
            Tensor(targets),
            None if self.ends is None else Tensor(layout.ends(self.ends)),
            None if base is None else Tensor(base),
        )


def _largest_sum(counts: np.ndarray, rows: int) -> int:
    """The most that ``rows`` rows can have together; an epoch's end can bring a row twice."""
    if len(counts) == 0:
        return 0
    top = np.sort(counts)[-rows:]
    return int(top.sum() + (rows - len(top)) * top[-1])
