"""The families' templates, as text segments built without Jinja, and as Jinja text of our own for ``tokenizer_config.json``.

Every turn is ``<|im_start|>role\\ncontent<|im_end|>\\n``. Qwen v1, Qwen1.5 and Qwen2 put a default system turn first where
there is none; Qwen2.5 adds tools, tool calls and tool answers to it. The wording of the tool instructions is part of the
format the models were trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from research.core.errors import DataError
from research.core.text.messages import Message, tool_call

Segment = tuple[bool, str]  # (the template's own text, text)

HELPFUL = "You are a helpful assistant."
CREATED = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

TOOLS_BEFORE = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)

_OPEN = {role: (True, f"<|im_start|>{role}\n") for role in ("system", "user", "assistant", "tool")}
_CLOSE: Segment = (True, "<|im_end|>\n")


@dataclass(frozen=True)
class ChatML:
    """One template: its default system turn, and whether it knows tools."""

    default_system: str
    tools: bool

    def segments(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, add_generation_prompt: bool, system: str | None
    ) -> list[Segment]:
        """The conversation as alternating own text and content. ``messages`` are checked ones.

        ``system`` replaces the default system turn; ``""`` leaves it out.
        """
        if tools and not self.tools:
            raise DataError("this template has no place for tools", hint="the template qwen2_5, or no tools")
        parts: list[Segment] = []
        first = messages[0]
        if first["role"] == "system":
            text, own, messages = first["content"], False, messages[1:]
        else:
            text, own = (self.default_system, True) if system is None else (system, False)
        if text or tools or first["role"] == "system":
            parts += (_OPEN["system"], (own, text))
            if tools:
                parts.append((True, TOOLS_BEFORE))
                for tool in tools:
                    parts += ((True, "\n"), (False, json.dumps(tool, ensure_ascii=False)))
                parts.append((True, TOOLS_AFTER))
            parts.append(_CLOSE)
        offset = 1 if first["role"] == "system" else 0
        for number, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role == "tool" and self.tools:
                parts += self._tool_answer(messages, number)
            elif role == "assistant" and message.get("tool_calls"):
                parts += self._tool_calls(message, number + offset + 1)
            else:
                parts += (_OPEN[role], (False, content), _CLOSE)
        if add_generation_prompt:
            parts.append(_OPEN["assistant"])
        return parts

    def _tool_calls(self, message: Message, number: int) -> list[Segment]:
        if not self.tools:
            raise DataError(
                "this template has no tool calls",
                where=f"message {number}",
                hint="the template qwen2_5, or plain content",
            )
        parts: list[Segment] = [(True, "<|im_start|>assistant")]
        if message["content"]:
            parts += ((True, "\n"), (False, message["content"]))
        for call in message["tool_calls"]:
            name, arguments = tool_call(call, number)
            parts += (
                (True, '\n<tool_call>\n{"name": "'),
                (False, name),
                (True, '", "arguments": '),
                (False, json.dumps(arguments, ensure_ascii=False)),
                (True, "}\n</tool_call>"),
            )
        return [*parts, _CLOSE]

    @staticmethod
    def _tool_answer(messages: Sequence[Message], number: int) -> list[Segment]:
        """Answers in a row share one user turn."""
        parts: list[Segment] = []
        if number == 0 or messages[number - 1]["role"] != "tool":
            parts.append((True, "<|im_start|>user"))
        parts += ((True, "\n<tool_response>\n"), (False, messages[number]["content"]), (True, "\n</tool_response>"))
        if number + 1 == len(messages) or messages[number + 1]["role"] != "tool":
            parts.append(_CLOSE)
        return parts

    def jinja(self) -> str:
        """The same template for programs that render Jinja."""
        return (
            _TOOLS_JINJA.replace("@default", self.default_system)
            if self.tools
            else _PLAIN_JINJA.replace("@default", self.default_system)
        )


_PLAIN_JINJA = r"""
{%- set open, close = '<|im_start|>', '<|im_end|>\n' -%}
{%- if messages[0]['role'] != 'system' -%}
  {{- open + 'system\n@default' + close -}}
{%- endif -%}
{%- for turn in messages -%}
  {{- open + turn['role'] + '\n' + turn['content'] + close -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- open + 'assistant\n' -}}
{%- endif -%}
"""[1:]


def _quoted(text: str) -> str:
    """``text`` as a Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("\n", "\\n").replace("'", "\\'") + "'"


_TOOLS_JINJA = (
    r"""
{%- set open, close = '<|im_start|>', '<|im_end|>\n' -%}
{%- set given = messages[0]['role'] == 'system' -%}
{{- open + 'system\n' + (messages[0]['content'] if given else '@default') -}}
{%- if tools -%}
  {{- @before -}}
  {%- for tool in tools -%}
    {{- '\n' + (tool | tojson) -}}
  {%- endfor -%}
  {{- @after -}}
{%- endif -%}
{{- close -}}
{%- for turn in (messages[1:] if given else messages) -%}
  {%- if turn['role'] == 'tool' -%}
    {%- if loop.first or loop.previtem['role'] != 'tool' -%}{{- open + 'user' -}}{%- endif -%}
    {{- '\n<tool_response>\n' + turn['content'] + '\n</tool_response>' -}}
    {%- if loop.last or loop.nextitem['role'] != 'tool' -%}{{- close -}}{%- endif -%}
  {%- elif turn['role'] == 'assistant' and turn['tool_calls'] -%}
    {{- open + turn['role'] -}}
    {%- if turn['content'] -%}{{- '\n' + turn['content'] -}}{%- endif -%}
    {%- for call in turn['tool_calls'] -%}
      {%- set call = call['function'] or call -%}
      {{- '\n<tool_call>\n{"name": "' + call['name'] + '", "arguments": ' + (call['arguments'] | tojson) -}}
      {{- '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- close -}}
  {%- else -%}
    {{- open + turn['role'] + '\n' + turn['content'] + close -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- open + 'assistant\n' -}}
{%- endif -%}
"""[1:]
    .replace("@before", _quoted(TOOLS_BEFORE))
    .replace("@after", _quoted(TOOLS_AFTER))
)
