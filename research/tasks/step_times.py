"""When the tokens of a batch came, and the result files of MindIE's programs that are made of it."""

from __future__ import annotations

import csv
import io
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from research.core.engine.api import Update
from research.core.engine.run_all import Answered
from research.core.run.folder import write_text


@dataclass
class StepTimes:
    """Seconds since the batch was given to the engine at which each answer's tokens came. Pass :meth:`note` to
    :func:`research.core.engine.run_all.run_all`."""

    start: float = field(default_factory=time.perf_counter)
    came: dict[int, list[float]] = field(default_factory=dict)

    def note(self, place: int, update: Update) -> None:
        now = time.perf_counter() - self.start
        self.came.setdefault(place, []).extend([now] * len(update.tokens))

    @property
    def total(self) -> float:
        """Until the last token of all."""
        return max((times[-1] for times in self.came.values() if times), default=0.0)

    @property
    def first(self) -> list[float]:
        """Each answer's time to its first token."""
        return [times[0] for times in self.came.values() if times]

    @property
    def later(self) -> list[float]:
        """Time of each token after an answer's first, from the one before it."""
        return [b - a for times in self.came.values() for a, b in itertools.pairwise(times)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def benchmark_row(batch: int, answers: Sequence[Answered], times: StepTimes) -> dict[str, object]:
    """A row of run_pa's benchmark.csv; times in milliseconds, of the longest prompt and answer where lengths differ."""
    first, later = ([f"{1000 * value:.3f}" for value in values] for values in (times.first, times.later))
    return {
        "batch_size": batch,
        "input_seq_len": max(answer.prompt_tokens for answer in answers),
        "output_seq_len": max(len(answer.ids) for answer in answers),
        "e2e_time(ms)": f"{1000 * times.total:.3f}",
        "prefill_time(ms)": f"{1000 * max(times.first, default=0.0):.3f}",
        "decoder_token_time(ms)": f"{1000 * mean(times.later):.3f}",
        "prefill_count": len(times.first),
        "prefill_token_times": ",".join(first),
        "decode_token_times": ",".join(later),
        "prefill_average_time(ms)": f"{1000 * mean(times.first):.3f}",
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """A csv file with the keys of the first row as its header, written aside and renamed."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())
