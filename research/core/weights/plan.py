"""What a conversion, split, merge or reshard will write, before it writes anything.

A :class:`Plan` is a list of files, each a list of :class:`Target` tensors described as blocks of logical tensors
(:mod:`research.core.weights.blocks`), and where those logical tensors lie in the source. :mod:`runner` carries it out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from research.core.weights.blocks import Block, Stored
from research.core.weights.formats import dcp, mindspore, safetensors
from research.core.weights.formats.framing import Frame
from research.core.weights.tensors import Entry, tensor_bytes

SAFETENSORS, CKPT, DCP = "safetensors", "ckpt", "dcp"


@dataclass(frozen=True)
class Target:
    """One tensor to write: its blocks, its dtype (safetensors' name), and in a few words how it is made."""

    stored: Stored
    dtype: str
    how: str = "copy"

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def bytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class TargetFile:
    """One file of tensors. ``path`` is relative to the target folder, or the file's own name when a single file is written."""

    path: str
    format: str  # safetensors | ckpt | dcp
    tensors: tuple[Target, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def frame(self) -> Frame:
        rows = [(target.name, target.dtype, target.shape) for target in self.tensors]
        if self.format == DCP:
            return dcp.frame(rows)
        return safetensors.frame(rows, self.metadata) if self.format == SAFETENSORS else mindspore.frame(rows)


@dataclass
class Plan:
    """``entries``: the source's tensors by handle; ``sources``: logical name -> (handle, block) in order of preference;
    ``extra``: small files by relative path (contents, or a file to copy), written last."""

    files: Sequence[TargetFile]
    entries: Mapping[Hashable, Entry]
    sources: Mapping[str, Sequence[tuple[Hashable, Block]]]
    extra: Mapping[str, bytes | Path] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(file.frame().size for file in self.files)

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor on either side."""
        targets = (target.bytes for file in self.files for target in file.tensors)
        return max((*targets, *(entry.bytes for entry in self.entries.values())), default=0)

    def fingerprint(self) -> str:
        """Changes with anything that decides the written bytes: the targets, the blocks, the source files' size and time."""
        digest = hashlib.sha256()
        for path in sorted({segment.path for entry in self.entries.values() for segment in entry.segments}):
            stat = path.stat()
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        for file in self.files:
            digest.update(json.dumps([file.path, file.format, dict(file.metadata)]).encode())
            for target in file.tensors:
                digest.update(f"{target.stored!r}\0{target.dtype}\0".encode())
        for name in sorted(self.sources):
            digest.update(f"{name}\0{self.sources[name]!r}\0".encode())
        return digest.hexdigest()


def shard_files(targets: Sequence[Target], shard_bytes: int, metadata: Mapping[str, str]) -> list[TargetFile]:
    """Hugging Face's file names: model.safetensors, or shards of at most ``shard_bytes`` (a larger tensor has its own)."""
    shards: list[list[Target]] = [[]]
    room = shard_bytes
    for target in targets:
        if target.bytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(target)
        room -= target.bytes
    if len(shards) == 1:
        return [TargetFile("model.safetensors", SAFETENSORS, tuple(shards[0]), metadata)]
    return [
        TargetFile(f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors", SAFETENSORS, tuple(shard), metadata)
        for n, shard in enumerate(shards)
    ]


def index_file(files: Sequence[TargetFile]) -> bytes:
    """``model.safetensors.index.json`` of several shards."""
    weight_map = {target.name: file.path for file in files for target in file.tensors}
    total = sum(target.bytes for file in files for target in file.tensors)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()
