"""Greedy continuations of token-id prompts, without a tokenizer.

    python tools/generate.py --weights DIR --input prompts.json --max-new-tokens 64 --output out.json [--backend mindspore]

Reads ``{"prompts": [[ids], ...]}`` of different lengths and writes ``{"ids": [[prompt + new], ...]}`` in the same order.
A row ends at one of the end tokens of ``generation_config.json`` or ``config.json`` (which it keeps) or after N tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from research.core.config.schema import DeviceConfig, GenerateConfig
from research.core.errors import DataError, UserError, require_file, run_cli
from research.core.generation.loop import run_requests
from research.core.generation.requests import Request, check_request
from research.core.run.folder import write_text
from research.core.weights.generation import read_generation_defaults
from research.tasks.framework import half

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def main(argv: Sequence[str]) -> int:
    args = _arguments(argv)
    if args.max_new_tokens < 1:
        raise UserError(
            f"{args.max_new_tokens} new tokens cannot be generated", where="--max-new-tokens", hint="1 or more"
        )
    if args.batch < 1:
        raise UserError(f"{args.batch} prompts cannot run at a time", where="--batch", hint="1 or more")
    if not args.output.parent.is_dir():
        raise UserError("there is no such folder", where=args.output.parent, hint="create it, or another --output")
    prompts = read_prompts(args.input)

    eos_ids = read_generation_defaults(args.weights).eos_ids
    generate, device = GenerateConfig(dtype=DTYPES[args.dtype]), DeviceConfig(kind="cpu")
    runner, _ = half(args.backend, "load_runner").load_runner(args.weights, generate, device, args.adapter)
    requests = [Request(prompt, max_new_tokens=args.max_new_tokens) for prompt in prompts]
    for number, request in enumerate(requests):
        check_request(request, runner.spec.vocab, runner.length_limit, f"{args.input}, prompt {number}")
    results = run_requests(runner, requests, eos_ids, batch=args.batch)
    rows = [prompt + result.ids for prompt, result in zip(prompts, results, strict=True)]
    write_text(args.output, json.dumps({"ids": rows}) + "\n")
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder with config.json and safetensors")
    parser.add_argument("--input", type=Path, required=True, help='JSON: {"prompts": [[ids], ...]}')
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help='JSON: {"ids": [[prompt + new], ...]}')
    parser.add_argument("--adapter", type=Path, help="PEFT adapter folder put on the weights")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--backend", choices=("torch", "mindspore"), default="torch")
    parser.add_argument("--batch", type=int, default=8, help="prompts that run at a time (default 8)")
    return parser.parse_args(argv)


def read_prompts(path: Path) -> list[list[int]]:
    """The prompts of an input file; raises :class:`DataError` with line or prompt number."""
    require_file(path, "input file", hint='a JSON file with {"prompts": [[ids], ...]}')
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as bad:
        raise DataError(f"not valid JSON: {bad.msg}", where=f"{path}:{bad.lineno}") from None
    except UnicodeDecodeError as bad:
        raise DataError(f"not UTF-8: {bad}", where=path) from None
    prompts = content.get("prompts") if isinstance(content, dict) else None
    if not isinstance(prompts, list):
        raise DataError('has no list "prompts"', where=path, hint='{"prompts": [[ids], ...]}')
    for number, prompt in enumerate(prompts):
        # bool is an int in Python, but true is no token.
        if not isinstance(prompt, list) or not all(type(i) is int for i in prompt):
            raise DataError("is not a list of token ids", where=f"{path}, prompt {number}")
    return prompts


if __name__ == "__main__":
    sys.exit(run_cli(main))
