"""Encode, decode and render with a family's tokenizer and chat template, one JSON request a line.

python tools/encode.py --family qwen2_5 --tokenizer DIR --input in.jsonl --output out.jsonl

{"op": "encode", "text", "allowed_special": "all" | [...]}                    -> {"ids"}   (default: none allowed)
{"op": "decode", "ids"}                                                      -> {"text"}  (control tokens included)
{"op": "chat", "messages", "tools", "add_generation_prompt", "template_file"} -> {"text", "ids"}

Answers come in order, one a line. A wrong request ends the program with status 2, naming its line; nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from research.core.errors import DataError, UserError, require_file, run_cli
from research.core.text.save import writing
from research.core.text.specials import FAMILY_SPECIALS
from research.core.text.template import ChatTemplate, get_template, template_from_file
from research.core.text.tokenizer import Tokenizer, load_tokenizer

PADDING_ROWS = 512  # an embedding matrix has at most this many rows past the vocabulary; they decode to nothing

FIELDS = {
    "encode": ({"text"}, {"allowed_special"}),
    "decode": ({"ids"}, set()),
    "chat": ({"messages"}, {"tools", "add_generation_prompt", "template_file"}),
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, help=", ".join(FAMILY_SPECIALS))
    parser.add_argument("--tokenizer", required=True, help="folder with the vocabulary")
    parser.add_argument("--input", required=True, help="requests, one JSON object a line; - for standard input")
    parser.add_argument("--output", required=True, help="answers; - for standard output")
    options = parser.parse_args(argv)
    tokenizer = load_tokenizer(options.tokenizer, options.family)
    template = get_template(options.family)
    if options.output == "-":
        answer_all(options.input, tokenizer, template, sys.stdout)
    else:
        if Path(options.output).is_dir():
            raise UserError("the output must be a file, this is a folder", where=options.output)
        with writing(Path(options.output)) as file:
            answer_all(options.input, tokenizer, template, file)
    return 0


def answer_all(source: str, tokenizer: Tokenizer, template: ChatTemplate, file: Any) -> None:
    for where, request in requests(source):
        try:
            answer = respond(request, tokenizer, template)
        except UserError as error:
            raise DataError(str(error), where=where) from None
        file.write(json.dumps(answer, ensure_ascii=False) + "\n")


def requests(source: str) -> Iterator[tuple[str, Any]]:
    """``(file:line, parsed line)`` of every line that is not blank."""
    if source == "-":
        yield from parsed("stdin", sys.stdin.buffer)
    else:
        with open(require_file(source, "input"), "rb") as file:
            yield from parsed(source, file)


def parsed(name: str, lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            yield where, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except json.JSONDecodeError as bad:
            raise DataError(f"not valid JSON: {bad.msg} (column {bad.colno})", where=where) from None
        except UnicodeDecodeError as bad:
            raise DataError(f"not UTF-8 text: {bad.reason} at byte {bad.start}", where=where) from None
        except RecursionError:
            raise DataError("nested too deeply", where=where) from None


def respond(request: Any, tokenizer: Tokenizer, template: ChatTemplate) -> dict[str, Any]:
    """The answer to one request; raises :class:`UserError` for a wrong one."""
    if not isinstance(request, dict) or request.get("op") not in FIELDS:
        raise DataError('a request is an object with "op": ' + ", ".join(FIELDS))
    needed, optional = FIELDS[request["op"]]
    for name in sorted(needed - request.keys()):
        raise DataError(f'{request["op"]} needs "{name}"')
    for name in sorted(request.keys() - needed - optional - {"op", "id"}):
        print(f'warning: {request["op"]} has no field "{name}": not used', file=sys.stderr)
    if request["op"] == "encode":
        return {"ids": encode(request["text"], request.get("allowed_special"), tokenizer)}
    if request["op"] == "decode":
        return {"text": tokenizer.decode(checked_ids(request["ids"], tokenizer))}
    return chat(request, tokenizer, template)


def encode(text: Any, allowed: Any, tokenizer: Tokenizer) -> list[int]:
    if not isinstance(text, str):
        raise DataError('"text" is a string')
    if allowed is None:
        allowed = []
    if allowed != "all" and not (isinstance(allowed, list) and all(isinstance(name, str) for name in allowed)):
        raise DataError('"allowed_special" is "all" or a list of control tokens')
    if allowed != "all":
        for name in set(allowed) - tokenizer.special_tokens.keys():
            print(f"warning: {name!r} is not a control token of this vocabulary: plain text", file=sys.stderr)
    return tokenizer.encode(text, allowed)


def checked_ids(ids: Any, tokenizer: Tokenizer) -> list[int]:
    if not isinstance(ids, list) or not all(type(index) is int for index in ids):
        raise DataError('"ids" is a list of whole numbers')
    for index in ids:
        if not 0 <= index < tokenizer.vocab_size + PADDING_ROWS:
            raise DataError(f"id {index} is not in the vocabulary of {tokenizer.vocab_size:,} tokens")
    return ids


def chat(request: dict[str, Any], tokenizer: Tokenizer, template: ChatTemplate) -> dict[str, Any]:
    if request.get("template_file") is not None:
        if not isinstance(request["template_file"], str):
            raise DataError('"template_file" is a path')
        template = read_template(request["template_file"])
    tools, prompt = request.get("tools"), request.get("add_generation_prompt", False)
    if tools is not None and not isinstance(tools, list):
        raise DataError('"tools" is a list')
    if type(prompt) is not bool:
        raise DataError('"add_generation_prompt" is true or false')
    text = template.render(request["messages"], tools, prompt)
    return {"text": text, "ids": template.encode(tokenizer, request["messages"], tools, prompt).ids}


@lru_cache(maxsize=16)
def read_template(path: str) -> ChatTemplate:
    return template_from_file(path)


if __name__ == "__main__":
    sys.exit(run_cli(main))
