"""A conversation with a Qwen model, with the documents' flags: --config --load_checkpoint --vocab_file --predict_data --enable_history ...

For programs: ``from research.qwen.qwen_chat import make_context, decode_tokens``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from research.core.errors import run_cli
from research.qwen.chat import decode_tokens, make_context
from research.tasks.chat_script import main

__all__ = ["decode_tokens", "main", "make_context"]

if __name__ == "__main__":
    sys.exit(run_cli(lambda words: main(words, "qwen")))
