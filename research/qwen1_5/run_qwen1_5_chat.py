"""A conversation with a Qwen1.5 model, with the documents' flags: --config --load_checkpoint --vocab_file --predict_data --enable_history ..."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from research.core.errors import run_cli
from research.tasks.chat_script import main

if __name__ == "__main__":
    sys.exit(run_cli(lambda words: main(words, "qwen1_5")))
