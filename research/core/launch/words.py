"""The positional arguments of the launch scripts: a command as one string, device ranges, numbers."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from research.core.errors import ConfigError

_SHELL = {"|", "||", "&&", "&", ";", ">", ">>", "<", "2>", "2>&1", "&>"}
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")


def split_command(text: str) -> tuple[list[str], dict[str, str]]:
    """Words of a COMMAND argument as a shell splits them, quotes and line ends with a backslash included, and the variables set
    before the first word. Raises :class:`ConfigError` for what only a shell could do, and for a program that is not there.
    """
    where = "COMMAND"
    try:
        words = shlex.split(re.sub(r"\\\r?\n", " ", text))
    except ValueError as bad:
        raise ConfigError(f"cannot be split into words: {bad}", where=where, hint="close every quote") from None
    shell = next((word for word in words if word in _SHELL), None)
    if shell is not None:
        raise ConfigError(
            f"{shell!r} needs a shell, and the launcher starts the program itself",
            where=where,
            hint="\"bash -c '...'\", or the launcher inside your script",
        )
    env = {}
    while words and _ASSIGNMENT.match(words[0]):
        name, value = words.pop(0).split("=", 1)
        env[name] = value
    if not words:
        raise ConfigError("no command is given", where=where, hint='"python research/qwen/run_qwen.py ..."')
    return words, env


def python_command(words: Sequence[str], python: str) -> list[str]:
    """A command that begins with ``x.py`` or ``python``, with ``python`` as its interpreter; others as they are."""
    head = Path(words[0]).name
    if head.endswith(".py") and not _executable(words[0]):
        words = [python, *words]
    elif re.fullmatch(r"python3?", words[0]):
        words = [python, *words[1:]]
    check_program(words)
    return list(words)


def check_program(words: Sequence[str]) -> None:
    """Raise :class:`ConfigError` when the program, or the script that Python is to run, is not there."""
    if shutil.which(words[0]) is None:
        raise ConfigError("no program is called so here", where=words[0], hint="its path, or `python script.py`")
    script = next((word for word in words[1:] if not word.startswith("-")), None)
    runs_script = (
        Path(words[0]).name.startswith("python") and script and script.endswith(".py") and "-m" not in words[:3]
    )
    if runs_script and not Path(script).is_file():
        raise ConfigError(
            "this script is not there",
            where=f"{script} (from {Path.cwd()})",
            hint=_near(script) or "cd to its folder",
        )


def _near(script: str) -> str | None:
    repo = Path(__file__).resolve().parents[3]
    for folder in (repo, repo / "research"):
        if (folder / script).is_file():
            return f"cd {folder}"
    return None


def _executable(path: str) -> bool:
    return "/" in path and shutil.which(path) is not None


def parse_range(text: str) -> range:
    """``[0,8]`` or ``[0,8)``: 0 to 7. Raises :class:`ConfigError`."""
    found = re.fullmatch(r"\s*\[\s*(\d+)\s*,\s*(\d+)\s*[\])]\s*", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ConfigError(
            "is not a range of devices", where=f"{text!r}", hint="[0,8] for the devices 0 to 7: the end is not included"
        )
    return range(int(found[1]), int(found[2]))


def number(text: str, name: str) -> int:
    """A whole number of at least 0. Raises :class:`ConfigError` naming the argument."""
    if not re.fullmatch(r"\d+", text.strip()):
        raise ConfigError("is no number", where=f"{name}={text}", hint=f"{name}=8")
    return int(text)


def truth(text: str, name: str) -> bool:
    """True or False, as Python or a shell writes them. Raises :class:`ConfigError`."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.strip().lower() not in known:
        raise ConfigError("is neither True nor False", where=f"{name}={text}", hint=f"{name}=True")
    return known[text.strip().lower()]
