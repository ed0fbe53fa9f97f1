"""What a template accepts as a conversation: checked, and with content parts joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from research.core.errors import DataError

ROLES = frozenset(("system", "user", "assistant", "tool"))

Message = dict[str, Any]


def checked_messages(messages: Sequence[Message], roles: frozenset[str] | None = ROLES) -> list[Message]:
    """``messages`` with list content joined to text; raises :class:`DataError` naming the message at fault.

    ``roles`` None lets any role through (the template decides). Content may be None beside ``tool_calls`` only.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError("a conversation is a list of at least one message", hint='[{"role": "user", "content": "..."}]')
    result = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError('a message is an object with "role" and "content"', where=f"message {number}")
        role, content = message["role"], message.get("content")
        if roles is not None and role not in roles:
            raise DataError(f"unknown role {role!r}", where=f"message {number}", hint="system, user, assistant or tool")
        if type(content) is str:
            result.append(message)
        elif isinstance(content, list):
            result.append(message | {"content": _joined(content, number)})
        elif content is None and role == "assistant" and message.get("tool_calls"):
            result.append(message | {"content": None})
        elif isinstance(content, str):
            result.append(message | {"content": str(content)})
        else:
            kind = "no content" if content is None else f"content is {type(content).__name__}, not text"
            raise DataError(f"{role} message: {kind}", where=f"message {number}")
    return result


def _joined(parts: list, number: int) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                'content parts must be {"type": "text", "text": "..."}: images and sound are not for these models',
                where=f"message {number}",
            )
    return "".join(part["text"] for part in parts)


def tool_call(call: Any, number: int) -> tuple[str, Any]:
    """Name and arguments of one entry of ``tool_calls``, bare or under ``function``."""
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
        raise DataError('a tool call is an object with "name" and "arguments"', where=f"message {number}")
    return call["name"], call["arguments"]
