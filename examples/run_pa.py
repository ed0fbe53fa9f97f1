"""MindIE's name for research/tasks/run_pa.py: ``python -m examples.run_pa --model_path FOLDER ...``, also under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from research.core.errors import run_cli
from research.tasks.run_pa import main

if __name__ == "__main__":
    sys.exit(run_cli(main))
