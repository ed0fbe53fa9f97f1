"""MindSpore on the CPU for every test of this folder; without it they are skipped."""

from __future__ import annotations

import pytest

from research.core.config.schema import DeviceConfig


def pytest_ignore_collect(collection_path, config):
    """The modules here import MindSpore: without it they are not collected."""
    import importlib.util

    return True if importlib.util.find_spec("mindspore") is None else None


@pytest.fixture(autouse=True)
def graph_mode():
    from research.core.mindspore import runtime

    return runtime.start(DeviceConfig(kind="cpu"))
