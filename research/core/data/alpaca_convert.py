"""Alpaca records -> conversations in the layouts that the documents' alpaca_converter.py of each family writes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from research.core.data.folder import close_synced
from research.core.data.json_stream import Record
from research.core.data.messages import Dropped, to_example
from research.core.data.readers import read_file
from research.core.data.sources import OnBytes
from research.core.errors import DataError

SYSTEM = "You are a helpful assistant."


def qwen_conversation(messages: list[dict[str, Any]], number: int) -> dict[str, Any]:
    """Qwen v1: ``{"id", "conversations": [{"from": "user" | "assistant", "value"}]}``; the id is the record's number."""
    return {"id": str(number), "conversations": [{"from": m["role"], "value": m["content"]} for m in messages]}


def chatml_messages(messages: list[dict[str, Any]], _number: int) -> dict[str, Any]:
    """Qwen1.5 and later: ``{"type": "chatml", "messages": [...]}`` that begins with a system turn."""
    own = messages[0]["role"] == "system"
    return {"type": "chatml", "messages": messages if own else [{"role": "system", "content": SYSTEM}, *messages]}


def sharegpt_conversation(messages: list[dict[str, Any]], _number: int) -> dict[str, Any]:
    """Qwen2's dynamic shapes: ``{"type": "chatml", "conversations": [{"from": "human" | "gpt", "value"}]}``."""
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in messages]
    return {"type": "chatml", "conversations": turns}


@dataclass(frozen=True)
class Layout:
    """How one converter writes: ``array`` is one indented JSON array, else JSON Lines."""

    record: Callable[[list[dict[str, Any]], int], dict[str, Any]]
    array: bool
    ascii: bool


QWEN = Layout(qwen_conversation, array=True, ascii=True)
CHATML = Layout(chatml_messages, array=False, ascii=True)
SHAREGPT = Layout(sharegpt_conversation, array=True, ascii=False)


@dataclass
class Converted:
    """``dropped`` maps a reason to ``[records, where the first one is]``."""

    records: int = 0
    dropped: dict[str, list] = field(default_factory=dict)


def convert_alpaca(source: Path, output: Path, layout: Layout, on_bytes: OnBytes | None = None) -> Converted:
    """Write every record of ``source`` that has an instruction; the file appears under its name when it is complete.

    Raises :class:`DataError` for a file that is not Alpaca's.
    """
    fmt, records = read_file(source, "auto", on_bytes=on_bytes)
    if fmt != "alpaca":
        raise DataError(
            f"the records are of the format {fmt}, not Alpaca's",
            where=source,
            hint='{"instruction", "input", "output"} records; the preprocess scripts read other formats as they are',
        )
    result = Converted()
    output = Path(os.path.abspath(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        with open(aside, "wb", buffering=1 << 20) as file:
            for text in _texts(_conversations(records, layout, result), layout):
                file.write(text.encode())
            close_synced(file)
        os.replace(aside, output)
    finally:
        aside.unlink(missing_ok=True)
    return result


def _conversations(records: Iterator[Record], layout: Layout, result: Converted) -> Iterator[dict[str, Any]]:
    for record in records:
        try:
            messages = to_example(record, "alpaca", mindformers=True).messages
        except Dropped as reason:
            result.dropped.setdefault(str(reason), [0, str(record.where)])[0] += 1
            continue
        result.records += 1
        yield layout.record(messages, record.where.record)


def _texts(values: Iterator[dict[str, Any]], layout: Layout) -> Iterator[str]:
    if not layout.array:
        for value in values:
            yield json.dumps(value, ensure_ascii=layout.ascii) + "\n"
        return
    opening = "["
    for value in values:
        text = json.dumps(value, ensure_ascii=layout.ascii, indent=2)
        yield opening + "\n  " + text.replace("\n", "\n  ")  # a line break inside a string is written as \n
        opening = ","
    yield "[]" if opening == "[" else "\n]"
