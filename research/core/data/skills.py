"""The built-in ``skills`` set: short questions, in English and Chinese, whose answers a program can check.

Every skill asks for a rule, not for a fact: a question that was never seen can be answered by whoever learned the rule.
A question is known by its key: what is asked of which operands, whatever the wording or language (``3+5`` and ``5+3``
are one question). A hash of the key puts it into the train or the held-out split, so no held-out question is trained
in any wording. Digits are single tokens in Qwen's vocabularies; letters are spaced so that each is one too.

A skill is chosen by name, or as ``name:size`` to set how hard it is:
    arithmetic  size: the largest number         a number plus or minus one digit, not below zero
    copy        size: the most letters           letters repeated
    reverse     size: the most letters           letters backwards
    sort        size: the most digits            the digits of a number in ascending order
    count       size: the most letters           how many letters there are
    dates       size: the most days added        a date written in words; a date some days later in the same month
    units       size: the largest whole number   km and m, m and cm, cm and mm, kg and g, l and ml, both ways
    sums        size: the largest operand        sums and differences of two such numbers; chosen by name only
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from research.core.config.names import did_you_mean
from research.core.errors import ConfigError

HELD_OUT = 10  # one question in ten is held out
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October")
MONTHS += ("November", "December")
UNITS = (  # large, small, how many small ones in a large one; English and Chinese
    (("km", "千米"), ("m", "米"), 1000),
    (("m", "米"), ("cm", "厘米"), 100),
    (("cm", "厘米"), ("mm", "毫米"), 10),
    (("kg", "千克"), ("g", "克"), 1000),
    (("l", "升"), ("ml", "毫升"), 1000),
)
_TRIES = 500


class Question(NamedTuple):
    """``key`` names the question whatever its wording; ``wordings`` are ``(question, answer)`` pairs, one is drawn."""

    key: str
    wordings: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Skill:
    """``draw(rng, size)`` makes a question; ``size`` is the default.

    ``weight`` is the share in the training mix; 0 leaves the skill out unless it is named, and counts as 1 then.
    """

    draw: Callable[[random.Random, int], Question]
    size: int
    least: int
    weight: int


def generate(skills: Sequence[str], n: int, seed: int, split: str) -> Iterator[dict[str, Any]]:
    """``n`` examples ``{"id", "skill", "messages", "answer"}`` of ``split`` ``train`` or ``eval``, fixed by the seed.

    ``skills`` are names or ``name:size``; empty means the training mix. Held-out questions are all different, and spread
    evenly over the skills; training questions follow the weights. Raises :class:`ConfigError` for an unknown skill, or
    when there are not ``n`` different held-out questions.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split must be train or eval, not {split!r}")
    chosen = [_parse(item) for item in (skills or MIX)]
    rng = random.Random(f"skills {seed} {split}")
    weights = [max(1, skill.weight) for _, skill, _ in chosen]
    seen: set[str] = set()
    for number in range(n):
        if split == "train":
            name, skill, size = rng.choices(chosen, weights)[0]
        else:
            name, skill, size = chosen[number % len(chosen)]
        for _ in range(_TRIES):
            question = skill.draw(rng, size)
            if held_out(question.key) == (split == "eval") and question.key not in seen:
                break
        else:
            raise ConfigError(
                f"{name}:{size} has too few different {split} questions for {n} records",
                where="data.skills",
                hint=f"{name}:{2 * size}, or a smaller data.eval_records",
            )
        if split == "eval":
            seen.add(question.key)
        text, answer = rng.choice(question.wordings)
        yield {
            "id": f"skills-{split}-{number}",
            "skill": name,
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}],
            "answer": answer,
        }


def check(answer: str, expected: str) -> bool:
    """Whether ``answer`` is the expected one: equal up to white space and a final full stop."""
    return _plain(answer) == _plain(expected)


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".。").rstrip()


def held_out(key: str) -> bool:
    """Whether the question with this key belongs to the held-out split."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") % HELD_OUT == 0


def _parse(item: str) -> tuple[str, Skill, int]:
    name, colon, size = item.partition(":")
    if name not in SKILLS:
        raise ConfigError(f"unknown skill {name!r}", where="data.skills", hint=did_you_mean(name, SKILLS))
    skill = SKILLS[name]
    if not colon:
        return name, skill, skill.size
    if not size.isdigit() or int(size) < skill.least:
        raise ConfigError(
            f"{item!r}: the size must be a whole number from {skill.least}",
            where="data.skills",
            hint=f"{name}:{skill.size}",
        )
    return name, skill, int(size)


# --- The skills -------------------------------------------------------------------------------------------------


def _number(rng: random.Random, size: int) -> int:
    """A number up to ``size`` of any number of digits: short ones as often as long ones."""
    digits = rng.randint(1, len(str(size)))
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), min(size, 10**digits - 1))


def _arithmetic(rng: random.Random, size: int) -> Question:
    return _sum(rng, rng.randint(0, size), rng.randint(0, 9))


def _sums(rng: random.Random, size: int) -> Question:
    return _sum(rng, _number(rng, size), _number(rng, size))


def _sum(rng: random.Random, a: int, b: int) -> Question:
    low, high = sorted((a, b))
    if rng.random() < 0.5:
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        answer = str(a + b)
        texts = (f"{a}+{b}=", f"What is {a} plus {b}?", f"计算{a}+{b}")
        return Question(f"add {low} {high}", [(text, answer) for text in texts])
    a, b, answer = high, low, str(high - low)
    texts = (f"{a}-{b}=", f"What is {a} minus {b}?", f"计算{a}-{b}")
    return Question(f"subtract {a} {b}", [(text, answer) for text in texts])


def _letters(rng: random.Random, size: int) -> list[str]:
    return rng.choices(LETTERS, k=rng.randint(min(3, size), size))


def _copy(rng: random.Random, size: int) -> Question:
    letters = " ".join(_letters(rng, size))
    texts = (
        f"Copy: {letters}",
        f"Repeat: {letters}",
        f"Say this again: {letters}",
        f"抄写: {letters}",
        f"重复: {letters}",
    )
    return Question(f"copy {letters}", [(text, letters) for text in texts])


def _reverse(rng: random.Random, size: int) -> Question:
    letters = _letters(rng, size)
    line, answer = " ".join(letters), " ".join(reversed(letters))
    texts = (f"Reverse: {line}", f"Backwards: {line}", f"Turn around: {line}", f"倒序: {line}", f"反过来: {line}")
    return Question(f"reverse {line}", [(text, answer) for text in texts])


def _sort(rng: random.Random, size: int) -> Question:
    digits = rng.choices("0123456789", k=rng.randint(min(3, size), size))
    line, answer = "".join(digits), "".join(sorted(digits))
    texts = (f"Sort the digits: {line}", f"Put in order: {line}", f"Smallest first: {line}")
    texts += (f"从小到大: {line}", f"排序: {line}")
    return Question(f"sort {line}", [(text, answer) for text in texts])


def _count(rng: random.Random, size: int) -> Question:
    letters = rng.choices(LETTERS, k=rng.randint(1, size))
    line = " ".join(letters)
    texts = (f"Count: {line}", f"How many letters: {line}", f"Number of letters: {line}")
    texts += (f"数一数: {line}", f"有几个字母: {line}")
    return Question(f"count {line}", [(text, str(len(letters))) for text in texts])


def _dates(rng: random.Random, size: int) -> Question:
    month, day = rng.randint(1, 12), rng.randint(1, 28)
    name = MONTHS[month - 1]
    if rng.random() < 0.5:
        year = rng.randint(2000, 2029)
        iso = f"{year}-{month:02}-{day:02}"
        english, chinese = f"{day} {name} {year}", f"{year}年{month}月{day}日"
        wordings = [(f"Write the date {iso}", english), (f"In words: {iso}", english)]
        wordings += [(f"写出日期 {iso}", chinese), (f"用中文写 {iso}", chinese)]
        return Question(f"write {iso}", wordings)
    days = rng.randint(1, min(size, 27))
    day = rng.randint(1, 28 - days)
    english, chinese = f"{day + days} {name}", f"{month}月{day + days}日"
    wordings = [
        (f"{days} days after {day} {name}?", english),
        (f"What date is {day} {name} plus {days} days?", english),
    ]
    wordings += [(f"{month}月{day}日过{days}天是几月几日？", chinese), (f"{month}月{day}日加{days}天", chinese)]
    return Question(f"after {month} {day} {days}", wordings)


def _units(rng: random.Random, size: int) -> Question:
    large, small, factor = rng.choice(UNITS)
    value = max(1, _number(rng, size))
    if rng.random() < 0.5:
        given, wanted, number, answer = large, small, value, value * factor
    else:
        given, wanted, number, answer = small, large, value * factor, value
    texts = (f"{number} {given[0]} in {wanted[0]}", f"How many {wanted[0]} is {number} {given[0]}?")
    texts += (f"{number}{given[1]}等于多少{wanted[1]}？", f"{number}{given[1]}是几{wanted[1]}？")
    return Question(f"convert {number} {given[0]} {wanted[0]}", [(text, str(answer)) for text in texts])


SKILLS: dict[str, Skill] = {
    "arithmetic": Skill(_arithmetic, size=99, least=9, weight=6),
    "copy": Skill(_copy, size=4, least=2, weight=2),
    "reverse": Skill(_reverse, size=4, least=2, weight=2),
    "sort": Skill(_sort, size=3, least=2, weight=1),
    "count": Skill(_count, size=6, least=3, weight=1),
    "dates": Skill(_dates, size=5, least=1, weight=3),
    "units": Skill(_units, size=99, least=9, weight=2),
    "sums": Skill(_sums, size=99, least=9, weight=0),
}
MIX = tuple(name for name, skill in SKILLS.items() if skill.weight)
