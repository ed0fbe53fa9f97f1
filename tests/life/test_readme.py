"""The README's commands, copied out of it and run in a copy of the repository, as a new user would.

``bash`` blocks are run from top to bottom in one folder. ``console`` blocks need weights, data or cards that are not
here: each of their commands is composed and checked instead, down to the name of every setting.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from research.core.config.compose import compose
from research.core.errors import run_cli
from tests.conftest import REPO

# These start this very test, or take longer than all others together.
NOT_HERE = ("make test", "make test-fast", "make lint", "make bench", "make setup", "make clean", "git clone", "cd ")


def blocks(text: str, language: str) -> list[list[str]]:
    """Commands of each fenced block of ``language``, continuation lines joined, comments dropped."""
    found = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)
    joined = [block.replace("\\\n", " ").splitlines() for block in found]
    return [[line.strip() for line in block if line.strip() and not line.startswith("#")] for block in joined]


@pytest.fixture(scope="module")
def copy(repo, tmp_path_factory) -> Path:
    """The tracked and new files of the repository in an empty folder, with this environment as its .venv."""
    target = tmp_path_factory.mktemp("clone") / "qwen-workbench"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=repo,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (repo / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repo / name, target / name)
    venv = target / ".venv"
    (venv / "bin").mkdir(parents=True)
    # Not a link: Python finds its packages by the path that it was started with.
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for stamp in (".ready", ".ready-mindspore", ".ready-dev"):
        (venv / stamp).touch()
    return target


def run(command: str, folder: Path, **extra: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MAKE", "MFLAGS"))}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        # compiled kernels and the built-in vocabulary are there already
        env=env | {"QWEN_CACHE": os.environ.get("QWEN_CACHE") or str(REPO / ".cache")} | extra,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=1200,
    )


@pytest.mark.slow
def test_the_readme_commands_run_from_top_to_bottom(copy):
    commands = [line for block in blocks((copy / "README.md").read_text(), "bash") for line in block]
    ours = [line for line in commands if not line.startswith(NOT_HERE)]
    assert any(line.startswith("make finetune") for line in ours)
    for command in ours:
        first = command == "make finetune"
        # The recipe takes five minutes and gets about 90 % on two free cores; here it has so many steps, of whatever length
        # they are, which end at about 50 %.
        done = run(command, copy, **({"ARGS": "train.steps=500"} if first else {}))
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        if first:
            score = re.search(r"exact match after[^\d]*([\d.]+) ?%", done.stdout + done.stderr)
            assert score and float(score[1]) >= 25.0, done.stdout[-3000:]  # 0 % before


@pytest.mark.slow
def test_the_other_commands_of_the_documents_name_settings_that_exist(copy, monkeypatch, capsys):
    # Instead of Python: each command hands its words over, and this process composes them.
    handed = copy / "words"
    checker = copy / "hand_over"
    checker.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > '{handed}'\n")
    checker.chmod(0o755)
    (copy / "alpaca_data.json").write_text("[]")
    monkeypatch.chdir(copy)
    pages = [copy / "README.md", *sorted((copy / "docs").glob("*.md")), *sorted(copy.glob("research/*/README.md"))]
    checked = 0
    for page in pages:
        for command in (line for block in blocks(page.read_text(encoding="utf-8"), "console") for line in block):
            command = re.sub(r"<[a-z ]+>", "/folder", command.split("  #")[0])
            handed.unlink(missing_ok=True)
            if command.startswith("make ") and not command.startswith(NOT_HERE):
                done = run(f"{command} PY={checker}", copy)
            elif command.startswith("python research/"):
                done = run(command.replace("python ", f"{checker} ", 1), copy)
            else:
                continue
            assert done.returncode == 0, f"{page.name}: {command}\n{done.stderr}"
            script, *words = handed.read_text(encoding="utf-8").split("\0")[:-1]
            assert (copy / script).is_file(), f"{page.name}: {command}"
            assert run_cli(lambda given: compose(given) and 0, words) == 0, (
                f"{page.name}: {command}\n{capsys.readouterr().err}"
            )
            checked += 1
    assert checked >= 10


def test_help_lists_every_target(copy):
    listed = run("make help", copy).stdout
    targets = re.findall(r"^([a-z-]+):.*## ", (copy / "Makefile").read_text(), flags=re.M)
    assert targets
    assert [target for target in targets if f"make {target} " not in listed] == []
