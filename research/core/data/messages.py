"""A record of any conversation format -> :class:`Example`: messages with known roles and text that is there.

What cannot be a conversation (a missing key, an unknown role, a number where text belongs) is a mistake in the file and
raises :class:`DataError` with its line. What is one but teaches nothing (an empty instruction or answer) raises
:class:`Dropped`, which the audit counts by reason.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from research.core.config.names import nearest
from research.core.data.json_stream import Record
from research.core.data.sources import Where
from research.core.errors import DataError

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "function_call",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
EMPTY_INSTRUCTION, EMPTY_ANSWER = "empty instruction", "empty answer"
NO_ANSWER = "no assistant message"
NOT_UNICODE = "text with a lone surrogate (not valid Unicode)"

_SURROGATE = re.compile("[\ud800-\udfff]")


class Dropped(Exception):
    """This record is left out; the message is the reason for the audit."""


@dataclass(slots=True)
class Example:
    """One conversation. ``messages`` are ``{"role", "content", "tool_calls"?}`` as the templates take them."""

    id: str | int
    where: Where
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


def to_example(record: Record, fmt: str, mindformers: bool = False) -> Example:
    """Read one record of format alpaca, messages or sharegpt.

    ``mindformers`` builds Alpaca prompts as its alpaca_converter.py did and keeps empty answers, which it trained.
    Raises :class:`DataError` and :class:`Dropped` as the module says.
    """
    raw, where = record.raw, record.where
    if not isinstance(raw, dict):
        raise DataError(f"a record must be a JSON object, this is a {type(raw).__name__}", where=where)
    messages = _alpaca(raw, where, mindformers) if fmt == "alpaca" else _turns(raw, where, fmt)
    _check_content(messages, where, mindformers)
    number = raw.get("id")
    return Example(
        id=number if isinstance(number, (str, int)) else where.name,
        where=where,
        messages=messages,
        tools=_tools(raw.get("tools"), where),
    )


# --- Alpaca -----------------------------------------------------------------------------------------------------


def alpaca_prompt(instruction: str, input: str, mindformers: bool = False) -> str:
    """The user's message: the instruction, and the input on a line of its own.

    With ``mindformers``: the instruction without its final full stop, a colon, and the input on the same line.
    """
    if not input:
        return instruction
    return f"{instruction.removesuffix('.')}: {input}" if mindformers else f"{instruction}\n{input}"


def _alpaca(raw: dict, where: Where, mindformers: bool) -> list[dict]:
    instruction = _string(raw, "instruction", where)
    given = _string(raw, "input", where, optional=True)
    output = _string(raw, "output", where)
    if not instruction.strip():
        raise Dropped(EMPTY_INSTRUCTION)
    messages = []
    if system := _string(raw, "system", where, optional=True):
        messages.append({"role": "system", "content": system})
    for pair in raw.get("history") or ():
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError("'history' must be a list of [question, answer] pairs", where=where)
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    messages.append({"role": "user", "content": alpaca_prompt(instruction, given, mindformers)})
    messages.append({"role": "assistant", "content": output})
    return messages


def _string(raw: dict, key: str, where: Where, optional: bool = False) -> str:
    value = raw.get(key)
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    if key not in raw:
        raise DataError(f"the record has no {key!r} (it has {', '.join(map(repr, raw))})", where=where)
    raise DataError(f"{key!r} must be a string, this is {json.dumps(value, ensure_ascii=False)[:60]}", where=where)


# --- Messages and conversations ---------------------------------------------------------------------------------


def _turns(raw: dict, where: Where, fmt: str) -> list[dict]:
    key = "conversations" if fmt == "sharegpt" else "messages"
    if key not in raw:  # both spellings are read whichever was named
        key = "messages" if key == "conversations" and "messages" in raw else "conversations"
    turns = raw.get(key)
    if not isinstance(turns, list):
        has = ", ".join(map(repr, raw)) or "nothing"
        raise DataError(f"the record has no list 'messages' or 'conversations' (it has {has})", where=where)
    messages = [_turn(turn, number, where) for number, turn in enumerate(turns, 1)]
    if isinstance(raw.get("system"), str) and raw["system"] and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": raw["system"]})
    for number, message in enumerate(messages[1:], 2):
        if message["role"] == "system":
            raise DataError(f"message {number}: the system message must come first", where=where)
    return messages


def _turn(turn: Any, number: int, where: Where) -> dict:
    if not isinstance(turn, dict):
        raise DataError(f"message {number} must be an object with 'role' and 'content'", where=where)
    role = turn.get("role", turn.get("from"))
    content = turn["content"] if "content" in turn else turn.get("value")
    known = ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        near = nearest(role, ROLES) if isinstance(role, str) else None
        raise DataError(
            f"message {number}: role {role!r} is not known",
            where=where,
            hint=f"did you mean {near}?" if near else "one of: " + ", ".join(ROLES),
        )
    if isinstance(content, list):
        content = _text_parts(content, number, where)
    calls = turn.get("tool_calls")
    if known == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, number, where)}
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        shown = json.dumps(content, ensure_ascii=False)[:60]
        raise DataError(f"message {number}: the content must be a string, this is {shown}", where=where)
    message = {"role": known, "content": content}
    if calls:
        if known != "assistant" or not isinstance(calls, list):
            raise DataError(f"message {number}: 'tool_calls' must be a list, on an assistant message", where=where)
        message["tool_calls"] = [_call(call, number, where) for call in calls]
    return message


def _text_parts(parts: list, number: int, where: Where) -> str:
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"message {number}: only text parts can be trained on", where=where)
    return "".join(texts)


def _calls(content: Any, number: int, where: Where) -> list[dict]:
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except ValueError as error:
            raise DataError(f"message {number}: the function call is not JSON: {error}", where=where) from None
    return [_call(call, number, where) for call in (content if isinstance(content, list) else [content])]


def _call(call: Any, number: int, where: Where) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
        raise DataError(f"message {number}: a function call needs 'name' and 'arguments'", where=where)
    arguments = function["arguments"]
    if isinstance(arguments, str):  # the API's spelling: JSON inside a string
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise DataError(f"message {number}: the call's arguments are not JSON: {error}", where=where) from None
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(tools: Any, where: Where) -> list | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except ValueError as error:
            raise DataError(f"'tools' is not JSON: {error}", where=where) from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError("'tools' must be a list of objects", where=where)
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _check_content(messages: list[dict], where: Where, keep_empty_answers: bool) -> None:
    answers = 0
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            answers += 1
            if not content.strip() and not message.get("tool_calls") and not keep_empty_answers:
                raise Dropped(EMPTY_ANSWER)
        elif role == "user" and not content.strip():
            raise Dropped(EMPTY_INSTRUCTION)
        if not content.isascii() and _SURROGATE.search(content):
            raise Dropped(NOT_UNICODE)
    if not answers:
        raise Dropped(NO_ANSWER)
