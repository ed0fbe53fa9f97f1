"""Conversations or WikiText to MindRecord: --input_glob --output_file --dataset_type --vocab_file --merges_file --file_partition --repeat --seq_length."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from research.core.errors import run_cli
from research.tasks.preprocess_scripts import preprocess

if __name__ == "__main__":
    sys.exit(run_cli(partial(preprocess, "qwen1_5")))
