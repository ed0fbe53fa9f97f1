"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parent.parent

# Two workers on two cores: threads of both would wait for each other. Read when torch is loaded, so it is said here.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def load_script(path: Path) -> ModuleType:
    """A program as a module: starting Python and torch for every case would take most of the tests' time."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data (vocabularies, configs, trained weights); tests that need it skip where it is absent."""
    folder = Path(os.environ.get("QWEN_TEST_DATA") or REPO.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set QWEN_TEST_DATA to its folder")
    return folder
