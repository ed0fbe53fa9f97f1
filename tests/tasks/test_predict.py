"""make predict as a user runs it: only answers on stdout, and the same answer whichever way it is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from research.core.config.compose import compose
from research.core.errors import ConfigError, DataError, UserError, WeightsError
from research.core.weights.generation import GenerationDefaults
from research.tasks import answering, predict
from tests import small_model

NEW = "generate.max_new_tokens=24"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return small_model.save(tmp_path_factory.mktemp("model") / "weights", "qwen2_5_tiny", vocabulary=False)


def _config(weights: Path, *words: str):
    return compose(["task=predict", "model=qwen2_5_tiny", f"weights={weights}", "generate.dtype=fp32", NEW, *words])


def _answer(capsys, weights: Path, *words: str) -> str:
    assert predict.run(_config(weights, *words)) == 0
    return capsys.readouterr().out


def _program(repo: Path, weights: Path, *words: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(repo / "research/qwen2_5/run_qwen2_5.py"), "task=predict", "model=qwen2_5_tiny"]
    command += [f"weights={weights}", "generate.dtype=fp32", NEW, *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, **kwargs)


@pytest.mark.slow
def test_stdout_is_the_answer_and_nothing_else(repo, weights, capsys):
    expected = _answer(capsys, weights, "prompt=What is 2 + 3?")
    done = _program(repo, weights, "prompt=What is 2 + 3?", stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected and len(expected) > 10 and expected.endswith("\n")
    assert "tokens/s" in done.stderr


@pytest.mark.slow
def test_a_prompt_over_standard_input_gets_the_same_answer(repo, weights, capsys):
    expected = _answer(capsys, weights, "prompt=Sort: c b a")
    assert _program(repo, weights, input="Sort: c b a\n").stdout == expected


@pytest.mark.slow
def test_a_file_of_prompts_gives_one_json_line_each_in_order(weights, capsys, tmp_path):
    texts = ["Hello", "A much longer prompt than the others, with many words in it", "你好", "x", "Sort: 3 1 2"]
    single = [_answer(capsys, weights, f"prompt={text}").removesuffix("\n") for text in texts]
    assert len(set(single)) > 1, "the model answers everything alike: nothing is proved"
    (tmp_path / "p.txt").write_text("\n".join([*texts[:2], "", *texts[2:]]) + "\n", encoding="utf-8")
    lines = _answer(capsys, weights, f"prompts={tmp_path / 'p.txt'}", "generate.batch=2").splitlines()
    assert [json.loads(line) for line in lines] == [{"prompt": t, "answer": a} for t, a in zip(texts, single)]

    records = [
        {"id": 7, "prompt": texts[0]},
        {"messages": [{"role": "user", "content": texts[2]}]},
        {"id": "s", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    answers = [json.loads(line) for line in _answer(capsys, weights, f"prompts={tmp_path / 'p.jsonl'}").splitlines()]
    assert answers[:2] == [records[0] | {"answer": single[0]}, records[1] | {"answer": single[2]}]
    system = _answer(capsys, weights, "prompt=x", "generate.system=Be brief.").removesuffix("\n")
    assert answers[2]["answer"] == system != single[3]


def test_raw_continues_the_text_without_a_template(weights, capsys):
    from research.core.text.builtin import builtin_tokenizer
    from research.core.torch.generate import generate
    from research.core.torch.weights import load_decoder

    tokenizer = builtin_tokenizer()
    ids = tokenizer.encode("Once upon a time")
    new = generate(load_decoder(weights), [ids], max_new_tokens=24, eos_ids=tokenizer.eos_ids(chat=False))[0]
    expected = tokenizer.decode(new, skip_special=True)
    assert _answer(capsys, weights, "prompt=Once upon a time", "generate.raw=true").removesuffix("\n") == expected
    assert _answer(capsys, weights, "prompt=Once upon a time").removesuffix("\n") != expected


def test_the_chat_prompt_is_what_the_template_renders(weights):
    cfg = _config(weights, "prompt=<|im_start|>hi")
    model = answering.load_model(cfg)
    question = predict.read_questions(cfg)[0]
    ids = predict.encode_question(cfg, model, question)
    rendered = model.template.render([{"role": "user", "content": question.text}], add_generation_prompt=True)
    assert model.tokenizer.decode(ids) == rendered
    # Typed control tokens stay text: the template's own two turn starts and the one that opens the answer remain.
    assert ids.count(model.tokenizer.im_start_id) == 3
    cfg.allow_special = True
    assert predict.encode_question(cfg, model, question).count(model.tokenizer.im_start_id) == 4


def test_an_answer_ends_before_a_stop_string(weights, capsys):
    free = _answer(capsys, weights, "prompt=Hello").removesuffix("\n")
    stop = free[len(free) // 2 :][:3]
    cut = _answer(capsys, weights, "prompt=Hello", f"generate.stop=[{json.dumps(stop)}]").removesuffix("\n")
    assert cut == free[: free.index(stop)]


def test_sampling_repeats_with_its_seed(weights, capsys):
    words = ["prompt=Hello", "generate.temperature=1", "generate.top_p=0.95"]
    first, again, other = (_answer(capsys, weights, *words, f"generate.seed={seed}") for seed in (1, 1, 2))
    assert first == again != other


def test_settings_win_over_the_checkpoint_and_the_checkpoint_over_greedy(weights, capsys):
    published = GenerationDefaults(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05)
    chosen = answering.choose_sampling(_config(weights, "generate.top_p=0.5", "generate.seed=9"), published)
    assert (chosen.temperature, chosen.top_k, chosen.top_p, chosen.repetition_penalty, chosen.seed) == (
        0.7,
        20,
        0.5,
        1.05,
        9,
    )
    assert answering.choose_sampling(_config(weights, "generate.temperature=0"), published).greedy
    assert answering.choose_sampling(_config(weights), GenerationDefaults()).greedy
    capsys.readouterr()
    answering.choose_sampling(_config(weights, "generate.top_k=5"), GenerationDefaults())
    assert "generate.top_k has no effect" in capsys.readouterr().err


def test_weights_trained_with_another_vocabulary_or_template_are_refused(weights, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    for file in weights.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    note = folder / "workbench.json"
    model = answering.load_model(_config(weights))
    note.write_text(json.dumps({"tokenizer": model.tokenizer.fingerprint, "template": model.template.fingerprint}))
    answering.load_model(_config(folder))

    note.write_text(json.dumps({"tokenizer": "f" * 64, "template": model.template.fingerprint}))
    with pytest.raises(ConfigError, match=f"tokenizer ffffffffffff.*{model.tokenizer.fingerprint[:12]}"):
        answering.load_model(_config(folder))
    note.write_text(json.dumps({"tokenizer": model.tokenizer.fingerprint, "template": "e" * 64}))
    with pytest.raises(ConfigError, match=f"template eeeeeeeeeeee.*{model.template.fingerprint[:12]}"):
        answering.load_model(_config(folder))
    answering.load_model(_config(folder, "generate.raw=true"))  # no template is used


@pytest.mark.slow
def test_a_vocabulary_larger_than_the_weights_is_refused(weights, shared_data):
    with pytest.raises(WeightsError, match="only 3072"):
        answering.load_model(_config(weights, f"tokenizer={shared_data / 'tokenizer_qwen'}"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": }', "p.jsonl:2"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"text": "b"}', "p.jsonl:3"),
        ("p.jsonl", '{"messages": []}', "p.jsonl:1"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', "p.jsonl:1"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(weights, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        predict.read_questions(_config(weights, f"prompts={tmp_path / name}"))


def test_a_prompt_that_leaves_no_room_is_refused_with_the_numbers(weights, capsys):
    with pytest.raises(UserError, match=r"PROMPT: \d+ tokens and 2048 new ones are more than the model's 2048"):
        predict.run(_config(weights, "prompt=Hello", "generate.max_new_tokens=2048"))
    assert capsys.readouterr().out == ""


def test_no_prompt_at_all_is_an_error_with_status_2(repo, weights):
    done = _program(repo, weights, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and done.stdout == "" and "nothing to answer" in done.stderr
