"""One decoder for all families, dense and mixture of experts, built from a DecoderSpec.

Shape letters: B batch, T time, N = B * T, H hidden, V vocabulary. Parameter names are Hugging Face's Qwen2 names for
every family, the torch decoder's; checkpoints with other names are translated by :mod:`research.core.weights.keys`.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops

from research.core.mindspore import native
from research.core.mindspore.attention import bias_of, visible
from research.core.mindspore.fused import choose_kernels
from research.core.mindspore.layers import DecoderLayer, RMSNorm
from research.core.mindspore.linear import Linear, zeros
from research.core.mindspore.rotary import Rotary
from research.core.spec import DecoderSpec


class Embedding(nn.Cell):
    """Rows of ``weight`` [V, H]."""

    def __init__(self, vocab: int, hidden: int, dtype):
        super().__init__()
        self.weight = zeros((vocab, hidden), dtype)

    def construct(self, ids):
        return ops.gather(self.weight, ids, 0)


class DecoderModel(nn.Cell):
    """Embedding, layers and final norm: the part that Hugging Face calls ``model``; or a stage's part of that."""

    def __init__(self, spec: DecoderSpec, dtype, kernels: str, layers: range, embeds: bool, ends: bool):
        super().__init__()
        self.embed_tokens = Embedding(spec.vocab, spec.hidden, dtype) if embeds else None
        self.layers = nn.CellList([DecoderLayer(spec, layer, dtype, kernels) for layer in layers])
        self.norm = RMSNorm(spec.hidden, spec.norm_eps, dtype, kernels) if ends else None


class Decoder(nn.Cell):
    """The model, with zero weights: they come from :mod:`research.core.mindspore.weights` or from ``init_weights``.

    In evaluation mode until ``set_train()``: Qwen v1's log-n attention and dynamic NTK act in evaluation only, as
    published. Inputs of every call are int32 arrays of fixed shape (:mod:`research.core.mindspore.layout`).
    """

    def __init__(
        self,
        spec: DecoderSpec,
        dtype=ms.float32,
        *,
        head: bool = True,
        block: int | None = None,
        kernels: str = "auto",
        plan=None,
    ):
        """``head=False`` leaves out the output matrix (embedding models). ``block``: static hint for packed rows, no
        document is longer (:func:`research.core.mindspore.layout.choose_block`). ``kernels``: the
        switch of :func:`research.core.mindspore.fused.choose_kernels`. ``plan``: the share of ``spec`` to build
        (:class:`research.core.mindspore.plan.Plan`); it computes as a whole behind the pass
        :func:`research.core.mindspore.tensor_parallel.parallelize`, a stage within a
        :class:`research.core.mindspore.pipeline.Pipeline`."""
        super().__init__()
        self.spec, self.dtype, self.block = spec, dtype, block
        self.plan, self.joined = plan, False
        layers = range(spec.layers) if plan is None else plan.layers
        self.first, self.last = plan is None or plan.first, plan is None or plan.last
        spec = spec if plan is None else plan.local
        self.kernels = choose_kernels(kernels, dtype)
        self.by_runs = self.kernels == "native" and native.attends(spec.head_dim)
        embeds = self.first or (self.last and spec.tied)
        self.model = DecoderModel(spec, dtype, self.kernels, layers, embeds, self.last)
        for n, layer in enumerate(self.model.layers):  # names count the whole model's layers
            for parameter in layer.get_parameters():
                parameter.name = parameter.name.replace(f".{n}.", f".{layers[n]}.", 1)
        self.tied, self.has_head = spec.tied, head
        own_head = head and not spec.tied and self.last
        self.lm_head = Linear(spec.hidden, spec.vocab, False, dtype) if own_head else None
        self.rotary = Rotary(spec)
        self.causal, self.window = spec.causal, spec.sliding_window
        self.sliding = tuple(layer in spec.sliding_layers and spec.sliding_window is not None for layer in layers)
        self.any_sliding, self.any_full = any(self.sliding), not all(self.sliding)
        self.sparse = any(spec.is_sparse(layer) for layer in range(spec.layers))
        self.project = ops.MatMul(transpose_b=True)
        self.set_train(False)

    def hidden(self, input_ids, position_ids=None, doc_ids=None, rope_base=None, ends=None, before=None):
        """Token ids [B, T] -> ([N, H] after the final norm, keys and values of every layer, router counts or None).

        ``position_ids`` and ``doc_ids`` [B, T] (0: filling); None: every row is one whole document. ``rope_base``
        float32 [B, 1 or T] for models with dynamic NTK. ``ends``: for Ascend's operator, see
        :func:`research.core.mindspore.fused.flash_attention`. The counts are [2, E], summed over the sparse layers.
        A stage that is not the first begins with ``before`` = (states [N, H], counts or None) of the stage before it; one that is
        not the last leaves the final norm out.
        """
        batch, time = input_ids.shape
        if position_ids is None:
            position_ids = ops.arange(time).astype(ms.int32).expand_dims(0)
        block = None if doc_ids is None else self.block
        full = self.seen(doc_ids, batch, time, block, ends, None) if self.any_full else None
        sliding = self.seen(doc_ids, batch, time, block, ends, self.window) if self.any_sliding else None
        real_N = None if doc_ids is None else (doc_ids != 0).astype(ms.float32).reshape(-1)
        tables = self.rotary(position_ids, rope_base, self.dtype)
        if self.first:
            before = self.model.embed_tokens(input_ids.reshape(-1)), None
        x_NH, counts = before
        keys, values = (), ()
        for n, layer in enumerate(self.model.layers):
            seen = sliding if self.sliding[n] else full
            x_NH, k, v, sent = layer(x_NH, tables, batch, time, block, seen, real_N)
            keys, values = keys + (k,), values + (v,)
            if sent is not None:
                counts = sent if counts is None else counts + sent
        if self.last:
            x_NH = self.model.norm(x_NH)
        return x_NH, keys, values, counts

    def seen(self, doc_ids, batch: int, time: int, block, ends, window):
        """What one kind of layer sees, as its attention takes it: (mask, ends, documents), each None where not needed.

        ``documents`` for the CPU kernel, which knows no window: only where none can cut a document. ``ends`` for
        Ascend's operator; ``mask`` for the others: what is visible for Ascend's, the scores' bias for the composite.
        """
        longest = time if block is None else block
        if self.by_runs and (window is None or window >= longest):
            return None, None, ops.ones((batch, time), ms.int32) if doc_ids is None else doc_ids.astype(ms.int32)
        if self.kernels == "ascend" and (ends is not None or doc_ids is None):
            return None, ends, None
        shown = visible(doc_ids, time, block, self.causal, window)
        if self.kernels == "ascend":
            return shown.expand_dims(1), None, None
        return bias_of(shown), None, None

    def head_weight(self):
        """The output matrix [V, H]; the embedding's where the spec ties them."""
        return self.model.embed_tokens.weight if self.tied else self.lm_head.weight

    def logits(self, hidden_NH):
        """[N, H] -> [N, V], in the weights' dtype."""
        return self.project(hidden_NH, self.head_weight())

    def construct(self, input_ids, position_ids=None, doc_ids=None, rope_base=None, ends=None):
        """Token ids [B, T] -> logits [B, T, V]."""
        batch, time = input_ids.shape
        hidden_NH, _, _, _ = self.hidden(input_ids, position_ids, doc_ids, rope_base, ends)
        return self.logits(hidden_NH).reshape(batch, time, -1)


class Embedder(nn.Cell):
    """Last-token embedding (gte-Qwen2): each row's hidden state at ``last`` -> [B, H] float32, of length 1 when
    ``normalize``."""

    def __init__(self, decoder: Decoder, normalize: bool = True):
        super().__init__(auto_prefix=False)  # parameters keep their names
        self.decoder, self.normalize = decoder, normalize

    def construct(self, input_ids, position_ids, doc_ids, last, rope_base=None):
        batch, time = input_ids.shape
        hidden_NH, _, _, _ = self.decoder.hidden(input_ids, position_ids, doc_ids, rope_base)
        rows = ops.arange(batch).astype(ms.int32) * time + last
        x_BH = ops.gather(hidden_NH, rows, 0).astype(ms.float32)
        if not self.normalize:
            return x_BH
        return x_BH / ops.maximum(ops.sqrt(ops.square(x_BH).sum(-1, keepdims=True)), 1e-12)
