"""Low-rank adapters (arXiv 2106.09685) as a pass over an ordinary decoder, and PEFT's file format.

The pass exchanges each chosen nn.Linear by a :class:`LoraLinear` that keeps the base's parameter names, so weights
load and save as if no adapter were there. Files are PEFT's: ``adapter_config.json`` and ``adapter_model.safetensors``
with keys ``base_model.model.<module>.lora_A.weight``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from research.core.config.names import did_you_mean
from research.core.config.schema import LoraConfig
from research.core.errors import ConfigError, WeightsError
from research.core.torch.adapted_linear import adapted_linear
from research.core.torch.packed_linear import Linear, linear

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


class LoraLinear(nn.Module):
    """``x W^T + b + scaling * drop(x) A^T B^T`` with W and b frozen. A is [rank, in], B is [out, rank].

    A and B may be stored in fp32 while the rest computes in bf16: they are cast to the input's dtype.
    """

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, dropout: float, rslora: bool, dtype: torch.dtype | None
    ):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha = rank, alpha
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout = dropout
        self.weight, self.bias = base.weight, base.bias
        place = {"device": base.weight.device, "dtype": dtype or base.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **place))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **place))

    def reset(self, generator: torch.Generator | None = None) -> None:
        """PEFT's initialisation: A Kaiming uniform with a = sqrt 5 (drawn in fp32 on the CPU), B zero."""
        a = torch.empty(self.lora_A.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(a)
            self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if not (self.dropout and self.training) and not self.weight.requires_grad:
            return adapted_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling)
        rows = x.reshape(-1, self.in_features)
        dropped = F.dropout(rows, self.dropout, self.training)
        low = F.linear(dropped, self.lora_A.to(x.dtype)) * self.scaling
        out = torch.addmm(linear(rows, self.weight, self.bias), low, self.lora_B.to(x.dtype).t())
        return out.view(*x.shape[:-1], self.out_features)

    def merged(self) -> nn.Linear:
        """An nn.Linear with the adapter folded in; the sum is taken in fp32 and rounded once to the base's dtype."""
        out = Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        delta = self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())
        out.weight = nn.Parameter((self.weight.detach().float() + delta).to(self.weight.dtype), requires_grad=False)
        out.bias = self.bias
        return out

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"


# --- choosing the modules ---------------------------------------------------------------------------------------


def linear_names(decoder: nn.Module) -> list[str]:
    """Names of every Linear that can carry an adapter: all but the head, whose weight the loss reads by itself."""
    return [
        name
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] != "lm_head"
    ]


def choose_targets(decoder: nn.Module, targets: str | list[str]) -> list[str]:
    """Modules that ``targets`` selects, by PEFT's rules: ``all-linear``, a full-match expression, or a list of suffixes.

    ``all-linear`` leaves out the routers of an MoE, which are no Linears in transformers; they can be named. Raises :class:`ConfigError` for an entry that selects nothing.
    """
    names = linear_names(decoder)
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    where = "lora.target_modules"
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return [name for name in names if not name.endswith(".mlp.gate")]
    if isinstance(targets, str):
        try:
            found = [name for name in names if re.fullmatch(targets, name)]
        except re.error as bad:
            raise ConfigError(f"{targets!r} is not a regular expression: {bad}", where=where) from None
        if not found:
            raise ConfigError(
                f"the expression {targets!r} matches no linear module as a whole (such as {names[0]})",
                where=where,
                hint=f"'.*({'|'.join(leaves)})', a list of these names, or all-linear",
            )
        return found
    if not targets:
        raise ConfigError("no target modules are given", where=where, hint="all-linear")
    chosen = set()
    for target in targets:
        found = [name for name in names if name == target or name.endswith("." + target)]
        if not found:
            raise ConfigError(
                f"{target!r} names no linear module of this model", where=where, hint=did_you_mean(target, leaves)
            )
        chosen.update(found)
    return [name for name in names if name in chosen]


def pattern_value(patterns: dict, name: str, default):
    """PEFT's rank_pattern / alpha_pattern: the first key that is a regular expression for the end of ``name``."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _check(cfg: LoraConfig, names: list[str]) -> None:
    if cfg.rank < 1:
        raise ConfigError(f"the rank must be at least 1, not {cfg.rank}", where="lora.rank", hint="lora.rank=8")
    if not 0 <= cfg.dropout < 1:
        raise ConfigError(
            f"dropout must lie in [0, 1), not {cfg.dropout}", where="lora.dropout", hint="lora.dropout=0.05"
        )
    for setting in ("rank_pattern", "alpha_pattern"):
        for key, value in getattr(cfg, setting).items():
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in names):
                leaves = {name.rsplit(".", 1)[-1] for name in names}
                raise ConfigError(
                    f"{key!r} matches none of the adapted modules",
                    where=f"lora.{setting}",
                    hint=did_you_mean(key, leaves),
                )
            if setting == "rank_pattern" and value < 1:
                raise ConfigError(f"the rank of {key!r} must be at least 1, not {value}", where=f"lora.{setting}")


# --- the pass ---------------------------------------------------------------------------------------------------


def add_lora(
    decoder: nn.Module, cfg: LoraConfig, *, seed: int = 0, dtype: torch.dtype | None = None, log=lambda line: None
) -> list[str]:
    """Freeze ``decoder``, exchange the chosen Linears by LoraLinears, initialise them from ``seed``; return their names.

    ``dtype`` stores A and B (None: the base's dtype). Stacked MoE experts are not Linears and stay as they are.
    """
    names = choose_targets(decoder, cfg.target_modules)
    _check(cfg, names)
    decoder.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        rank = pattern_value(cfg.rank_pattern, name, cfg.rank)
        alpha = pattern_value(cfg.alpha_pattern, name, cfg.alpha)
        layer = LoraLinear(decoder.get_submodule(name), rank, alpha, cfg.dropout, cfg.rslora, dtype)
        if not layer.lora_A.is_meta:
            layer.reset(generator)
        decoder.set_submodule(name, layer)
    trainable = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    total = sum(p.numel() for p in decoder.parameters())
    log(f"LoRA on {len(names)} modules: {trainable:,} of {total:,} parameters train ({100 * trainable / total:.2f} %)")
    if any(".experts." in name for name, _ in decoder.named_parameters()):
        log("LoRA: the routed experts are stacked matrices, not Linears, and carry no adapter")
    return names


def lora_layers(decoder: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Name and module of every adapted Linear, in the decoder's order."""
    return ((name, module) for name, module in decoder.named_modules() if isinstance(module, LoraLinear))


def has_lora(decoder: nn.Module) -> bool:
    return next(lora_layers(decoder), None) is not None


def merge_lora(decoder: nn.Module) -> nn.Module:
    """Fold every adapter into its base weight, in place; the decoder is an ordinary one afterwards."""
    for name, layer in list(lora_layers(decoder)):
        decoder.set_submodule(name, layer.merged())
    return decoder


# --- PEFT files -------------------------------------------------------------------------------------------------


def adapter_config(decoder: nn.Module, cfg: LoraConfig, base: str | None = None) -> dict:
    """``adapter_config.json`` for the adapters on ``decoder``."""
    names = [name for name, _ in lora_layers(decoder)]
    targets = cfg.target_modules
    if not isinstance(targets, str) or targets.lower() == "all-linear":
        every = [n for n, m in decoder.named_modules() if isinstance(m, (nn.Linear, LoraLinear))]
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
        # the short names where they select exactly these modules, else every name in full
        short = [n for n in every if n.rsplit(".", 1)[-1] in leaves]
        targets = leaves if short == names else names
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": cfg.rank,
        "lora_alpha": cfg.alpha,
        "lora_dropout": cfg.dropout,
        "target_modules": targets,
        "rank_pattern": dict(cfg.rank_pattern),
        "alpha_pattern": dict(cfg.alpha_pattern),
        "use_rslora": cfg.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def adapter_tensors(decoder: nn.Module) -> dict[str, Tensor]:
    """PEFT's keys and the adapters' tensors, in the decoder's order; not copied, shards of several cards put together."""
    tensors = {}
    for name, layer in lora_layers(decoder):
        for part in ("lora_A", "lora_B"):
            tensor = getattr(layer, part).detach()
            tensors[f"{PREFIX}{name}.{part}.weight"] = (
                tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            )
    return tensors


def save_adapter(
    decoder: nn.Module, folder: str | os.PathLike, cfg: LoraConfig, base: str | None = None, write: bool = True
) -> None:
    """Write the adapter as PEFT does; each file appears under its name only when it is complete.

    With sharded weights every card calls this and only one has ``write``.
    """
    tensors = {key: value.cpu().contiguous() for key, value in adapter_tensors(decoder).items()}
    if not write:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / (WEIGHTS_FILE + ".partial")
    try:
        save_file(tensors, aside, metadata={"format": "pt"})
        os.replace(aside, folder / WEIGHTS_FILE)
        aside = folder / (CONFIG_FILE + ".partial")
        aside.write_text(json.dumps(adapter_config(decoder, cfg, base), indent=2) + "\n", encoding="utf-8")
        os.replace(aside, folder / CONFIG_FILE)
    finally:
        aside.unlink(missing_ok=True)


def read_adapter_config(folder: str | os.PathLike) -> LoraConfig:
    """The settings of a PEFT folder. Raises :class:`WeightsError` for a kind of adapter that this repository does not run."""
    path = Path(folder) / CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(
            f"no {CONFIG_FILE}: not a PEFT adapter folder", where=folder, hint="the adapter/ folder of a LoRA run"
        ) from None
    except ValueError as bad:
        raise WeightsError(f"malformed JSON: {bad}", where=path) from None
    if raw.get("peft_type", "LORA") != "LORA":
        raise WeightsError(f"peft_type {raw['peft_type']!r} is not supported, only LORA", where=path)
    for key in (
        "use_dora",
        "fan_in_fan_out",
        "modules_to_save",
        "lora_bias",
        "trainable_token_indices",
        "target_parameters",
    ):
        if raw.get(key):
            raise WeightsError(f"{key}={raw[key]!r} is not supported", where=path, hint="a plain LoRA adapter")
    if raw.get("bias", "none") != "none":
        raise WeightsError(f"bias={raw['bias']!r} is not supported, only 'none'", where=path)
    if "r" not in raw or "lora_alpha" not in raw:
        raise WeightsError("r or lora_alpha is missing", where=path)
    return LoraConfig(
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        dropout=raw.get("lora_dropout") or 0.0,
        target_modules=raw.get("target_modules") or "all-linear",
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        rslora=bool(raw.get("use_rslora")),
    )


def load_adapter(
    decoder: nn.Module, folder: str | os.PathLike, *, dtype: torch.dtype | None = None, allow_pickle: bool = False
) -> LoraConfig:
    """Put the adapter of a PEFT folder on ``decoder`` (frozen base, trainable A and B) and return its settings.

    The modules are those that the file has tensors for. Raises :class:`WeightsError` naming the tensor and both shapes
    when the adapter was made for another model; the decoder is then unchanged.
    """
    folder = Path(folder)
    cfg = read_adapter_config(folder)
    pairs = _read_pairs(folder, allow_pickle)
    linears = {name: decoder.get_submodule(name) for name in linear_names(decoder)}
    layers = {}
    for name, pair in pairs.items():
        key = f"{PREFIX}{name}.lora_A.weight"
        if name not in linears:
            raise WeightsError(
                f"tensor {key} belongs to a module that this model does not have",
                where=folder,
                hint=f"{did_you_mean(name, linears)} Otherwise the adapter is for another model",
            )
        base = linears[name]
        rank = pattern_value(cfg.rank_pattern, name, cfg.rank)
        for part, shape in (("A", (rank, base.in_features)), ("B", (base.out_features, rank))):
            found = tuple(pair[part].shape) if part in pair else None
            if found != shape:
                raise WeightsError(
                    f"tensor {PREFIX}{name}.lora_{part}.weight is {_shape(found)}, this model needs {_shape(shape)}",
                    where=folder,
                    hint="the base model that the adapter was trained on",
                )
        layer = LoraLinear(
            base, rank, pattern_value(cfg.alpha_pattern, name, cfg.alpha), cfg.dropout, cfg.rslora, dtype
        )
        with torch.no_grad():
            layer.lora_A.copy_(pair["A"])
            layer.lora_B.copy_(pair["B"])
        layers[name] = layer
    decoder.requires_grad_(False)
    for name, layer in layers.items():
        layer.train(decoder.training)
        decoder.set_submodule(name, layer)
    return cfg


_KEY = re.compile(r"(?:base_model\.model\.)?(?P<name>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")


def _read_pairs(folder: Path, allow_pickle: bool) -> dict[str, dict[str, Tensor]]:
    path = folder / WEIGHTS_FILE
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as bad:
            raise WeightsError(f"damaged or truncated: {bad}", where=path) from None
    elif (folder / "adapter_model.bin").is_file():
        path = folder / "adapter_model.bin"
        if not allow_pickle:
            raise WeightsError(
                "only a pickle file is there, and pickles can run code",
                where=path,
                hint=f"save the adapter as {WEIGHTS_FILE}",
            )
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    else:
        raise WeightsError(f"no {WEIGHTS_FILE}", where=folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise WeightsError(f"tensor {key} is not part of a plain LoRA adapter", where=path)
        pairs.setdefault(match["name"], {})[match["part"]] = tensor
    return pairs


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))
