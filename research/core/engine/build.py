"""From a weight folder and settings to an engine that runs."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from research.core.config.schema import Config, EngineConfig
from research.core.engine.adapters import TABLE, Adapters, read_table
from research.core.engine.api import Engine
from research.core.engine.batch import StepPlan
from research.core.engine.engine import PagedEngine, check_settings
from research.core.engine.memory import CPU_FRACTION, count_blocks
from research.core.engine.ranks import LeadingRunner, LeadingSlots, Wire, follow
from research.core.engine.runner import ModelRunner
from research.core.errors import UserError, WeightsError
from research.core.launch.environment import place
from research.core.text.tokenizer import Tokenizer
from research.core.torch.decoder import Decoder
from research.core.torch.device import resolve_device, resolve_dtype
from research.core.torch.multi_lora import AdapterSlots
from research.core.torch.packed_linear import pack_frozen_linears
from research.core.torch.parallel import World
from research.core.torch.tensor_parallel import load_part
from research.core.torch.weights import load_decoder
from research.core.weights.opened import NOTHING_SAID, OpenOptions

Say = Callable[[str], None]


def open_engine(
    weights: str | os.PathLike,
    tokenizer: Tokenizer,
    eos_ids: Collection[int],
    cfg: Config,
    adapters: Mapping[str, Path] | None = None,
    opening: OpenOptions = NOTHING_SAID,
    say: Say = lambda line: None,
) -> tuple[Engine, str]:
    """-> (the engine, its dtype and device in words), as ``cfg.engine``, ``cfg.generate.dtype`` and ``cfg.device`` say.

    ``eos_ids`` end every answer. Loaded from the start: what ``lora_adapter.json`` beside the weights lists, and
    ``adapters``, name to folder, which win over it. ``say`` hears of the cache's size and of adapters. Raises
    :class:`UserError` for weights, adapters, devices and settings that do not fit.

    On several ranks (started by torchrun or :mod:`research.core.launch`) each holds its part of the decoder. All of them
    call this; it returns on the first, and the others leave by SystemExit when that one's engine is closed.
    """
    world = _world(cfg)
    # Measured where it says "auto": the ranks must not come to different results.
    dtype = world.tell(resolve_dtype(cfg.generate.dtype, world.device) if world.main else None)
    decoder = _load(weights, cfg, opening, world, dtype)
    engine = engine_of(decoder, tokenizer, eos_ids, cfg.engine, world, say if world.main else lambda line: None)
    load_adapters(engine, Path(weights), adapters or {}, say)
    cards = f" and {world.size - 1} more" if world.size > 1 else ""
    return engine, f"{str(dtype).removeprefix('torch.')} on {world.device}{cards}"


def _world(cfg: Config) -> World:
    if dist.is_initialized():  # an engine before this one, in the same process
        here = place()
        return World(resolve_device(cfg.device, here.local_rank, here.local_size), here.rank, here.size)
    if place() is None or place().size == 1:
        return World(resolve_device(cfg.device))
    world = World.join(cfg)
    atexit.register(world.leave)
    return world


def _load(weights, cfg: Config, opening: OpenOptions, world: World, dtype: torch.dtype) -> Decoder:
    if world.size > 1:
        opening = replace(opening, head=not cfg.model.embedding)
        how = {"dtype": dtype, "device": world.device, "attention": cfg.device.attention}
        decoder = load_part(weights, world.rank, world.size, **how, opening=opening)
    else:
        decoder = load_decoder(
            weights,
            dtype=dtype,
            device=world.device,
            attention=cfg.device.attention,
            head=not cfg.model.embedding,
            allow_pickle=opening.allow_pickle,
        )
    pack_frozen_linears(decoder.requires_grad_(False))
    return decoder


def engine_of(
    decoder: Decoder,
    tokenizer: Tokenizer,
    eos_ids: Collection[int],
    settings: EngineConfig,
    world: World,
    say: Say = lambda line: None,
) -> PagedEngine:
    """An engine of a loaded decoder, ready for adapters. Ranks but the first do not come back from here: they compute for
    it and leave by SystemExit when it is closed."""
    dtype, device = decoder.model.embed_tokens.weight.dtype, world.device
    settings = check_settings(settings, decoder)
    if world.size > 1:
        world.sum(0)  # when all are here, every rank's weights are in memory
        settings = _share(world.tell(settings), world)  # the first rank's: it knows the requests
    blocks = count_blocks(settings, decoder.spec, dtype, device, say=say) if decoder.spec.causal else 1
    slots = AdapterSlots(decoder)
    if world.size == 1:
        runner = ModelRunner(decoder, settings, blocks, adapters=Routes(slots))
        return PagedEngine(decoder, tokenizer, settings, eos_ids, runner, Adapters(slots))
    wire = Wire()
    runner = ModelRunner(decoder, settings, wire.smallest(blocks), adapters=Routes(slots))
    if not world.main:
        follow(runner, slots, wire)
        raise SystemExit(0)
    leading = LeadingRunner(runner, wire)
    engine = PagedEngine(decoder, tokenizer, settings, eos_ids, leading, Adapters(LeadingSlots(slots, wire)))
    engine.spec = decoder.parallel.whole
    return engine


def _share(settings: EngineConfig, world: World) -> EngineConfig:
    """Ranks that compute on one host's CPU share its memory."""
    if world.device.type != "cpu":
        return settings
    return replace(settings, memory_fraction=(settings.memory_fraction or CPU_FRACTION) / place().local_size)


class Routes:
    """Tells the adapters of a decoder which rows of a step use which of them."""

    def __init__(self, slots: AdapterSlots):
        self.slots = slots

    def select(self, plan: StepPlan) -> None:
        if plan.adapters is None:
            self.slots.route()
        else:
            self.slots.route(plan.queries, plan.adapters)


def load_adapters(engine: Engine, weights: Path, given: Mapping[str, Path], say: Say) -> None:
    """Load the adapters of ``lora_adapter.json`` and those ``given``; an error names the entry."""
    listed = {name: (folder, weights / TABLE) for name, folder in read_table(weights).items()}
    for name, (folder, source) in (listed | {name: (folder, None) for name, folder in given.items()}).items():
        try:
            engine.load_adapter(name, Path(folder))
        except UserError as error:
            if source is None:
                raise
            raise WeightsError(f"adapter {name!r}: {error}", where=source) from None
        say(f"adapter {name} from {folder}")
