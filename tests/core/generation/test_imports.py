from __future__ import annotations

import subprocess
import sys


def test_the_loop_the_sampler_and_an_exports_meta_load_no_framework(repo):
    """What torch, MindSpore and the Lite runner share must load where only one of them is installed."""
    code = """
import importlib, pkgutil, sys
import research.core.generation as generation
for module in pkgutil.walk_packages(generation.__path__, "research.core.generation."):
    importlib.import_module(module.name)
for name in ("mindspore.mindir", "mindspore.lite", "mindspore.load_runner", "mindspore.runtime"):
    importlib.import_module("research.core." + name)
import research.tasks.lite, research.tasks.export_mindir, research.tasks.predict, research.tasks.chat
print(*sorted({"torch", "transformers", "mindspore", "mindspore_lite"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
