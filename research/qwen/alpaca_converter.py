"""Alpaca records to one JSON array of conversations: --data_path --output_path."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from research.core.errors import run_cli
from research.tasks.preprocess_scripts import qwen_alpaca

if __name__ == "__main__":
    sys.exit(run_cli(qwen_alpaca))
