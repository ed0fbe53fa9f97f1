"""This repository's CPU kernels as MindSpore operators with gradients: RMSNorm, SwiGLU, rotary, attention over documents,
cross-entropy, dropout, AdamW. float32 only, as everything that MindSpore computes on the CPU.

MindSpore's CPU package has no fused operators, and composites pass over memory five to ten times where these pass once.
The library is loaded by file and symbol; each operator is made once per process. Shape letters as in
:mod:`research.core.mindspore.fused`; V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

import functools

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from research.core.native.build import library, library_file

_HEAD_DIM_STEP = 16  # the widest register, in floats


def available() -> bool:
    """Whether the kernels exist; they are compiled the first time anyone asks on a machine."""
    return library_file() is not None


def use_threads(count: int) -> None:
    """Threads of every kernel from now on."""
    if available():
        library().set_custom_threads(count)


def attends(head_dim: int) -> bool:
    """Whether the attention kernel takes heads of this size."""
    return head_dim % _HEAD_DIM_STEP == 0 and head_dim <= 1024


def _operator(symbol: str, shapes, dtypes, bprop=None):
    return ops.Custom(f"{library_file()}:{symbol}", shapes, dtypes, "aot", bprop=bprop)


@functools.cache
def rms_norm():
    """(x [.., W], weight [W], eps [1]) -> (y, the factor of each row)."""
    back = _operator("custom_rms_norm_back", lambda x, w, s, g: (x, w), lambda x, w, s, g: (x, w))

    def bprop(x, weight, eps, out, dout):
        grad_x, grad_weight = back(x, weight, out[1], dout[0])
        return grad_x, grad_weight, ops.zeros_like(eps)

    return _operator("custom_rms_norm", lambda x, w, e: (x, x[:-1]), lambda x, w, e: (x, x), bprop)


@functools.cache
def swiglu():
    """(gate, up) -> silu(gate) * up."""
    back = _operator("custom_swiglu_back", lambda a, b, g: (a, b), lambda a, b, g: (a, b))

    def bprop(gate, up, out, dout):
        return back(gate, up, dout)

    return _operator("custom_swiglu", lambda a, b: a, lambda a, b: a, bprop)


@functools.cache
def rotary():
    """(x [B, T, H, D], cos, sin [B or 1, T, 1, D/2]) -> x turned."""
    back = _operator("custom_rotary_back", lambda g, c, s: g, lambda g, c, s: g)

    def bprop(x, cos, sin, out, dout):
        return back(dout, cos, sin), ops.zeros_like(cos), ops.zeros_like(sin)

    return _operator("custom_rotary", lambda x, c, s: x, lambda x, c, s: x, bprop)


@functools.cache
def attention(causal: bool):
    """(q [B, T, H, D] scaled, k, v [B, T, K, D], doc_ids int32 [B, T]) -> (out as q, zero at filling; log-sums [B, T, H]).

    A run of one number in ``doc_ids`` is a document.
    """
    name = "custom_attention_causal" if causal else "custom_attention_full"
    back = _operator(name + "_back", lambda q, k, v, d, o, s, g: (q, k, v), lambda q, k, v, d, o, s, g: (q, k, v))

    def bprop(q, k, v, doc_ids, out, dout):
        grad_q, grad_k, grad_v = back(q, k, v, doc_ids, out[0], out[1], dout[0])
        return grad_q, grad_k, grad_v, ops.zeros_like(doc_ids)

    return _operator(name, lambda q, k, v, d: (q, q[:-1]), lambda q, k, v, d: (q, q), bprop)


@functools.cache
def cross_entropy():
    """(logits [C, V], targets int32 [C], negative where none) -> (losses [C], softmax - one_hot [C, V]). No gradient of
    its own: the second output is it."""
    return _operator("custom_cross_entropy", lambda x, t: (x[:1], x), lambda x, t: (x, x))


@functools.cache
def dropout():
    """(x, key int32 [4], keep [1]) -> x / keep, or 0 with probability 1 - keep; ``key`` alone decides which."""
    back = _operator("custom_dropout", lambda g, k, p: g, lambda g, k, p: g)

    def bprop(x, key, keep, out, dout):
        return back(dout, key, keep), ops.zeros_like(key), ops.zeros_like(keep)

    return _operator("custom_dropout", lambda x, k, p: x, lambda x, k, p: x, bprop)


@functools.cache
def adamw():
    """(weight, gradient, first, second moment [N], numbers [4], settings [4]) -> weight and both moments after a step; the
    numbers are factor, rate and both corrections of :class:`research.core.mindspore.optimizer.Update`, the settings beta1,
    beta2, eps and decay."""
    return _operator("custom_adamw", lambda w, g, m, v, n, s: (w, m, v), lambda w, g, m, v, n, s: (w, m, v))


def epsilon(value: float) -> Tensor:
    return Tensor(np.array([value], np.float32), ms.float32)
