"""Exact match on held-out questions of the built-in skills."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from research.core.data import skills
from research.core.text.template import ChatTemplate
from research.core.text.tokenizer import Tokenizer

BATCH = 64


@dataclass(frozen=True)
class Answer:
    """One question with what the model said."""

    skill: str
    question: str
    expected: str
    answer: str
    right: bool


@dataclass
class Score:
    """All answers of one examination, in the order of the questions."""

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def exact_match(self) -> float:
        """Share of right answers, in [0, 1]."""
        return sum(answer.right for answer in self.answers) / max(1, len(self.answers))

    def by_skill(self) -> dict[str, float]:
        """Exact match of each skill, by name."""
        marks: dict[str, list[bool]] = {}
        for answer in self.answers:
            marks.setdefault(answer.skill, []).append(answer.right)
        return {skill: sum(rights) / len(rights) for skill, rights in sorted(marks.items())}

    def samples(self, count: int = 5) -> list[Answer]:
        """Answers of as many different skills as there are, by turns."""
        by_skill: dict[str, list[Answer]] = {}
        for answer in self.answers:
            by_skill.setdefault(answer.skill, []).append(answer)
        turns = [answers[i] for i in range(count) for answers in by_skill.values() if i < len(answers)]
        return turns[:count]


class Exam:
    """Held-out questions of some skills, tokenised once and asked as often as one likes."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        names: Sequence[str],
        count: int,
        seed: int,
        system: str | None = None,
    ):
        """``names`` of the skills (empty: all), ``seed`` that of the data set: the questions are its held-out split."""
        self.tokenizer = tokenizer
        self.questions: list[dict[str, Any]] = list(skills.generate(names, count, seed, "eval"))
        asked = [[m for m in question["messages"] if m["role"] != "assistant"] for question in self.questions]
        self.prompts = [
            template.encode(tokenizer, messages, add_generation_prompt=True, system=system).ids for messages in asked
        ]
        longest = max((len(ids) for ids in tokenizer.encode_batch([q["answer"] for q in self.questions])), default=0)
        self.room = longest + 4  # an answer that goes on past this is wrong anyway

    def ask(self, decoder: Any, eos_ids: Collection[int], generate: Callable[..., list[list[int]]]) -> Score:
        """Greedy answers to every question, in batches with the key/value cache. ``generate`` is that of the decoder's
        framework."""
        started = time.perf_counter()
        found = generate(decoder, self.prompts, None, self.room, eos_ids, batch=BATCH)
        score = Score(seconds=time.perf_counter() - started)
        for question, ids in zip(self.questions, found):
            text = self.tokenizer.decode([i for i in ids if i not in eos_ids])
            user = next(m["content"] for m in reversed(question["messages"]) if m["role"] == "user")
            right = skills.check(text, question["answer"])
            score.answers.append(Answer(question["skill"], user, question["answer"], text, right))
        return score
