"""Tensor parallelism as a pass: the collectives that make decoders of one share each compute as the whole one does.

A worker's decoder is an ordinary one with its share of the heads, feed-forward columns, experts' columns and vocabulary rows
(:class:`research.core.mindspore.plan.Plan`). Between the layers states are the same on all workers. What enters
a share passes :class:`Apart`, what leaves it :class:`Together`: one sum forward and one backward around attention, and
around the feed-forward (Megatron-LM, arXiv 1909.08053). Shape letters as in :mod:`research.core.mindspore.decoder`; R rows of
the vocabulary that a worker has.
"""

from __future__ import annotations

from mindspore import nn, ops

from research.core.mindspore.collectives import Apart, Gather, Group, Together
from research.core.mindspore.decoder import Decoder
from research.core.mindspore.moe import SparseMLP
from research.core.mindspore.plan import Plan


def parallelize(decoder: Decoder) -> Decoder:
    """Put the collectives of ``decoder.plan`` in, in place; behind adapters, before checkpointing and the first call.
    A decoder of whole layers, or with its collectives, stays as it is."""
    plan = decoder.plan
    if plan is None or plan.workers == 1 or decoder.joined:
        return decoder
    group = plan.group
    for layer in decoder.model.layers:
        _exchange(layer, "input_layernorm", Entrance(layer.input_layernorm, group))
        _exchange(layer.self_attn, "o_proj", Exit(layer.self_attn.o_proj, group))
        if layer.sparse:
            _exchange(layer, "mlp", SharedSparseMLP(layer.mlp, group))
        else:
            _exchange(layer, "post_attention_layernorm", Entrance(layer.post_attention_layernorm, group))
            _exchange(layer.mlp, "down_proj", Exit(layer.mlp.down_proj, group))
    if decoder.model.embed_tokens is not None:
        _exchange(decoder.model, "embed_tokens", VocabularyEmbedding(decoder.model.embed_tokens, plan))
    if decoder.last:
        decoder.project = WholeLogits(plan)
    decoder.joined = True
    return decoder


def _exchange(owner: nn.Cell, attribute: str, cell: nn.Cell) -> None:
    cell.set_train(owner.training)
    names = [(parameter, parameter.name) for parameter in cell.get_parameters()]
    setattr(owner, attribute, cell)
    for parameter, name in names:  # MindSpore puts the attribute's name before names that are whole already
        parameter.name = name


class Entrance(nn.Cell):
    """A norm whose output goes into matrices cut by columns."""

    def __init__(self, norm: nn.Cell, group: Group):
        super().__init__(auto_prefix=False)  # the parameters have their full names already
        self.norm, self.apart = norm, Apart(group)

    def construct(self, x):
        return self.apart(self.norm(x))


class Exit(nn.Cell):
    """A matrix cut by rows, with or without an adapter: its products are parts of a sum."""

    def __init__(self, linear: nn.Cell, group: Group):
        super().__init__(auto_prefix=False)
        self.linear, self.together = linear, Together(group)

    def construct(self, x):
        return self.together(self.linear(x))


class SharedSparseMLP(SparseMLP):
    """A mixture of experts of whose every expert a worker has some columns. The router is the same on all workers, and its
    weights and the shared expert's gate are factors of parts."""

    def __init__(self, mlp: SparseMLP, group: Group):
        nn.Cell.__init__(self, auto_prefix=False)
        self.count, self.top_k, self.norm_topk = mlp.count, mlp.top_k, mlp.norm_topk
        self.gate, self.experts = mlp.gate, mlp.experts
        self.shared_expert, self.shared_expert_gate = mlp.shared_expert, mlp.shared_expert_gate
        self.apart, self.together = Apart(group), Together(group)

    def construct(self, x_NH, real_N=None):
        probs_NE, weights_NC, chosen_NC = self.route(x_NH)
        gate_N1 = ops.sigmoid(self.shared_expert_gate(x_NH))
        part_NH = self.mix(self.apart(x_NH), self.apart(weights_NC), chosen_NC, self.apart(gate_N1))
        return self.together(part_NH), self.counts(probs_NE, chosen_NC, real_N)


class VocabularyEmbedding(nn.Cell):
    """Rows of a vocabulary that lies over the workers: each looks its own ids up, the others' are zeros."""

    def __init__(self, embedding: nn.Cell, plan: Plan):
        super().__init__(auto_prefix=False)
        self.weight, self.start, self.rows = embedding.weight, plan.vocab_start, plan.vocab_rows
        self.together = Together(plan.group)

    def construct(self, ids):
        place = ids - self.start
        mine = ops.logical_and(place >= 0, place < self.rows)
        found = ops.gather(self.weight, ops.minimum(ops.maximum(place, 0), self.rows - 1), 0)
        return self.together(found * mine.astype(found.dtype).expand_dims(-1))


class WholeLogits(nn.Cell):
    """(states [N, H], this worker's rows of the output matrix [R, H]) -> logits of the whole vocabulary [N, V]."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.vocab, self.gather = plan.spec.vocab, Gather(plan.group)
        self.logits = ops.MatMul(transpose_b=True)

    def construct(self, hidden_NH, weight_RH):
        every = ops.transpose(self.gather(self.logits(hidden_NH, weight_RH)), (1, 0, 2))
        whole = every.reshape(hidden_NH.shape[0], -1)
        return whole if whole.shape[1] == self.vocab else whole[:, : self.vocab]
