"""The launchers' entry: python scripts/_launch.py singlenode|multinode|msrun|torchrun ARGUMENTS (see scripts/_launch.sh)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from research.core.errors import run_cli
from research.core.launch.scripts import main

if __name__ == "__main__":
    sys.exit(run_cli(main))
