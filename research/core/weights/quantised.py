"""Weights that were quantised for MindIE or by another tool, told from float ones by what stands beside them."""

from __future__ import annotations

from pathlib import Path

from research.core.errors import WeightsError
from research.core.weights.folder import read_config

# msmodelslim's files; the quantisation stands in their names, or in ``config.json``.
FILES = "quant_model_*"


def quantisation(folder: Path) -> str | None:
    """How the weights of a folder are quantised (``w8a8``, ``gptq``), as its ``config.json`` or its files say; None for
    float ones."""
    config = read_config(folder)
    if config.get("quantize"):
        return str(config["quantize"]).lower()
    details = config.get("quantization_config") or {}
    for key in ("quant_method", "quant_type", "kv_quant_type", "fa_quant_type"):
        if isinstance(details, dict) and details.get(key):
            return str(details[key])
    files = sorted(Path(folder).glob(FILES))
    return files[0].stem.rpartition("_")[2] if files else None


def check_float(folder: Path) -> None:
    """Raise :class:`WeightsError` for quantised weights, which this version does not run."""
    kind = quantisation(folder)
    if kind is not None:
        raise WeightsError(
            f"these weights are quantised ({kind}), which this version does not run",
            where=Path(folder) / "config.json",
            hint="the float weights that they were made of; ENGINE=vllm runs what vLLM can, where it is installed",
        )
