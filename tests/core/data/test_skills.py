"""The skills set: answers are right, held-out questions are never trained, everything follows from the seed."""

from __future__ import annotations

import re
from collections import Counter
from datetime import date, timedelta

import pytest

from research.core.data.skills import MONTHS, SKILLS, UNITS, _parse, check, generate, held_out
from research.core.errors import ConfigError


def question_key(example) -> tuple:
    """What a question asks, read off its text alone and whatever its wording: an independent canonical form."""
    text = example["messages"][0]["content"]
    skill = example["skill"]
    if skill in ("arithmetic", "sums"):
        a, b = map(int, re.findall(r"\d+", text))
        plus = any(sign in text for sign in ("+", "plus"))
        return (skill, "+", *sorted((a, b))) if plus else (skill, "-", *sorted((a, b)))
    if skill == "dates":
        iso = re.search(r"\d{4}-\d\d-\d\d", text)
        if iso:
            return (skill, iso.group())
        numbers = list(map(int, re.findall(r"\d+", text)))
        month = [i for i, name in enumerate(MONTHS, 1) if name in text]
        if not month:
            return (skill, *numbers)
        day, days = numbers if text.startswith("What") else numbers[::-1]
        return (skill, month[0], day, days)
    if skill == "units":
        number = re.search(r"\d+", text).group()
        english = {(a[0], b[0]): (i, 0) for i, (a, b, _) in enumerate(UNITS)}
        english |= {(b[0], a[0]): (i, 1) for i, (a, b, _) in enumerate(UNITS)}
        chinese = {(a[1], b[1]): (i, 0) for i, (a, b, _) in enumerate(UNITS)}
        chinese |= {(b[1], a[1]): (i, 1) for i, (a, b, _) in enumerate(UNITS)}
        found = re.fullmatch(r"\d+ (\w+) in (\w+)", text)
        if found:
            return (skill, number, english[found.groups()])
        found = re.fullmatch(r"How many (\w+) is \d+ (\w+)\?", text)
        if found:
            return (skill, number, english[found.groups()[::-1]])
        found = re.fullmatch(r"\d+(\w+?)(?:等于多少|是几)(\w+)？", text)
        return (skill, number, chinese[found.groups()])
    return (skill, *re.findall(r"\b[a-z]\b|\d", text.split("Smallest first")[-1]))


def right_answer(example) -> set[str]:
    """Every answer that is right, worked out from the text."""
    skill, text = example["skill"], example["messages"][0]["content"]
    key = question_key(example)
    tail = text.split(":")[-1].strip()
    if skill in ("arithmetic", "sums"):
        _, sign, low, high = key
        return {str(low + high if sign == "+" else high - low)}
    if skill == "copy":
        return {tail}
    if skill == "reverse":
        return {tail[::-1]}
    if skill == "sort":
        return {"".join(sorted(tail))}
    if skill == "count":
        return {str(len(tail.split()))}
    if skill == "dates":
        day = date.fromisoformat(key[1]) if len(key) == 2 else date(2001, key[1], key[2]) + timedelta(key[3])
        year = (f" {day.year}", f"{day.year}年") if len(key) == 2 else ("", "")
        return {f"{day.day} {MONTHS[day.month - 1]}{year[0]}", f"{year[1]}{day.month}月{day.day}日"}
    _, number, (unit, up) = key
    factor = UNITS[unit][2]
    return {str(int(number) // factor if up else int(number) * factor)}


@pytest.mark.parametrize("name", SKILLS)
def test_answers_are_right_in_every_wording(name):
    examples = list(generate([name], 600, 5, "train"))
    for example in examples:
        assert example["answer"] in right_answer(example), example
        assert example["messages"][1]["content"] == example["answer"]
    starts = Counter(re.sub(r"[\d\s].*|\b[a-z]\b.*", "", e["messages"][0]["content"]) for e in examples)
    assert len(starts) >= 2 and any("\u4e00" <= c <= "\u9fff" for e in examples for c in e["messages"][0]["content"])


@pytest.mark.slow
def test_no_held_out_question_is_trained_in_any_wording():
    trained = {question_key(e) for seed in (1, 2) for e in generate([], 40_000, seed, "train")}
    asked = [question_key(e) for e in generate([], 512, 1, "eval")]
    assert len(trained) > 10_000
    assert len(set(asked)) == len(asked) == 512
    assert not trained & set(asked)


def test_both_orders_of_a_sum_fall_into_one_split():
    trained = {question_key(e) for e in generate(["arithmetic:9"], 3000, 0, "train")}
    sums = {key for key in trained if key[1] == "+"}
    assert len(sums) == sum(not held_out(f"add {a} {b}") for a in range(10) for b in range(a, 10))


def test_the_seed_decides_everything():
    first, again = (list(generate([], 200, 7, "train")) for _ in range(2))
    assert first == again
    assert first != list(generate([], 200, 8, "train"))
    assert len({e["id"] for e in first}) == 200
    assert first[:50] == list(generate([], 50, 7, "train"))


def test_the_chosen_skills_and_sizes_are_used():
    examples = list(generate(["copy:3", "arithmetic:9"], 300, 1, "train"))
    assert {e["skill"] for e in examples} == {"copy", "arithmetic"}
    assert all(len(e["answer"]) <= 5 for e in examples)
    assert "sums" not in {e["skill"] for e in generate([], 500, 1, "train")}
    assert {e["skill"] for e in generate(["sums", "copy"], 50, 1, "train")} == {"sums", "copy"}
    held = Counter(e["skill"] for e in generate([], 70, 1, "eval"))
    assert set(held.values()) == {10}


@pytest.mark.parametrize(
    ("skills", "n", "says"),
    [(["copi"], 1, "did you mean copy"), (["copy:x"], 1, "whole number"), (["sort:1"], 1, "whole number")],
)
def test_unknown_skills_and_sizes_are_errors(skills, n, says):
    with pytest.raises(ConfigError, match=says):
        list(generate(skills, n, 0, "train"))


def test_too_few_held_out_questions_is_an_error_not_an_endless_search():
    with pytest.raises(ConfigError, match="too few"):
        list(generate(["arithmetic:9"], 300, 0, "eval"))


def test_check_allows_white_space_and_a_full_stop_only():
    assert check(" a  b c.\n", "a b c") and check("12。", "12")
    assert not check("a b", "a b c") and not check("12", "2") and not check("", "1")
    assert all(_parse(name)[0] == name for name in SKILLS)
