"""`make export`: a run's newest checkpoint as a Hugging Face folder; with BACKEND=mindspore weights as MINDIR graphs."""

from __future__ import annotations

from pathlib import Path

from research.core.config.compose import from_yaml
from research.core.config.schema import Config
from research.core.errors import ConfigError, UserError
from research.core.spec import spec_from_hf
from research.registry import model_spec
from research.tasks import export_mindir
from research.tasks.exporting import export_options
from research.tasks.sources import read_json, resolve_template, resolve_tokenizer, say


def run(cfg: Config) -> int:
    if cfg.backend == "mindspore":
        return export_mindir.run(cfg)
    if not cfg.run:
        raise ConfigError("which run?", where="export", hint="make export RUN=runs/... OUTPUT=<folder>")
    if not cfg.output:
        raise ConfigError("the exported weights need a folder", where="export", hint="OUTPUT=<folder>")
    run, output = Path(cfg.run).expanduser(), Path(cfg.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError("exists already", where=output, hint="OUTPUT=<a new folder>")

    from research.core.run.checkpoint import checkpoint_paths, load_checkpoint
    from research.core.torch.checkpoint import TorchTables

    paths = checkpoint_paths(run / "checkpoints")
    if not paths:
        raise UserError("the run has no checkpoint to export", where=run, hint=f"ls {run.parent}")
    trained = from_yaml(run / "config.yaml")
    weights = Path(trained.weights) if trained.weights else None
    tokenizer, template = resolve_tokenizer(trained, weights), resolve_template(trained, weights)
    checkpoint = load_checkpoint(paths[-1], TorchTables())
    parameters = checkpoint.model
    if weights is None:
        spec = model_spec(trained.model, tokens=tokenizer.vocab_size)
    else:
        spec = spec_from_hf(read_json(weights / "config.json"), where=str(weights / "config.json"))

    import torch

    from research.core.torch.device import DTYPES
    from research.core.torch.weights import resolve_dtype, save_weights

    if checkpoint.meta["identity"]["method"] == "lora":
        parameters = _merged(weights, trained, parameters)
    stored = DTYPES.get(cfg.train.dtype) or (resolve_dtype(None, weights) if weights else torch.float32)
    save_weights(spec, parameters, output, stored, **export_options(trained, tokenizer, template))
    say(f"step {checkpoint.meta['step']} of {run} ({str(stored).removeprefix('torch.')}): {output}")
    return 0


def _merged(weights: Path, trained: Config, adapter: dict) -> dict:
    """Base weights with the checkpoint's adapter folded in, once their logits agree."""
    import torch

    from research.core.torch.lora import add_lora
    from research.core.torch.merge import merge_and_check
    from research.core.torch.weights import load_decoder

    decoder = load_decoder(weights, torch.float32, allow_pickle=trained.allow_pickle)
    add_lora(decoder, trained.lora)
    decoder.load_state_dict(adapter, strict=False)
    merge_and_check(decoder)
    return dict(decoder.named_parameters())
