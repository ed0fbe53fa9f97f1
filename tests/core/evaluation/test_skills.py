"""Exact match on held-out questions: what is asked, and how answers are marked."""

from __future__ import annotations

import pytest
import torch

from research.core.data import skills
from research.core.evaluation.skills import Exam
from research.core.text.builtin import builtin_tokenizer
from research.core.text.template import get_template
from research.core.torch.generate import generate
from tests.core.torch.training_case import decoder


@pytest.fixture(scope="module")
def exam() -> Exam:
    return Exam(builtin_tokenizer(), get_template("qwen2_5"), names=["copy", "sort"], count=10, seed=3)


def test_questions_are_the_held_out_ones_of_the_data_set_and_answers_are_not_shown(exam):
    assert exam.questions == list(skills.generate(["copy", "sort"], 10, 3, "eval"))
    text = exam.tokenizer.decode(exam.prompts[0])
    assert exam.questions[0]["messages"][0]["content"] in text and text.endswith("<|im_start|>assistant\n")
    trained = {q["messages"][0]["content"] for q in skills.generate(["copy", "sort"], 500, 3, "train")}
    assert not trained & {q["messages"][0]["content"] for q in exam.questions}


def test_right_and_wrong_answers_are_counted_by_skill(exam):
    end = exam.tokenizer.im_end_id

    def answer(decoder, prompts, sampling, room, eos_ids, batch):
        assert list(prompts) == exam.prompts and end in eos_ids
        told = [q["answer"] if q["skill"] == "copy" else "no" for q in exam.questions]
        return [exam.tokenizer.encode(text) + [end] for text in told]

    score = exam.ask(None, [end], answer)
    assert score.exact_match == 0.5 and score.by_skill() == {"copy": 1.0, "sort": 0.0}
    assert [s.skill for s in score.samples(4)] == ["copy", "sort", "copy", "sort"]
    assert score.answers[1].answer == "no" and not score.answers[1].right


def test_an_untrained_model_is_asked_for_real_and_room_is_enough_for_every_answer(exam):
    longest = max(len(exam.tokenizer.encode(q["answer"])) for q in exam.questions)
    assert exam.room > longest
    torch.manual_seed(0)
    score = exam.ask(decoder(vocab=exam.tokenizer.vocab_size), exam.tokenizer.eos_ids(), generate)
    assert len(score.answers) == 10 and score.exact_match == 0.0
