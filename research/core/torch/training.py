"""What the training tasks ask of torch; :mod:`research.core.mindspore.training` has the same names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from research.core.config.schema import Config
from research.core.spec import DecoderSpec
from research.core.torch import lora
from research.core.torch.decoder import Decoder
from research.core.torch.device import resolve_dtype as dtype_of_device
from research.core.torch.generate import generate
from research.core.torch.optimizer import whole
from research.core.torch.parallel import World
from research.core.torch.trainer import Trainer
from research.core.torch.weights import load_decoder, save_weights

__all__ = ["Trainer", "World", "add_adapter", "build_decoder", "export", "generate", "resolve_dtype"]


def resolve_dtype(cfg: Config, world: World) -> torch.dtype:
    """``train.dtype`` on this device."""
    return dtype_of_device(cfg.train.dtype, world.device)


def build_decoder(cfg: Config, spec: DecoderSpec, weights: Path | None, dtype: torch.dtype, world: World) -> Decoder:
    """The decoder with the weights to start from: a folder's, or random ones drawn from ``train.seed``."""
    attention, device = cfg.device.attention, world.device
    if weights is not None:
        return load_decoder(weights, dtype=dtype, device=device, attention=attention, allow_pickle=cfg.allow_pickle)
    decoder = Decoder(spec).init_weights(cfg.train.seed).to(device, dtype)
    decoder.use_attention(attention)
    return decoder


def add_adapter(cfg: Config, decoder: Decoder, say: Callable[[str], None]) -> None:
    """Put a new adapter on the decoder, or the one of ``lora.adapter`` to go on with."""
    dtype = torch.float32 if cfg.train.master == "fp32" else None
    if cfg.lora.adapter is None:
        lora.add_lora(decoder, cfg.lora, seed=cfg.train.seed, dtype=dtype, log=say)
        return
    found = lora.load_adapter(decoder, cfg.lora.adapter, dtype=dtype, allow_pickle=cfg.allow_pickle)
    found.adapter, found.dropout = cfg.lora.adapter, cfg.lora.dropout
    for _, layer in lora.lora_layers(decoder):
        layer.dropout = cfg.lora.dropout
    cfg.lora = found
    say(f"LoRA goes on from {found.adapter}: rank {found.rank}, alpha {found.alpha:g}")


def export(trainer: Trainer, run: Path, cfg: Config, dtype: torch.dtype, options: Callable[[], dict[str, Any]]) -> Path:
    """Write ``adapter/`` in PEFT's format or ``weights/`` in Hugging Face's, with the ``options`` of
    :func:`save_weights`; every card has to call it. Returns the folder."""
    main = trainer.world.main
    if lora.has_lora(trainer.decoder):
        lora.save_adapter(trainer.decoder, run / "adapter", cfg.lora, base=cfg.weights, write=main)
        return run / "adapter"
    parameters = {
        name: tensor.cpu() if main else None
        for name, tensor in ((name, whole(value)) for name, value in trainer.optimizer.weights().items())
    }
    if main:
        save_weights(trainer.decoder.spec, parameters, run / "weights", dtype, overwrite=True, **options())
    return run / "weights"
