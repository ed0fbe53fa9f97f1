"""Rotary positions (arXiv 2104.09864): frequencies, the tables of one step, and their application.

Shape letters: B batch, T time, H heads (query or kv), D head_dim. Three ways of going past the training length:
``linear`` and ``yarn`` scale the frequencies for good, as transformers does; Qwen v1's dynamic NTK raises the base
with the length of a row's first forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from research.core.spec import DecoderSpec, RopeScaling
from research.core.torch.native import ops


@dataclass(eq=False)
class RopeTables:
    """cos and sin [B or 1, T, 1, D/2], and the log-n factor of the query [B or 1, T, 1, 1] (None: no factor)."""

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None = None


def apply_rotary(x_BTHD: Tensor, rope: RopeTables) -> Tensor:
    """Rotate the pairs (i, i + D/2). Tables in float32 on a bf16 ``x`` compute in float32 and round once."""
    if ops.rotary_ready(x_BTHD, rope.cos):
        return ops.rotary(x_BTHD, rope.cos, rope.sin)
    first, second = x_BTHD.chunk(2, dim=-1)
    rotated = torch.cat((first * rope.cos - second * rope.sin, second * rope.cos + first * rope.sin), dim=-1)
    return rotated.to(x_BTHD.dtype)


def scale_query(q_BTHD: Tensor, rope: RopeTables) -> Tensor:
    """Qwen v1's log-n attention: scale the query after the rotary."""
    return q_BTHD if rope.query_scale is None else q_BTHD * rope.query_scale


def inverse_frequencies(spec: DecoderSpec) -> tuple[Tensor, float]:
    """Frequencies [D/2] (float32, CPU) and the factor on cos and sin, without dynamic NTK."""
    scaling = spec.rope_scaling
    if scaling is not None and scaling.kind == "yarn":
        return _yarn(spec, scaling)
    frequencies = 1.0 / _powers(spec)
    if scaling is not None:
        frequencies = frequencies / scaling.factor
    return frequencies, 1.0


def _exponents(spec: DecoderSpec) -> Tensor:
    return torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device="cpu") / spec.head_dim


def _powers(spec: DecoderSpec) -> Tensor:
    return spec.rope_theta ** _exponents(spec)


def _yarn(spec: DecoderSpec, scaling: RopeScaling) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071, section 3): dimensions that turn often keep their frequency, slow ones are divided by
    ``factor``, a linear ramp between; ``0.1 ln(factor) + 1`` goes on cos and sin."""
    dim, base, trained = spec.head_dim, spec.rope_theta, scaling.original_positions

    def turning(turns: float) -> float:  # the dimension that turns so many times within the trained length
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(turning(scaling.beta_fast)), 0)
    high = min(math.ceil(turning(scaling.beta_slow)), dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    kept, powers = 1 - ramp, _powers(spec)
    frequencies = (1.0 / (scaling.factor * powers)) * (1 - kept) + (1.0 / powers) * kept
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return frequencies, factor


def ntk_alpha(lengths: Tensor | int, train_length: int) -> Tensor | float:
    """Qwen v1's ``2^ceil(log2(length / train_length) + 1) - 1``, at least 1; float64 for tensors."""
    if isinstance(lengths, int):
        if lengths <= train_length:
            return 1.0
        return 2.0 ** math.ceil(math.log2(lengths / train_length) + 1) - 1
    turns = torch.log2(lengths.to(torch.float64).clamp(min=1) / train_length) + 1
    return (torch.exp2(turns.ceil()) - 1).clamp(min=1)


class Rotary:
    """The tables of one forward for a spec. Holds frequencies per device, no parameters and no buffers."""

    def __init__(self, spec: DecoderSpec):
        self.spec = spec
        self._frequencies: dict[torch.device, Tensor] = {}
        self._factor = 1.0

    def tables(self, positions: Tensor, dtype: torch.dtype, alpha: Tensor | float = 1.0, logn: bool = False):
        """Tables for ``positions`` [B or 1, T] (int64) in ``dtype``.

        ``alpha`` (float, or float64 broadcastable to positions) raises the base to ``theta * alpha^(D/(D-2))``;
        ``logn`` adds Qwen v1's query factor ``log_train_length(position + 1)`` past the training length.
        Qwen v1 rotates in float32 whatever the model's dtype; the others in the model's dtype, as published.
        """
        spec = self.spec
        angles = positions[..., None].float() * self._inverse(positions.device, alpha)
        cos, sin = angles.cos(), angles.sin()
        if self._factor != 1.0:
            cos, sin = cos * self._factor, sin * self._factor
        if spec.model_type != "qwen":
            cos, sin = cos.to(dtype), sin.to(dtype)
        scale = None
        if logn:
            count = (positions + 1).double()
            scale = torch.log(count) / math.log(spec.train_length)
            scale = torch.where(count > spec.train_length, scale, 1.0).to(dtype)[..., None, None]
        return RopeTables(cos.unsqueeze(-2), sin.unsqueeze(-2), scale)

    def _inverse(self, device: torch.device, alpha: Tensor | float) -> Tensor:
        if isinstance(alpha, float) and alpha == 1.0:
            if device not in self._frequencies:
                frequencies, self._factor = inverse_frequencies(self.spec)
                self._frequencies[device] = frequencies.to(device)
            return self._frequencies[device]
        dim, exponents = self.spec.head_dim, _exponents(self.spec).to(device)
        base = self.spec.rope_theta * alpha ** (dim / (dim - 2))
        if isinstance(base, Tensor):
            base = base.float()[..., None]
        return 1.0 / base**exponents
