"""Low-rank adapters (arXiv 2106.09685) as a pass over an ordinary decoder, and PEFT's file format.

The pass exchanges each chosen nn.Linear by a :class:`LoraLinear` that keeps the base's parameter names, so weights
load and save as if no adapter were there. Files are PEFT's: ``adapter_config.json`` and ``adapter_model.safetensors``
with keys ``base_model.model.<module>.lora_A.weight``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from research.core import lora as common
from research.core.config.schema import LoraConfig
from research.core.errors import WeightsError
from research.core.lora import WEIGHTS_FILE, pattern_value, read_adapter_config, tensor_key
from research.core.torch.adapted_linear import adapted_linear
from research.core.torch.packed_linear import Linear, linear


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
        self.scaling = common.scaling(rank, alpha, rslora)
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


# --- the pass ---------------------------------------------------------------------------------------------------


def add_lora(
    decoder: nn.Module, cfg: LoraConfig, *, seed: int = 0, dtype: torch.dtype | None = None, log=lambda line: None
) -> list[str]:
    """Freeze ``decoder``, exchange the chosen Linears by LoraLinears, initialise them from ``seed``; return their names.

    ``dtype`` stores A and B (None: the base's dtype). Stacked MoE experts are not Linears and stay as they are.
    """
    names = common.choose_targets(linear_names(decoder), cfg.target_modules)
    common.check_lora(cfg, names)
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


def adapter_tensors(decoder: nn.Module) -> dict[str, Tensor]:
    """PEFT's keys and the adapters' tensors, in the decoder's order; not copied, shards of several cards put together."""
    tensors = {}
    for name, layer in lora_layers(decoder):
        for part in "AB":
            tensor = getattr(layer, f"lora_{part}").detach()
            tensors[tensor_key(name, part)] = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
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
    names = [name for name, _ in lora_layers(decoder)]
    every = [name for name, module in decoder.named_modules() if isinstance(module, (nn.Linear, LoraLinear))]
    config = common.adapter_config(cfg, names, every, base)
    common.write_adapter(folder, config, lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def load_adapter(
    decoder: nn.Module, folder: str | os.PathLike, *, dtype: torch.dtype | None = None, allow_pickle: bool = False
) -> LoraConfig:
    """Put the adapter of a PEFT folder on ``decoder`` (frozen base, trainable A and B) and return its settings.

    The modules are those that the file has tensors for. Raises :class:`WeightsError` naming the tensor and both shapes
    when the adapter was made for another model; the decoder is then unchanged.
    """
    folder = Path(folder)
    cfg = read_adapter_config(folder)
    pairs = read_pairs(folder, allow_pickle)
    linears = {name: decoder.get_submodule(name) for name in linear_names(decoder)}
    shapes = {name: {part: tuple(tensor.shape) for part, tensor in pair.items()} for name, pair in pairs.items()}
    common.check_shapes(shapes, {n: (m.in_features, m.out_features) for n, m in linears.items()}, cfg, folder)
    layers = {}
    for name, pair in pairs.items():
        rank = pattern_value(cfg.rank_pattern, name, cfg.rank)
        alpha = pattern_value(cfg.alpha_pattern, name, cfg.alpha)
        layer = LoraLinear(linears[name], rank, alpha, cfg.dropout, cfg.rslora, dtype)
        with torch.no_grad():
            layer.lora_A.copy_(pair["A"])
            layer.lora_B.copy_(pair["B"])
        layers[name] = layer
    decoder.requires_grad_(False)
    for name, layer in layers.items():
        layer.train(decoder.training)
        decoder.set_submodule(name, layer)
    return cfg


def read_pairs(folder: Path, allow_pickle: bool = False) -> dict[str, dict[str, Tensor]]:
    """Module -> A and B of a PEFT folder's file, on the CPU in its dtype. Raises :class:`WeightsError`."""
    path = common.weights_path(folder, allow_pickle)
    if path.name == WEIGHTS_FILE:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as bad:
            raise WeightsError(f"damaged or truncated: {bad}", where=path) from None
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    pairs = common.pairs_of(list(tensors), path)
    return {name: {part: tensors[key] for part, key in parts.items()} for name, parts in pairs.items()}
