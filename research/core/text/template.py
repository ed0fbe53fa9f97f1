"""Chat templates: messages to text, to ids, and to the token range of every turn's header, content and end."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from research.core.config.names import did_you_mean
from research.core.errors import ConfigError, DataError, require_file
from research.core.text.chatml import CREATED, HELPFUL, ChatML, Segment
from research.core.text.messages import Message, checked_messages
from research.core.text.specials import END_OF_TEXT, IM_END
from research.core.text.tokenizer import Tokenizer
from research.core.text.vocabulary import read_json

Piece = int | str  # a control token's id, or plain text


class Span(NamedTuple):
    """Tokens ``start <= i < stop`` of one turn. ``kind``: ``header`` (``<|im_start|>role\\n``), ``content``, ``end``
    (``<|im_end|>``) or ``newline`` (what stands between turns). A token that reaches from the header into the content
    (a content that begins with line breaks) counts as content. ``turn`` counts the rendered turns from 0, the default
    system turn included; empty ranges are left out.
    """

    start: int
    stop: int
    role: str
    turn: int
    kind: str


@dataclass
class Encoded:
    """``ids`` of a conversation and its ``spans`` in order; without spans, ``note`` says why there are none."""

    ids: list[int]
    spans: list[Span] = field(default_factory=list)
    note: str | None = None


class ChatTemplate(ABC):
    """A chat template. ``source`` is its Jinja text, ``default_system`` the system prompt it adds by itself (or None).

    Control tokens of the template's own text become control tokens; those inside messages and tools stay plain text,
    unless ``allow_special``. Ids are those of the rendered text tokenised as a whole, cut at control tokens only.
    """

    name: str
    source: str
    default_system: str | None
    fingerprint: str

    @abstractmethod
    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        system: str | None = None,
    ) -> str:
        """The text. ``system`` replaces the template's default system prompt where the messages have none; ``""``: none.

        Raises :class:`DataError` for a conversation the template cannot express.
        """

    @abstractmethod
    def _pieces(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        system: str | None,
    ) -> list[Piece]:
        """Control ids and plain texts, in turn; never two texts in a row."""

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        allow_special: bool = False,
        system: str | None = None,
    ) -> Encoded:
        """Ids and spans of one conversation."""
        return self.encode_batch(tokenizer, [messages], [tools], add_generation_prompt, allow_special, system)[0]

    def encode_batch(
        self,
        tokenizer: Tokenizer,
        conversations: Iterable[Sequence[Message]],
        tools: Sequence[Sequence[Any] | None] | None = None,
        add_generation_prompt: bool = False,
        allow_special: bool = False,
        system: str | None = None,
    ) -> list[Encoded]:
        """As :meth:`encode` for each conversation (``tools``: one entry for each, or None), with one tokenizer call."""
        index: dict[str, int] = {}  # each different text once: default system prompts, line breaks between turns
        rows: list[list[Piece]] = []
        for number, messages in enumerate(conversations):
            given = tools[number] if tools is not None else None
            if allow_special:
                text = self.render(messages, given, add_generation_prompt, system)
                pieces = tokenizer.cut(text)
            else:
                pieces = self._pieces(tokenizer, messages, given, add_generation_prompt, system)
            for piece in pieces:
                if type(piece) is str:
                    index.setdefault(piece, len(index))
            rows.append(pieces)
        encoded = tokenizer.encode_batch(list(index))
        return [_assemble(tokenizer, pieces, index, encoded) for pieces in rows]


def _assemble(tokenizer: Tokenizer, pieces: list[Piece], index: dict[str, int], encoded: list[list[int]]) -> Encoded:
    ids: list[int] = []
    spans: list[Span] = []
    start_id, end_id = tokenizer.im_start_id, tokenizer.im_end_id
    role, turn = "", -1
    opened = content = -1  # where the header and the content of the open turn begin; -1 outside of a turn
    regular = True
    for piece in pieces:
        here = len(ids)
        if type(piece) is str:
            part = encoded[index[piece]]
            ids += part
            if opened < 0:
                if turn >= 0:
                    spans.append(Span(here, len(ids), role, turn, "newline"))
            elif content < 0:
                head = piece.find("\n") + 1 or len(piece)
                role = piece[:head].strip()
                content = here + (tokenizer.prefix_tokens(part, piece, head) if head < len(piece) else len(part))
                spans.append(Span(opened, content, role, turn, "header"))
            continue
        ids.append(piece)
        if piece == start_id:
            regular = regular and opened < 0
            opened, content, turn = here, -1, turn + 1
        elif piece == end_id:
            regular = regular and content >= 0
            if content >= 0 and here > content:
                spans.append(Span(content, here, role, turn, "content"))
            spans.append(Span(here, here + 1, role, turn, "end"))
            opened = content = -1
    if opened >= 0 and 0 <= content < len(ids):
        spans.append(Span(content, len(ids), role, turn, "content"))
    if turn < 0 or not regular:
        return Encoded(
            ids, [], "turns are not marked by <|im_start|> role ... <|im_end|>, so they cannot be told apart"
        )
    return Encoded(ids, spans)


class ChatMLTemplate(ChatTemplate):
    """A family's template, built as text segments; equal to its Jinja form, many times faster."""

    def __init__(self, name: str, chatml: ChatML, source: str | None = None):
        self.name, self._chatml, self.default_system = name, chatml, chatml.default_system
        canonical = chatml.jinja()
        self.source = canonical if source is None else source
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    def _segments(self, messages, tools, add_generation_prompt, system) -> list[Segment]:
        return self._chatml.segments(checked_messages(messages), tools, add_generation_prompt, system)

    def render(self, messages, tools=None, add_generation_prompt=False, system=None) -> str:
        return "".join([text for _, text in self._segments(messages, tools, add_generation_prompt, system)])

    def _pieces(self, tokenizer, messages, tools, add_generation_prompt, system) -> list[Piece]:
        pieces: list[Piece] = []
        text = ""
        for own, part in self._segments(messages, tools, add_generation_prompt, system):
            if not own:
                text += part
                continue
            for piece in tokenizer.cut_own(part):
                if type(piece) is str:
                    text += piece
                else:
                    if text:
                        pieces.append(text)
                        text = ""
                    pieces.append(piece)
        if text:
            pieces.append(text)
        return pieces


class JinjaTemplate(ChatTemplate):
    """Any Jinja template, rendered as transformers does. ``variables`` are what it may read besides the conversation."""

    default_system = None

    def __init__(self, source: str, name: str = "jinja", variables: dict[str, Any] | None = None):
        self.name, self.source = name, source
        self._variables = {"eos_token": IM_END, "pad_token": END_OF_TEXT} | (variables or {})
        self.fingerprint = hashlib.sha256(source.encode()).hexdigest()
        self._start()

    def _start(self) -> None:
        from research.core.text.jinja import compile_template

        self._compiled = compile_template(self.source, self.name)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start()

    def _with_system(self, messages: Sequence[Message], system: str | None) -> list[Message]:
        messages = checked_messages(messages, roles=None)
        if system is None or messages[0]["role"] == "system":
            return messages
        if system:
            return [{"role": "system", "content": system}, *messages]
        if self._compiled(messages=messages, tools=None, **self._flags(False)).startswith("<|im_start|>system"):
            raise DataError(
                "this template always writes a system turn; an empty system prompt cannot take it away",
                where=self.name,
                hint="data.system=<text>, generate.system=<text>, or one of the families' templates",
            )
        return messages

    def _flags(self, add_generation_prompt: bool) -> dict[str, Any]:
        return {"documents": None, "add_generation_prompt": add_generation_prompt} | self._variables

    def render(self, messages, tools=None, add_generation_prompt=False, system=None) -> str:
        messages = self._with_system(messages, system)
        return self._compiled(messages=messages, tools=tools, **self._flags(add_generation_prompt))

    def _pieces(self, tokenizer, messages, tools, add_generation_prompt, system) -> list[Piece]:
        from research.core.text.standins import StandIns

        messages, flags = self._with_system(messages, system), self._flags(add_generation_prompt)
        plain = self._compiled(messages=messages, tools=tools, **flags)
        controls = tokenizer.control_pattern(frozenset(tokenizer.special_tokens))
        for message in messages:
            if controls.search(message["role"]):
                raise DataError(f"a control token in the role {message['role']!r}")
        everything = f"{messages!r}{tools!r}{self.source}{plain}"
        for ends in (True, False):
            stand = StandIns(controls, frozenset(tokenizer.special_tokens), everything, ends)
            replaced = stand.put_messages(messages), stand.put(tools)
            if not stand.used:
                return tokenizer.cut(plain)
            text = self._compiled(messages=replaced[0], tools=replaced[1], **flags)
            if stand.back(text) == plain:
                return [stand.back(piece) if type(piece) is str else piece for piece in tokenizer.cut(text)]
        raise DataError(
            "the template treats control tokens inside a message specially, so they cannot be kept as text",
            where=self.name,
            hint="take them out of the message, or allow_special=true",
        )


_TEMPLATES: dict[str, ChatML] = {
    "qwen": ChatML(HELPFUL, tools=False),
    "qwen1_5": ChatML(HELPFUL, tools=False),
    "qwen2": ChatML(HELPFUL, tools=False),
    "qwen2_5": ChatML(CREATED, tools=True),
    "qwen2_5_base": ChatML(HELPFUL, tools=True),
}

# sha256 of published Jinja texts that render as one of these: a weight folder with one gets the fast path.
_PUBLISHED: dict[str, str] = {
    "cd8e9439f0570856fd70470bf8889ebd8b5d1107207f67a5efb46e342330527f": "qwen2_5",
    "44d5f08f3f72b837eaad09f13a54c1f9f4eb58d75240334548b7fd52a5437fa5": "qwen2_5_base",
    "793202280c0910ab26bc6eb57c8212c2417324c6d8c4efd0d10d59092ab3e3eb": "qwen2",
}


def get_template(name: str) -> ChatTemplate:
    """The template of a family: ``qwen``, ``qwen1_5``, ``qwen2``, ``qwen2_5``, or ``qwen2_5_base`` (its base models')."""
    if name not in _TEMPLATES:
        raise ConfigError(f"unknown template {name!r}", where="model.template", hint=did_you_mean(name, _TEMPLATES))
    return ChatMLTemplate(name, _TEMPLATES[name])


def template_from_jinja(source: str, name: str = "jinja", variables: dict[str, Any] | None = None) -> ChatTemplate:
    """A template from Jinja text; ``variables`` such as ``bos_token`` are passed to it. Raises :class:`DataError`."""
    known = _PUBLISHED.get(hashlib.sha256(source.encode()).hexdigest())
    if known is None:
        known = next((key for key, chatml in _TEMPLATES.items() if chatml.jinja() == source), None)
    if known is not None:
        return ChatMLTemplate(known, _TEMPLATES[known], source)
    return JinjaTemplate(source, name, variables)


def template_from_file(path: str | os.PathLike) -> ChatTemplate:
    """A template from a file: Jinja text, or JSON with a ``chat_template`` (``tokenizer_config.json``).

    The control tokens that such a JSON file names (``eos_token`` ...) are passed to the template, as transformers does.
    """
    path = require_file(path, "template file")
    if path.suffix != ".json":
        try:
            return template_from_jinja(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as bad:
            raise DataError(f"not UTF-8 text: {bad.reason} at byte {bad.start}", where=path) from None
    fields = read_json(path)
    source = fields.get("chat_template") if isinstance(fields, dict) else None
    if isinstance(source, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        raise DataError('no text under "chat_template"', where=path)
    variables = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        token = fields.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            variables[name] = token
    return template_from_jinja(source, str(path), variables)
