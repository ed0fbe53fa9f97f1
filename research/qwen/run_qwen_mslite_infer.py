"""Exported graphs answer prompts, with the documents' flags: --mindir_root_dir --predict_data --seq_length --batch_size ..."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from research.core.errors import run_cli
from research.tasks.lite_script import main

if __name__ == "__main__":
    sys.exit(run_cli(main))
