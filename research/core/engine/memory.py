"""How many blocks the key/value cache gets."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from research.core.config.schema import EngineConfig
from research.core.errors import ConfigError
from research.core.spec import DecoderSpec

_log = logging.getLogger("research.engine")
GB = 1e9
CPU_FRACTION, CARD_FRACTION = 0.5, 0.9  # of the free memory, where no engine.memory_fraction is set


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``; on a CPU what the operating system calls available."""
    if device.type != "cpu":
        return getattr(torch, device.type).mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        import os

        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return min(found, *_cgroup_room()) if _cgroup_room() else found


def _cgroup_room() -> list[int]:
    """What the container that this process runs in may still take, where it has a limit."""
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            text = limit.read().strip()
            return [] if text == "max" else [max(0, int(text) - int(used.read()))]
    except (OSError, ValueError):
        return []


def count_blocks(
    settings: EngineConfig,
    spec: DecoderSpec,
    dtype: torch.dtype,
    device: torch.device,
    kv_heads: int | None = None,
    say: Callable[[str], None] = _log.info,
) -> int:
    """``engine.num_blocks``, or as many blocks as ``engine.memory_fraction`` of the free memory holds, but not more than
    ``engine.max_batch`` answers of full length can fill. ``kv_heads``: those of one rank. Says what it takes."""
    size = settings.block_size
    heads = kv_heads or spec.kv_heads
    bytes_per_block = 2 * spec.layers * heads * spec.head_dim * dtype.itemsize * size
    longest = min(settings.max_length or spec.usable_length, spec.usable_length)
    enough = settings.max_batch * -(-longest // size)
    if settings.num_blocks is not None:
        blocks, why = settings.num_blocks, "engine.num_blocks"
    else:
        fraction = settings.memory_fraction or (CPU_FRACTION if device.type == "cpu" else CARD_FRACTION)
        free = free_memory(device)
        held = int(free * fraction) // bytes_per_block
        if held < 1:
            raise ConfigError(
                f"one block of {size} tokens takes {bytes_per_block / GB:.3f} GB and {free / GB:.2f} GB are free",
                where="engine.memory_fraction",
                hint="a larger fraction, a smaller engine.block_size, or a smaller model",
            )
        blocks, why = held, f"{fraction:.0%} of the {free / GB:.1f} GB that are free"
        if enough < held:
            blocks, why = enough, f"all that engine.max_batch={settings.max_batch} answers of {longest} tokens can fill"
    say(
        f"key/value cache: {blocks} blocks of {size} tokens, {blocks * size:,} tokens, "
        f"{blocks * bytes_per_block / GB:.2f} GB ({why})"
    )
    return blocks
