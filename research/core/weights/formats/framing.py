"""What every file format tells the writer: the bytes around the tensors, and where each tensor's bytes go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """Bytes ``begin .. begin+bytes-1`` of a tensor lie at ``offset`` of the file."""

    offset: int
    begin: int
    bytes: int


@dataclass(frozen=True)
class Frame:
    """A file before its tensors: fixed ``pieces`` (offset, bytes), the slots of each tensor in order, the total size."""

    pieces: tuple[tuple[int, bytes], ...]
    slots: tuple[tuple[Slot, ...], ...]
    size: int
