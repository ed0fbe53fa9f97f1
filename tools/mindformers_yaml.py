#!/usr/bin/env python
"""MindFormers' YAML files, written and read.

    python tools/mindformers_yaml.py model=qwen1_5_7b task=finetune parallel.cards=8 parallel.tensor=2 --output finetune.yaml
    python tools/mindformers_yaml.py --config finetune_qwen1_5_7b.yaml --output finetune.yaml     a published one, as it was
    python tools/mindformers_yaml.py --show finetune.yaml                                         what a file means here
    python tools/mindformers_yaml.py --list                                                       the names that are known

Settings and flags are those of run_mindformer.py; the task is pretrain, finetune, lora or predict.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from research.core.config.compose import compose
from research.core.config.flags import translate
from research.core.config.mindformers.published import published
from research.core.config.mindformers.write import RELEASES, default_release, not_written, write_config
from research.core.config.mindformers.yaml_file import dump
from research.core.errors import ConfigError, run_cli
from research.registry import model_spec


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", help="file to write; default: standard output")
    parser.add_argument(
        "--release", choices=sorted(RELEASES), help="of MindFormers; default: the newest with the model"
    )
    parser.add_argument("--show", metavar="FILE", help="print the settings of a YAML, or of one of the documents'")
    parser.add_argument("--list", action="store_true", help="print the names of the documents' configurations")
    args, words = parser.parse_known_args(argv)
    if args.list:
        for row in published().values():
            print(f"{row.file}.yaml: model={row.model} task={row.recipe} ({row.release})")
        return 0
    if args.show is not None:
        words = ["--config", args.show, *words]
    translation = translate(words, as_written=True)
    for note in translation.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.show is not None:
        print("\n".join(translation.words))
        return 0
    # The file is MindFormers', so the grid is MindSpore's, whatever is installed here.
    settings = [word for word in translation.words if not word.startswith("backend=")]
    config = compose([*settings, "backend=mindspore"])
    if not any(word.startswith("model=") for word in settings):
        raise ConfigError("which model?", where="model=", hint="model=qwen1_5_7b")
    spec = model_spec(config.model, tokens=vocabulary(config))
    release = args.release or default_release(spec)
    text = header(config, release) + dump(write_config(config, spec, release))
    for note in not_written(config):
        print(f"note: {note}", file=sys.stderr)
    if args.output is None:
        print(text, end="")
        return 0
    from research.core.run.folder import write_text

    write_text(Path(args.output).expanduser(), text)
    print(args.output)
    return 0


def vocabulary(config) -> int | None:
    """The number of tokens of a model whose vocabulary follows its tokenizer."""
    if config.model.tokenizer != "builtin" or config.model.hf.get("vocab_size") is not None:
        return None
    from research.core.text.builtin import builtin_tokenizer

    return builtin_tokenizer().vocab_size


def header(config, release: str) -> str:
    task, family = config.task.name, config.model.family
    mode = {"pretrain": "train", "lora": "finetune"}.get(task, task)
    return (
        f"# {task} of {config.model.name} with MindFormers {release}:\n"
        f"# run_mindformer.py --register_path research/{family} --config <this file> --run_mode {mode}\n"
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
