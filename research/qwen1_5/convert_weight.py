"""Qwen1.5 weights from Hugging Face to MindFormers: --torch_ckpt_dir --mindspore_ckpt_path."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from research.core.errors import run_cli
from research.tasks.convert_scripts import qwen1_5_convert

if __name__ == "__main__":
    sys.exit(run_cli(qwen1_5_convert))
