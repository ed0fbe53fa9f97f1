"""Linear layers and the SwiGLU feed-forward, and how parameters are made. Tokens are rows [N, features]."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import One, Zero

from research.core.mindspore import fused, native


def zeros(shape: tuple[int, ...], dtype, name: str = "weight") -> Parameter:
    return Parameter(Tensor(shape=shape, dtype=dtype, init=Zero()).init_data(), name=name)


def ones(shape: tuple[int, ...], dtype) -> Parameter:
    return Parameter(Tensor(shape=shape, dtype=dtype, init=One()).init_data(), name="weight")


class Linear(nn.Cell):
    """x W^T + b on rows [N, in]; ``weight`` [out, in]. A Cell of its own, so that LoRA, quantisation and tensor
    parallelism can exchange it."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, dtype=ms.float32):
        super().__init__()
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias
        self.weight = zeros((out_features, in_features), dtype)
        self.bias = zeros((out_features,), dtype, "bias") if bias else None
        self.matmul = ops.MatMul(transpose_b=True)
        self.bias_add = ops.BiasAdd()

    def construct(self, x):
        out = self.matmul(x, self.weight)
        return self.bias_add(out, self.bias) if self.has_bias else out


class GatedProduct(nn.Cell):
    """silu(gate) * up; a Cell of its own, so that selective checkpointing can compute it again."""

    def __init__(self, kernels: str):
        super().__init__()
        self.kernels = kernels
        self.swiglu = native.swiglu() if kernels == "native" else None

    def construct(self, gate, up):
        if self.kernels == "ascend":
            return fused.swiglu(gate, up)
        if self.kernels == "native":
            return self.swiglu(gate, up)
        return ops.silu(gate) * up


class MLP(nn.Cell):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, ffn: int, dtype, kernels: str):
        super().__init__()
        self.gate_proj = Linear(hidden, ffn, False, dtype)
        self.up_proj = Linear(hidden, ffn, False, dtype)
        self.down_proj = Linear(ffn, hidden, False, dtype)
        self.product = GatedProduct(kernels)

    def construct(self, x):
        return self.down_proj(self.product(self.gate_proj(x), self.up_proj(x)))
