"""``make convert``: weights or an adapter from one layout to another, with the table of what became of each tensor."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from research.core.config.schema import Config
from research.core.errors import ConfigError, Interrupted, WeightsError
from research.core.spec import spec_from_hf
from research.core.weights.compare import Comparison, compare
from research.core.weights.config_source import ConfigSource, find_config
from research.core.weights.convert import ConvertOptions, Summary, convert
from research.core.weights.convert_adapter import convert_adapter
from research.core.weights.folder import read_config
from research.core.weights.layouts.adapter import open_adapter
from research.core.weights.meter import Meter
from research.core.weights.opened import HUGGINGFACE, MINDFORMERS, OpenOptions, OpenWeights, UnknownConcat, open_weights
from research.core.weights.tensors import dtype_from_name
from research.tasks.named_model import check_adapter_named, check_named, preset


@dataclass(frozen=True)
class Request:
    """A conversion as a person asks for it. ``to`` None: the layout that the source is not; ``model``: a model's or
    family's name to hold the weights against."""

    source: str
    target: str
    to: str | None = None
    model: str | None = None
    dtype: str | None = None  # safetensors' name, None keeps
    concat: str | None = None  # of the MindFormers side: none | stacked | grouped | probe
    source_concat: str | None = None
    gmm: bool | None = None
    lora: bool = False
    config: str | None = None
    tokenizer: str | None = None  # folder of the vocabulary, for the probe
    allow_pickle: bool = False
    verify: bool = False
    options: ConvertOptions = field(default_factory=ConvertOptions)


def run(cfg: Config) -> int:
    """Convert ``cfg.weights`` to ``cfg.output``."""
    if not cfg.weights or not cfg.output:
        raise ConfigError(
            "a source and a target are needed",
            where="weights=" if not cfg.weights else "output=",
            hint="make convert WEIGHTS=folder-or-file OUTPUT=folder-or-file",
        )
    c = cfg.convert
    request = Request(
        source=cfg.weights,
        target=cfg.output,
        to=None if c.to == "auto" else c.to,
        model=cfg.model.name if cfg.model.hub_id else None,
        dtype=dtype_from_name(c.dtype, "convert.dtype"),
        concat=c.qkv_concat,
        source_concat=c.source_concat,
        gmm=c.use_gmm,
        lora=c.lora,
        config=c.config,
        tokenizer=cfg.tokenizer,
        allow_pickle=cfg.allow_pickle,
        verify=c.verify,
        options=ConvertOptions(
            tied_head=c.tied_head,
            files=c.files,
            shard_bytes=int(c.shard_gb * 1e9),
            allow_overflow=c.allow_overflow,
            overwrite=c.overwrite,
        ),
    )
    run_request(request)
    return 0


def run_request(request: Request) -> Summary:
    """Do it and print the table; raises UserErrors."""
    try:
        summary = _adapter(request) if request.lora else _weights(request)
    except KeyboardInterrupt:
        raise Interrupted(f"\ninterrupted: the same command goes on with {request.target} where it stopped") from None
    print("\n".join(summary.lines()), flush=True)
    print(f"written: {summary.target}", flush=True)
    return summary


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _weights(request: Request) -> Summary:
    opening = OpenOptions(
        gmm=request.gmm if request.to != MINDFORMERS else None,
        config=request.config,
        allow_pickle=request.allow_pickle,
        presets=_fallback(request),
    )
    opened = _open(request, opening)
    if request.model:
        check_named(request.model, opened.spec, str(opened.path))
    to = request.to or (HUGGINGFACE if opened.kind != HUGGINGFACE else MINDFORMERS)
    options = replace(request.options, to=to, dtype=request.dtype)
    if to == MINDFORMERS:
        options = replace(options, concat=request.concat or "none", gmm=bool(request.gmm))
    elif opened.kind == HUGGINGFACE and request.concat not in (None, "none"):
        raise ConfigError(
            "neither side is MindFormers: there is no qkv_concat",
            where=f"qkv_concat={request.concat}",
            hint="leave it out",
        )
    with Meter("converted") as meter:
        summary = convert(opened, request.target, options, progress=meter, log=say)
    if request.verify:
        summary = replace(summary, notes=(*summary.notes, _verify(opened, options, request.target)))
    return summary


def _fallback(request: Request) -> ConfigSource | dict | None:
    """The architecture of a file without config.json: of the folder that is filled, else of the named model."""
    target = Path(request.target).expanduser()
    if request.to != MINDFORMERS and (target / "config.json").is_file():
        return ConfigSource(read_config(target), str(target / "config.json"), target)
    return preset(request.model) if request.model else None


def _open(request: Request, opening: OpenOptions) -> OpenWeights:
    """The source; its layout of joined tensors is what was said, recorded or (``probe``) found out."""
    said = request.source_concat or (request.concat if request.to != MINDFORMERS else None)
    if said == "probe":
        return open_probed(request.source, opening, request.tokenizer)
    try:
        return open_weights(request.source, replace(opening, concat=said))
    except UnknownConcat as unknown:
        if request.to == MINDFORMERS:
            raise WeightsError(
                unknown.what, where=unknown.where, hint="source_concat=stacked, grouped or probe"
            ) from None
        raise


def open_probed(path: str, opening: OpenOptions, tokenizer: str | None = None) -> OpenWeights:
    """Open a MindFormers file in the layout of joined tensors with which the model predicts text."""
    try:
        return open_weights(path, opening)  # apart, or recorded
    except UnknownConcat:
        from research.core.torch.probe import probe_concat

        found, words = probe_concat(path, opening, tokenizer=tokenizer)
        say(f"qkv_concat: {words}")
        return open_weights(path, replace(opening, concat=found))


def _adapter(request: Request) -> Summary:
    opening = OpenOptions(config=request.config, allow_pickle=request.allow_pickle)
    base = None
    known = preset(request.model) if request.model else None
    if request.config or known:
        source = find_config(Path(request.source), request.config, None, known)
        base = spec_from_hf(source.config, where=source.where)
    adapter = open_adapter(Path(request.source), opening)
    if request.model:
        check_adapter_named(request.model, adapter.v1, request.source)
    to = request.to or (HUGGINGFACE if adapter.opened.kind == MINDFORMERS else MINDFORMERS)
    if request.concat not in (None, "none"):
        raise ConfigError("adapters keep q, k and v apart", where=f"qkv_concat={request.concat}", hint="leave it out")
    options = replace(request.options, to=to, dtype=request.dtype)
    return convert_adapter(request.source, request.target, options, opening, base, log=say)


def _verify(source: OpenWeights, options: ConvertOptions, target: str) -> str:
    """Open what was written and compare it with the source; raises when anything but rounding differs."""
    again = OpenOptions(concat=options.concat if options.to == MINDFORMERS else None)
    with Meter("verified") as meter:
        found: Comparison = compare(source, open_weights(target, again), meter)
    if not found.equal:
        worst = next(row for row in found.rows if row.verdict == "different")
        raise WeightsError(f"the written {worst.name} differs from the source", where=target, hint="report this")
    counts = found.counts()
    return f"verified: {counts['same']} tensors have the same values, {counts['rounded']} are rounded"
