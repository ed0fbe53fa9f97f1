"""Mixture of experts: router, experts as one batched matmul over blocks of rows, shared expert, router counts.

Shape letters: N tokens, C chosen experts per token, P = N * C pairs, E experts, H hidden, F expert ffn; M rows of a
block, Q blocks.

Shapes must not depend on the routing. Pairs are sorted by expert and each expert's run is filled up to whole blocks of
M rows, of which there can never be more than Q = (P + min(E, P) (M - 1)) / M; each block meets its expert's matrix in
one batched matmul. M is near P / E, so that at most about half of the rows are filling.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops

from research.core.mindspore import fused, native
from research.core.mindspore.linear import MLP, Linear, zeros
from research.core.spec import DecoderSpec

LARGEST_BLOCK = 128


def block_rows(pairs: int, experts: int) -> int:
    """M: the largest power of two up to ``pairs / experts`` and 128, at least 1."""
    rows = 1
    while 2 * rows * experts <= pairs and rows < LARGEST_BLOCK:
        rows *= 2
    return rows


def sort_pairs(chosen_NC, experts: int):
    """-> (pair numbers sorted by expert, stable [P]; the expert of each [P]; rows per expert [E]), all int32."""
    flat_P = chosen_NC.reshape(-1).astype(ms.int32)
    pairs = flat_P.shape[0]
    keys_P, _ = ops.sort(flat_P * pairs + ops.arange(pairs).astype(ms.int32))
    owner_P = ops.floor_divide(keys_P, pairs)
    counts_E = ops.unsorted_segment_sum(ops.ones_like(flat_P), flat_P, experts)
    return keys_P - owner_P * pairs, owner_P, counts_E


class Experts(nn.Cell):
    """All experts' weights in two tensors: ``gate_up_proj`` [E, 2F, H] (gate rows first), ``down_proj`` [E, H, F]."""

    def __init__(self, experts: int, hidden: int, ffn: int, dtype, kernels: str):
        super().__init__()
        self.gate_up_proj = zeros((experts, 2 * ffn, hidden), dtype, "gate_up_proj")
        self.down_proj = zeros((experts, hidden, ffn), dtype, "down_proj")
        self.count, self.ffn, self.kernels = experts, ffn, kernels
        self.swiglu = native.swiglu() if kernels == "native" else None
        self.matmul = ops.BatchMatMul(transpose_b=True)
        self.scatter = ops.TensorScatterUpdate()

    def construct(self, x_NH, chosen_NC):
        """Each token through each of its experts -> [P, H], token by token."""
        share = chosen_NC.shape[1]
        order_P, owner_P, counts_E = sort_pairs(chosen_NC, self.count)
        ends_E = ops.cumsum(counts_E, 0)
        if self.kernels == "ascend":
            gate_up = fused.grouped_linear(ops.gather(x_NH, order_P // share, 0), self.gate_up_proj, ends_E)
            inner = fused.swiglu(gate_up[:, : self.ffn], gate_up[:, self.ffn :])
            back_P = self.place(order_P, ops.arange(order_P.shape[0]).astype(ms.int32), order_P.shape[0])
            return ops.gather(fused.grouped_linear(inner, self.down_proj, ends_E), back_P, 0)
        return self.by_blocks(x_NH, order_P, owner_P, counts_E, ends_E, share)

    def by_blocks(self, x_NH, order_P, owner_P, counts_E, ends_E, share: int):
        pairs = order_P.shape[0]
        rows = block_rows(pairs, self.count)
        blocks = (pairs + min(self.count, pairs) * (rows - 1)) // rows
        blocks_E = ops.floor_divide(counts_E + (rows - 1), rows)
        block_ends_E = ops.cumsum(blocks_E, 0)
        # where expert e's run begins: among the sorted pairs, and among the blocks' rows
        shift_E = (block_ends_E - blocks_E) * rows - (ends_E - counts_E)
        slot_P = ops.gather(shift_E, owner_P, 0) + ops.arange(pairs).astype(ms.int32)
        # Filling reads token 0; nobody reads what becomes of it, so that its gradient is zero.
        token = self.place(slot_P, ops.floor_divide(order_P, share), blocks * rows)
        owner_Q = (block_ends_E.expand_dims(0) <= ops.arange(blocks).astype(ms.int32).expand_dims(1)).astype(ms.int32)
        owner_Q = ops.minimum(owner_Q.sum(1), self.count - 1)
        x_QMH = ops.gather(x_NH, token, 0).reshape(blocks, rows, -1)
        gate_up = self.matmul(x_QMH, ops.gather(self.gate_up_proj, owner_Q, 0))
        gate, up = gate_up[:, :, : self.ffn], gate_up[:, :, self.ffn :]
        inner = self.swiglu(gate, up) if self.kernels == "native" else ops.silu(gate) * up
        y_QMH = self.matmul(inner, ops.gather(self.down_proj, owner_Q, 0))
        return ops.gather(y_QMH.reshape(blocks * rows, -1), self.place(order_P, slot_P, pairs), 0)

    def place(self, where_P, what_P, size: int):
        """int32 [size] with ``what`` at ``where``, 0 elsewhere."""
        return self.scatter(ops.zeros((size,), ms.int32), where_P.expand_dims(1), what_P)


class SparseMLP(nn.Cell):
    """Qwen2-MoE's feed-forward: softmax router in fp32, top-k experts, and a shared expert behind a sigmoid gate."""

    def __init__(self, spec: DecoderSpec, dtype, kernels: str):
        super().__init__()
        moe = spec.moe
        self.count, self.top_k, self.norm_topk = moe.experts, moe.top_k, moe.norm_topk
        self.gate = Linear(spec.hidden, moe.experts, False, dtype)
        self.experts = Experts(moe.experts, spec.hidden, moe.expert_ffn, dtype, kernels)
        self.shared_expert = MLP(spec.hidden, moe.shared_ffn, dtype, kernels)
        self.shared_expert_gate = Linear(spec.hidden, 1, False, dtype)

    def construct(self, x_NH, real_N=None):
        """-> ([N, H], router counts [2, E]: real tokens sent to each expert, and the sum of its probabilities)."""
        probs_NE, weights_NC, chosen_NC = self.route(x_NH)
        gate_N1 = ops.sigmoid(self.shared_expert_gate(x_NH))
        return self.mix(x_NH, weights_NC, chosen_NC, gate_N1), self.counts(probs_NE, chosen_NC, real_N)

    def route(self, x_NH):
        """-> (each expert's probability [N, E], weights and numbers of the chosen ones [N, C])."""
        probs_NE = ops.softmax(self.gate(x_NH).astype(ms.float32), -1)
        weights_NC, chosen_NC = ops.topk(probs_NE, self.top_k)
        if self.norm_topk:
            weights_NC = weights_NC / weights_NC.sum(-1, keepdims=True)
        return probs_NE, weights_NC, chosen_NC

    def mix(self, x_NH, weights_NC, chosen_NC, gate_N1):
        """The chosen experts' outputs by their weights, and the shared one's by its gate, added up [N, H]."""
        y_NCH = self.experts(x_NH, chosen_NC).reshape(x_NH.shape[0], self.top_k, -1)
        routed_NH = (y_NCH * weights_NC.astype(x_NH.dtype).expand_dims(-1)).sum(1)
        return routed_NH + gate_N1 * self.shared_expert(x_NH)

    def counts(self, probs_NE, chosen_NC, real_N):
        flat_P = chosen_NC.reshape(-1).astype(ms.int32)
        if real_N is None:
            real_N = ops.ones((probs_NE.shape[0],), ms.float32)
        share_P = ops.broadcast_to(real_N.expand_dims(1), chosen_NC.shape).reshape(-1)
        sent_E = ops.stop_gradient(ops.unsorted_segment_sum(share_P, flat_P, self.count))
        return ops.stack((sent_E, (probs_NE * real_N.expand_dims(1)).sum(0)))


def balance_loss(counts_2E, rows):
    """The load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4 to 6), as transformers'
    ``load_balancing_loss_func`` computes it, before the coefficient. ``counts`` summed over the sparse layers, ``rows``
    real tokens times sparse layers."""
    shares = counts_2E / rows
    return (shares[0] * shares[1]).sum() * counts_2E.shape[1]
