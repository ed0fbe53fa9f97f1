"""main.py --task precision: an exam sat in the engine, with a cache of what has been answered."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from research.core.config.schema import Config
from research.core.engine.api import EngineRequest
from research.core.engine.run_all import Answered, run_all
from research.core.errors import ConfigError
from research.core.evaluation.ceval import Subject, fitting_prompt, letter, read_exam, score
from research.core.generation.sampling import Sampling
from research.core.run.folder import write_text
from research.tasks.answering import EngineModel
from research.tasks.atb_config import PrecisionSection

LONGEST_PROMPT = 2000  # tokens; examples are left out until a prompt is that short
HEADER = ("question_id", "task", "truth", "pred")


@dataclass
class Exam:
    """The questions, and what has been answered in ``folder``: (subject, question's id) -> (truth, answer)."""

    settings: PrecisionSection
    subjects: list[Subject]
    folder: Path
    answered: dict[tuple[str, str], tuple[str, str]]

    @classmethod
    def open(cls, own: PrecisionSection, cfg: Config) -> Exam:
        """Read the exam and its cache. Raises UserErrors, also for a ``test_result`` of other weights or settings."""
        work = Path(own.work_dir)
        subjects, folder = read_exam(work), work / "test_result"
        folder.mkdir(exist_ok=True)
        facts = {"model": cfg.model.name, "weights": str(Path(cfg.weights).resolve()), "adapter": cfg.adapter}
        facts |= {"shot": own.shot, "seq_len_out": own.seq_len_out, "max_length": cfg.engine.max_length}
        known = folder / "settings.json"
        if known.is_file() and json.loads(known.read_text(encoding="utf-8")) != facts:
            raise ConfigError(
                "the results here are of other weights or settings", where=folder, hint=f"delete or move {folder}"
            )
        write_text(known, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        return cls(own, subjects, folder, _read_cache(folder / "cache0.csv"))

    def sit(self, model: EngineModel, say: Callable[[str], None]) -> int:
        """Answer what is not answered yet and write the results; every answer is kept at once."""
        start, cache = time.perf_counter(), self.folder / "cache0.csv"
        limit = min(LONGEST_PROMPT, model.length_limit - self.settings.seq_len_out)
        if limit < 1:
            raise ConfigError(
                f"{model.length_limit} tokens leave no room for answers of {self.settings.seq_len_out}",
                where="MAX_SEQ_LEN",
                hint="a larger MAX_SEQ_LEN, or a smaller seq_len_out",
            )
        if not cache.is_file():
            write_text(cache, ",".join(HEADER) + "\n")
        with cache.open("a", encoding="utf-8", newline="") as file:
            for subject in self.subjects:
                left = [row for row in subject.questions if (subject.name, row["id"]) not in self.answered]
                self._ask(model, subject, left, limit, csv.writer(file, lineterminator="\n"), file)
                marks = [self.answered[subject.name, row["id"]] for row in subject.questions]
                right = sum(truth == found for truth, found in marks)
                say(f"{subject.name}: {right} of {len(marks)} right")
        rows = [(name, *marks) for (name, _), marks in self.answered.items()]
        by_subject, by_class = score(rows, self.subjects)
        for name, accuracy in (("subject", by_subject), ("classes", by_class)):
            write_text(self.folder / f"result_0_{name}_acc.json", json.dumps(accuracy, indent=2) + "\n")
        print("\n".join(f"{kind}: {accuracy:.4f}" for kind, accuracy in by_class.items()))
        say(f"{len(rows)} questions in {time.perf_counter() - start:.1f} s; results in {self.folder}")
        return 0

    def _ask(
        self, model: EngineModel, subject: Subject, left: list[dict], limit: int, writer, file: io.TextIOBase
    ) -> None:
        requests = [
            EngineRequest(
                tuple(fitting_prompt(subject, row, self.settings.shot, model.tokenizer.encode, limit)),
                Sampling(),
                self.settings.seq_len_out,
                adapter=model.adapter,
            )
            for row in left
        ]

        def keep(place: int, answer: Answered) -> None:
            row = left[place]
            marks = row["answer"], letter(answer.text)
            self.answered[subject.name, row["id"]] = marks
            writer.writerow((row["id"], subject.name, *marks))
            file.flush()

        run_all(model.engine, requests, on_end=keep)


def _read_cache(path: Path) -> dict[tuple[str, str], tuple[str, str]]:
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    # The last line is cut where the program was killed in the middle of it.
    return {(row[1], row[0]): (row[2], row[3]) for row in rows[1:] if len(row) == len(HEADER)}
