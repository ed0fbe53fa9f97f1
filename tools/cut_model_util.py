"""Cut a model for tensor-parallel cards, as the document qwen_7b_atb_pytorch does (scripts/cut_model_and_run.sh calls it).

    python tools/cut_model_util.py --input_path model --output_path model/part_model --world_size 2

Writes one Hugging Face folder per card (part_model/0, part_model/1, ..: config.json, tokenizer files, safetensors). Parts
that were cut before are used again only if they are of the same weights and the same cut; anything else is an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from research.core.errors import ConfigError, WeightsError, run_cli
from research.core.weights.exchange import check_ours
from research.core.weights.grid import Grid
from research.core.weights.meter import Meter
from research.core.weights.opened import OpenOptions, open_weights
from research.core.weights.parts_state import CUT_FILE, cut_facts, stale_reasons
from research.core.weights.reshard import ReshardOptions, reshard
from research.core.weights.tensors import dtype_from_name

DONE = "Tensor parallelism weights have been successfully saved."


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input_path", required=True, help="Hugging Face folder of the model")
    parser.add_argument("--output_path", required=True, help="folder of the parts, usually <input_path>/part_model")
    parser.add_argument("--world_size", type=int, required=True, help="cards")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16; default: as stored")
    parser.add_argument("--kv", choices=("replicate", "refuse"), default="replicate", help="kv heads fewer than cards")
    parser.add_argument(
        "--vocab",
        choices=("pad", "replicate", "whole", "refuse"),
        default="pad",
        help="a vocabulary that does not divide",
    )
    parser.add_argument("--recut", action="store_true", help="replace parts that are of other weights or another cut")
    parser.add_argument("--check", action="store_true", help="only tell whether the parts are current (exit status 0)")
    parser.add_argument("--allow_pickle", action="store_true", help="read .bin files (weights-only), if you trust them")
    args = parser.parse_args(argv)
    if args.world_size < 1:
        raise ConfigError("at least one card is needed", where=f"--world_size {args.world_size}")
    source, parts = Path(args.input_path).expanduser(), Path(args.output_path).expanduser()
    opened = open_weights(source, OpenOptions(allow_pickle=args.allow_pickle))
    options = ReshardOptions(
        grid=Grid(tensor=args.world_size), kv=args.kv, vocab=args.vocab, dtype=dtype_from_name(args.dtype, "--dtype")
    )
    facts = cut_facts(opened, options)
    present = parts.exists() and any(parts.iterdir())
    if present:
        reasons = stale_reasons(parts, facts)
        if not reasons:
            print(f"{parts}: {args.world_size} parts of {source}, current")
            return 0
        if args.check or not args.recut:
            raise WeightsError(
                "these parts are not what would be cut now: " + "; ".join(reasons),
                where=parts,
                hint="recut=1 bash scripts/cut_model_and_run.sh (--recut) to cut again, or another output_dir",
            )
        check_ours(parts, CUT_FILE)
        options = replace(options, overwrite=True)
    elif args.check:
        raise WeightsError("not cut yet", where=parts, hint="leave out --check")
    with Meter("cut") as meter:
        summary = reshard(
            opened,
            parts,
            options,
            OpenOptions(),
            extra={CUT_FILE: (json.dumps(facts, indent=2) + "\n").encode()},
            inside=True,
            progress=meter,
            log=lambda line: print(line, file=sys.stderr),
        )
    print("\n".join(summary.lines()))
    print(f"{DONE} ({parts})")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
