"""Tensor parallelism for inference (arXiv 1909.08053): every rank holds a part of every layer and all see the same tokens.

One pass over the ordinary decoder, built from the part's own sizes: heads, feed-forward columns and every expert's are
cut over the ranks, kv heads too, or replicated where there are fewer than ranks; the row-parallel products (o_proj,
down_proj) are summed over the ranks; the vocabulary is cut by rows, its embedding summed and its logits gathered. Which
part is whose is :mod:`research.core.weights.grid`'s rule, the same as of ``make split``, so that a rank reads its part of
whole weights or of a folder of parts alike. Shape letters: H hidden, V vocabulary, W the part's vocabulary rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from research.core.errors import WeightsError
from research.core.spec import DecoderSpec
from research.core.torch.decoder import Decoder
from research.core.torch.layers import DecoderLayer, Embedding
from research.core.torch.moe import SparseMLP
from research.core.torch.packed_linear import Linear, linear
from research.core.torch.weights import TORCH_DTYPES, resolve_dtype, set_parameters
from research.core.weights.blocks import Block, Box, Stored, logical_shapes
from research.core.weights.compare import read_stored
from research.core.weights.grid import Grid, Sharding, shard_model, shard_stored
from research.core.weights.model_folder import check_spec
from research.core.weights.opened import NOTHING_SAID, OpenOptions, OpenWeights, open_weights
from research.core.weights.sharded import ShardedWeights, memory_layout
from research.core.weights.tensors import Files, RowReader


@dataclass(frozen=True, eq=False)
class TensorPart:
    """This rank's part of a model: which rows and columns, and the sums and gathers between the ranks.

    ``whole`` is the model's spec, ``spec`` the part's: the same hidden size and vocabulary, this rank's heads and columns.
    ``group``: the process group (None: all processes).
    """

    sharding: Sharding
    rank: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, whole: DecoderSpec, rank: int, size: int, group: dist.ProcessGroup | None = None) -> TensorPart:
        """Raises :class:`ConfigError` naming the numbers of ranks that work when heads or columns would be torn."""
        return cls(shard_model(whole, Grid(tensor=size)), rank, group)

    @property
    def whole(self) -> DecoderSpec:
        return self.sharding.spec

    @property
    def size(self) -> int:
        return self.sharding.grid.tensor

    @property
    def spec(self) -> DecoderSpec:
        whole, size, moe = self.whole, self.size, self.whole.moe
        if moe is not None:
            moe = replace(moe, expert_ffn=moe.expert_ffn // size, shared_ffn=moe.shared_ffn // size)
        heads, kv_heads = whole.heads // size, max(1, whole.kv_heads // size)
        return replace(whole, heads=heads, kv_heads=kv_heads, ffn=whole.ffn // size, moe=moe)

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and of the head; of a vocabulary that does not divide the last ones are zero."""
        return self.sharding.padded_vocab // self.size

    def box(self, name: str, shape: tuple[int, ...]) -> Box:
        """The part of a weight of the whole model, (start, stop) per axis."""
        box = self.sharding.box(name, shape, self.rank)
        return tuple((min(low, extent), min(high, extent)) for (low, high), extent in zip(box, shape))

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """[.., W] of every rank -> [.., ranks * W], in order of rank."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)


# --- the modules that talk -------------------------------------------------------------------------------------------


class RowLinear(Linear):
    """A linear whose input columns are cut: :meth:`product` is this rank's share, the forward the sum over the ranks."""

    def __init__(self, in_features: int, out_features: int, part: TensorPart):
        super().__init__(in_features, out_features, bias=False)
        self.part = part

    def product(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def reduce(self, out: Tensor) -> Tensor:
        return self.part.sum_(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.product(x))


class PartEmbedding(Embedding):
    """The rows ``rank * W .. (rank + 1) * W - 1`` of the embedding; the forward looks up ids of the whole vocabulary."""

    def __init__(self, part: TensorPart):
        super().__init__(part.vocab_rows, part.whole.hidden)
        self.part, self.first = part, part.rank * part.vocab_rows

    def forward(self, ids: Tensor) -> Tensor:
        row = ids - self.first
        here = (row >= 0) & (row < self.num_embeddings)
        found = nn.functional.embedding(row.clamp(0, self.num_embeddings - 1), self.weight)
        return self.part.sum_(found.masked_fill_(~here[..., None], 0))


class PartHead(Linear):
    """W rows of the output matrix: :meth:`product` is this rank's logits, the forward gives everybody's, [.., V]."""

    def __init__(self, part: TensorPart):
        super().__init__(part.whole.hidden, part.vocab_rows, bias=False)
        self.part = part

    def product(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.part.gather(self.product(hidden))[..., : self.part.whole.vocab]

    def best(self, hidden: Tensor) -> Tensor:
        """The token with the largest logit (of equals the first; -1: they are no numbers), [..] int64, without gathering
        logits."""
        logits = self.product(hidden)
        rows = self.part.whole.vocab - self.part.rank * self.part.vocab_rows  # behind them: padding
        if rows < self.part.vocab_rows:
            logits = logits.clone() if rows > 0 else logits
            logits[..., max(rows, 0) :] = float("-inf")
        value, token = logits.max(-1)
        # float32 holds every bf16 and fp32 logit; tokens travel apart, as they are.
        values = self.part.gather(value.float()[..., None])
        tokens = self.part.gather((token + self.part.rank * self.part.vocab_rows)[..., None])
        value, rank = values.max(-1)
        return tokens.gather(-1, rank[..., None])[..., 0].masked_fill(value.isnan(), -1)


class PartSparseMLP(SparseMLP):
    """The mixture with every expert's columns cut: routed and shared experts' shares go into one sum over the ranks."""

    def __init__(self, spec: DecoderSpec, part: TensorPart):
        super().__init__(spec)
        self.part = part

    def forward(self, x_BTH: Tensor, real_BT: Tensor | None = None, collect: bool = False):
        out, counts = super().forward(x_BTH, real_BT, collect)
        return self.part.sum_(out), counts


# --- the pass --------------------------------------------------------------------------------------------------------


def part_decoder(part: TensorPart, head: bool = True) -> Decoder:
    """The part as a decoder, on the meta device. ``decoder.spec`` is the part's; ``decoder.parallel`` is ``part``."""
    spec = part.spec
    with torch.device("meta"):
        decoder = Decoder(spec, head=head)
        decoder.parallel = part
        for layer in decoder.model.layers:
            _cut_layer(layer, spec, part)
        if part.sharding.vocab != "replicated":
            decoder.model.embed_tokens = PartEmbedding(part)
            decoder.lm_head = PartHead(part) if head else None
            decoder.tie()
    return decoder


def _cut_layer(layer: DecoderLayer, spec: DecoderSpec, part: TensorPart) -> None:
    layer.self_attn.o_proj = RowLinear(spec.heads * spec.head_dim, spec.hidden, part)
    if layer.sparse:
        layer.mlp = PartSparseMLP(spec, part)
    else:
        layer.mlp.down_proj = RowLinear(spec.ffn, spec.hidden, part)


# --- weights ----------------------------------------------------------------------------------------------------------


def load_part(
    folder: str | os.PathLike,
    rank: int,
    size: int,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    attention: str = "auto",
    expect: DecoderSpec | None = None,
    opening: OpenOptions = NOTHING_SAID,
    group: dist.ProcessGroup | None = None,
) -> Decoder:
    """:func:`research.core.torch.weights.load_decoder` for one rank of ``size``: reads its part only, one tensor at a time,
    from weights of any layout (a Hugging Face folder, parts of any number, MindFormers' files).

    Raises :class:`WeightsError` for everything that is wrong with the weights, :class:`ConfigError` for a number of ranks
    that would tear heads or columns.
    """
    opened = open_weights(folder, opening)
    if opened.spec is None:
        raise WeightsError("this is a LoRA adapter, not a model", where=folder)
    if expect is not None:
        check_spec(expect, opened.spec, folder)
    part = TensorPart.of(opened.spec, rank, size, group)
    decoder = part_decoder(part, head=opening.head)
    kind = resolve_dtype(dtype, opened.sides or folder)
    set_parameters(decoder, _read_part(opened, part, kind, device, opening.head))
    decoder.use_attention(attention)
    return decoder.eval()


def _read_part(opened: OpenWeights, part: TensorPart, dtype: torch.dtype, device, head: bool) -> dict[str, Tensor]:
    sources, made = opened.sources(), {}
    shapes = logical_shapes(part.whole)
    with Files() as files:
        reader = RowReader(files, opened.entries, keep=1)
        for whole in memory_layout(part.whole):
            if whole.name == "lm_head.weight" and not head:
                continue
            stored = _part_of(whole, part, shapes)
            kind = opened.entries[sources[whole.blocks[0].name][0][0]].dtype
            bits = torch.from_numpy(read_stored(stored, sources, opened.entries, reader, kind))
            made[whole.name] = bits.view(TORCH_DTYPES[kind]).to(device=device, dtype=dtype)
            if whole.name == "model.embed_tokens.weight":
                _check_tied_head(opened, part, reader)
    return made


def _part_of(whole: Stored, part: TensorPart, shapes: dict[str, tuple[int, ...]]) -> Stored:
    """A rank's part of a parameter in memory; the stacked experts are cut expert by expert."""
    if whole.blocks[0].axes[0] is not None:
        return shard_stored(whole, part.sharding, part.rank, shapes)
    experts, rows = whole.shape[:2]
    boxes = [part.box(block.name, shapes[block.name]) for block in whole.blocks]
    height = boxes[0][0][1] - boxes[0][0][0]
    full_height = shapes[whole.blocks[0].name][0]
    blocks = tuple(
        Block(block.name, box, (block.at[0], block.at[1] // full_height * height, 0), block.axes, block.steps)
        for block, box in zip(whole.blocks, boxes)
    )
    return Stored(whole.name, (experts, rows // full_height * height, boxes[0][1][1] - boxes[0][1][0]), blocks)


def _check_tied_head(opened: OpenWeights, part: TensorPart, reader: RowReader) -> None:
    """A head stored beside an embedding that config.json ties to it must be the same; each rank sees to its own rows.

    Other tensors that parts hold several times (norms, kv heads) are read once and compared by ``make verify``.
    """
    for first, second in () if isinstance(opened, ShardedWeights) else opened.copies:
        entry = opened.entries[second]
        (low, high), width = part.box("lm_head.weight", entry.shape)
        of = (slice(low, high, 1), slice(*width, 1))
        if low < high and not np.array_equal(reader.take(first, of).copy(), reader.take(second, of)):
            raise WeightsError(
                "config.json ties the output matrix to the embedding, but the folder stores another lm_head.weight",
                where=opened.path,
                hint='"tie_word_embeddings": false in config.json, if the stored one is meant',
            )
