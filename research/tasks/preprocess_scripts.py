"""The documents' data scripts (``research/qwen/qwen_preprocess.py``, ``alpaca_converter.py`` and the others) under their own
flags. Without other words they write what the originals wrote; docs/data.md lists where they differ."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from research.core.config.names import did_you_mean
from research.core.config.schema import DataConfig
from research.core.data.alpaca_convert import CHATML, QWEN, SHAREGPT, Layout, convert_alpaca
from research.core.data.audit import AuditError
from research.core.data.encode import MINDRECORD_FORMAT, TEXT_FORMATS
from research.core.data.mindrecord.write import check_output, scratch_folder
from research.core.data.prepare import prepare_dataset
from research.core.data.readers import read_file
from research.core.data.sources import expand_sources, source_bytes
from research.core.data.supervise import MODES
from research.core.errors import ConfigError, DataError
from research.core.run.progress import Progress
from research.core.run.terminal import Terminal
from research.core.text.template import get_template
from research.core.text.tokenizer import tokenizer_of_files
from research.tasks.data import preparation_shown, print_report
from research.tasks.mindrecord import write_split

_MB = 1 << 20
_OUTPUT = "./alpaca-fastchat-qwen.mindrecord"
_OVERWRITE = "--overwrite"


def preprocess(family: str, argv: Sequence[str]) -> None:
    """``<family>_preprocess.py``: conversations, or WikiText, as MindRecord records of seq_length + 1 tokens."""
    parser = _Parser(
        description=f"Tokenise conversations for {family} and write them as MindRecord", allow_abbrev=False
    )
    if family != "qwen":
        parser.add_argument("--dataset_type", default="qa", choices=("qa", "wiki"), help="conversations, or WikiText")
    parser.add_argument(
        "--input_glob", required=True, help="file, folder or glob: .json .jsonl .gz .parquet, text for wiki"
    )
    parser.add_argument("--output_file", default=_OUTPUT, help=f"file to write; default: {_OUTPUT}")
    if family == "qwen":
        parser.add_argument("--model_file", required=True, help="qwen.tiktoken")
    else:
        parser.add_argument("--vocab_file", default="./vocab.json", help="vocab.json")
        parser.add_argument("--merges_file", default="./merges.txt", help="merges.txt")
    parser.add_argument("--file_partition", type=int, default=1, help="files to write; several are numbered from 0")
    parser.add_argument(
        "--repeat", type=int, default=1, help="write all records so many times, one pass after the other"
    )
    parser.add_argument("--seq_length", type=int, default=2048, help="of training; a record has one token more")
    parser.add_argument(
        "--supervise", default="mindformers", choices=MODES, help="what is labelled; default: mindformers"
    )
    parser.add_argument("--allow_special", action="store_true", help="control tokens written in a text become such")
    parser.add_argument("--workers", type=int, default=0, help="processes that tokenise; 0: one per core")
    parser.add_argument(_OVERWRITE, action="store_true", help="replace the output where it exists")
    args = parser.parse(argv)
    for name in ("seq_length", "repeat"):
        if getattr(args, name) < 1:
            raise ConfigError("must be at least 1", where=f"--{name} {getattr(args, name)}")
    wiki = getattr(args, "dataset_type", "qa") == "wiki"
    if wiki and args.supervise != "mindformers":
        raise ConfigError("has no effect on running text", where=f"--supervise {args.supervise}", hint="leave it out")
    output = Path(args.output_file).expanduser()
    check_output(output, args.file_partition, args.overwrite, _OVERWRITE)
    _check_sources(args.input_glob, wiki, family)
    if family == "qwen":
        tokenizer = tokenizer_of_files(family, args.model_file)
    else:
        tokenizer = tokenizer_of_files(family, args.vocab_file, args.merges_file)
    cfg = DataConfig(
        source=args.input_glob,
        format="wikitext" if wiki else "auto",
        seq_length=args.seq_length + 1,
        supervise=args.supervise,
        packing=False,
        # MindFormers' chat template of the later families adds no system turn; alpaca_converter.py writes one.
        system="" if args.supervise == "mindformers" and family != "qwen" else None,
        eval_records=0,
        workers=args.workers,
    )
    run = Terminal()
    with scratch_folder(output) as scratch:
        dataset = scratch / "dataset"
        with Progress(run, source_bytes(expand_sources(cfg.source)) // _MB or None, "tokenise", "MB") as bar:
            try:
                report = prepare_dataset(
                    cfg,
                    tokenizer,
                    get_template(family),
                    dataset,
                    model_length=None,
                    vocab_size=None,
                    family=family,
                    allow_special=args.allow_special,
                    progress=preparation_shown(bar),
                )
            except AuditError as error:
                print_report(error.report, run)
                raise
        report.notes = []  # of the held-out split, which is not asked for
        print_report(report, run)
        write_split(
            dataset / "train",
            output,
            run,
            family=family,
            width=args.seq_length + 1,
            repeat=args.repeat,
            shards=args.file_partition,
            overwrite=args.overwrite,
            option=_OVERWRITE,
        )


def _check_sources(pattern: str, wiki: bool, family: str) -> None:
    """Look at the first record of each file, so that a wrong kind is told before any work."""
    for source in expand_sources(pattern):
        if not isinstance(source, Path):
            raise DataError("is a built-in set, not a file", where=f"--input_glob {source}", hint=f"./{source}")
        if wiki:
            read_file(source, "wikitext")
            continue
        fmt, _ = read_file(source)
        if fmt == MINDRECORD_FORMAT:
            raise DataError("this is MindRecord already", where=source, hint="the JSON file it was made from")
        if fmt in TEXT_FORMATS:
            hint = "conversations; Qwen v1's script reads no text" if family == "qwen" else "--dataset_type wiki"
            raise DataError("this is plain text, not conversations", where=source, hint=hint)


def qwen_alpaca(argv: Sequence[str]) -> None:
    """``research/qwen/alpaca_converter.py``."""
    _alpaca(argv, QWEN, "one JSON array of conversations")


def chatml_alpaca(argv: Sequence[str]) -> None:
    """``alpaca_converter.py`` of Qwen1.5 and later."""
    _alpaca(argv, CHATML, "JSON Lines of messages with a system turn")


def sharegpt_alpaca(argv: Sequence[str]) -> None:
    """``research/qwen2/alpaca_converter_json.py``."""
    _alpaca(argv, SHAREGPT, "one JSON array of conversations between human and gpt")


def _alpaca(argv: Sequence[str], layout: Layout, what: str) -> None:
    parser = _Parser(description=f"Alpaca records -> {what}", allow_abbrev=False)
    parser.add_argument("--data_path", default="alpaca-data.json", help="Alpaca records: .json .jsonl .gz .parquet")
    parser.add_argument("--output_path", default="alpaca-data-conversation.json", help="file to write")
    parser.add_argument(_OVERWRITE, action="store_true", help="replace the output where it exists")
    args = parser.parse(argv)
    output = Path(args.output_path).expanduser()
    if output.is_dir():
        raise DataError("is a folder", where=output, hint=f"--output_path {output / 'alpaca-data-conversation.json'}")
    if output.exists() and not args.overwrite:
        raise DataError("exists already", where=output, hint=f"{_OVERWRITE} to replace it, or another --output_path")
    sources = expand_sources(args.data_path)
    if len(sources) != 1 or not isinstance(sources[0], Path):
        raise DataError(f"{len(sources)} files; one is converted at a time", where=f"--data_path {args.data_path}")
    source, run, began = sources[0], Terminal(), time.monotonic()
    with Progress(run, os.path.getsize(source) // _MB or None, "convert", "MB") as bar:
        done = convert_alpaca(source, output, layout, lambda count: bar.update(count // _MB))
    for reason, (count, where) in done.dropped.items():
        run.say(f"dropped: {count:,} records, {reason} (first: {where})")
    run.say(f"{output}: {done.records:,} records in {time.monotonic() - began:.1f} s")


class _Parser(argparse.ArgumentParser):
    """Reports wrong words as errors of ours, and takes the documents' spellings."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where=self.prog, hint=f"python {self.prog} --help")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse ``argv``. A comment behind a line's backslash, which the shell hands over as a word, is left out with a
        word about it: nothing of the lines after it has reached this program."""
        known = [option for action in self._actions for option in action.option_strings]
        for word in argv:
            name = word.partition("=")[0]
            if word.startswith("--") and name not in known:
                raise ConfigError(f"no flag is called {name}", where=self.prog, hint=did_you_mean(name, known))
        args, rest = self.parse_known_args(list(argv))
        for word in rest:
            if not word.strip().startswith("#"):
                raise ConfigError(f"{word!r} belongs to no flag", where=self.prog, hint=f"python {self.prog} --help")
            Terminal().say(
                f"left out: {word.strip()!r}, a comment after the backslash at a line's end; the lines after it are another"
                " command to the shell, so their flags did not arrive here"
            )
        return args
