"""Where a task meets its framework: modules of the same name and functions in ``core/torch`` and ``core/mindspore``."""

from __future__ import annotations

import importlib
from types import ModuleType


def half(backend: str, module: str) -> ModuleType:
    """``research.core.<backend>.<module>``, imported now; MindSpore only where it is installed (else a UserError)."""
    if backend == "mindspore":
        importlib.import_module("research.core.mindspore.runtime").require_mindspore()
    return importlib.import_module(f"research.core.{backend}.{module}")
