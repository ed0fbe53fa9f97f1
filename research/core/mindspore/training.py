"""What the training tasks ask of MindSpore; :mod:`research.core.torch.training` has the same names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import Tensor

from research.core.config.schema import Config
from research.core.errors import ConfigError
from research.core.generation.loop import run_requests
from research.core.generation.requests import as_requests
from research.core.mindspore import lora, runtime
from research.core.mindspore.decoder import Decoder
from research.core.mindspore.generate import Runner
from research.core.mindspore.parallel import World
from research.core.mindspore.trainer import Trainer
from research.core.mindspore.weights import init_weights, load_decoder, save_weights
from research.core.spec import DecoderSpec, spec_to_hf
from research.core.weights.opened import OpenOptions

__all__ = ["Trainer", "World", "add_adapter", "build_decoder", "export", "generate", "resolve_dtype"]

_DTYPES = {"fp32": ms.float32, "bf16": ms.bfloat16, "fp16": ms.float16}


@functools.lru_cache(maxsize=1)
def _runner(decoder: Decoder) -> Runner:
    return Runner(decoder)


def generate(decoder, prompts, sampling, max_new_tokens: int, eos_ids, batch: int = 8) -> list[list[int]]:
    """:func:`research.core.mindspore.generate.generate` with the graphs of the former call: a training asks often."""
    requests = as_requests(prompts, sampling, max_new_tokens)
    return [result.ids for result in run_requests(_runner(decoder), requests, eos_ids, None, batch)]


def resolve_dtype(cfg: Config, world: World):
    """``train.dtype`` on this device: ``auto`` is bf16 on Ascend. Raises :class:`ConfigError` for 16 bits on the CPU."""
    name = cfg.train.dtype
    if name == "auto":
        name = "bf16" if runtime.on_ascend() else "fp32"
    if name != "fp32" and not runtime.on_ascend():
        raise ConfigError(
            "MindSpore computes in float32 on the CPU", where=f"train.dtype={name}", hint="train.dtype=fp32, or auto"
        )
    return _DTYPES[name]


def build_decoder(cfg: Config, spec: DecoderSpec, weights: Path | None, dtype, world: World) -> Decoder:
    """The decoder with the weights to start from: a folder's, or random ones drawn from ``train.seed``."""
    if weights is None:
        return init_weights(Decoder(spec, dtype, plan=world.plan(spec)), cfg.train.seed)
    said = OpenOptions(
        concat=cfg.convert.qkv_concat,
        gmm=cfg.convert.use_gmm,
        config=cfg.convert.config,
        strategy=cfg.reshard.strategy,
        allow_pickle=cfg.allow_pickle,
        presets=spec_to_hf(spec),
    )
    return load_decoder(weights, _name(dtype), expect=spec, opening=said, plan=world.plan)


def add_adapter(cfg: Config, decoder: Decoder, say: Callable[[str], None]) -> None:
    """Put a new adapter on the decoder, or the one of ``lora.adapter`` to go on with."""
    dtype = ms.float32 if cfg.train.master == "fp32" else None
    if cfg.lora.adapter is None:
        lora.add_lora(decoder, cfg.lora, seed=cfg.train.seed, dtype=dtype, log=say)
        return
    found = lora.load_adapter(
        decoder, cfg.lora.adapter, dtype=dtype, allow_pickle=cfg.allow_pickle, dropout=cfg.lora.dropout
    )
    found.adapter = cfg.lora.adapter
    cfg.lora = found
    say(f"LoRA goes on from {found.adapter}: rank {found.rank}, alpha {found.alpha:g}")


def export(trainer: Trainer, run: Path, cfg: Config, dtype, options: Callable[[], dict[str, Any]]) -> Path:
    """Write ``adapter/`` in PEFT's format or ``weights/`` in Hugging Face's, with the ``options`` of
    :func:`save_weights`; every worker has to call it. Returns the folder."""
    main, values = trainer.world.main, trainer.optimizer.trained()
    if lora.has_lora(trainer.decoder):
        if main:
            lora.save_adapter(trainer.decoder, run / "adapter", cfg.lora, base=cfg.weights, values=values)
        return run / "adapter"
    if main:
        parameters = {name: Tensor(value) for name, value in values.items()}
        save_weights(trainer.decoder.spec, parameters, run / "weights", _name(dtype), overwrite=True, **options())
    return run / "weights"


def _name(dtype) -> str:
    return {ms.float32: "float32", ms.bfloat16: "bfloat16", ms.float16: "float16"}[dtype]
