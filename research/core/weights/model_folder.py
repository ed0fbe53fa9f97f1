"""A model as a folder in Hugging Face format, written from the parameters of any framework, and compared with MODEL."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from research.core.errors import WeightsError
from research.core.spec import DecoderSpec, spec_differences, spec_to_hf
from research.core.weights.keys import StoredTensor, stored_tensors
from research.core.weights.tensors import TORCH_NAMES
from research.core.weights.write import SHARD_BYTES, new_folder, write_json, write_tensors


def check_spec(expect: DecoderSpec, found: DecoderSpec, folder: str | os.PathLike) -> None:
    """Raise :class:`WeightsError` listing the keys in which the folder contradicts the chosen model."""
    differences = spec_differences(expect, found)
    if differences:
        raise WeightsError(
            "this checkpoint is not the chosen MODEL:\n    " + "\n    ".join(differences),
            where=Path(folder) / "config.json",
            hint="the MODEL of these weights, or other WEIGHTS",
        )


def write_model(
    spec: DecoderSpec,
    parameters: Collection[str],
    content: Callable[[StoredTensor], object],
    folder: str | os.PathLike,
    dtype: str,
    *,
    eos: int | list[int] | None = None,
    bos: int | None = None,
    generation: dict | None = None,
    fingerprints: dict | None = None,
    files: Mapping[str, str | os.PathLike | bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    head: bool = True,
) -> None:
    """Write a folder that transformers, vLLM and MindIE load: config.json, generation_config.json, safetensors.

    ``parameters`` names what is there in memory; ``content(tensor)`` gives a stored tensor's bytes in ``dtype``
    (safetensors' name), one tensor is asked for at a time. ``eos``/``bos`` go into both configs, ``generation`` adds to
    generation_config.json, ``fingerprints`` (tokenizer, template) become workbench.json, ``files`` are further files by
    name (contents, or a path to copy). The folder appears whole.
    """
    tensors = stored_tensors(spec, head)
    absent = {piece.parameter for tensor in tensors for piece in tensor.pieces} - set(parameters)
    assert not absent, f"parameters missing for export: {sorted(absent)[:4]}"
    generation = {
        **({"eos_token_id": eos} if eos is not None else {}),
        **({"bos_token_id": bos} if bos is not None else {}),
        **(generation or {}),
    }
    with new_folder(folder, overwrite) as aside:
        write_json(aside / "config.json", spec_to_hf(spec, TORCH_NAMES[dtype], eos=eos, bos=bos))
        write_json(aside / "generation_config.json", generation)
        if fingerprints is not None:
            write_json(aside / "workbench.json", fingerprints)
        for file, source in (files or {}).items():
            if isinstance(source, bytes):
                (aside / file).write_bytes(source)
            else:
                shutil.copyfile(source, aside / file)
        write_tensors(aside, tensors, dtype, content, shard_bytes)
