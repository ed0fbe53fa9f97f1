"""The kernels as torch operators with gradients: RMSNorm, SwiGLU, rotary, attention over documents, cross-entropy,
and the linear layer for few rows.

``ready(...)`` says whether tensors may go to the kernels; the caller keeps the plain torch expression for when they may
not. Shape letters: N tokens, H query heads, K kv heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from research.core.native.build import library

_DTYPES = (torch.float32, torch.bfloat16)
_HEAD_DIM_STEP = 16  # the widest register, in floats


def ready(*tensors: Tensor) -> bool:
    """True when all tensors are on the CPU in one type that the kernels know, and the kernels exist."""
    first = tensors[0]
    if first.device.type != "cpu" or first.dtype not in _DTYPES or torch.compiler.is_compiling():
        return False
    return all(t.dtype == first.dtype and t.device.type == "cpu" for t in tensors[1:]) and library() is not None


def _wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _half(t: Tensor) -> int:
    return int(t.dtype == torch.bfloat16)


def _threads(elements: int) -> int:
    """Threads worth starting for that many elements."""
    return 1 if elements < 16384 else torch.get_num_threads()


# --- RMSNorm ----------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, rounded to x's dtype before the weight."""
    x = x.contiguous()
    if _wants_grad(x, weight):
        return _RMSNorm.apply(x, weight, eps)
    return _rms_norm(x, weight, eps, None)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None) -> Tensor:
    y, width = torch.empty_like(x), x.shape[-1]
    library().rms_norm_forward(
        _half(x),
        x.numel() // width,
        width,
        eps,
        _at(x),
        _at(weight),
        _at(y),
        _at(scale),
        _threads(x.numel()),
    )
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.empty(x.shape[:-1], dtype=torch.float32)
        y = _rms_norm(x, weight, eps, scale)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad, width = grad.contiguous(), x.shape[-1]
        threads = _threads(x.numel())
        grad_x = torch.empty_like(x)
        partial = torch.zeros(threads, width) if ctx.needs_input_grad[1] else None
        library().rms_norm_backward(
            _half(x),
            x.numel() // width,
            width,
            _at(x),
            _at(weight),
            _at(scale),
            _at(grad),
            _at(grad_x),
            _at(partial),
            threads,
        )
        return grad_x, None if partial is None else partial.sum(0).to(weight.dtype), None


# --- SwiGLU -----------------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, tensors of one shape."""
    gate, up = gate.contiguous(), up.contiguous()
    return _SwiGLU.apply(gate, up) if _wants_grad(gate, up) else _swiglu(gate, up)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    n = gate.numel()
    library().swiglu_forward(_half(gate), n, _at(gate), _at(up), _at(out), _threads(n))
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad, n = grad.contiguous(), gate.numel()
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        library().swiglu_backward(
            _half(gate), n, _at(gate), _at(up), _at(grad), _at(grad_gate), _at(grad_up), _threads(n)
        )
        return grad_gate, grad_up


# --- rotary -----------------------------------------------------------------------------------------------------


def rotary_ready(x_BTHD: Tensor, cos: Tensor) -> bool:
    """Tables [B or 1, T, 1, D/2] in x's dtype or float32."""
    return ready(x_BTHD) and (cos.dtype == x_BTHD.dtype or cos.dtype == torch.float32) and cos.device.type == "cpu"


def rotary(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of every head by the tables of its token."""
    x_BTHD, cos, sin = x_BTHD.contiguous(), cos.contiguous(), sin.contiguous()
    return _Rotary.apply(x_BTHD, cos, sin) if _wants_grad(x_BTHD) else _rotary(x_BTHD, cos, sin, 1.0)


def _rotary(x_BTHD: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    out, dim = torch.empty_like(x_BTHD), x_BTHD.shape[-1]
    library().rotary(
        _half(x_BTHD),
        _half(cos),
        x_BTHD.shape[0] * x_BTHD.shape[1],
        x_BTHD.shape[2],
        dim,
        cos.numel() // (dim // 2),
        _at(x_BTHD),
        _at(cos),
        _at(sin),
        _at(out),
        direction,
        _threads(x_BTHD.numel()),
    )
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTHD, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotary(x_BTHD, cos, sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotary(grad.contiguous(), cos, sin, -1.0), None, None


# --- attention --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Documents:
    """Runs of tokens that see each other: first token and length of each, [documents] int64 on the CPU, the longest
    length, and whether every token belongs to one."""

    begins: Tensor
    lengths: Tensor
    longest: int
    whole: bool


def attention_ready(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Self-attention [.., heads, D] that the kernel can do: D a multiple of 16, grouped heads."""
    return q.shape[-1] % _HEAD_DIM_STEP == 0 and q.shape[-1] <= 1024 and ready(q, k, v)


def attention(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, documents: Documents, causal: bool) -> Tensor:
    """Softmax(q k^T / sqrt(D)) v inside each document -> [N, H, D]; tokens of no document get zeros."""
    q_NHD, k_NKD, v_NKD = q_NHD.contiguous(), k_NKD.contiguous(), v_NKD.contiguous()
    if _wants_grad(q_NHD, k_NKD, v_NKD):
        return _Attention.apply(q_NHD, k_NKD, v_NKD, documents, causal)
    return _attention(q_NHD, k_NKD, v_NKD, documents, causal, None)


def _shape_arguments(q: Tensor, k: Tensor, documents: Documents, causal: bool) -> tuple:
    return (
        _half(q),
        len(documents.begins),
        q.shape[1],
        k.shape[1],
        q.shape[2],
        _at(documents.begins),
        _at(documents.lengths),
        int(causal),
        1.0 / math.sqrt(q.shape[2]),
    )


def _attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, causal: bool, lse: Tensor | None) -> Tensor:
    out = torch.empty_like(q) if documents.whole else torch.zeros_like(q)
    shapes = _shape_arguments(q, k, documents, causal)
    library().attention_forward(*shapes, _at(q), _at(k), _at(v), _at(out), _at(lse), _threads(q.numel()))
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, documents, causal):
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        out = _attention(q, k, v, documents, causal, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.documents, ctx.causal = documents, causal
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        new = torch.empty_like if ctx.documents.whole else torch.zeros_like
        grad_q, grad_k, grad_v = new(q), new(k), new(v)
        shapes = _shape_arguments(q, k, ctx.documents, ctx.causal)
        tensors = (q, k, v, out, lse, grad.contiguous(), grad_q, grad_k, grad_v)
        library().attention_backward(*shapes, *map(_at, tensors), _threads(q.numel()))
        return grad_q, grad_k, grad_v, None, None


# --- cross-entropy ----------------------------------------------------------------------------------------------


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor, grad: bool) -> Tensor:
    """Cross-entropy of each row, [N] float32. With ``grad`` the logits are replaced by their gradient
    ``softmax - one_hot`` (of the sum of the losses), else they are left alone. Contiguous; targets int64."""
    assert logits_NV.is_contiguous() and targets_N.is_contiguous() and targets_N.dtype == torch.int64
    rows, width = logits_NV.shape
    loss = torch.empty(rows, dtype=torch.float32)
    library().cross_entropy(
        _half(logits_NV),
        rows,
        width,
        _at(logits_NV),
        _at(targets_N),
        _at(loss),
        int(grad),
        _threads(logits_NV.numel()),
    )
    return loss


# --- linear layer for few rows ----------------------------------------------------------------------------------

MOST_ROWS = 8


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b for at most ``MOST_ROWS`` rows (all axes but the last), without gradient. The weight is contiguous."""
    return _linear(library().linear_rows, x, weight, bias)


def linear_panels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As :func:`linear_rows` for any number of rows: in float32 inside, as fast as the processor multiplies that."""
    return _linear(library().linear_panels, x, weight, bias)


def _linear(kernel, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, (n, k) = x.contiguous(), weight.shape
    out = x.new_empty(*x.shape[:-1], n)
    kernel(
        _half(x),
        x.numel() // k,
        n,
        k,
        _at(x),
        _at(weight),
        _at(bias),
        _at(out),
        _threads(weight.numel()),
    )
    return out
