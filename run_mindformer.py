#!/usr/bin/env python
"""MindFormers' run_mindformer.py on this repository's code: --config FILE --run_mode train|finetune|predict|export|eval ...

Its flags and its dotted overrides (--model.model_config.seq_length 4096) are translated to settings; docs/mindformers.md has
the table. A --config that the documents name works without the file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from research.core.errors import ConfigError, run_cli
from research.core.launch.environment import is_scheduler
from research.tasks.cli import run_task


def main(words: Sequence[str]) -> int:
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return 0
    given = any(word.split("=", 1)[0] in ("--config", "--config_path") for word in words)
    if not given and not is_scheduler():
        raise ConfigError(
            "which configuration?",
            where="--config",
            hint="--config research/qwen1_5/qwen1_5_7b/finetune_qwen1_5_7b.yaml, or a file of your own",
        )
    return run_task(words)


if __name__ == "__main__":
    sys.exit(run_cli(main))
