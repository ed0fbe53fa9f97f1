"""The loss of a batch of rows, without gradients; :mod:`research.core.mindspore.perplexity` has the same function."""

from __future__ import annotations

from collections.abc import Callable

import torch

from research.core.config.schema import Config
from research.core.data.dataset import Batch, PackedDataset
from research.core.torch.decoder import Decoder
from research.core.torch.layout import Layout
from research.core.torch.loss import Objective
from research.core.torch.parallel import World

PAD_TO = 0  # rows as wide as the widest of their batch


def row_loss(cfg: Config, decoder: Decoder, rows: PackedDataset, world: World) -> Callable[[Batch], float]:
    """A function from a batch of ``rows`` to the sum of its cross-entropies."""
    objective, device = Objective(decoder.eval(), cfg.train.head_chunk), world.device

    @torch.inference_mode()
    def total(batch: Batch) -> float:
        layout = Layout.packed(torch.from_numpy(batch.position_ids), torch.from_numpy(batch.doc_ids), device)
        ids, labels = torch.from_numpy(batch.input_ids).to(device), torch.from_numpy(batch.labels).to(device)
        return float(objective(ids, labels, layout)[0])

    return total
