"""`make merge`: an adapter folded into its base weights, written only when the logits agree."""

from __future__ import annotations

from pathlib import Path

from research.core.config.schema import Config
from research.core.errors import ConfigError
from research.core.weights.generation import FILE as GENERATION
from research.tasks.exporting import companions
from research.tasks.sources import check_architecture, read_json, read_note, resolve_weights, say


def run(cfg: Config) -> int:
    weights = resolve_weights(cfg)
    if not cfg.adapter:
        raise ConfigError("there is no adapter to fold in", where="merge", hint="ADAPTER=<folder>, or RUN=<a lora run>")
    if not cfg.output:
        raise ConfigError("the merged weights need a folder", where="merge", hint="OUTPUT=<folder>")
    output = Path(cfg.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError("exists already", where=output, hint="OUTPUT=<a new folder>")
    check_architecture(cfg, weights)

    import torch

    from research.core.torch.device import resolve_device
    from research.core.torch.lora import load_adapter
    from research.core.torch.merge import merge_and_check
    from research.core.torch.weights import load_decoder, resolve_dtype, save_decoder

    device, stored = resolve_device(cfg.device), resolve_dtype(None, weights)
    decoder = load_decoder(
        weights, torch.float32, device, attention=cfg.device.attention, allow_pickle=cfg.allow_pickle
    )
    load_adapter(decoder, cfg.adapter, allow_pickle=cfg.allow_pickle)
    difference = merge_and_check(decoder, cfg.train.seed)
    say(f"logits of base + adapter and of the merged weights differ by at most {difference:.2e} (fp32)")

    config, own = read_json(weights / "config.json"), weights / GENERATION
    adapter_note = read_note(Path(cfg.adapter))
    save_decoder(
        decoder,
        output,
        stored,
        eos=config.get("eos_token_id"),
        bos=config.get("bos_token_id"),
        generation=read_json(own) if own.is_file() else None,
        fingerprints=(read_note(weights) | adapter_note) or None,
        files=companions(weights),
    )
    say(f"merged weights ({str(stored).removeprefix('torch.')}): {output}")
    return 0
