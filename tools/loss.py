#!/usr/bin/env python
"""The training loss of ready-made records, in fp32 and without an update.

``python tools/loss.py --weights DIR --data records.jsonl [--packed]`` prints ``{"loss", "tokens"}``: the mean
cross-entropy over all supervised targets, and their number. A record is ``{"id", "input_ids", "labels"}`` with labels
aligned with the ids and -100 where nothing is to be learned.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from research.core.errors import DataError, require_file, run_cli

ROW = 2048  # tokens of a packed row; longer where one record is longer
IGNORED = -100


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="folder with config.json and safetensors")
    parser.add_argument("--data", required=True, help='JSONL of {"id", "input_ids", "labels"}')
    parser.add_argument("--packed", action="store_true", help="several records in a row, exactly; the same numbers")
    args = parser.parse_args(argv)
    path = require_file(args.data, "the file of records", "make data DATA=... ARGS=data.dump=records.jsonl")

    import torch

    from research.core.config.schema import DeviceConfig
    from research.core.torch.device import resolve_device
    from research.core.torch.layout import Layout
    from research.core.torch.loss import linear_cross_entropy
    from research.core.torch.weights import load_decoder

    device = resolve_device(DeviceConfig())
    decoder = load_decoder(args.weights, torch.float32, device)
    records = read_records(path, decoder.spec.vocab, decoder.spec.usable_length)
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for row in pack(records) if args.packed else ([record] for record in records):
            ids, labels, positions, documents = (torch.tensor(values)[None] for values in join(row))
            layout = Layout.packed(positions, documents, device)
            hidden = decoder.hidden(ids.to(device), layout)
            summed, count = linear_cross_entropy(hidden, decoder.lm_head.weight, labels.to(device))
            total, tokens = total + float(summed), tokens + count
    if tokens == 0:
        raise DataError("no label is supervised: there is no loss", where=path, hint="labels other than -100")
    print(json.dumps({"loss": total / tokens, "tokens": tokens}))
    return 0


def read_records(path: Path, vocab: int, longest: int) -> Iterator[tuple[list[int], list[int]]]:
    """``(ids, labels)`` of every line. Raises :class:`DataError` naming the line that cannot be used."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
                ids, labels = record["input_ids"], record["labels"]
            except ValueError as bad:
                raise DataError(f"not valid JSON: {bad}", where=where) from None
            except (KeyError, TypeError):
                raise DataError("a record needs input_ids and labels", where=where) from None
            if not (_integers(ids) and _integers(labels) and len(ids) == len(labels) and ids):
                raise DataError("input_ids and labels must be lists of integers of one length", where=where)
            for value in [*ids, *(label for label in labels if label != IGNORED)]:
                if not 0 <= value < vocab:
                    raise DataError(
                        f"token id {value} is outside the model's vocabulary of {vocab}",
                        where=where,
                        hint="records made with the vocabulary of these weights",
                    )
            if len(ids) > longest:
                raise DataError(f"{len(ids)} tokens, the model is made for {longest}", where=where)
            yield ids, labels


def _integers(values) -> bool:
    return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)


def pack(records: Iterator[tuple[list[int], list[int]]]) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Rows of whole records, filled in order up to :data:`ROW` tokens."""
    row, used = [], 0
    for record in records:
        if row and used + len(record[0]) > ROW:
            yield row
            row, used = [], 0
        row.append(record)
        used += len(record[0])
    if row:
        yield row


def join(row: list[tuple[list[int], list[int]]]) -> tuple[list[int], list[int], list[int], list[int]]:
    """ids, labels, positions and document numbers of one row; a record's first token is predicted from nothing."""
    ids, labels, positions, documents = [], [], [], []
    for number, (record_ids, record_labels) in enumerate(row, 1):
        ids += record_ids
        labels += [IGNORED, *record_labels[1:]]
        positions += range(len(record_ids))
        documents += [number] * len(record_ids)
    return ids, labels, positions, documents


if __name__ == "__main__":
    sys.exit(run_cli(main))
