"""The documents' conversion scripts (``research/qwen/convert_weight.py`` and the others) under their own flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from research.core.weights.convert import ConvertOptions
from research.core.weights.opened import HUGGINGFACE, MINDFORMERS
from research.core.weights.tensors import dtype_from_name
from research.tasks.convert import Request, run_request

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".json")


def qwen_convert(argv: Sequence[str]) -> None:
    """``research/qwen/convert_weight.py``: ``--torch_ckpt_path`` is any weight file of the folder, or the folder."""
    parser = _parser("Qwen v1: Hugging Face folder -> MindFormers checkpoint")
    parser.add_argument(
        "--torch_ckpt_path", "--torch_ckpt_dir", required=True, help="any file of the folder, or the folder"
    )
    parser.add_argument("--mindspore_ckpt_path", default="./run/qwen_7b_ms.ckpt", help="file to write")
    _common(parser)
    args = parser.parse_args(argv)
    run_request(_forward(args, args.torch_ckpt_path, "qwen"))


def qwen1_5_convert(argv: Sequence[str]) -> None:
    """``research/qwen1_5/convert_weight.py``."""
    parser = _parser("Qwen1.5: Hugging Face folder -> MindFormers checkpoint")
    parser.add_argument("--torch_ckpt_dir", "--torch_ckpt_path", default="./", help="folder of the model")
    parser.add_argument("--mindspore_ckpt_path", default="transform.ckpt", help="file to write")
    _common(parser)
    args = parser.parse_args(argv)
    run_request(_forward(args, args.torch_ckpt_dir, "qwen1_5"))


def qwen1_5_reversed(argv: Sequence[str]) -> None:
    """``research/qwen1_5/convert_reversed.py``: writes a Hugging Face folder (safetensors) where the original wrote a pickle."""
    parser = _parser("Qwen1.5: MindFormers checkpoint -> Hugging Face folder")
    parser.add_argument("--mindspore_ckpt_path", default="transform.ckpt", help="file, or folder with rank_0/")
    parser.add_argument("--torch_ckpt_path", default="./qwen2/qwen2-hf/", help="folder to write")
    parser.add_argument("--config", help="config.json of the model, or its folder; default: beside the checkpoint")
    _common(parser)
    args = parser.parse_args(argv)
    run_request(
        Request(
            source=args.mindspore_ckpt_path,
            target=args.torch_ckpt_path,
            to=HUGGINGFACE,
            model="qwen1_5",
            dtype=dtype_from_name(args.dtype, "--dtype"),
            concat=args.qkv_concat,
            config=args.config,
            options=_options(args),
        )
    )


def _parser(text: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=text + ". tools/convert_weight.py has every option.", allow_abbrev=False)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (fp32, bf16, fp16); default: as stored")
    parser.add_argument("--qkv_concat", choices=("none", "stacked", "grouped", "probe"), help="of the MindFormers side")
    parser.add_argument("--allow_overflow", action="store_true", help="write infinities where fp16 is too small")
    parser.add_argument("--allow_pickle", action="store_true", help="read .bin files, if you trust their source")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def _options(args) -> ConvertOptions:
    return ConvertOptions(allow_overflow=args.allow_overflow, overwrite=args.overwrite)


def _forward(args, source: str, family: str) -> Request:
    path = Path(source).expanduser()
    folder = path.parent if path.is_file() and path.suffix in _WEIGHTS else path
    return Request(
        source=str(folder),
        target=args.mindspore_ckpt_path,
        to=MINDFORMERS,
        model=family,
        dtype=dtype_from_name(args.dtype, "--dtype"),
        concat=args.qkv_concat,
        allow_pickle=args.allow_pickle,
        options=_options(args),
    )
