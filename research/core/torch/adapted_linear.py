"""A linear layer with its low-rank adapter as one differentiable step (arXiv 2106.09685, equation 3).

Autograd alone would write the base's output, a scaled copy of the adapter's and their sum, and add two gradients of
the input; here the adapter's part is added to the base's in place, forward and backward. Shape letters: N rows,
I in, O out features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from research.core.torch.packed_linear import linear


def adapted_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
) -> Tensor:
    """``x W^T + bias + scaling * x A^T B^T``; gradients for x, A and B, none for the frozen W and bias.

    A and B may be stored in another dtype than x: they are rounded to x's, their gradients come in their own.
    """
    rows_NI = x.reshape(-1, x.shape[-1])
    a_RI, b_OR = a_RI.to(x.dtype), b_OR.to(x.dtype)
    return _AdaptedLinear.apply(rows_NI, weight_OI, bias_O, a_RI, b_OR, scaling).view(*x.shape[:-1], b_OR.shape[0])


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NI, weight_OI, bias_O, a_RI, b_OR, scaling):
        low_NR = linear(x_NI, a_RI) * scaling
        ctx.save_for_backward(x_NI, weight_OI, a_RI, b_OR, low_NR)
        ctx.scaling = scaling
        return linear(x_NI, weight_OI, bias_O).addmm_(low_NR, b_OR.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NO):
        x_NI, weight_OI, a_RI, b_OR, low_NR = ctx.saved_tensors
        grad_x = grad_a = grad_b = None
        grad_low_NR = (grad_NO @ b_OR) * ctx.scaling
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad_NO, weight_OI.t()).addmm_(grad_low_NR, a_RI)
        if ctx.needs_input_grad[3]:
            grad_a = grad_low_NR.t() @ x_NI
        if ctx.needs_input_grad[4]:
            grad_b = grad_NO.t() @ low_NR
        return grad_x, None, None, grad_a, grad_b, None
