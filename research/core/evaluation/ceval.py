"""C-Eval (arXiv 2305.08322) as the documents' precision task runs it: few examples, a short free answer, its first letter.

A work folder holds ``subject_mapping.json`` and the exam's ``dev`` and ``val`` folders, either directly or in ``data`` or
``ceval-exam``. Questions come from ``val`` (their answers are public), examples from ``dev``.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from research.core.errors import DataError, UserError

CLASSES = ("STEM", "Social Science", "Humanities", "Other")
# The exam's own harder part, counted again.
HARD = (
    "advanced_mathematics",
    "discrete_mathematics",
    "probability_and_statistics",
    "college_chemistry",
    "college_physics",
    "high_school_mathematics",
    "high_school_chemistry",
    "high_school_physics",
)
_COLUMNS = ("id", "question", "A", "B", "C", "D", "answer")


@dataclass(frozen=True)
class Subject:
    """``title`` is its Chinese name, ``kind`` one of :data:`CLASSES`."""

    name: str
    title: str
    kind: str
    examples: tuple[dict[str, str], ...]
    questions: tuple[dict[str, str], ...]


def read_exam(work: Path) -> list[Subject]:
    """The subjects of a work folder, by name. Raises :class:`DataError` naming what is not there."""
    data = next((folder for folder in (work, work / "data", work / "ceval-exam", work / "data" / "ceval-exam")
                 if (folder / "dev").is_dir() and (folder / "val").is_dir()), None)  # fmt: skip
    if data is None:
        raise DataError("no dev and val folders of C-Eval here", where=work, hint="unpack ceval-exam.zip into it")
    mapping = next((path for path in (work / "subject_mapping.json", data / "subject_mapping.json",
                                      data.parent / "subject_mapping.json") if path.is_file()), None)  # fmt: skip
    if mapping is None:
        raise DataError("subject_mapping.json is not here", where=work, hint="fetch it from C-Eval's repository")
    try:
        subjects = json.loads(mapping.read_text(encoding="utf-8"))
        found = [
            Subject(
                path.name.removesuffix("_val.csv"),
                *subjects[path.name.removesuffix("_val.csv")][1:3],
                _rows(data / "dev" / path.name.replace("_val.csv", "_dev.csv")),
                _rows(path),
            )
            for path in sorted((data / "val").glob("*_val.csv"))
        ]
    except (json.JSONDecodeError, KeyError, TypeError) as bad:
        raise DataError(f"cannot be read as C-Eval's subjects: {bad!r}", where=mapping) from None
    if not found:
        raise DataError("no *_val.csv files", where=data / "val")
    return found


def _rows(path: Path) -> tuple[dict[str, str], ...]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"column {missing[0]} is missing", where=f"{path}:1")
            rows = tuple(reader)
    except FileNotFoundError:
        raise DataError("file not found", where=path) from None
    for row in rows:
        if row["answer"] not in ("A", "B", "C", "D"):
            raise DataError(f"question {row['id']} has the answer {row['answer']!r}", where=path, hint="A, B, C or D")
    return rows


def prompt(subject: Subject, question: Mapping[str, str], shots: int) -> str:
    """Instruction, ``shots`` examples with their answers, and the question without one."""
    parts = [f"以下是中国关于{subject.title}考试的单项选择题，请选出其中的正确答案。\n"]
    parts += [_asked(example) + f"{example['answer']}\n" for example in subject.examples[:shots]]
    return "\n".join([*parts, _asked(question)])


def _asked(row: Mapping[str, str]) -> str:
    choices = "".join(f"{letter}. {row[letter]}\n" for letter in "ABCD")
    return f"{row['question'].strip()}\n{choices}答案："


def fitting_prompt(
    subject: Subject, question: Mapping[str, str], shots: int, encode: Callable[[str], list[int]], limit: int
) -> list[int]:
    """Ids of the prompt with as many of ``shots`` examples as ``limit`` tokens hold. Raises :class:`UserError` when the
    question alone is longer."""
    for count in range(min(shots, len(subject.examples)), -1, -1):
        ids = encode(prompt(subject, question, count))
        if len(ids) <= limit:
            return ids
    raise UserError(
        f"question {question['id']} alone has {len(ids)} tokens and there is room for {limit}", where=subject.name
    )


def letter(text: str) -> str:
    """The answer that a text gives: its first Latin letter, as a capital; empty when it has none."""
    found = re.search("[A-Za-z]", text)
    return found[0].upper() if found else ""


def score(rows: Iterable[tuple[str, str, str]], subjects: Sequence[Subject]) -> tuple[dict, dict]:
    """-> accuracy by subject and by class from (subject, truth, answer) rows.

    A class counts its questions, not its subjects; ``Hard`` and ``Avg acc`` (all questions) stand behind the classes.
    """
    kinds = {subject.name: subject.kind for subject in subjects}
    right: dict[str, list[bool]] = {}
    for name, truth, answer in rows:
        right.setdefault(name, []).append(truth == answer)
    by_subject = {name: _share(marks) for name, marks in right.items()}
    groups = {kind: [name for name in right if kinds[name] == kind] for kind in CLASSES}
    groups["Hard"] = [name for name in right if name in HARD]
    groups["Avg acc"] = list(right)
    by_class = {
        kind: _share([mark for name in names for mark in right[name]]) for kind, names in groups.items() if names
    }
    return by_subject, by_class


def _share(marks: Sequence[bool]) -> float:
    return sum(marks) / len(marks)
