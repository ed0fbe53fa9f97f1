"""The document qwen_7b_atb_pytorch's main.py: ``python main.py --task inference|precision|performance``, with config.ini."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from research.core.errors import run_cli
from research.tasks.atb import main

if __name__ == "__main__":
    sys.exit(run_cli(main))
