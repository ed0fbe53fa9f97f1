"""Weight folders in Hugging Face format <-> the torch decoder, streaming tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from research.core.errors import WeightsError
from research.core.spec import DecoderSpec
from research.core.torch.decoder import Decoder
from research.core.torch.sharded_weights import open_shards, sharded_parameters
from research.core.weights.folder import Plan, WeightFolder, plan_reading, read_config, read_spec
from research.core.weights.keys import StoredTensor
from research.core.weights.model_folder import check_spec, write_model

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class PickleFolder:
    """The ``*.bin`` files of a folder, opened with torch's restricted unpickler; same interface as WeightFolder."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.tensors: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob("*.bin")):
            try:
                self.tensors |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                raise WeightsError(f"cannot be read as torch weights: {error}", where=path) from None
        if not self.tensors:
            raise WeightsError("no .bin files in this folder", where=self.folder)

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)


def open_folder(folder: str | os.PathLike, allow_pickle: bool = False) -> WeightFolder | PickleFolder:
    """The folder's tensors: safetensors, or with ``allow_pickle`` the ``*.bin`` files where there are none."""
    path = Path(folder)
    if allow_pickle and path.is_dir() and not any(path.glob("*.safetensors*")):
        return PickleFolder(path)
    return WeightFolder(folder)


def read_tensor(source: WeightFolder | PickleFolder, name: str, rows: tuple[int, int] | None = None) -> Tensor:
    """One stored tensor, or its rows ``start .. stop-1``, on the CPU in its stored dtype."""
    if isinstance(source, PickleFolder):
        tensor = source.tensors[name]
        return tensor if rows is None else tensor[rows[0] : rows[1]]
    kind = source.dtype(name)
    if kind not in TORCH_DTYPES:
        raise WeightsError(f"tensor {name} is {kind}; floating-point weights are needed", where=source.folder)
    shape = list(source.shape(name))
    if rows is not None:
        shape[0] = rows[1] - rows[0]
    tensor = torch.empty(shape, dtype=TORCH_DTYPES[kind])
    if tensor.numel():
        source.read_into(name, tensor.view(-1).view(torch.uint8).numpy(), rows)
    return tensor


def load_decoder(
    folder: str | os.PathLike,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    attention: str = "auto",
    expect: DecoderSpec | None = None,
    head: bool = True,
    allow_pickle: bool = False,
) -> Decoder:
    """Build the decoder of a folder and fill it, one tensor at a time; in evaluation mode. The folder may hold the weights
    in shards: tensor-parallel parts, MindSpore ranks with a config.json, a torch distributed checkpoint.

    ``dtype``: torch dtype or its name; None keeps what ``config.json`` says. ``expect``: the spec of the chosen
    model, compared first. ``head=False`` for embedding models without an output matrix.
    Raises :class:`WeightsError` for everything that is wrong with the folder.
    """
    shards = open_shards(folder)
    spec = read_spec(folder) if shards is None else shards.spec
    if expect is not None:
        check_spec(expect, spec, folder)
    if shards is None:
        source = open_folder(folder, allow_pickle)
        plan = plan_reading(source, spec, head)
    with torch.device("meta"):
        decoder = Decoder(spec, head=head)
    if shards is None:
        fill_decoder(decoder, source, plan, resolve_dtype(dtype, folder), device)
    else:
        set_parameters(decoder, sharded_parameters(shards, resolve_dtype(dtype, folder), device))
    decoder.use_attention(attention)
    return decoder.eval()


def resolve_dtype(dtype: torch.dtype | str | None, folder: str | os.PathLike) -> torch.dtype:
    """A torch dtype from a dtype, its name, or (None) the folder's ``config.json``; float32 where that says nothing."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        config = read_config(folder)
        dtype = config.get("torch_dtype") or config.get("dtype") or "float32"
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise WeightsError(f"dtype {dtype!r} is not a floating-point dtype", hint="float32 or bfloat16")
    return found


def fill_decoder(
    decoder: Decoder,
    source: WeightFolder | PickleFolder,
    plan: Plan,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Replace the (meta) parameters of ``decoder`` by the folder's tensors as ``dtype`` on ``device``."""
    shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    made: dict[str, Tensor] = {}
    for stored in plan.tensors:
        name = plan.names[stored.name]
        for piece in stored.pieces:
            block = read_tensor(source, name, piece.rows_stored if len(stored.pieces) > 1 else None)
            height = piece.rows_parameter[1] - piece.rows_parameter[0]
            if piece.expert is None and height == shapes[piece.parameter][0]:
                made[piece.parameter] = block.to(device=device, dtype=dtype)
                continue
            if piece.parameter not in made:
                made[piece.parameter] = torch.empty(shapes[piece.parameter], dtype=dtype, device=device)
            target = made[piece.parameter] if piece.expert is None else made[piece.parameter][piece.expert]
            target[piece.rows_parameter[0] : piece.rows_parameter[1]] = block
    if plan.tied_head is not None:
        _check_tied_head(read_tensor(source, plan.tied_head).to(dtype), made["model.embed_tokens.weight"], source)
    set_parameters(decoder, made)


def set_parameters(decoder: Decoder, made: Mapping[str, Tensor]) -> None:
    for name, value in made.items():
        owner, _, attribute = name.rpartition(".")
        setattr(decoder.get_submodule(owner), attribute, nn.Parameter(value))
    decoder.tie()


def _check_tied_head(head: Tensor, embedding: Tensor, source) -> None:
    if head.shape != embedding.shape or not torch.equal(head, embedding.cpu()):
        raise WeightsError(
            "config.json ties the output matrix to the embedding, but the folder stores another lm_head.weight",
            where=source.folder,
            hint='"tie_word_embeddings": false in config.json, if the stored one is meant',
        )


def save_decoder(decoder: Decoder, folder: str | os.PathLike, dtype: torch.dtype | None = None, **options) -> None:
    """:func:`save_weights` of the decoder's own parameters, in ``dtype`` (None: as they are)."""
    save_weights(
        decoder.spec, dict(decoder.named_parameters()), folder, dtype, head=decoder.lm_head is not None, **options
    )


def save_weights(
    spec: DecoderSpec,
    parameters: Mapping[str, Tensor],
    folder: str | os.PathLike,
    dtype: torch.dtype | None = None,
    **options,
) -> None:
    """Write a folder in Hugging Face format; ``options`` are those of :func:`research.core.weights.model_folder.write_model`.

    ``parameters`` has the in-memory names (a DTensor is gathered one at a time).
    """
    if dtype is None:
        dtype = next(iter(parameters.values())).dtype
    if dtype not in SAFETENSORS_DTYPES:
        raise WeightsError(f"weights of dtype {dtype} cannot be exported", hint="float32 or bfloat16")

    def content(tensor: StoredTensor):
        value = torch.empty(tensor.shape, dtype=dtype)
        for piece in tensor.pieces:
            block = parameters[piece.parameter].detach()
            block = block.full_tensor() if hasattr(block, "full_tensor") else block
            block = block if piece.expert is None else block[piece.expert]
            value[piece.rows_stored[0] : piece.rows_stored[1]] = block[slice(*piece.rows_parameter)]
        return value.view(-1).view(torch.uint8).numpy()

    write_model(spec, parameters, content, folder, SAFETENSORS_DTYPES[dtype], **options)
