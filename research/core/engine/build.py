"""From a weight folder and settings to an engine that runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from research.core.config.schema import Config
from research.core.engine.adapters import TABLE, Adapters, read_table
from research.core.engine.api import Engine
from research.core.engine.batch import StepPlan
from research.core.engine.engine import PagedEngine, check_settings
from research.core.engine.memory import count_blocks
from research.core.engine.runner import ModelRunner
from research.core.errors import UserError, WeightsError
from research.core.text.tokenizer import Tokenizer
from research.core.torch.device import resolve_device, resolve_dtype
from research.core.torch.multi_lora import AdapterSlots
from research.core.torch.packed_linear import pack_frozen_linears
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
    """
    where = resolve_device(cfg.device)
    dtype = resolve_dtype(cfg.generate.dtype, where)
    decoder = load_decoder(
        weights,
        dtype=dtype,
        device=where,
        attention=cfg.device.attention,
        head=not cfg.model.embedding,
        allow_pickle=opening.allow_pickle,
    )
    pack_frozen_linears(decoder.requires_grad_(False))
    settings = check_settings(cfg.engine, decoder)
    blocks = count_blocks(settings, decoder.spec, dtype, where, say=say) if decoder.spec.causal else 1
    slots = AdapterSlots(decoder)
    runner = ModelRunner(decoder, settings, blocks, adapters=Routes(slots))
    engine = PagedEngine(decoder, tokenizer, settings, eos_ids, runner, Adapters(slots))
    load_adapters(engine, Path(weights), adapters or {}, say)
    return engine, f"{str(dtype).removeprefix('torch.')} on {where}"


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
