"""A contender in a process of its own, run by an interpreter that has what it needs: one JSON line per call, one answer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from research.core.errors import UserError


class Outside:
    """``words`` name a script beside this file and its arguments, ``python`` what runs it; ready when this returns.
    What the process prints besides its answers goes to this one's error output."""

    def __init__(self, python: str, script: str, *words: object):
        command = [python, str(Path(__file__).resolve().parent / script), *map(str, words)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def __call__(self, prompts: list[list[int]], new: int | list[int]) -> dict:
        """Have ``prompts`` answered with ``new`` tokens each, or with one number of tokens for each -> at least "seconds"."""
        self._process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def __enter__(self) -> Outside:
        return self

    def __exit__(self, *exception) -> None:
        """End the process; its time counts as ours from then on (:class:`roofline.Busy`)."""
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            where = " ".join(self._process.args[:2])
            raise UserError(f"the peer ended with status {self._process.wait()}", where=where)
        return json.loads(line)
