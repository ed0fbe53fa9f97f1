"""Replacing a folder by a new one that was written beside it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from research.core.errors import WeightsError


def beside(target: Path) -> Path:
    """Where the new contents of ``target`` grow."""
    return target.parent / f".{target.name}.new"


def exchange(target: Path) -> None:
    """Put :func:`beside` in the place of ``target``: at every moment one of the two is there, whole."""
    former = target.parent / f".{target.name}.old"
    shutil.rmtree(former, ignore_errors=True)
    if target.exists():
        os.replace(target, former)
    os.replace(beside(target), target)
    shutil.rmtree(former, ignore_errors=True)


def check_ours(target: Path, mark: str) -> None:
    """Raise :class:`WeightsError` when ``target`` holds something and not the file ``mark`` that our writers leave: such a
    folder may hold what nobody wrote twice."""
    if target.is_dir() and any(target.iterdir()) and not (target / mark).is_file():
        raise WeightsError(
            f"this folder was not written here (no {mark}) and is not replaced",
            where=target,
            hint="move it away, or another output path",
        )
