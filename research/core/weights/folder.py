"""A weight folder in Hugging Face format: config.json and safetensors, one file or several with an index.

Headers are read and checked first (names, shapes, byte counts against the files' sizes), tensors one at a time
afterwards, so that memory stays near the largest of them and a damaged folder is refused before anything is built.
The safetensors layout: 8 bytes little-endian header length, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from research.core.errors import WeightsError
from research.core.spec import DecoderSpec, spec_from_hf
from research.core.weights.keys import IGNORED, StoredTensor, stored_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where a stored tensor lies: ``begin`` counts bytes from the start of ``path``."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    bytes: int


def read_config(folder: str | os.PathLike) -> dict:
    """The folder's ``config.json``. Raises :class:`WeightsError` when the folder or the file is absent or no JSON."""
    folder = existing_folder(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(
            "no config.json in this folder", where=folder, hint="WEIGHTS must be a folder in Hugging Face format"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"not valid JSON: {error}", where=path, hint="fetch the file again") from None
    if not isinstance(config, dict):
        raise WeightsError("must hold one JSON object", where=path)
    return config


def read_spec(folder: str | os.PathLike) -> DecoderSpec:
    """The architecture that ``config.json`` describes."""
    return spec_from_hf(read_config(folder), where=str(Path(folder) / "config.json"))


def existing_folder(folder: str | os.PathLike) -> Path:
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise WeightsError(
            "weight folder not found", where=folder, hint="check the path, or `make weights MODEL=...` to fetch it"
        )
    if not folder.is_dir():
        raise WeightsError(
            "this is a file; the folder that holds it and its config.json is needed",
            where=folder,
            hint=f"WEIGHTS={folder.parent}",
        )
    return folder


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Entries of one safetensors file, checked against its size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little") if len(head) == 8 else -1
        if head.startswith(b"version "):
            raise WeightsError("this is a Git LFS pointer, not the weights", where=path, hint="git lfs pull")
        if not 2 <= length <= MAX_HEADER:
            raise WeightsError("not a safetensors file", where=path, hint="fetch the file again")
        if size < 8 + length:
            raise _truncated(path, size, 8 + length)
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise WeightsError("its header is damaged", where=path, hint="fetch the file again") from None
    entries, start = {}, 8 + length
    for name, item in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = item["data_offsets"]
            shape, dtype = tuple(int(d) for d in item["shape"]), item["dtype"]
        except (KeyError, TypeError, ValueError):
            raise WeightsError(f"its header entry for {name} is damaged", where=path) from None
        if dtype not in ITEM_BYTES:
            raise WeightsError(f"tensor {name} has dtype {dtype}, which is not read here", where=path)
        count = ITEM_BYTES[dtype]
        for extent in shape:
            count *= extent
        if end - begin != count:
            raise WeightsError(
                f"tensor {name} says {end - begin} bytes but {dtype}{list(shape)} has {count}", where=path
            )
        entries[name] = TensorEntry(path, dtype, shape, start + begin, count)
    needed = max((e.begin + e.bytes for e in entries.values()), default=start)
    if size < needed:
        raise _truncated(path, size, needed)
    return entries


def _truncated(path: Path, size: int, needed: int) -> WeightsError:
    return WeightsError(
        f"truncated: {size} bytes, its header promises {needed}", where=path, hint="fetch the file again"
    )


class WeightFolder:
    """The tensors of a folder: ``names()``, ``shape(name)``, ``dtype(name)``, ``read_into(name, buffer, rows)``."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = existing_folder(folder)
        self.entries = self._entries()

    def _entries(self) -> dict[str, TensorEntry]:
        index = self.folder / INDEX
        if index.is_file():
            return self._from_index(index)
        single = self.folder / SINGLE
        files = [single] if single.is_file() else sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise self._nothing()
        entries: dict[str, TensorEntry] = {}
        for path in files:
            found = read_header(path)
            for name in found.keys() & entries.keys():
                raise WeightsError(f"tensor {name} is in {entries[name].path.name} too", where=path)
            entries |= found
        return entries

    def _nothing(self) -> WeightsError:
        pickles = sorted(self.folder.glob("*.bin")) + sorted(self.folder.glob("*.pt*"))
        if pickles:
            return WeightsError(
                f"only pickled weights here ({pickles[0].name}); a pickle can run code when it is opened",
                where=self.folder,
                hint="fetch the safetensors files, or say allow_pickle=true if you trust their source",
            )
        return WeightsError("no safetensors files in this folder", where=self.folder)

    def _from_index(self, index: Path) -> dict[str, TensorEntry]:
        twice: list[str] = []

        def unique(pairs: list) -> dict:  # json keeps the last of two equal keys and says nothing
            seen = dict(pairs)
            if len(seen) < len(pairs):
                twice.extend(name for name in seen if sum(key == name for key, _ in pairs) > 1)
            return seen

        try:
            text = index.read_text(encoding="utf-8")
            weight_map = json.loads(text, object_pairs_hook=unique)["weight_map"]
            files = sorted(set(weight_map.values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise WeightsError("not a safetensors index", where=index, hint="fetch the file again") from None
        if twice:
            raise WeightsError(f"it names {_some(twice)} twice", where=index, hint="fetch the file again")
        headers = {}
        for name in files:
            path = self.folder / name
            if not path.is_file():
                absent = [f for f in files if not (self.folder / f).is_file()]
                raise WeightsError(
                    f"{len(absent)} of {len(files)} files that {INDEX} names are missing: {_some(absent)}",
                    where=self.folder,
                    hint="fetch them too",
                )
            headers[name] = read_header(path)
        places: dict[str, str] = {}
        for name, header in headers.items():
            for tensor in header.keys() & places.keys():
                raise WeightsError(f"tensor {tensor} is in {places[tensor]} and in {name}", where=self.folder)
            places |= dict.fromkeys(header, name)
        entries = {}
        for tensor, name in weight_map.items():
            if tensor not in headers[name]:
                raise WeightsError(f"{INDEX} says that {tensor} is in {name}; it is not", where=self.folder)
            entries[tensor] = headers[name][tensor]
        return entries

    def names(self) -> list[str]:
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> str:
        """safetensors' name of the dtype: F32, BF16, F16, .."""
        return self.entries[name].dtype

    def read_into(self, name: str, buffer, rows: tuple[int, int] | None = None) -> None:
        """Fill ``buffer`` (writable, of exactly the bytes) with a tensor, or with its rows ``start .. stop-1``."""
        entry = self.entries[name]
        begin, count = entry.begin, entry.bytes
        if rows is not None:
            row = entry.bytes // entry.shape[0]
            begin, count = begin + rows[0] * row, (rows[1] - rows[0]) * row
        view = memoryview(buffer).cast("B")
        assert len(view) == count, (name, len(view), count)
        with entry.path.open("rb", buffering=0) as file:
            file.seek(begin)
            done = 0
            while done < count:
                got = file.readinto(view[done:])
                if not got:
                    raise _truncated(entry.path, begin + done, begin + count)
                done += got


@dataclass(frozen=True)
class Plan:
    """How a folder fills a decoder: the tensors to read (``names`` maps the table's name to the folder's)."""

    tensors: tuple[StoredTensor, ...]
    names: dict[str, str]
    tied_head: str | None = None  # a head stored although the config ties it: to be compared with the embedding


def plan_reading(folder, spec: DecoderSpec, head: bool = True) -> Plan:
    """Match the folder's tensors with the key table of ``spec`` and check every name and shape.

    ``folder`` is a :class:`WeightFolder` or anything with its ``names()``, ``shape(name)`` and ``folder``. With
    ``head=False`` an output matrix may be absent (embedding models). Raises :class:`WeightsError`.
    """
    found = {name: name for name in folder.names() if not IGNORED.search(name)}
    if found and not any(name.startswith(("model.", "transformer.")) for name in found):
        # Saved from the bare model (Qwen2Model): the same names without the prefix.
        prefix = "transformer." if spec.model_type == "qwen" else "model."
        found = {name if name == "lm_head.weight" else prefix + name: name for name in found}
    stacked = any(name.endswith("mlp.experts.gate_up_proj") for name in found)
    tensors = stored_tensors(spec, head and not spec.tied, stacked)
    expected = {tensor.name: tensor for tensor in tensors}

    spare_head = found.pop("lm_head.weight") if "lm_head.weight" in found and "lm_head.weight" not in expected else None
    missing = [name for name in expected if name not in found]
    unexpected = [found[name] for name in found if name not in expected]
    where = folder.folder
    if missing:
        hint = "the folder is incomplete, or its config.json belongs to another model"
        if missing == ["lm_head.weight"]:
            hint = "an embedding model has no output matrix; or set tie_word_embeddings in config.json if it is tied"
        more = f"; unexpected ({len(unexpected)}): {_some(unexpected)}" if unexpected else ""
        raise WeightsError(f"tensors missing ({len(missing)}): {_some(missing)}{more}", where=where, hint=hint)
    if unexpected:
        raise WeightsError(
            f"tensors that do not belong to this model ({len(unexpected)}): {_some(unexpected)}",
            where=where,
            hint="does config.json belong to these weights?",
        )
    for name, tensor in expected.items():
        if tuple(folder.shape(found[name])) != tensor.shape:
            raise WeightsError(
                f"tensor {found[name]} has the wrong shape: expected {list(tensor.shape)}, "
                f"found {list(folder.shape(found[name]))}",
                where=where,
                hint="does config.json belong to these weights?",
            )
    return Plan(tuple(tensors), found, spare_head if spec.tied else None)


def _some(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
