"""The linear layer as fast as this machine's CPU allows, and a pass that moves frozen weights where they read faster.

What was measured (docs/performance.md): for many rows torch's bf16 product runs at the processor's speed with the
weight as it is, so nothing is gained by other layouts, where the processor has bf16 products, and at a third of float32's
where it has none: there a kernel widens the weight as it goes; in float32 oneDNN's product beats the BLAS library's on some
processors; for few rows (decoding) the weight has to be read once from memory, and the reading speed depends on the
page size: on 2 MB pages it is up to twice that on 4 KB pages. Shape letters: N rows, I in, O out features.
"""

from __future__ import annotations

import mmap
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from research.core.native.build import multiplies_bf16
from research.core.torch.native import ops

_HUGE_PAGE = 2 << 20
_ALIGNMENT = 64


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``F.linear`` by the fastest of four ways; differentiable. On devices other than the CPU it is ``F.linear``."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear(x, weight_OI, bias_O)
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or weight_OI.requires_grad)
    few = x.numel() <= ops.MOST_ROWS * x.shape[-1]
    if not wants_grad and (few or (x.dtype == torch.bfloat16 and not multiplies_bf16())):
        same = (x, weight_OI) if bias_O is None else (x, weight_OI, bias_O)
        if x.numel() and weight_OI.is_contiguous() and ops.ready(*same):
            return (ops.linear_rows if few else ops.linear_panels)(x, weight_OI, bias_O)
    elif not few and x.dtype == torch.float32 == weight_OI.dtype and _onednn():
        if wants_grad or (bias_O is not None and bias_O.requires_grad):
            return _OneDnnLinear.apply(x, weight_OI, bias_O)
        return _onednn_linear(x, weight_OI, bias_O)
    return F.linear(x, weight_OI, bias_O)


@cache
def _onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_OI, bias_O):
        ctx.save_for_backward(x, weight_OI)
        return _onednn_linear(x, weight_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight_OI = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        rows_NO = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = _onednn_linear(rows_NO, weight_OI.t(), None).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = rows_NO.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = rows_NO.sum(0)
        return grad_x, grad_weight, grad_bias


class Linear(nn.Linear):
    """An ``nn.Linear`` whose forward is :func:`linear`: same parameters, names and initialisation."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def pack_frozen_linears(module: nn.Module) -> int:
    """Move the frozen matrices of ``module`` (``nn.Linear``, ``nn.Embedding``) into one region of 2 MB pages, for
    decoding; returns the bytes moved, 0 where there is nothing to gain (another device, no such pages).

    Values, names, dtypes and sharing stay (a tied head stays tied), so saving, merging and ``state_dict`` are as
    before. One matrix at a time is held twice. Other views of the old storage keep the old storage alive.
    """
    parameters = {
        id(child.weight): child.weight
        for child in module.modules()
        if isinstance(child, (nn.Linear, nn.Embedding))
        and not child.weight.requires_grad
        and child.weight.device.type == "cpu"
        and not getattr(child.weight, "on_huge_pages", False)
    }
    return _move(list(parameters.values()))


def _move(parameters: list[Tensor]) -> int:
    size = sum(-(-p.numel() * p.element_size() // _ALIGNMENT) * _ALIGNMENT for p in parameters)
    if size == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return 0
    region = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        region.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without huge pages: the weights may stay where they are
        return 0
    offset = -torch.frombuffer(region, dtype=torch.uint8, count=1).data_ptr() % _HUGE_PAGE
    for parameter in parameters:
        moved = torch.frombuffer(region, dtype=parameter.dtype, count=parameter.numel(), offset=offset)
        parameter.data = moved.view(parameter.shape).copy_(parameter.data)
        parameter.on_huge_pages = True
        offset += -(-parameter.numel() * parameter.element_size() // _ALIGNMENT) * _ALIGNMENT
    return size
