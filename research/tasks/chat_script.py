"""The documents' chat scripts (run_qwen1_5_chat.py, qwen_chat.py): their flags, on the conversation of ``make chat``.

``--predict_data`` asks given questions one after another, ``--run_demo`` a few of its own first; without questions the
script is interactive, on one card only. It runs on MindSpore where that is installed, else on torch; ``backend=torch``
chooses. Further flags are those of run_<family>.py, and any ``setting=value`` counts.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Sequence

from research.core.config.flag_actions import truth
from research.core.config.schema import Config
from research.core.errors import ConfigError
from research.core.generation.requests import check_room
from research.core.launch.environment import is_scheduler, place
from research.tasks.chat import Repl, open_session, use_utf8
from research.tasks.cli import bring_workers_together, configuration
from research.tasks.predict import read_questions
from research.tasks.sources import say

SYSTEM = "You are a helpful assistant."  # the documents' default
# Of --seq_length, an answer may take this part: one quarter, as in the documents' scripts.
ANSWER_PART = 4
DEMO = (
    "你好，请介绍一下你自己。",
    "北京有哪些值得一去的地方？",
    "其中哪一个最适合带孩子去？",
    "Name three rivers in Europe.",
    "Which of them is the longest?",
)


def main(argv: Sequence[str], family: str) -> int:
    """Run the script of ``family`` with ``argv``; returns the exit status."""
    if is_scheduler():
        return bring_workers_together()
    script, others = arguments(argv)
    cfg = settings(script, others, family)
    use_utf8()
    given = bool(cfg.prompt or cfg.prompt_list or cfg.prompts)
    ranks = place()
    if not given and ranks is not None and ranks.size > 1:
        raise ConfigError(
            f"{ranks.size} ranks cannot talk on one terminal",
            where="--predict_data is not given",
            hint="--predict_data 'first question' 'second question', or one rank",
        )
    questions = [*DEMO] if script.run_demo else []
    for question in read_questions(cfg) if given else ():
        if question.text is None:
            raise ConfigError("a conversation is no question", where=question.where, hint='{"prompt": "text"}')
        questions.append(question.text)
    with contextlib.closing(open_session(cfg, remember=script.enable_history, limit=script.seq_length)) as session:
        repl = Repl(session, sys.stdin, sys.stdout, sys.stderr, verbose=script.verbose)
        for question in questions:
            repl.ask(question)
        return 0 if given else repl.loop()


def settings(script: argparse.Namespace, others: Sequence[str], family: str) -> Config:
    """The configuration that flags and words come to. Raises :class:`ConfigError`."""
    words = ["task=chat", *others]
    named = any(word.startswith("backend=") for word in others)
    if any(word.split("=")[0] == "--config" for word in others):
        words += ["--run_mode", "predict"]  # the part of the file that counts, whatever it was last used for
    elif not named and place() is None:
        installed = importlib.util.find_spec("mindspore") is not None
        if not installed:
            say("note: MindSpore is not installed, so this runs on torch (backend=torch)")
        words.append("backend=mindspore" if installed else "backend=torch")
    cfg = configuration(words, family)
    if cfg.generate.system is None:
        cfg.generate.system = script.system_prompt
    if script.seq_length is not None:
        room = max(1, script.seq_length // ANSWER_PART)
        cfg.generate.max_new_tokens = min(cfg.generate.max_new_tokens, room)
        check_room(1, room, script.seq_length, f"--seq_length {script.seq_length}")
    return cfg


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags that only a conversation has, and all other words."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seq_length", help="tokens of prompt and answer together; a quarter of it for the answer")
    parser.add_argument("--system_prompt", default=SYSTEM)
    for name, what in (
        ("--enable_history", "a question sees what was said before; False: each stands alone"),
        ("--verbose", "note behind each answer what the model was given"),
        ("--run_demo", "ask a few questions of our own first"),
    ):
        parser.add_argument(name, nargs="?", const="True", default="False", help=what)
    script, others = parser.parse_known_args(list(argv))
    for name in ("enable_history", "verbose", "run_demo"):
        setattr(script, name, truth(name, getattr(script, name)))
    if script.seq_length is not None:
        if not script.seq_length.isdigit() or int(script.seq_length) < 2:
            raise ConfigError("is no length", where=f"--seq_length {script.seq_length}", hint="--seq_length 2048")
        script.seq_length = int(script.seq_length)
    return script, others
