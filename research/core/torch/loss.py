"""Cross-entropy of a linear head without ever holding [tokens, vocabulary] logits.

Only supervised rows reach the head, ``chunk`` of them at a time; the gradient of a chunk is computed while its logits
are there, so nothing is recomputed in the backward pass (the idea of Cut Cross-Entropy, arXiv 2411.09009, in plain
matmuls). Shape letters: B rows, T positions, H hidden, V vocabulary, N supervised targets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from research.core.torch.decoder import Decoder
from research.core.torch.layout import Layout
from research.core.torch.moe import RouterCounts
from research.core.torch.native import ops
from research.core.torch.packed_linear import linear

IGNORED = -100
# Rows of a chunk are filled up to this multiple: the matrix library keeps what it made for every new shape, and the
# number of supervised rows is another one in every step.
ROW_STEP = 64


def shifted_targets(labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Where to predict and what: indices into the B*T positions, and the label of the following position, both [N].

    Hugging Face's alignment: position t predicts ``labels[t + 1]`` of its own row; -100 is ignored.
    """
    next_BT = torch.full_like(labels_BT, IGNORED)
    next_BT[:, :-1] = labels_BT[:, 1:]
    flat = next_BT.reshape(-1)
    where_N = (flat != IGNORED).nonzero().squeeze(1)
    return where_N, flat[where_N]


def linear_cross_entropy(
    hidden_BTH: Tensor, weight_VH: Tensor, labels_BT: Tensor, chunk: int = 1024
) -> tuple[Tensor, int]:
    """Sum of the cross-entropies (fp32 scalar, differentiable) over the supervised targets, and their number.

    ``hidden_BTH`` is the decoder's output after the final norm, fp32 or bf16; the matmuls run in its dtype, logits and
    softmax in fp32. A head with ``requires_grad=False`` costs no gradient matmul.
    """
    where_N, targets_N = shifted_targets(labels_BT)
    hidden_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1]).index_select(0, where_N)
    total = _LinearCrossEntropy.apply(hidden_NH, weight_VH, targets_N, chunk, torch.is_grad_enabled())
    return total, targets_N.numel()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, targets_N, chunk, with_gradient):
        head_VH = weight_VH.to(hidden_NH.dtype)
        want_hidden = with_gradient and ctx.needs_input_grad[0]
        want_weight = with_gradient and ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden_NH) if want_hidden else None
        grad_weight = None
        total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)

        for start in range(0, hidden_NH.shape[0], chunk):
            real = min(chunk, hidden_NH.shape[0] - start)
            filling = min(chunk - real, -real % ROW_STEP)
            rows_CH = F.pad(hidden_NH[start : start + real], (0, 0, 0, filling))
            targets_C = F.pad(targets_N[start : start + real], (0, filling))
            losses_C, grad_CV = _softmax_loss(linear(rows_CH, head_VH), targets_C, want_hidden or want_weight)
            total += losses_C[:real].sum()
            if grad_CV is not None and filling:
                grad_CV[real:] = 0
            if want_hidden:
                grad_hidden[start : start + real] = linear(grad_CV, head_VH.t())[:real]
            if want_weight:
                if grad_weight is None:
                    grad_weight = (grad_CV.t() @ rows_CH).float()
                elif grad_CV.dtype == torch.float32:
                    grad_weight.addmm_(grad_CV.t(), rows_CH)
                else:  # a bf16 sum over chunks would lose what small gradients add
                    grad_weight += grad_CV.t() @ rows_CH

        if want_weight and grad_weight is None:
            grad_weight = torch.zeros(weight_VH.shape, dtype=torch.float32, device=weight_VH.device)
        ctx.grads = (grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VH.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total):
        grad_hidden, grad_weight = ctx.grads
        ctx.grads = None
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(grad_total)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _softmax_loss(logits_CV: Tensor, targets_C: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of each row (fp32) and its gradient, softmax - one_hot, in the logits' dtype and possibly place."""
    if ops.ready(logits_CV):
        return ops.cross_entropy_(logits_CV, targets_C, with_gradient), logits_CV
    wide_CV, targets_C1 = logits_CV.float(), targets_C[:, None]
    lse_C1 = torch.logsumexp(wide_CV, dim=1, keepdim=True)
    losses_C = (lse_C1 - wide_CV.gather(1, targets_C1)).squeeze(1)
    if not with_gradient:
        return losses_C, None
    grad_CV = wide_CV.sub_(lse_C1).exp_()
    grad_CV.scatter_add_(1, targets_C1, grad_CV.new_full(targets_C1.shape, -1.0))
    return losses_C, grad_CV.to(logits_CV.dtype)


class Objective(nn.Module):
    """The decoder with its loss as one forward, which is what sharding and compilation wrap."""

    def __init__(self, decoder: Decoder, head_chunk: int, router: bool = False):
        super().__init__()
        self.decoder, self.head_chunk, self.router = decoder, head_chunk, router

    def forward(self, input_ids_BT: Tensor, labels_BT: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """-> (sum of the cross-entropies, router balance loss of an MoE or None), both fp32 scalars."""
        counts = RouterCounts() if self.router else None
        hidden_BTH = self.decoder.hidden(input_ids_BT, layout, router=counts)
        total, _ = linear_cross_entropy(hidden_BTH, self.decoder.lm_head.weight, labels_BT, self.head_chunk)
        return total, counts.loss() if counts is not None and counts.layers else None
