"""MindSpore's ``.ckpt``: protocol-buffer ``Checkpoint`` messages one after the other, read and written as a stream.

``Checkpoint { repeated Value value = 1 }``, ``Value { string tag = 1; TensorProto tensor = 2 }``,
``TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }``
(mindspore/train/checkpoint_pb2.py). A tensor above 512 MiB is several values of one tag, each with the whole shape.
A scalar has no dims, or the single dim 0. Text that ``append_dict`` put beside the weights has the type ``str``.
A file saved with ``crc_check`` ends in ``crc_num`` and ten bytes, big-endian, of the CRC-32 of all before.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from research.core.errors import WeightsError
from research.core.weights.formats.framing import Frame, Slot
from research.core.weights.tensors import Entry, Segment, tensor_bytes
from research.core.weights.wire import BYTES, WireError, bytes_field, int_fields, numbers, read_varint, varint

SLICE_BYTES = 512 * 1024 * 1024  # as MindSpore cuts them
MINDSPORE_TYPES = {
    "Float32": "F32", "Float16": "F16", "BFloat16": "BF16", "Float64": "F64", "Int64": "I64", "Int32": "I32",
    "Int16": "I16", "Int8": "I8", "UInt64": "U64", "UInt32": "U32", "UInt16": "U16", "UInt8": "U8", "Bool": "BOOL",
}  # fmt: skip
TYPE_NAMES = {name: kind for kind, name in MINDSPORE_TYPES.items()}
_CRC_TAG, _CRC_BYTES = b"crc_num", 17
_HEAD = 4096  # enough for the fields before a tensor's content


def read_entries(path: Path, check_crc: bool = True) -> tuple[dict[str, Entry], dict[str, str]]:
    """-> (name -> entry, further values that are text or of no dtype of ours).

    Only the bytes between the tensors are read; with ``check_crc`` a file that carries a checksum is read once whole.
    Raises :class:`WeightsError` for a file that is cut off, damaged or no MindSpore checkpoint.
    """
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        try:
            size = _without_crc(file, path, size, check_crc)
            values = list(_values(file, size))
        except WireError as error:
            raise WeightsError(
                f"not a whole MindSpore checkpoint: {error}", where=path, hint="copy or convert the file again"
            ) from None
    return _entries(values, path)


def _without_crc(file, path: Path, size: int, check: bool) -> int:
    if size < _CRC_BYTES:
        return size
    tail = os.pread(file.fileno(), _CRC_BYTES, size - _CRC_BYTES)
    if not tail.startswith(_CRC_TAG):
        return size
    end, crc = size - _CRC_BYTES, 0
    if check:
        for begin in range(0, end, 1 << 24):
            crc = zlib.crc32(os.pread(file.fileno(), min(1 << 24, end - begin), begin), crc)
        if crc != int.from_bytes(tail[len(_CRC_TAG) :], "big"):
            raise WeightsError("damaged: its bytes do not have the checksum that it carries", where=path)
    return end


def _values(file, size: int):
    """(tag, type, dims, offset, bytes) of every value, without reading the contents."""
    at = 0
    while at < size:
        head = _pread(file, at, min(_HEAD, size - at))
        key, place = read_varint(head, 0)
        if key != (1 << 3 | BYTES):
            raise WireError(f"no value at byte {at}")
        length, place = read_varint(head, place)
        begin, end = at + place, at + place + length
        if end > size:
            raise WireError(f"truncated: a value ends at byte {end}, the file at {size}")
        yield _value(file, begin, end)
        at = end


def _value(file, begin: int, end: int):
    tag = kind = None
    dims: list[int] = []
    offset = count = None
    for number, low, high in _spans(file, begin, end):
        if number == 1:
            tag = _text(file, low, high)
        elif number == 2:
            for inner, start, stop in _spans(file, low, high):
                if inner == 1:
                    dims.extend(
                        numbers(start) if isinstance(start, int) and stop is None else _packed(file, start, stop)
                    )
                elif inner == 2:
                    kind = _text(file, start, stop)
                elif inner == 3:
                    offset, count = start, stop - start
        elif number == 3:
            raise WireError(f"the value {tag!r} is a map of tensors, which is no weight")
    if tag is None or kind is None or offset is None:
        raise WireError(f"a value without name, type or content at byte {begin}")
    return tag, kind, tuple(dims), offset, count


def _spans(file, begin: int, end: int):
    """(field number, first byte, end byte) of a message's length-delimited fields; (number, value, None) of varints."""
    at = begin
    while at < end:
        head = _pread(file, at, min(24, end - at))
        key, place = read_varint(head, 0)
        if key & 7 == 0:
            value, place = read_varint(head, place)
            yield key >> 3, value, None
            at += place
            continue
        if key & 7 != BYTES:
            raise WireError(f"a field of wire type {key & 7}")
        length, place = read_varint(head, place)
        if at + place + length > end:
            raise WireError(f"a field at byte {at} reaches past its message")
        yield key >> 3, at + place, at + place + length
        at += place + length


def _pread(file, at: int, count: int) -> bytes:
    data = os.pread(file.fileno(), count, at)
    if len(data) < count:
        raise WireError(f"truncated at byte {at + len(data)}")
    return data


def _text(file, low: int, high: int) -> str:
    if high is None or high - low > 1 << 16:
        raise WireError("a name that is no text")
    try:
        return _pread(file, low, high - low).decode()
    except UnicodeDecodeError:
        raise WireError("a name that is no text") from None


def _packed(file, low: int, high: int) -> list[int]:
    return numbers(memoryview(_pread(file, low, high - low)))


def _entries(values, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    entries: dict[str, Entry] = {}
    others: dict[str, str] = {}
    for tag, kind, dims, offset, count in values:
        dtype = MINDSPORE_TYPES.get(kind)
        if dtype is None:
            others[tag] = kind
            continue
        shape = () if dims == (0,) else dims
        segment = Segment(path, offset, count)
        known = entries.get(tag)
        if known is None:
            entries[tag] = Entry(tag, dtype, shape, (segment,))
        elif (known.dtype, known.shape) == (dtype, shape) and sum(s.bytes for s in known.segments) < known.bytes:
            entries[tag] = Entry(tag, dtype, shape, (*known.segments, segment))
        else:
            raise WeightsError(f"tensor {tag} is in it twice", where=path)
    for entry in entries.values():
        found = sum(segment.bytes for segment in entry.segments)
        if found != entry.bytes:
            raise WeightsError(
                f"tensor {entry.name} has {found} bytes, {entry.dtype}{list(entry.shape)} needs {entry.bytes}",
                where=path,
                hint="the file is cut off or damaged: copy or convert it again",
            )
    return entries, others


def frame(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> Frame:
    """Where everything of a file of ``(name, dtype, shape)`` goes; byte-identical to what MindSpore writes."""
    pieces, slots, at = [], [], 0
    for name, dtype, shape in tensors:
        size, own, begin = tensor_bytes(dtype, shape), [], 0
        while True:
            count = min(SLICE_BYTES, size - begin)
            head = _head(name, dtype, shape, count)
            pieces.append((at, head))
            own.append(Slot(at + len(head), begin, count))
            at += len(head) + count
            begin += count
            if begin >= size:
                break
        slots.append(tuple(own))
    return Frame(tuple(pieces), tuple(slots), at)


def _head(name: str, dtype: str, shape: tuple[int, ...], content: int) -> bytes:
    tensor = int_fields(1, shape) + bytes_field(2, TYPE_NAMES[dtype]) + varint(3 << 3 | BYTES) + varint(content)
    value = bytes_field(1, name) + varint(2 << 3 | BYTES) + varint(len(tensor) + content) + tensor
    return varint(1 << 3 | BYTES) + varint(len(value) + content) + value
