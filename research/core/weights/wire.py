"""Protocol buffers' wire format: the few primitives that MindSpore's files are made of.

A message is a run of fields, each a key (field number << 3 | wire type) and a value: a varint (type 0), 8 bytes (1),
a length and that many bytes (2), or 4 bytes (5). https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """The bytes are no message: cut off, or of another format."""


def varint(value: int) -> bytes:
    """``value`` as a varint; negative numbers in two's complement of 64 bits, as int32 and int64 fields have them."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def int_field(number: int, value: int) -> bytes:
    return varint(number << 3 | VARINT) + varint(value)


def bytes_field(number: int, value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | BYTES) + varint(len(value)) + value


def int_fields(number: int, values: Iterable[int]) -> bytes:
    """A repeated number, one field each (proto2's default; readers accept it for packed fields too)."""
    return b"".join(int_field(number, value) for value in values)


def read_varint(data: memoryview | bytes, at: int) -> tuple[int, int]:
    """The varint at ``at`` and the position after it. Raises :class:`WireError` when the bytes end or it is too long."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise WireError("cut off or damaged varint")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def signed(value: int) -> int:
    """A varint read as int32/int64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def fields(data: memoryview | bytes) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message; length-delimited values are views of ``data``. Raises :class:`WireError`."""
    view = memoryview(data)
    at = 0
    while at < len(view):
        key, at = read_varint(view, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise WireError("field number 0")
        if kind == VARINT:
            value, at = read_varint(view, at)
            yield number, value
            continue
        if kind == BYTES:
            length, at = read_varint(view, at)
        elif kind in (FIXED64, FIXED32):
            length = 8 if kind == FIXED64 else 4
        else:
            raise WireError(f"wire type {kind}")
        if at + length > len(view):
            raise WireError("a field reaches past the end")
        yield number, view[at : at + length]
        at += length


def numbers(value: int | memoryview) -> list[int]:
    """The values of one occurrence of a repeated number: one, or a packed run."""
    if isinstance(value, int):
        return [value]
    out, at = [], 0
    while at < len(value):
        number, at = read_varint(value, at)
        out.append(number)
    return out
