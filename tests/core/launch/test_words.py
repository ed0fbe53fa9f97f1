"""The scripts' positional arguments, as the documents write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.core.errors import ConfigError
from research.core.launch.words import check_program, number, parse_range, python_command, split_command, truth


@given(
    st.lists(
        st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(lambda w: "=" not in w[:40]),
        min_size=1,
    )
)
def test_quoted_words_come_out_as_a_shell_would_give_them(words):
    import shlex

    if any(word in {"|", "||", "&&", "&", ";", ">", ">>", "<", "2>", "2>&1", "&>"} for word in words):
        return
    assert split_command(" ".join(shlex.quote(word) for word in words)) == (words, {})


def test_line_ends_of_the_documents_commands_are_no_words():
    text = "python qwen/run_qwen.py \\\n --predict_data '你好 世界' \\\n--run_mode predict"
    assert split_command(text)[0] == [
        "python",
        "qwen/run_qwen.py",
        "--predict_data",
        "你好 世界",
        "--run_mode",
        "predict",
    ]
    assert split_command("A=1 B='x y' prog C=3") == (["prog", "C=3"], {"A": "1", "B": "x y"})


@pytest.mark.parametrize(
    ("text", "says"),
    [("prog 'open", "close every quote"), ("prog a | tee log", "bash -c"), ("", "no command"), ("X=1", "no command")],
)
def test_a_command_that_cannot_be_run_is_refused(text, says):
    with pytest.raises(ConfigError, match=says):
        split_command(text)


def test_dollar_signs_and_stars_are_not_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/elsewhere")
    assert split_command("prog $HOME `id` *.py")[0] == ["prog", "$HOME", "`id`", "*.py"]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("[0,8]", range(8)), ("[0,8)", range(8)), (" [ 8 , 16 ] ", range(8, 16)), ("[10,12]", range(10, 12))],
)
def test_ranges_are_read_with_several_digits_and_either_bracket(text, numbers):
    assert parse_range(text) == numbers


@pytest.mark.parametrize("text", ["0,8", "[8,0]", "[3,3]", "[a,b]", "[0-8]", "", "[-1,3]"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ConfigError, match="range of devices"):
        parse_range(text)


def test_scripts_run_with_the_launchers_python_and_must_be_there(tmp_path, monkeypatch, repo):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text("")
    assert python_command(["job.py", "-x"], "/usr/bin/env") == ["/usr/bin/env", "job.py", "-x"]
    assert python_command(["python3", "job.py"], "/usr/bin/env") == ["/usr/bin/env", "job.py"]
    assert python_command(["sh", "-c", "true"], "/usr/bin/env") == ["sh", "-c", "true"]
    with pytest.raises(ConfigError, match=f"cd {repo}/research"):
        check_program(["python", "qwen/run_qwen.py"])
    with pytest.raises(ConfigError, match="no program"):
        check_program(["no-such-program"])


def test_numbers_and_truths():
    assert number("16", "WORKERS") == 16 and truth("False", "JOIN") is False and truth("true", "JOIN")
    with pytest.raises(ConfigError, match="WORKERS=x"):
        number("x", "WORKERS")
    with pytest.raises(ConfigError, match="JOIN=maybe"):
        truth("maybe", "JOIN")
