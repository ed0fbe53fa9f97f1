from __future__ import annotations

import subprocess
import sys


def test_the_data_pipeline_loads_no_framework(repo):
    """core/data serves torch and MindSpore alike; pyarrow and rich load when they are needed."""
    code = """
import importlib, pkgutil, sys
import research.core.data as data
for module in pkgutil.walk_packages(data.__path__, "research.core.data."):
    importlib.import_module(module.name)
heavy = {"torch", "transformers", "mindspore", "tokenizers", "tiktoken", "datasets", "pyarrow", "rich", "sqlite3"}
print(*sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
