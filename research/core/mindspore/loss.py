"""Cross-entropy of a linear head over the supervised rows only, and the decoder with its loss as one Cell.

Shape letters: B rows, T positions, N = B * T, H hidden, V vocabulary, R rows of it on one worker, M target slots (a fixed
number), C rows of a chunk.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from research.core.errors import ConfigError
from research.core.mindspore import native
from research.core.mindspore.attention import HIDDEN
from research.core.mindspore.collectives import own_row
from research.core.mindspore.decoder import Decoder
from research.core.mindspore.moe import balance_loss
from research.core.mindspore.plan import Plan

IGNORED = -100


def shifted_targets(labels_BT: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where to predict and what, both int32 [``size``]: indices into the B * T positions, and the label of the following
    position; -100 in slots that are left over.

    Hugging Face's alignment: position t predicts ``labels[t + 1]`` of its own row; -100 is ignored.
    Raises :class:`ConfigError` when there are more than ``size`` targets.
    """
    following = np.full(labels_BT.shape, IGNORED, np.int32)
    following[:, :-1] = labels_BT[:, 1:]
    flat = following.reshape(-1)
    found = np.flatnonzero(flat != IGNORED)
    if len(found) > size:
        raise ConfigError(f"{len(found)} supervised targets, room is made for {size}", where="train.micro_batch")
    where, targets = np.zeros(size, np.int32), np.full(size, IGNORED, np.int32)
    where[: len(found)], targets[: len(found)] = found, flat[found]
    return where, targets


class LinearCrossEntropy(nn.Cell):
    """Sum of the cross-entropies of ``hidden W^T`` against ``targets``, with the gradients made on the way.

    The logits of ``chunk`` rows exist at a time and nothing is computed twice: the gradient of a chunk is taken while its
    logits are there (as :mod:`research.core.torch.loss` does). Matmuls in the inputs' dtype, softmax in float32.
    """

    def __init__(self, chunk: int, kernels: str = "composite"):
        super().__init__()
        self.chunk, self.native = chunk, kernels == "native"
        self.kernel = native.cross_entropy() if self.native else None
        self.logits = ops.MatMul(transpose_b=True)
        self.to_weight = ops.MatMul(transpose_a=True)
        self.largest = ops.ArgMaxWithValue(axis=1, keep_dims=True)

    def construct(self, hidden_MH, weight_VH, targets_M):
        """-> (total float32, its gradients for hidden [M, H] and weight [V, H]); callers take the first."""
        rows = hidden_MH.shape[0]
        total, grad_weight, grads = 0.0, 0.0, ()
        for start in range(0, rows, self.chunk):
            stop = min(start + self.chunk, rows)
            loss, grad_hidden, grad = self.one(hidden_MH[start:stop], weight_VH, targets_M[start:stop])
            total, grad_weight, grads = total + loss, grad_weight + grad, grads + (grad_hidden,)
        return total, grads[0] if len(grads) == 1 else ops.cat(grads, 0), grad_weight

    def one(self, hidden_CH, weight_VH, targets_C):
        if self.native:
            losses_C, grad_CV = self.kernel(self.logits(hidden_CH, weight_VH), targets_C)
            return losses_C.sum(), ops.matmul(grad_CV, weight_VH), self.to_weight(grad_CV, hidden_CH)
        counted_C1 = (targets_C != IGNORED).astype(ms.float32).expand_dims(1)
        targets_C = ops.maximum(targets_C, 0)
        logits_CV = self.logits(hidden_CH, weight_VH).astype(ms.float32)
        probs_CV = ops.softmax(logits_CV, -1)
        # lse = largest logit - log of its probability, which is at least 1/V; the target's own may be zero.
        place_C1, largest_C1 = self.largest(logits_CV)
        lse_C1 = largest_C1 - ops.log(ops.gather_d(probs_CV, 1, place_C1))
        losses_C1 = (lse_C1 - ops.gather_d(logits_CV, 1, targets_C.expand_dims(1))) * counted_C1
        # (probs - one_hot) times a matrix, the one_hot part as rows taken or added: no pass over [C, V] of its own
        probs = probs_CV.astype(hidden_CH.dtype)
        counted = counted_C1.astype(hidden_CH.dtype)
        grad_hidden = (ops.matmul(probs, weight_VH) - ops.gather(weight_VH, targets_C, 0)) * counted
        rows_CH = hidden_CH * counted
        wide_CH = rows_CH.astype(ms.float32)
        grad_weight = self.to_weight(probs, rows_CH).astype(ms.float32)
        grad_weight = grad_weight - ops.unsorted_segment_sum(wide_CH, targets_C, weight_VH.shape[0])
        return losses_C1.sum(), grad_hidden, grad_weight

    def bprop(self, hidden_MH, weight_VH, targets_M, out, dout):
        _, grad_hidden, grad_weight = out
        scale = dout[0]
        hidden = grad_hidden * scale.astype(grad_hidden.dtype)
        return hidden, (grad_weight * scale).astype(weight_VH.dtype), ops.zeros_like(targets_M)


class SplitCrossEntropy(LinearCrossEntropy):
    """The cross-entropy against a vocabulary that lies over the workers: they exchange a logarithm and the target's logit per
    row, never the logits."""

    def __init__(self, chunk: int, plan: Plan):
        super().__init__(chunk)
        self.start, self.rows = plan.vocab_start, plan.vocab_rows
        # Operators, not Cells: a Cell with a gradient of its own may not hold any.
        self.workers, self.index = plan.workers, plan.index
        self.reduce = ops.AllReduce(group=plan.group.name)
        filling = np.arange(self.start, self.start + self.rows) >= plan.spec.vocab
        self.filled = bool(filling.any())
        self.hidden = Tensor(np.where(filling, HIDDEN, 0).astype(np.float32))

    def one(self, hidden_CH, weight_RH, targets_C):
        counted_C1 = (targets_C != IGNORED).astype(ms.float32).expand_dims(1)
        place_C = targets_C - self.start
        mine_C = ops.logical_and(place_C >= 0, place_C < self.rows)
        place_C = ops.minimum(ops.maximum(place_C, 0), self.rows - 1)  # another worker's: anything, times zero
        mine_C1 = mine_C.astype(ms.float32).expand_dims(1)
        logits_CR = self.logits(hidden_CH, weight_RH).astype(ms.float32)
        if self.filled:
            logits_CR = logits_CR + self.hidden
        _, largest_C1 = self.largest(logits_CR)
        lse_C1 = largest_C1 + ops.log(ops.exp(logits_CR - largest_C1).sum(1, keepdims=True))
        target_C1 = ops.gather_d(logits_CR, 1, place_C.expand_dims(1)) * mine_C1
        row = own_row(ops.cat((lse_C1, target_C1), 1), self.workers, self.index)
        every = self.reduce(row).reshape(self.workers, -1, 2)
        lse_C1 = ops.logsumexp(every[:, :, 0], 0).expand_dims(1)
        losses_C1 = (lse_C1 - every[:, :, 1].sum(0).expand_dims(1)) * counted_C1
        # (probs - one_hot) times a matrix, as on one worker; one_hot where the target is in this worker's rows
        probs = ops.exp(logits_CR - lse_C1).astype(hidden_CH.dtype)
        counted, mine = counted_C1.astype(hidden_CH.dtype), mine_C1.astype(hidden_CH.dtype)
        grad_hidden = (ops.matmul(probs, weight_RH) - ops.gather(weight_RH, place_C, 0) * mine) * counted
        rows_CH = hidden_CH * counted
        grad_weight = self.to_weight(probs, rows_CH).astype(ms.float32)
        wide_CH = (rows_CH * mine).astype(ms.float32)
        grad_weight = grad_weight - ops.unsorted_segment_sum(wide_CH, place_C, self.rows)
        grad_hidden = self.reduce(grad_hidden.reshape(-1)).reshape(hidden_CH.shape)
        return losses_C1.sum(), grad_hidden, grad_weight


class Objective(nn.Cell):
    """The decoder with its loss as one forward: what the trainer differentiates, scales and shards."""

    def __init__(self, decoder: Decoder, head_chunk: int = 1024, router: bool = False):
        """``router``: with the load-balancing loss of a mixture of experts."""
        super().__init__(auto_prefix=False)  # parameters keep their names
        self.decoder, self.router = decoder, router and decoder.sparse
        spec = decoder.spec
        self.sparse_layers = sum(spec.is_sparse(layer) for layer in range(spec.layers))
        if decoder.plan is None or decoder.plan.workers == 1:
            self.loss = LinearCrossEntropy(head_chunk, decoder.kernels)
        else:
            assert decoder.joined, "parallelize comes first"
            self.loss = SplitCrossEntropy(head_chunk, decoder.plan)

    def construct(self, input_ids, position_ids, doc_ids, where, targets, ends=None, rope_base=None, before=None):
        """[B, T] three times and [M] twice (:func:`shifted_targets`), int32 -> (sum of the cross-entropies, router
        balance loss; 0 without one), both float32 scalars. ``ends``, ``rope_base`` and ``before``: see :meth:`Decoder.hidden`."""
        hidden_NH, _, _, counts = self.decoder.hidden(input_ids, position_ids, doc_ids, rope_base, ends, before)
        rows_MH = ops.gather(hidden_NH, where, 0)
        total, _, _ = self.loss(rows_MH, self.decoder.head_weight(), targets)
        if not self.router:
            return total, ops.zeros((), ms.float32)
        real = (doc_ids != 0).astype(ms.float32).sum()
        return total, balance_loss(counts, real * self.sparse_layers)
