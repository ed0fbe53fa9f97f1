"""Run one task on a model of this family: `python research/qwen2/run_qwen2.py task=finetune model=...`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from research.tasks.cli import main

if __name__ == "__main__":
    sys.exit(main(family="qwen2"))
