"""A weight folder, and an adapter on it, ready to generate on MindSpore."""

from __future__ import annotations

import os

from research.core.config.schema import DeviceConfig, GenerateConfig
from research.core.errors import ConfigError
from research.core.mindspore import runtime
from research.core.weights.opened import NOTHING_SAID, OpenOptions

DTYPES = {"auto": None, "fp32": "float32", "bf16": "bfloat16"}


def load_runner(
    weights: str | os.PathLike,
    generate: GenerateConfig,
    device: DeviceConfig,
    adapter: str | os.PathLike | None = None,
    opening: OpenOptions = NOTHING_SAID,
):
    """-> (a :class:`research.core.mindspore.generate.Runner`, its dtype and device in words). Raises UserErrors for
    folders, adapters and devices."""
    from research.core.mindspore import generate as generation

    decoder, target = _load(weights, generate, device, adapter, opening, "auto")
    return generation.Runner(decoder), f"{str(decoder.dtype).lower()} on {target} (MindSpore)"


def load_plain(
    weights: str | os.PathLike,
    generate: GenerateConfig,
    device: DeviceConfig,
    adapter: str | os.PathLike | None = None,
    opening: OpenOptions = NOTHING_SAID,
):
    """-> (the decoder as graphs are exported of, the device's name): an adapter is folded in, and there are no kernels of
    this machine's in it."""
    decoder, target = _load(weights, generate, device, adapter, opening, None)
    if adapter:
        from research.core.mindspore.lora import merge_lora

        merge_lora(decoder)
    return decoder, target


def _load(weights, generate: GenerateConfig, device: DeviceConfig, adapter, opening: OpenOptions, kernels: str | None):
    where = runtime.start(device)
    if where.on_cpu and generate.dtype == "bf16":
        raise ConfigError(
            "MindSpore computes in float32 on the CPU",
            where="generate.dtype=bf16",
            hint="generate.dtype=fp32, or BACKEND=torch",
        )
    from research.core.mindspore.weights import load_decoder

    if kernels is None:
        kernels = "composite" if where.on_cpu else "auto"

    decoder = load_decoder(weights, DTYPES[generate.dtype], opening=opening, kernels=kernels)
    if adapter:
        from research.core.mindspore.lora import load_adapter

        load_adapter(decoder, adapter, allow_pickle=opening.allow_pickle)
    return decoder, where.target
