"""Low-rank adapters (arXiv 2106.09685) as a pass over an ordinary decoder, and PEFT's files in and out.

The pass exchanges each chosen Linear by a :class:`LoraLinear` that keeps the base's parameters and their names, so weights
load and save as if no adapter were there. Matching rules and file format: :mod:`research.core.lora`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from safetensors.numpy import save_file

from research.core import lora as common
from research.core.config.schema import LoraConfig
from research.core.mindspore.dropout import Dropout, new_key
from research.core.mindspore.linear import Linear
from research.core.mindspore.weights import set_value, to_numpy
from research.core.spec import DecoderSpec
from research.core.weights.cast import cast
from research.core.weights.formats import safetensors, torch_bin
from research.core.weights.initial import Stream
from research.core.weights.keys import parameter_shapes
from research.core.weights.tensors import Files, read_tensor


class LoraLinear(nn.Cell):
    """``x W^T + b + scaling * drop(x) A^T B^T`` with W and b frozen. A is [rank, in], B is [out, rank]; stored in
    ``dtype``, cast to the input's."""

    def __init__(
        self, base: Linear, name: str, rank: int, alpha: float, rslora: bool, dtype=None, dropout: Dropout | None = None
    ):
        super().__init__(auto_prefix=False)  # the parameters have their full names already
        self.in_features, self.out_features, self.has_bias = base.in_features, base.out_features, base.has_bias
        self.rank, self.alpha = rank, alpha
        self.scaling = common.scaling(rank, alpha, rslora)
        self.weight, self.bias = base.weight, base.bias
        dtype = base.weight.dtype if dtype is None else dtype
        self.lora_A = Parameter(Tensor(np.zeros((rank, base.in_features), np.float32), dtype), name=f"{name}.lora_A")
        self.lora_B = Parameter(Tensor(np.zeros((base.out_features, rank), np.float32), dtype), name=f"{name}.lora_B")
        self.dropout = dropout
        self.matmul = ops.MatMul(transpose_b=True)
        self.bias_add = ops.BiasAdd()

    def construct(self, x):
        out = self.matmul(x, self.weight)
        if self.has_bias:
            out = self.bias_add(out, self.bias)
        dropped = x if self.dropout is None else self.dropout(x)
        low = self.matmul(dropped, self.lora_A.astype(x.dtype)) * self.scaling
        return out + self.matmul(low, self.lora_B.astype(x.dtype))

    def merged(self) -> Linear:
        """A Linear with the adapter folded in; the sum is taken in float32 and rounded once to the base's dtype."""
        out = Linear(self.in_features, self.out_features, self.has_bias, self.weight.dtype)
        delta = self.scaling * (to_numpy(self.lora_B) @ to_numpy(self.lora_A))
        set_value(self.weight, to_numpy(self.weight) + delta)
        out.weight, out.bias = self.weight, self.bias
        return out


# --- the pass -----------------------------------------------------------------------------------------------------


def linears(decoder: nn.Cell) -> dict[str, Linear]:
    """Every Linear that can carry an adapter, by its weight's name: all but the head, whose weight the loss reads by itself."""
    cells = (cell for _, cell in decoder.cells_and_names() if isinstance(cell, Linear))
    found = {cell.weight.name.removesuffix(".weight"): cell for cell in cells}
    found.pop("lm_head", None)
    return found


def linear_sizes(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """Name -> (in, out) features of the whole model's :func:`linears`, in its order, wherever a decoder has them."""
    shapes = parameter_shapes(spec, head=False)
    matrices = {
        name: shape for name, shape in shapes.items() if len(shape) == 2 and name != "model.embed_tokens.weight"
    }
    return {name.removesuffix(".weight"): (shape[1], shape[0]) for name, shape in matrices.items()}


def add_lora(decoder: nn.Cell, cfg: LoraConfig, *, seed: int = 0, dtype=None, log=lambda line: None) -> list[str]:
    """Freeze ``decoder``, exchange the chosen Linears by LoraLinears, initialise them from ``seed``; return the names of the
    whole model's.

    ``dtype`` stores A and B (None: the base's). Stacked MoE experts are not Linears and stay as they are. To be done
    before the decoder is first called.
    """
    found, sizes, plan = linears(decoder), linear_sizes(decoder.spec), decoder.plan
    names = common.choose_targets(list(sizes), cfg.target_modules)
    common.check_lora(cfg, names)
    stream, layers, key, trainable = Stream(seed), {}, new_key(), 0
    for place, name in enumerate(names):
        in_features, out_features = sizes[name]
        rank = common.pattern_value(cfg.rank_pattern, name, cfg.rank)
        # PEFT's initialisation, the torch pass's values: A Kaiming uniform with a = sqrt 5, B zero. Drawn for the whole of
        # every module, also where another worker has it.
        value = stream.uniform((rank, in_features), -(in_features**-0.5), in_features**-0.5)
        trainable += rank * (in_features + out_features)
        if name in found:
            layer = layers[name] = _layer(found[name], name, cfg, dtype, key, place)
            set_value(layer.lora_A, value if plan is None else plan.take(layer.lora_A.name, value))
    _exchange(decoder, layers)
    total = trainable + sum(math.prod(shape) for shape in parameter_shapes(decoder.spec, decoder.has_head).values())
    log(f"LoRA on {len(names)} modules: {trainable:,} of {total:,} parameters train ({100 * trainable / total:.2f} %)")
    if decoder.sparse:
        log("LoRA: the routed experts are stacked matrices, not Linears, and carry no adapter")
    return names


def _layer(base: Linear, name: str, cfg: LoraConfig, dtype, key: Parameter, place: int) -> LoraLinear:
    rank = common.pattern_value(cfg.rank_pattern, name, cfg.rank)
    alpha = common.pattern_value(cfg.alpha_pattern, name, cfg.alpha)
    dropout = Dropout(cfg.dropout, key, place) if cfg.dropout else None
    return LoraLinear(base, name, rank, alpha, cfg.rslora, dtype, dropout)


def _exchange(decoder: nn.Cell, layers: dict[str, nn.Cell]) -> None:
    for parameter in decoder.get_parameters():
        parameter.requires_grad = False
    cells = dict(decoder.cells_and_names())
    places = {
        cell.weight.name.removesuffix(".weight"): place
        for place, cell in cells.items()
        if isinstance(cell, (Linear, LoraLinear))
    }  # a stage counts its layers from 0, their names do not
    for name, layer in layers.items():
        owner, _, attribute = places[name].rpartition(".")
        layer.set_train(cells[owner].training)
        names = [(parameter, parameter.name) for parameter in layer.get_parameters()]
        setattr(cells[owner], attribute, layer)
        for parameter, full in names:  # MindSpore puts the attribute's name before names that are whole already
            parameter.name = full


def lora_layers(decoder: nn.Cell) -> Iterator[tuple[str, LoraLinear]]:
    """Name and Cell of every adapted Linear, in the decoder's order; the name is the parameters', wherever the Cell sits."""
    cells = (cell for _, cell in decoder.cells_and_names() if isinstance(cell, LoraLinear))
    return ((cell.lora_A.name.removesuffix(".lora_A"), cell) for cell in cells)


def has_lora(decoder: nn.Cell) -> bool:
    return next(lora_layers(decoder), None) is not None


def merge_lora(decoder: nn.Cell) -> nn.Cell:
    """Fold every adapter into its base weight, in place; the decoder is an ordinary (frozen) one afterwards."""
    _exchange(decoder, {name: layer.merged() for name, layer in lora_layers(decoder)})
    return decoder


# --- PEFT files ---------------------------------------------------------------------------------------------------


def adapter_tensors(decoder: nn.Cell) -> dict[str, Parameter]:
    """PEFT's keys and the adapters' parameters, in the decoder's order."""
    return {
        common.tensor_key(name, part): getattr(layer, f"lora_{part}")
        for name, layer in lora_layers(decoder)
        for part in "AB"
    }


def save_adapter(
    decoder: nn.Cell,
    folder: str | os.PathLike,
    cfg: LoraConfig,
    base: str | None = None,
    values: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write the adapter as PEFT does, in float32; each file appears under its name only when it is complete. ``values``: the
    whole model's adapters by parameter, where the decoder has parts of them."""
    if values is None:
        values = {parameter.name: to_numpy(parameter) for parameter in adapter_tensors(decoder).values()}
    parts = {name: name.rpartition(".lora_")[::2] for name in values}
    tensors = {
        common.tensor_key(*parts[name]): np.ascontiguousarray(value, np.float32) for name, value in values.items()
    }
    names = list(dict.fromkeys(module for module, _ in parts.values()))
    every = [*linear_sizes(decoder.spec), *(["lm_head"] if decoder.has_head and not decoder.tied else [])]
    config = common.adapter_config(cfg, names, every, base)
    common.write_adapter(folder, config, lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def load_adapter(
    decoder: nn.Cell, folder: str | os.PathLike, *, dtype=None, allow_pickle: bool = False, dropout: float | None = None
) -> LoraConfig:
    """Put the adapter of a PEFT folder on ``decoder`` (frozen base, trainable A and B) and return its settings;
    ``dropout`` replaces the folder's.

    The modules are those that the file has tensors for. Raises :class:`WeightsError` naming the tensor and both shapes
    when the adapter was made for another model; the decoder is then unchanged.
    """
    folder = Path(folder)
    cfg = common.read_adapter_config(folder)
    cfg.dropout = cfg.dropout if dropout is None else dropout
    path = common.weights_path(folder, allow_pickle)
    entries = safetensors.read_entries(path) if path.name == common.WEIGHTS_FILE else torch_bin.read_file(path)
    pairs = common.pairs_of(list(entries), path)
    found, plan = linears(decoder), decoder.plan
    shapes = {name: {part: entries[key].shape for part, key in parts.items()} for name, parts in pairs.items()}
    common.check_shapes(shapes, linear_sizes(decoder.spec), cfg, folder)
    layers, key = {}, new_key()
    with Files() as files:
        for place, (name, parts) in enumerate(pairs.items()):
            if name not in found:  # another stage's
                continue
            layers[name] = _layer(found[name], name, cfg, dtype, key, place)
            for part, stored in parts.items():
                bits = read_tensor(files, entries[stored])
                value = np.empty(bits.shape, np.float32)
                cast(bits, entries[stored].dtype, value, "F32")
                parameter = getattr(layers[name], f"lora_{part}")
                set_value(parameter, value if plan is None else plan.take(parameter.name, value))
    _exchange(decoder, layers)
    return cfg
