"""Logits of weights of any layout, with one layer in memory at a time; and the probe that tells two readings apart.

The forward is the decoder's own, layer by layer: the weights are put together from wherever they lie (shards, joined
matrices, MindFormers' names) as they are needed, so that a model of any size can be compared on a small machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from research.core.errors import WeightsError
from research.core.torch.decoder import Decoder
from research.core.torch.layers import DecoderLayer, RMSNorm
from research.core.torch.layout import Layout
from research.core.weights.blocks import Stored, crop
from research.core.weights.compare import read_stored
from research.core.weights.layouts.mindformers import mindformers_layout
from research.core.weights.opened import OpenOptions, OpenWeights, open_weights
from research.core.weights.sharded import memory_layout
from research.core.weights.tensors import Files, RowReader

HEAD_ROWS = 16384  # of the output matrix at one time
# Natural text, which every language model predicts far better than chance and a scrambled one does not.
PROBE_TEXT = (
    "Once upon a time there was a little girl who lived with her mother in a small house near the forest. Every day she "
    "went to the river to play with her friends, and in the evening she came home for dinner."
)
PROBE_TOKENS = 64
CLEAR = 0.5  # nats per token by which one reading must win


class Streamed:
    """The decoder of opened weights, in float32 on the CPU; nothing of it stays between layers."""

    def __init__(self, opened: OpenWeights):
        self.opened, self.spec = opened, opened.spec
        self.layout = {stored.name: stored for stored in memory_layout(opened.spec)}
        self.sources = opened.sources()

    @torch.inference_mode()
    def logits(self, ids_BT: Tensor) -> Tensor:
        """Token ids [B, T] (int64) -> logits [B, T, V] float32."""
        with Files() as files:
            reader = RowReader(files, self.opened.entries)
            hidden = self._hidden(ids_BT, reader)
            return torch.cat([hidden @ rows.T for rows in self._head(reader)], dim=-1)

    def _hidden(self, ids_BT: Tensor, reader: RowReader) -> Tensor:
        with torch.device("meta"):
            shell = Decoder(self.spec).eval()
        x_BTH = self._embed(ids_BT, reader)
        layout = Layout.full(*ids_BT.shape)
        rope = shell.rope(layout, x_BTH.dtype)
        for n in range(self.spec.layers):
            with torch.device("meta"):
                layer = DecoderLayer(self.spec, n).eval()
            for name, _ in list(layer.named_parameters()):
                owner, _, attribute = name.rpartition(".")
                value = self._read(self.layout[f"model.layers.{n}.{name}"], reader)
                setattr(layer.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
            x_BTH, _ = layer(x_BTH, rope, layout)
        norm = RMSNorm(self.spec.hidden, self.spec.norm_eps)
        norm.weight = nn.Parameter(self._read(self.layout["model.norm.weight"], reader), requires_grad=False)
        return norm(x_BTH)

    def _embed(self, ids_BT: Tensor, reader: RowReader) -> Tensor:
        stored = self.layout["model.embed_tokens.weight"]
        rows = {row: self._rows(stored, row, row + 1, reader)[0] for row in sorted(set(ids_BT.flatten().tolist()))}
        return torch.stack([torch.stack([rows[int(token)] for token in row]) for row in ids_BT])

    def _head(self, reader: RowReader) -> Iterator[Tensor]:
        stored = self.layout["model.embed_tokens.weight" if self.spec.tied else "lm_head.weight"]
        for low in range(0, self.spec.vocab, HEAD_ROWS):
            yield self._rows(stored, low, min(low + HEAD_ROWS, self.spec.vocab), reader)

    def _rows(self, stored: Stored, low: int, high: int, reader: RowReader) -> Tensor:
        return self._read(crop(stored, ((low, high), (0, stored.shape[1]))), reader)

    def _read(self, stored: Stored, reader: RowReader) -> Tensor:
        return torch.from_numpy(read_stored(stored, self.sources, self.opened.entries, reader, "F32"))


def fixed_prompt(vocab: int, tokens: int) -> np.ndarray:
    """The ids [1, tokens] on which logits are compared: the same for every model of a vocabulary, spread over it."""
    steps = np.arange(1, tokens + 1, dtype=np.int64)
    return ((steps * 2654435761) % vocab)[None]


def logits(opened: OpenWeights, ids_BT: np.ndarray) -> np.ndarray:
    """float32 logits [B, T, V]; raises :class:`WeightsError` when they are not finite."""
    out = Streamed(opened).logits(torch.from_numpy(ids_BT)).numpy()
    if not np.isfinite(out).all():
        raise WeightsError("the logits are not finite: the weights hold NaN or infinity", where=opened.path)
    return out


# --- telling the two joined layouts apart -------------------------------------------------------------------------------


def probe_concat(
    path: str | os.PathLike, opening: OpenOptions, ids: np.ndarray | None = None, tokenizer: str | None = None
) -> tuple[str, str]:
    """-> (``stacked`` or ``grouped``, why in words), from the loss of a forward pass in each reading.

    ``ids`` [T] is text in the model's vocabulary; without it, English text by ``tokenizer``'s folder or the vocabulary
    beside config.json; without those a repeated sequence, which only larger models predict. Raises :class:`WeightsError` with both losses when neither reading is clearly a language model.
    """
    readings = {name: open_weights(path, replace(opening, concat=name)) for name in ("stacked", "grouped")}
    spec = next(iter(readings.values())).spec
    ffn = "none" if spec.moe else "stacked"
    if mindformers_layout(spec, "stacked", ffn) == mindformers_layout(
        spec, "grouped", ffn.replace("stacked", "grouped")
    ):
        return "stacked", "both layouts are the same for this model"
    ids, what = _probe_ids(next(iter(readings.values())), tokenizer) if ids is None else (torch.from_numpy(ids), "text")
    losses = {name: _loss(opened, ids) for name, opened in readings.items()}
    words = ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items())
    best = min(losses, key=losses.get)
    other = max(losses, key=losses.get)
    chance = math.log(spec.vocab)
    if not losses[best] < min(losses[other], chance) - CLEAR:
        raise WeightsError(
            f"the probe cannot tell: loss on {what}: {words} (chance is {chance:.2f})",
            where=path,
            hint="qkv_concat=stacked or grouped; the probe needs trained weights, best with the vocabulary beside them",
        )
    return best, f"{best} (loss on {what}: {words})"


def _loss(opened: OpenWeights, ids: Tensor) -> float:
    scores = Streamed(opened).logits(ids[None])[0, :-1]
    loss = F.cross_entropy(scores, ids[1:], reduction="none")
    return float(loss.nan_to_num(nan=float("inf")).mean())


def _probe_ids(opened: OpenWeights, tokenizer: str | None) -> tuple[Tensor, str]:
    from research.core.text.tokenizer import has_tokenizer, load_tokenizer

    folder = tokenizer or opened.sides
    if tokenizer is not None or (folder is not None and has_tokenizer(folder)):
        ids = load_tokenizer(folder).encode(PROBE_TEXT)[:PROBE_TOKENS]
        return torch.tensor(ids), "text"
    # Without a vocabulary: a random sequence twice; models that copy from their context predict the repetition.
    half = fixed_prompt(opened.spec.vocab, PROBE_TOKENS // 2)[0]
    return torch.from_numpy(np.concatenate((half, half))), "a repeated sequence"
