"""Rotary positions (arXiv 2104.09864): frequencies, the tables of one forward, and their application.

Shape letters: B batch, T time, H heads (query or kv), D head_dim. ``linear`` and ``yarn`` scale the frequencies for
good, as transformers does; Qwen v1's dynamic NTK comes as a base per position from the host
(:func:`research.core.mindspore.layout.rope_base`), because it follows from the length of a row's first forward.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from research.core.spec import DecoderSpec, RopeScaling


class Rotary(nn.Cell):
    """The tables of one forward. No parameters."""

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        frequencies, self.factor = inverse_frequencies(spec)
        self.frequencies = Tensor(frequencies)
        self.exponents = Tensor(_exponents(spec))
        self.dynamic = spec.dynamic_ntk
        self.logn = spec.logn_attention
        self.train_length = float(spec.train_length or 1)
        self.log_train_length = math.log(self.train_length) or 1.0
        self.wide = spec.model_type == "qwen"
        self.scale = spec.head_dim**-0.5

    def construct(self, position_ids, rope_base, dtype):
        """Positions [B, T] int32 and bases [B, 1 or T] float32 (or None) -> (cos, sin) for keys and (cos, sin) for
        queries, each [B, T, 1, D/2].

        The queries' are multiplied by 1/sqrt(D) and by Qwen v1's log-n factor ``log_train_length(position + 1)``:
        turning is linear, so that their scaling costs no step of its own. Qwen v1 rotates in float32 whatever the
        model's dtype; the others in the model's dtype, as published.
        """
        frequencies = self.frequencies
        if self.dynamic and rope_base is not None and not self.training:
            frequencies = 1.0 / ops.pow(rope_base.expand_dims(-1), self.exponents)
        places = position_ids.astype(ms.float32).expand_dims(-1)
        angles = places * frequencies
        cos, sin = ops.cos(angles) * self.factor, ops.sin(angles) * self.factor
        scale = self.scale
        if self.logn and not self.training:
            count = places + 1.0
            scale = scale * ops.maximum(ops.log(count) / self.log_train_length, 1.0)
        q_cos, q_sin = cos * scale, sin * scale
        if not self.wide:
            cos, sin, q_cos, q_sin = cos.astype(dtype), sin.astype(dtype), q_cos.astype(dtype), q_sin.astype(dtype)
        return (cos.expand_dims(2), sin.expand_dims(2)), (q_cos.expand_dims(2), q_sin.expand_dims(2))


def apply_rotary(x_BTHD, cos, sin):
    """Rotate the pairs (i, i + D/2). Tables in float32 on a bf16 ``x`` compute in float32 and round once."""
    half = x_BTHD.shape[-1] // 2
    first, second = x_BTHD[..., :half], x_BTHD[..., half:]
    return ops.cat((first * cos - second * sin, second * cos + first * sin), -1).astype(x_BTHD.dtype)


def inverse_frequencies(spec: DecoderSpec) -> tuple[np.ndarray, float]:
    """Frequencies [D/2] (float32) and the factor on cos and sin, without dynamic NTK."""
    scaling = spec.rope_scaling
    if scaling is not None and scaling.kind == "yarn":
        return _yarn(spec, scaling)
    frequencies = 1.0 / _powers(spec)
    if scaling is not None:
        frequencies = frequencies / np.float32(scaling.factor)
    return frequencies.astype(np.float32), 1.0


def _exponents(spec: DecoderSpec) -> np.ndarray:
    return np.arange(0, spec.head_dim, 2, dtype=np.float32) / np.float32(spec.head_dim)


def _powers(spec: DecoderSpec) -> np.ndarray:
    return np.power(np.float32(spec.rope_theta), _exponents(spec))


def _yarn(spec: DecoderSpec, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071, section 3): dimensions that turn often keep their frequency, slow ones are divided by
    ``factor``, a linear ramp between; ``0.1 ln(factor) + 1`` goes on cos and sin."""
    dim, base, trained = spec.head_dim, spec.rope_theta, scaling.original_positions

    def turning(turns: float) -> float:  # the dimension that turns so many times within the trained length
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(turning(scaling.beta_fast)), 0)
    high = min(math.ceil(turning(scaling.beta_slow)), dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    kept, powers = 1 - ramp, _powers(spec)
    frequencies = (1.0 / (scaling.factor * powers)) * (1 - kept) + (1.0 / powers) * kept
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return frequencies.astype(np.float32), float(factor)
