"""Weights of any layout -> the MindSpore decoder, and back to a folder in Hugging Face format, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from research.core.errors import ConfigError, WeightsError
from research.core.mindspore import runtime
from research.core.mindspore.decoder import Decoder
from research.core.mindspore.plan import Plan
from research.core.spec import DecoderSpec
from research.core.weights.blocks import Stored, crop
from research.core.weights.cast import cast
from research.core.weights.compare import check_copies, read_stored
from research.core.weights.initial import initial_value
from research.core.weights.keys import StoredTensor
from research.core.weights.model_folder import check_spec, write_model
from research.core.weights.opened import OpenOptions, OpenWeights, open_weights
from research.core.weights.sharded import memory_layout
from research.core.weights.tensors import NUMPY_DTYPES, TORCH_NAMES, Files, RowReader, dtype_from_name

DTYPES = {"F32": ms.float32, "BF16": ms.bfloat16, "F16": ms.float16}
STORED_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def load_decoder(
    path: str | os.PathLike,
    dtype: str | None = None,
    *,
    expect: DecoderSpec | None = None,
    head: bool = True,
    allow_pickle: bool = False,
    opening: OpenOptions | None = None,
    plan: Callable[[DecoderSpec], Plan | None] = lambda spec: None,
    **options,
) -> Decoder:
    """The decoder of weights of any layout (Hugging Face folder, MindFormers file or ranks, tensor-parallel parts, torch's
    distributed checkpoint), filled one tensor at a time; in evaluation mode.

    ``dtype``: float32, bfloat16 or float16; None: what config.json says on Ascend, float32 on the CPU, which computes in
    nothing else. ``expect``: the spec of the chosen model, compared first. ``head=False`` for embedding models.
    ``opening``: what the files do not say themselves; ``options`` are :class:`Decoder`'s. ``plan`` says of the model which
    part this worker holds: only that is read, whatever grid the weights were cut for. Raises :class:`WeightsError` for
    everything that is wrong with the weights.
    """
    opening = OpenOptions(allow_pickle=allow_pickle, head=head) if opening is None else opening
    opened = open_weights(path, opening)
    if expect is not None:
        check_spec(expect, opened.spec, path)
    check_copies(opened)
    decoder = Decoder(opened.spec, resolve_dtype(dtype, opened.config), head=head, plan=plan(opened.spec), **options)
    fill_decoder(decoder, opened)
    return decoder


def resolve_dtype(name: str | None, config: Mapping):
    """MindSpore's dtype from a name, or (None) from ``config.json`` on Ascend; on the CPU float32 or
    :class:`ConfigError`."""
    if name is None and not runtime.on_ascend():
        return ms.float32
    said = name or config.get("torch_dtype") or config.get("dtype") or "float32"
    kind = dtype_from_name(str(said)) or "F32"
    if kind != "F32" and not runtime.on_ascend():
        raise ConfigError(f"MindSpore computes in float32 on the CPU, not in {said}", where="dtype", hint="float32")
    return DTYPES[kind]


def fill_decoder(decoder: Decoder, opened: OpenWeights) -> None:
    """Set every parameter of ``decoder`` from opened weights; memory stays near the largest tensor on top of the model."""
    parameters = {parameter.name: parameter for parameter in decoder.get_parameters()}
    sources = opened.sources()
    with Files() as files:
        reader = RowReader(files, opened.entries)
        for stored in memory_layout(opened.spec):
            if stored.name in parameters:
                parts = [read_stored(part, sources, opened.entries, reader, "F32") for part in _parts(decoder, stored)]
                axis = 0 if len(parts) == 1 else decoder.plan.cut(stored.name).axis
                set_value(parameters[stored.name], parts[0] if len(parts) == 1 else np.concatenate(parts, axis))


def _parts(decoder: Decoder, stored: Stored) -> list[Stored]:
    cut = None if decoder.plan is None else decoder.plan.cut(stored.name)
    if cut is None:
        return [stored]
    return [crop(stored, box) for box in cut.boxes(stored.shape, decoder.plan.index)]


def set_value(parameter: Parameter, value: np.ndarray) -> None:
    """float32 values into a parameter, rounded to its dtype."""
    assert tuple(parameter.shape) == value.shape, (parameter.name, parameter.shape, value.shape)
    parameter.set_data(Tensor(value, parameter.dtype))


def init_weights(decoder: Decoder, seed: int = 0) -> Decoder:
    """Random weights, the torch decoder's for the same seed (:mod:`research.core.weights.initial`)."""
    plan = decoder.plan
    for parameter in decoder.get_parameters():
        name, shape = parameter.name, tuple(parameter.shape)
        if plan is None:
            set_value(parameter, initial_value(decoder.spec, name, shape, seed))
        else:
            whole = initial_value(decoder.spec, name, plan.whole_shape(name, shape), seed)
            set_value(parameter, plan.take(name, whole))
    return decoder


def to_numpy(parameter: Parameter | Tensor) -> np.ndarray:
    """A parameter's values on the host; 16-bit floats as float32, which numpy has no bfloat16 for."""
    wide = parameter if parameter.dtype == ms.float32 else parameter.astype(ms.float32)
    return wide.asnumpy()


def save_decoder(decoder: Decoder, folder: str | os.PathLike, dtype: str | None = None, **options) -> None:
    """:func:`save_weights` of the decoder's own parameters, in ``dtype`` (None: as they are)."""
    parameters = {parameter.name: parameter for parameter in decoder.get_parameters()}
    save_weights(decoder.spec, parameters, folder, dtype, head=decoder.has_head, **options)


def save_weights(
    spec: DecoderSpec,
    parameters: Mapping[str, Parameter | Tensor],
    folder: str | os.PathLike,
    dtype: str | None = None,
    **options,
) -> None:
    """Write a folder in Hugging Face format; ``options`` are those of :func:`research.core.weights.model_folder.write_model`.

    ``parameters`` has the in-memory names; ``dtype`` is float32, bfloat16 or float16 (None: theirs).
    """
    found = next(iter(parameters.values())).dtype
    kind = STORED_NAMES.get(found) if dtype is None else dtype_from_name(dtype)
    if kind not in TORCH_NAMES:
        raise WeightsError(f"weights of dtype {found} cannot be exported", hint="float32 or bfloat16")

    def content(tensor: StoredTensor):
        value = np.empty(tensor.shape, NUMPY_DTYPES[kind])
        for piece in tensor.pieces:
            block = to_numpy(parameters[piece.parameter])
            block = block if piece.expert is None else block[piece.expert]
            cast(block[slice(*piece.rows_parameter)], "F32", value[slice(*piece.rows_stored)], kind)
        return value.reshape(-1).view(np.uint8)

    write_model(spec, parameters, content, folder, kind, **options)
