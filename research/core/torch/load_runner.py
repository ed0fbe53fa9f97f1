"""A weight folder, and an adapter on it, ready to generate on torch."""

from __future__ import annotations

import os

from research.core.config.schema import DeviceConfig, GenerateConfig
from research.core.torch.device import resolve_device, resolve_dtype
from research.core.torch.generate import Runner
from research.core.torch.lora import load_adapter
from research.core.torch.packed_linear import pack_frozen_linears
from research.core.torch.weights import load_decoder
from research.core.weights.opened import NOTHING_SAID, OpenOptions


def load_runner(
    weights: str | os.PathLike,
    generate: GenerateConfig,
    device: DeviceConfig,
    adapter: str | os.PathLike | None = None,
    opening: OpenOptions = NOTHING_SAID,
) -> tuple[Runner, str]:
    """-> (the runner, its dtype and device in words). Raises UserErrors for folders, adapters and devices."""
    where = resolve_device(device)
    dtype = resolve_dtype(generate.dtype, where)
    decoder = load_decoder(
        weights, dtype=dtype, device=where, attention=device.attention, allow_pickle=opening.allow_pickle
    )
    if adapter:
        load_adapter(decoder, adapter, allow_pickle=opening.allow_pickle)
    pack_frozen_linears(decoder.requires_grad_(False))
    return Runner(decoder, compiled=generate.compile), f"{str(dtype).removeprefix('torch.')} on {where}"
