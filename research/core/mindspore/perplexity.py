"""The loss of a batch of rows, without gradients; :mod:`research.core.torch.perplexity` has the same function."""

from __future__ import annotations

from collections.abc import Callable

from research.core.config.schema import Config
from research.core.data.dataset import Batch, PackedDataset
from research.core.mindspore.decoder import Decoder
from research.core.mindspore.feed import Feed
from research.core.mindspore.parallel import World
from research.core.mindspore.pipeline import make_passes
from research.core.mindspore.tensor_parallel import parallelize

PAD_TO = None  # one shape, one graph


def row_loss(cfg: Config, decoder: Decoder, rows: PackedDataset, world: World) -> Callable[[Batch], float]:
    """A function from a batch of ``rows`` to the sum of its cross-entropies."""
    feed = Feed(decoder.spec, [rows], cfg.train.micro_batch, decoder.kernels)
    parallelize(decoder).set_train(False)
    decoder.block = feed.block
    passes = make_passes(decoder, world, cfg.train.head_chunk, router=False)
    return lambda batch: passes.loss(feed(batch, evaluation=True))
