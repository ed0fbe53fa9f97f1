"""Weights between Hugging Face and MindFormers, with the flags of MindFormers' own tool.

    python tools/convert_weight.py --model qwen2_5 --input_path hf_folder --output_path qwen.ckpt [--dtype bf16]
    python tools/convert_weight.py --model qwen2_5 --input_path qwen.ckpt --output_path hf_folder --reversed

Streaming, resumable, and with a record (conversion.json) of how each tensor was made. docs/weights.md tells the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from research.core.errors import ConfigError, run_cli
from research.core.weights.convert import ConvertOptions
from research.core.weights.tensors import dtype_from_name
from research.tasks.convert import Request, run_request

CONCAT = ("none", "stacked", "grouped", "probe")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", required=True, help="family (qwen, qwen1_5, qwen2, qwen2-moe, qwen2_5) or model name"
    )
    parser.add_argument(
        "--input_path", required=True, help="Hugging Face folder (or a file in it); --reversed: MindFormers'"
    )
    parser.add_argument("--output_path", required=True, help=".ckpt or .safetensors file, or a folder")
    parser.add_argument("--reversed", action="store_true", help="MindFormers -> Hugging Face")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16; default: as stored")
    parser.add_argument("--qkv_concat", help=f"of the MindFormers side: {' | '.join(CONCAT)} (probe: with --reversed)")
    parser.add_argument(
        "--is_lora", type=yes_or_no, nargs="?", const=True, default=False, help="the input is an adapter"
    )
    parser.add_argument(
        "--config", "--config_path", help="config.json, or its folder, of a MindFormers input or of an adapter's base"
    )
    parser.add_argument(
        "--use_gmm", type=yes_or_no, nargs="?", const=True, help="experts' axes exchanged (grouped matmul)"
    )
    parser.add_argument("--tied_head", choices=("copy", "omit"), default="copy", help="lm_head.weight of tied models")
    parser.add_argument(
        "--tokenizer", help="folder of the vocabulary, for --qkv_concat probe (default: beside config.json)"
    )
    parser.add_argument("--allow_overflow", action="store_true", help="write infinities where fp16 is too small")
    parser.add_argument(
        "--allow_pickle", action="store_true", help="read .bin files (weights-only), if you trust their source"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --output_path")
    parser.add_argument("--verify", action="store_true", help="compare the result with the source at the end")
    args = parser.parse_args(argv)
    run_request(
        Request(
            source=args.input_path,
            target=args.output_path,
            to="huggingface" if args.reversed else "mindformers",
            model=args.model,
            dtype=dtype_from_name(args.dtype, "--dtype"),
            concat=concat(args.qkv_concat, args.reversed),
            gmm=args.use_gmm,
            lora=args.is_lora,
            config=args.config,
            tokenizer=args.tokenizer,
            allow_pickle=args.allow_pickle,
            verify=args.verify,
            options=ConvertOptions(
                tied_head=args.tied_head, allow_overflow=args.allow_overflow, overwrite=args.overwrite
            ),
        )
    )


def yes_or_no(word: str) -> bool:
    """``True``, ``false``, ``1`` .. as the documents write them."""
    if word.lower() in ("true", "1", "yes", "y", "on"):
        return True
    if word.lower() in ("false", "0", "no", "n", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")


def concat(word: str | None, backwards: bool) -> str | None:
    """``--qkv_concat``'s value; MindFormers' own True is refused, for it means two layouts."""
    where = f"--qkv_concat {word}"
    if word is None or word.lower() in ("false", "0"):
        return None if word is None else "none"
    if word.lower() in ("true", "1"):
        raise ConfigError("True has meant two layouts", where=where, hint="stacked (r1.3) or grouped (r1.5 and MoE)")
    if word not in CONCAT:
        raise ConfigError("no such layout", where=where, hint=" | ".join(CONCAT))
    if word == "probe" and not backwards:
        raise ConfigError("only a MindFormers input can be probed", where=where, hint="stacked or grouped")
    return word


if __name__ == "__main__":
    sys.exit(run_cli(main))
