"""Writing the splits of a dataset folder as MindRecord, with progress: for `make data` and the documents' scripts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from research.core.data.dataset import PackedDataset
from research.core.data.mindrecord.columns import columns_of
from research.core.data.mindrecord.export import write_blocks, write_rows
from research.core.run.folder import RunFolder
from research.core.run.progress import Progress
from research.core.run.terminal import Terminal


def write_split(
    split: Path, output: Path, run: RunFolder | Terminal, *, family: str, width: int, repeat: int = 1, **options: Any
) -> None:
    """Write one split of a dataset folder as ``output``, records of ``width`` tokens, and say what was written.

    Conversations: each row a record; plain text: one stream of tokens. ``options`` are ``shards``, ``overwrite`` and
    ``option`` of :func:`~research.core.data.mindrecord.export.write_rows`.
    """
    data = PackedDataset(split)
    text = data.meta.get("text_only", data.meta["template"] is None)
    rows = data.tokens * repeat // width if text else len(data) * repeat
    began, left = time.monotonic(), 0
    with Progress(run, rows, "mindrecord", "record") as bar:
        options["progress"] = _shown(bar)
        if text:
            written, left = write_blocks(split, output, width, repeat=repeat, **options)
        else:
            labelled = data.meta["settings"]["supervise"] == "mindformers"
            written = write_rows(split, output, family, width, first_label=labelled, repeat=repeat, **options)
    seconds = time.monotonic() - began
    files = str(written.files[0]) if len(written.files) == 1 else f"{written.files[0]} .. {written.files[-1].name}"
    run.say(f"mindrecord: {files}, each with its .db")
    run.say(
        f"  {written.rows:,} records of {width:,} tokens ({', '.join(columns_of(family, text))}; int32)"
        + (f", {left:,} tokens left over" if left else "")
        + f", {written.bytes / 1e6:,.1f} MB in {seconds:.1f} s: {written.rows / max(seconds, 1e-9):,.0f} records/s"
    )
    if not text and data.documents > len(data):
        run.say(
            "  rows of several documents (data.packing=true): the columns do not say where one ends, so MindFormers lets"
            " them see each other; data.packing=false writes one document a record"
        )


def _shown(bar: Progress) -> Callable[[int, int], None]:
    """Show on ``bar`` how many records have been written."""
    last = time.monotonic()

    def show(done: int, _total: int) -> None:
        nonlocal last
        bar.update(done, f"{bar.rate():,.0f} records/s")
        if time.monotonic() - last > 10:
            last = time.monotonic()
            bar.line(f"{bar.rate():,.0f} records/s", routine=True)

    return show
