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
    folders, adapters and devices. Several workers share every layer, and have to ask for the same."""
    from research.core.mindspore import generate as generation
    from research.core.mindspore.tensor_parallel import parallelize

    decoder, world = _load(weights, generate, device, adapter, opening, "auto")
    workers = f"{world.size} x " if world.size > 1 else ""
    where = f"{str(decoder.dtype).lower()} on {workers}{world.target} (MindSpore)"
    return generation.Runner(parallelize(decoder)), where


def load_plain(
    weights: str | os.PathLike,
    generate: GenerateConfig,
    device: DeviceConfig,
    adapter: str | os.PathLike | None = None,
    opening: OpenOptions = NOTHING_SAID,
):
    """-> (the decoder as graphs are exported of, the :class:`research.core.mindspore.parallel.World`): an adapter is folded
    in, and there are no kernels of this machine's in it."""
    from research.core.mindspore.tensor_parallel import parallelize

    decoder, world = _load(weights, generate, device, adapter, opening, None)
    if adapter:
        from research.core.mindspore.lora import merge_lora

        merge_lora(decoder)
    return parallelize(decoder), world


def _load(weights, generate: GenerateConfig, device: DeviceConfig, adapter, opening: OpenOptions, kernels: str | None):
    runtime.require_mindspore()
    from research.core.mindspore.parallel import World

    world = World.meet(device)
    world.tensor = world.size
    if world.on_cpu and generate.dtype == "bf16":
        raise ConfigError(
            "MindSpore computes in float32 on the CPU",
            where="generate.dtype=bf16",
            hint="generate.dtype=fp32, or BACKEND=torch",
        )
    from research.core.mindspore.weights import load_decoder

    if kernels is None:
        kernels = "composite" if world.on_cpu else "auto"

    decoder = load_decoder(weights, DTYPES[generate.dtype], opening=opening, kernels=kernels, plan=world.plan)
    if adapter:
        from research.core.mindspore.lora import load_adapter

        load_adapter(decoder, adapter, allow_pickle=opening.allow_pickle)
    return decoder, world
