"""MindSpore itself reads what is written here and writes what is read here, .ckpt and safetensors, every dtype."""

from __future__ import annotations

import os
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from research.core.errors import WeightsError
from research.core.weights.convert import ConvertOptions, convert
from research.core.weights.formats import mindspore as reader
from research.core.weights.opened import HUGGINGFACE, OpenOptions
from research.core.weights.tensors import Files, read_tensor
from tests.core.weights.cases import DTYPES, FAMILIES, Case, folder_tensors, mindformers_weights, same

ms = pytest.importorskip("mindspore", reason="MindSpore is not installed (requirements/mindspore.txt)")

CASES = {family: Case(family) for family in FAMILIES} | {"tied": Case("qwen2", tied=True, kv=1, repeat=3)}


def to_torch(value) -> torch.Tensor:
    """A MindSpore tensor with its dtype; bfloat16 by way of float32, which holds it exactly."""
    if value.dtype == ms.bfloat16:
        return torch.from_numpy(value.astype(ms.float32).asnumpy().copy()).bfloat16()
    return torch.from_numpy(value.asnumpy().copy())


def to_mindspore(value: torch.Tensor):
    if value.dtype == torch.bfloat16:
        return ms.Tensor(value.float().numpy(), ms.bfloat16)
    return ms.Tensor(value.numpy())


def save(tensors: dict[str, torch.Tensor], path, **options) -> None:
    rows = [{"name": name, "data": to_mindspore(value)} for name, value in tensors.items()]
    ms.save_checkpoint(rows, str(path), format=path.suffix[1:], **options)


@pytest.mark.slow
@pytest.mark.parametrize("concat", ["none", "stacked", "grouped"])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("name", sorted(CASES))
def test_mindspore_loads_our_checkpoint_and_we_load_its(name, dtype, concat, tmp_path):
    case = CASES[name]
    source = case.write(tmp_path / "hf", DTYPES[dtype])
    expected = mindformers_weights(case, case.weights(DTYPES[dtype]), concat)
    for files in ("ckpt", "safetensors"):
        ours = tmp_path / f"ours.{files}"
        convert(source, ours, ConvertOptions(concat=concat))
        loaded = ms.load_checkpoint(str(ours), format=files)
        assert same({key: to_torch(value) for key, value in loaded.items()}, expected)

        theirs = tmp_path / f"theirs.{files}"
        save(expected, theirs)
        opening = OpenOptions(concat=concat, config=str(source), gmm=False if case.family == "qwen2_moe" else None)
        convert(theirs, tmp_path / f"back_{files}", ConvertOptions(to=HUGGINGFACE), opening)
        assert same(folder_tensors(tmp_path / f"back_{files}"), case.weights(DTYPES[dtype]))
        if concat == "none":
            convert(
                theirs, tmp_path / f"again_{files}", ConvertOptions(to=HUGGINGFACE), OpenOptions(config=str(source))
            )


def test_our_checkpoint_is_byte_for_byte_what_mindspore_writes(tmp_path):
    case = CASES["qwen2"]
    convert(case.write(tmp_path / "hf"), tmp_path / "ours.ckpt", ConvertOptions())
    loaded = ms.load_checkpoint(str(tmp_path / "ours.ckpt"))
    ms.save_checkpoint([{"name": n, "data": v} for n, v in loaded.items()], str(tmp_path / "theirs.ckpt"))
    assert (tmp_path / "ours.ckpt").read_bytes() == (tmp_path / "theirs.ckpt").read_bytes()


def test_every_dtype_scalars_and_text_are_read_as_mindspore_wrote_them(tmp_path):
    kinds = {name: kind for name, kind in reader.MINDSPORE_TYPES.items() if name != "BFloat16"}
    rows = []
    for name, kind in kinds.items():
        values = np.array([[0, 1], [2, 3]]).astype(reader_dtype(kind))
        rows.append({"name": name, "data": ms.Tensor(values)})
    rows.append({"name": "BFloat16", "data": ms.Tensor([1.5, -2.0], ms.bfloat16)})
    rows.append({"name": "scalar", "data": ms.Tensor(2.5, ms.float32)})
    ms.save_checkpoint(rows, str(tmp_path / "x.ckpt"), append_dict={"epoch_num": 3, "note": "text", "lr": 0.5})
    entries, others = reader.read_entries(tmp_path / "x.ckpt")
    assert list(others) == ["note"]
    assert {entry.dtype for name, entry in entries.items() if name in reader.MINDSPORE_TYPES} == set(
        reader.MINDSPORE_TYPES.values()
    )
    with Files() as files:
        for name, kind in kinds.items():
            assert entries[name].dtype == kind
            assert (
                read_tensor(files, entries[name]).tolist()
                == np.array([[0, 1], [2, 3]]).astype(reader_dtype(kind)).tolist()
            )
        assert read_tensor(files, entries["BFloat16"]).tolist() == [0x3FC0, 0xC000]
        assert entries["scalar"].shape == () and float(read_tensor(files, entries["scalar"])) == 2.5
        assert int(read_tensor(files, entries["epoch_num"])) == 3


def reader_dtype(kind: str) -> np.dtype:
    from research.core.weights.tensors import NUMPY_DTYPES

    return NUMPY_DTYPES[kind]


def test_a_checksummed_file_is_checked(tmp_path):
    path = tmp_path / "x.ckpt"
    save({"w": torch.arange(100.0)}, path, crc_check=True)
    entries, _ = reader.read_entries(path)
    assert entries["w"].shape == (100,)
    os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="checksum"):
        reader.read_entries(path)


def test_a_tensor_above_the_slice_limit_is_read_as_mindspore_slices_it(tmp_path, monkeypatch):
    from mindspore.train import serialization

    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)  # KiB instead of 512 MiB
    value = torch.randn(100, 30)
    save({"w": value}, tmp_path / "x.ckpt")
    entries, _ = reader.read_entries(tmp_path / "x.ckpt")
    assert len(entries["w"].segments) > 5
    with Files() as files:
        assert np.array_equal(read_tensor(files, entries["w"]), value.numpy())


def test_mindspore_joins_the_slices_that_we_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "SLICE_BYTES", 64)
    case = CASES["qwen2"]
    convert(case.write(tmp_path / "hf"), tmp_path / "x.ckpt", ConvertOptions())
    loaded = ms.load_checkpoint(str(tmp_path / "x.ckpt"))
    assert same({n: to_torch(v) for n, v in loaded.items()}, mindformers_weights(case, case.weights()))


def test_mindspore_safetensors_keep_their_mark(tmp_path):
    from safetensors import safe_open

    case = CASES["qwen2"]
    convert(case.write(tmp_path / "hf"), tmp_path / "x.safetensors", ConvertOptions())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "ms"}
    assert same(load_file(tmp_path / "x.safetensors"), mindformers_weights(case, case.weights()))
