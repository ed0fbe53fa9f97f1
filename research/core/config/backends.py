"""What each backend can do with the settings: contradictions are refused, settings without effect are named.

What cannot be had is an error with the setting to use instead; what makes no difference is a line of
:func:`without_effect`, which the command line prints before the task starts.
"""

from __future__ import annotations

from collections.abc import Sequence

from research.core.config.schema import Config, MindirConfig
from research.core.errors import ConfigError
from research.core.spec import DecoderSpec, spec_from_hf
from research.core.weights.grid import Grid, shard_model

_TRAINING = ("pretrain", "finetune", "lora")
_ANSWERS = ("predict", "chat", "export")


def check_backend(config: Config) -> None:
    """Raise :class:`ConfigError` for a setting that ``config.backend`` cannot follow."""
    _check_grid(config)
    if config.backend == "torch":
        _check_torch(config)
    elif config.backend == "mindspore":
        _check_mindspore(config)


def _check_grid(config: Config) -> None:
    parallel = config.parallel
    if parallel.stage_layers and len(parallel.stage_layers) != parallel.pipeline:
        raise ConfigError(
            f"{len(parallel.stage_layers)} numbers of layers for {parallel.pipeline} pipeline stages",
            where=f"parallel.stage_layers={_listed(parallel.stage_layers)}",
            hint=f"parallel.pipeline={len(parallel.stage_layers)}",
        )
    cards, inner = parallel.cards * parallel.nodes, parallel.tensor * parallel.pipeline
    data = parallel.data
    if data is None and cards % inner == 0:
        return
    if data is not None and data * inner == cards:
        return
    named = f"parallel.tensor={parallel.tensor} parallel.pipeline={parallel.pipeline}"
    if data is not None:
        named = f"parallel.data={data} {named}"
    wanted = inner * (data or 1)
    what = f"make {wanted} cards" if data is not None else f"need a multiple of {inner} cards"
    fits = f"CARDS={max(1, wanted // parallel.nodes)}"
    if cards % inner == 0:
        fits += f", or parallel.data={cards // inner}"
    raise ConfigError(f"{what}, and there are {cards}", where=named, hint=fits)


def check_sharing(config: Config) -> None:
    """Raise :class:`ConfigError` when the cards cannot share the model's layers on mindspore; to be called when ``config.model``
    is known. Answers and graphs are made by all cards together, trainings by ``parallel.tensor`` of them in each of
    ``parallel.pipeline`` stages."""
    parallel = config.parallel
    together = config.task.name in _ANSWERS
    shares = parallel.cards * parallel.nodes if together else max(parallel.tensor, parallel.pipeline)
    if config.backend != "mindspore" or shares == 1 or config.model.hf.get("num_attention_heads") is None:
        return
    spec = spec_from_hf({"vocab_size": 1} | {k: v for k, v in config.model.hf.items() if v is not None})
    if together:
        _check_shared(config, spec, Grid(tensor=shares), f"CARDS={shares}")
        return
    _check_shared(config, spec, Grid(tensor=parallel.tensor), f"parallel.tensor={parallel.tensor}")
    if parallel.pipeline > spec.layers:
        raise ConfigError(
            f"{spec.layers} layers make no {parallel.pipeline} stages",
            where=f"parallel.pipeline={parallel.pipeline} with {config.model.name}",
            hint=f"parallel.pipeline={spec.layers} or fewer",
        )
    try:
        Grid(pipeline=parallel.pipeline, stage_layers=tuple(parallel.stage_layers)).layers_per_stage(spec.layers)
    except ConfigError as problem:
        even = Grid(pipeline=parallel.pipeline).layers_per_stage(spec.layers)
        raise ConfigError(
            problem.what,
            where=f"parallel.stage_layers={_listed(parallel.stage_layers)} with {config.model.name}",
            hint=f"parallel.stage_layers={_listed(even)}",
        ) from None


def _check_shared(config: Config, spec: DecoderSpec, grid: Grid, named: str) -> None:
    try:
        shard_model(spec, grid)
    except ConfigError as problem:
        raise ConfigError(problem.what, where=f"{named} with {config.model.name}", hint=problem.hint) from None


def _listed(layers: Sequence[int]) -> str:
    return f"[{','.join(map(str, layers))}]"


def _check_torch(config: Config) -> None:
    parallel, train = config.parallel, config.train
    if parallel.tensor * parallel.pipeline > 1 or parallel.stage_layers:
        raise ConfigError(
            "on torch every card has whole layers",
            where=f"parallel.tensor={parallel.tensor} parallel.pipeline={parallel.pipeline}",
            hint="parallel.shard=full, which spreads the weights over the cards, or BACKEND=mindspore",
        )
    if parallel.shard == "optimizer":
        raise ConfigError(
            "torch shards weights, gradients and optimiser state together",
            where="parallel.shard=optimizer",
            hint="parallel.shard=full, or BACKEND=mindspore",
        )
    if train.dtype == "fp16":
        raise ConfigError(
            "fp16 with loss scaling is the mindspore backend's; torch trains in fp32 or bf16",
            where="train.dtype=fp16",
            hint="train.dtype=bf16",
        )


def _check_mindspore(config: Config) -> None:
    if config.parallel.shard == "full":
        raise ConfigError(
            "MindSpore splits layers (parallel.tensor, parallel.pipeline) and the optimiser's state",
            where="parallel.shard=full",
            hint="parallel.shard=optimizer",
        )


def without_effect(config: Config) -> list[str]:
    """One line for each setting that differs from its default and changes nothing in this task on this backend."""
    notes = []
    torch, task = config.backend == "torch", config.task.name
    cards = config.parallel.cards * config.parallel.nodes
    if torch and not config.auto_transform:
        notes.append("auto_transform=false has no effect on torch: a checkpoint there is whole, or loads on any cards")
    if not torch and config.train.compile and task in _TRAINING:
        notes.append("train.compile has no effect with MindSpore: its graphs are always compiled")
    if not torch and config.generate.compile and task in ("predict", "chat"):
        notes.append("generate.compile has no effect with MindSpore: its graphs are always compiled")
    if config.mindir != MindirConfig() and (torch or task not in ("export", "lite")):
        notes.append(
            f"mindir.* has no effect here: it shapes the graphs of `make export BACKEND=mindspore`, not {task}"
        )
    if not torch and task in _ANSWERS and (config.parallel.tensor not in (1, cards) or config.parallel.pipeline > 1):
        notes.append(
            f"parallel.tensor and pipeline have no effect on {task} with MindSpore: all cards share every layer"
        )
    if config.device.index is not None and cards > 1:
        notes.append("device.index has no effect on several cards: each rank takes the card of its number")
    elif config.device.index is not None and config.device.kind == "cpu":
        notes.append("device.index has no effect on the CPU")
    if config.train.dtype != "fp16" and task in _TRAINING and _scaled(config):
        notes.append(f"train.loss_scale has no effect with train.dtype={config.train.dtype}: only fp16 needs it")
    return notes


def _scaled(config: Config) -> bool:
    default = type(config.train)()
    return (config.train.loss_scale, config.train.loss_scale_window) != (default.loss_scale, default.loss_scale_window)
