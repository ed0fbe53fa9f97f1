"""Choosing the device, and what is said when it or MindSpore is not there."""

from __future__ import annotations

import subprocess
import sys

import pytest

from research.core.config.schema import DeviceConfig
from research.core.errors import ConfigError
from research.core.mindspore import runtime


def test_devices_that_are_not_there_are_errors_that_name_the_setting():
    with pytest.raises(ConfigError, match=r"device\.kind=cuda"):
        runtime.start(DeviceConfig(kind="cuda"))
    with pytest.raises(ConfigError, match="no Ascend NPU"):
        runtime.start(DeviceConfig(kind="npu"))
    assert runtime.start(DeviceConfig(kind="auto")).target == "CPU" and not runtime.on_ascend()


def test_a_machine_without_mindspore_is_told_what_to_install(repo):
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'mindspore' else find(name, *a)\n"
        "from research.core.errors import run_cli\n"
        "from research.core.mindspore import runtime\n"
        "sys.exit(run_cli(lambda words: runtime.start() and 0))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 2
    assert "MindSpore is not installed" in done.stderr and "requirements/mindspore.txt" in done.stderr
