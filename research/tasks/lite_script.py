"""run_qwen_mslite_infer.py of the documents: its flags, on what ``make lite`` does.

Shapes need not be given: the export's meta.json has them. A flag that is given must agree with it. Further words are plain
settings, as ``generate.top_p=0.8``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from research.core.config.compose import compose, groups, setting_type
from research.core.config.flag_actions import truth
from research.core.config.names import did_you_mean
from research.core.config.schema import Config
from research.core.errors import ConfigError
from research.core.launch.environment import is_scheduler
from research.core.mindspore.mindir import Meta, read_meta
from research.tasks.cli import bring_workers_together
from research.tasks.lite import LITE_INI, check_shapes, ge_config_files, load_graphs
from research.tasks.predict import answer, encode_question, read_questions

LONGEST_ANSWER = 512  # the documents' default of --predict_length
# The flag of each shape, by its name in meta.json.
SHAPE_FLAGS = {
    "seq_length": "seq_length",
    "batch": "batch_size",
    "paged": "paged_attention",
    "block_size": "pa_block_size",
    "num_blocks": "pa_num_blocks",
    "dynamic": "dynamic",
}


def main(argv: Sequence[str]) -> int:
    """Run the script; returns the exit status."""
    if is_scheduler():
        return bring_workers_together()
    script, words = arguments(argv)
    root = Path(script.mindir_root_dir).expanduser()
    meta = read_meta(root)
    shapes = given_shapes(script)
    if not meta.shapes.paged and not shapes.get("paged"):  # the sizes of blocks that are not there
        shapes = {key: value for key, value in shapes.items() if key not in ("block_size", "num_blocks")}
    check_shapes(shapes, meta, SHAPE_FLAGS)
    cfg = settings(script, words, meta)
    questions = read_questions(cfg)
    model = load_graphs(cfg, meta, root, ge_configs(script))
    if script.predict_length is None:
        longest = max(len(encode_question(cfg, model, question)) for question in questions)
        cfg.generate.max_new_tokens = max(1, min(LONGEST_ANSWER, meta.shapes.seq_length - longest))
    cfg.generate.batch = meta.shapes.batch
    return answer(cfg, model, questions)


def settings(script: argparse.Namespace, words: Sequence[str], meta: Meta) -> Config:
    """The configuration that flags and words come to. Raises :class:`ConfigError`."""
    cfg = compose(["task=lite", *words])
    texts = [text.replace("\\n", "\n") for text in script.predict_data]
    if len(texts) > 1:
        cfg.prompt_list = texts
    elif texts[0].endswith((".txt", ".jsonl")) and os.path.isfile(texts[0]):
        cfg.prompts = texts[0]
    else:
        cfg.prompt = texts[0]
    if script.vocab_file is not None:
        cfg.tokenizer = os.path.dirname(script.vocab_file) or "."
    if script.predict_length is not None:
        cfg.generate.max_new_tokens = script.predict_length
    if script.do_sample is not None and cfg.generate.temperature is None:
        samples = truth("do_sample", script.do_sample)
        cfg.generate.temperature = (meta.sampling["temperature"] or 1.0) if samples else 0.0
    device = script.device_id
    if device is not None and device >= 0:
        cfg.device.index = device
    return cfg


def given_shapes(script: argparse.Namespace) -> dict[str, object]:
    """The shapes that flags name, by their names in meta.json."""
    given = {key: getattr(script, flag) for key, flag in SHAPE_FLAGS.items()}
    given = {key: value for key, value in given.items() if value is not None}
    return given | {key: truth(SHAPE_FLAGS[key], given[key]) for key in ("paged", "dynamic") if key in given}


def ge_configs(script: argparse.Namespace) -> list[Path] | None:
    """The user's configuration of MindSpore Lite; None: ours. The documents' default counts where that file exists."""
    if script.ge_config_path is not None:
        return ge_config_files(script.ge_config_path)
    return [Path(LITE_INI)] if Path(LITE_INI).is_file() else None


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The documents' flags, and plain settings. Raises :class:`ConfigError` for other words."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--mindir_root_dir", default="output", help="the export's folder (default output)")
    parser.add_argument("--predict_data", nargs="+", required=True, help="prompts, or a .txt or .jsonl file of them")
    parser.add_argument("--predict_length", type=int, help="new tokens at most (default 512, or what the graphs hold)")
    parser.add_argument("--do_sample", help="True: the checkpoint's sampling, or temperature 1; False: greedy")
    parser.add_argument("--vocab_file", help="the vocabulary (default: the one that the export kept)")
    parser.add_argument("--device_id", type=int, help="which NPU; -1 or nothing: DEVICE_ID, else the first")
    parser.add_argument("--ge_config_path", help="configuration of MindSpore Lite: a file, or full.ini,inc.ini")
    for flag in ("seq_length", "batch_size", "pa_block_size", "pa_num_blocks"):
        parser.add_argument(f"--{flag}", type=int, help="must be the export's")
    for flag in ("paged_attention", "dynamic"):
        parser.add_argument(f"--{flag}", help="must be the export's")
    words = list(argv)
    plain = [word for word in words if _is_setting(word)]
    script, others = parser.parse_known_args([word for word in words if word not in plain])
    if others:
        known = [action.option_strings[0][2:] for action in parser._actions if action.option_strings[0] != "-h"]
        raise ConfigError(
            f"no flag is called {others[0]}", hint=did_you_mean(others[0].lstrip("-"), known, prefix="--")
        )
    return script, plain


def _is_setting(word: str) -> bool:
    key, given, _ = word.partition("=")
    return bool(given) and key.isidentifier() | ("." in key) and (key in groups() or setting_type(key) is not None)
