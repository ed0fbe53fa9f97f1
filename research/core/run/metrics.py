"""Numbers of a run: one JSON object a line in metrics.jsonl, the same as TensorBoard scalars.

A resumed run cuts both back to its checkpoint first, so that no step is there twice.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


class Metrics:
    """Appends records to ``folder/metrics.jsonl`` and to TensorBoard events in ``folder/tensorboard``."""

    def __init__(self, folder: str | os.PathLike, *, from_step: int = 0, tensorboard: bool = True):
        """Records of steps after ``from_step`` are dropped; ``tensorboard=False`` writes the file only."""
        self.path = Path(folder) / FILE
        kept = [record for record in read_metrics(folder) if record["step"] <= from_step] if from_step else []
        aside = self.path.with_name(f".{FILE}.partial")
        aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(aside, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._board = _Events(Path(folder) / "tensorboard", from_step) if tensorboard else None

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """One record ``{"step", "kind", ...}``; ``kind`` is train, eval or sample. Numbers also go to TensorBoard."""
        self._file.write(json.dumps({"step": step, "kind": kind, **values}, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._board is None:
            return
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._board.scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class _Events:
    """TensorBoard's event file, written with its own package: torch is not needed for it."""

    def __init__(self, folder: Path, from_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(folder))
        if from_step:  # TensorBoard then hides what an earlier, interrupted run wrote after this step
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(self._event(wall_time=time.time(), step=from_step + 1, session_log=start))

    def scalar(self, tag: str, value: float, step: int) -> None:
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=value)])
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


def read_metrics(folder: str | os.PathLike, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """Records of a run folder in order; a last line that a crash cut short is left out."""
    path = Path(folder) / FILE
    if not path.is_file():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if kind is None or record["kind"] == kind:
                yield record
