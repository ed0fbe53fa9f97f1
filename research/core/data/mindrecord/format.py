"""The MindRecord file, version 3.0, as MindSpore 2.x writes and reads it; needs no MindSpore.

    X.mindrecord
        header    uint64 n, n bytes of JSON, nothing up to header_size: schema, names of all shards, one entry per page
        page k    at header_size + k * page_size:
                  BLOB_DATA  rows, each uint64 n and n bytes: the array of the one column there is, or of each column (in
                             the order of their names) after its length as a big-endian uint64
                  RAW_DATA   per row uint64 n and n bytes of MessagePack with the columns that are single values; {"id": 0}
                             where there are none
    X.mindrecord.db   SQLite: INDEXES says where each row lies, SHARD_NAME repeats the name of the file

Integers are little-endian unless it says otherwise. An array of integers is packed: its length as a big-endian uint32, two
bits per element (0, 1, 2, 3: it takes 1, 2, 4, 8 bytes), four to a byte from the highest bits on, then the elements, each
in the fewest bytes that hold it. Version 2.0 stores the array as it is. The layout was read from
mindspore/ccsrc/minddata/mindrecord; the tests compare with what MindSpore's FileWriter writes, byte by byte.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

VERSION, READABLE = "3.0", ("2.0", "3.0")
HEADER_SIZE = 1 << 24
PAGE_SIZE, LARGEST_PAGE = 1 << 25, 1 << 28
MOST_SHARDS = 1000
BLOB, RAW = "BLOB_DATA", "RAW_DATA"
RAW_ENTRY = struct.pack("<Q", 5) + b"\x81\xa2id\x00"
WIDTHS = {"int32": 4, "int64": 8}
_CODES = np.arange(256, dtype=np.uint8)[:, None] >> np.array([6, 4, 2, 0], np.uint8) & 3  # those in one byte
_SIZES = np.array([1, 2, 4, 8])  # bytes of an element, by its code
_STEPS = np.arange(8)
INDEX_TABLES = (
    "CREATE TABLE INDEXES(  ROW_ID               INT  NOT NULL, PAGE_ID_RAW          INT  NOT NULL"
    ", PAGE_OFFSET_RAW      INT  NOT NULL, PAGE_OFFSET_RAW_END  INT  NOT NULL"
    ", ROW_GROUP_ID         INT  NOT NULL, PAGE_ID_BLOB         INT  NOT NULL"
    ", PAGE_OFFSET_BLOB     INT  NOT NULL, PAGE_OFFSET_BLOB_END INT  NOT NULL, PRIMARY KEY(ROW_ID))",
    "CREATE TABLE SHARD_NAME(NAME TEXT NOT NULL)",
)


@dataclass
class Page:
    """One page of a shard. Blob pages hold rows ``first .. last - 1``; ``used`` counts bytes.

    ``number`` counts the pages of its kind. ``groups`` are ``(blob page, offset)``: in a raw page where the entries of each
    blob page's rows begin.
    """

    id: int
    kind: str
    number: int
    groups: list[tuple[int, int]]
    first: int = 0
    last: int = 0
    used: int = 0

    def to_json(self, shard: int) -> dict[str, Any]:
        return {
            "end_row_id": self.last,
            "page_id": self.id,
            "page_size": self.used,
            "page_type": self.kind,
            "page_type_id": self.number,
            "row_group_ids": [{"id": number, "offset": offset} for number, offset in self.groups],
            "shard_id": shard,
            "start_row_id": self.first,
        }


def header_bytes(
    columns: Sequence[str],
    note: str,
    names: Sequence[str],
    shard: int,
    pages: Sequence[Page],
    page_size: int,
    saved: int,
) -> bytes:
    """The header of one shard with int32 columns. ``saved``: bytes that packing saved in all shards together."""
    columns = sorted(columns)
    schema = {
        "blob_fields": columns,
        "desc": note,
        "schema": {name: {"shape": [-1], "type": "int32"} for name in columns},
    }
    fields = {
        "header_size": HEADER_SIZE,
        "index_fields": None,
        "page": [page.to_json(shard) for page in pages],
        "page_size": page_size,
        "compression_size": max(0, saved),
        "schema": [schema],
        "shard_addresses": list(names),
        "shard_id": shard,
        "statistics": None,
        "version": VERSION,
    }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    return struct.pack("<Q", len(text)) + text


# --- packed integers --------------------------------------------------------------------------------------------


def pack_rows(flat: np.ndarray, lengths: np.ndarray, width: int, fill: int) -> list[bytes]:
    """``len(lengths)`` packed arrays of ``width`` int32 each: the next ``lengths[i]`` values of ``flat``, then ``fill``."""
    codes, data, ends = _shortest(flat)
    fill_code, fill_data, _ = _shortest(np.array([fill], np.int32))
    bits = np.zeros((len(lengths), -(-width // 4) * 4), np.uint8)
    bits[:, :width] = fill_code[0]
    bits[:, :width][np.arange(width) < lengths[:, None]] = codes
    bitmaps = bits[:, 0::4] << 6 | bits[:, 1::4] << 4 | bits[:, 2::4] << 2 | bits[:, 3::4]
    count, tail = struct.pack(">I", width), fill_data * width
    cuts = ends[np.concatenate(([0], np.cumsum(lengths)))].tolist()
    return [
        b"".join((count, bitmaps[row].tobytes(), data[cuts[row] : cuts[row + 1]], tail[length * len(fill_data) :]))
        for row, length in enumerate(lengths.tolist())
    ]


def _shortest(values: np.ndarray) -> tuple[np.ndarray, bytes, np.ndarray]:
    """``(codes, bytes, ends)`` of int32 values: ``ends[i]`` is where the bytes of the first ``i`` values end."""
    codes = ((values > 127) | (values < -128)).astype(np.uint8)
    codes += (values > 32767) | (values < -32768)
    sizes = np.left_shift(1, codes, dtype=np.int64)
    whole = values.astype("<i4", copy=False).view(np.uint8).reshape(-1, 4)
    return codes, whole[np.arange(4) < sizes[:, None]].tobytes(), np.concatenate(([0], np.cumsum(sizes)))


def packed_length(blob: np.ndarray) -> int:
    """Elements of a packed array. ``blob`` is uint8."""
    return int.from_bytes(blob[:4].tobytes(), "big")


def unpack(blob: np.ndarray, limit: int | None = None) -> np.ndarray:
    """The first ``limit`` elements (None: all) of a packed array, int64. Raises ValueError where it is cut off."""
    count = packed_length(blob)
    n = count if limit is None else min(count, limit)
    start = 4 + -(-count // 4)
    bitmap = blob[4 : 4 + -(-n // 4)]
    if len(bitmap) == -(-n // 4) and not bitmap.any():  # bytes, as masks are
        values = blob[start : start + n].view(np.int8).astype(np.int64)
        if len(values) < n:
            raise ValueError(f"an array of {count} integers is cut off")
        return values
    codes = _CODES[bitmap].reshape(-1)[:n]
    sizes = _SIZES[codes]
    ends = sizes.cumsum()
    ends += start
    if len(codes) < n or ends[-1] > len(blob):
        raise ValueError(f"an array of {count} integers is cut off")
    values = np.empty(n, np.int64)
    for code, share in enumerate(np.bincount(codes, minlength=4).tolist()):
        size = 1 << code
        if share == n:
            values[:] = blob[start : start + n * size].view(f"<i{size}")
        elif share:
            places = (codes == code).nonzero()[0]
            found = blob[(ends[places] - size)[:, None] + _STEPS[:size]]
            values[places] = found.view(f"<i{size}")[:, 0]
    return values
