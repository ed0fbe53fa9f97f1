"""Qwen v1 weights from Hugging Face to MindFormers: --torch_ckpt_path --mindspore_ckpt_path --dtype."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from research.core.errors import run_cli
from research.tasks.convert_scripts import qwen_convert

if __name__ == "__main__":
    sys.exit(run_cli(qwen_convert))
