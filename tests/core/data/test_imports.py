from __future__ import annotations

import subprocess
import sys


def test_the_data_pipeline_loads_no_framework(repo):
    """core/data serves torch and MindSpore alike; pyarrow and rich load when they are needed."""
    code = """
import importlib, pkgutil, sys
import research.core.data as data
for module in pkgutil.iter_modules(data.__path__):
    importlib.import_module(f"research.core.data.{module.name}")
heavy = {"torch", "transformers", "mindspore", "tokenizers", "tiktoken", "datasets", "pyarrow", "rich"}
print(*sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
