"""`make chat`: talk to a model in a terminal, or through a pipe with one message a line."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

from research.core.config.schema import Config
from research.core.engine.session import EngineSession
from research.core.errors import ConfigError, UserError
from research.core.generation.requests import check_room
from research.core.generation.session import ChatSession
from research.core.launch.ranks import launch, needs_launch
from research.core.run.folder import write_text
from research.tasks.answering import EngineModel, mode, open_model

HELP = """\
/help         this text
/clear        forget the conversation
/system TEXT  set the system prompt (without TEXT: show it); the conversation goes on
/save FILE    write the conversation as {"messages": [...]}, a record that `make data` reads
/quit, /exit  leave (so does the end of input)
A line that ends with \\ goes on in the next one; \"\"\" opens and closes a block of several lines.
A message that begins with a slash is typed with two: //
Ctrl-C stops an answer."""

_COMMANDS = ("help", "clear", "system", "save", "quit", "exit")
_FENCE = '"""'


def run(cfg: Config) -> int:
    use_utf8()
    if cfg.generate.raw:
        raise ConfigError("a conversation needs a template", where="generate.raw=true", hint="task=predict")
    if mode(cfg) == "paged" and needs_launch(cfg):
        return launch(cfg)
    with contextlib.closing(open_session(cfg)) as session:
        return Repl(session, sys.stdin, sys.stdout, sys.stderr).loop()


def use_utf8() -> None:
    """Messages and answers are UTF-8, whatever the locale says."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8")


def open_session(cfg: Config, remember: bool = True, limit: int | None = None) -> ChatSession:
    """Load the model of ``cfg`` and begin a conversation with it; ``remember`` and ``limit`` are the session's."""
    cfg.engine.max_batch = 1  # what the cache's memory goes by
    model = open_model(cfg)
    # One token of a message at least; what a real one needs is known when it is typed.
    room = model.length_limit if limit is None else min(limit, model.length_limit)
    check_room(1, cfg.generate.max_new_tokens, room, "generate.max_new_tokens")
    if isinstance(model, EngineModel):
        begin = partial(EngineSession, model.engine, adapter=model.adapter)
    else:
        begin = partial(ChatSession, model.runner)
    return begin(
        model.tokenizer,
        model.template,
        model.sampling,
        cfg.generate.max_new_tokens,
        model.eos_ids,
        stop=cfg.generate.stop,
        system=cfg.generate.system,
        allow_special=cfg.allow_special,
        remember=remember,
        limit=limit,
    )


class Repl:
    """Reads messages and commands, writes answers to ``out`` and everything else to ``notes``.

    Prompts and hints appear only when both ends are a terminal, so a pipe receives nothing but answers. ``verbose``
    notes behind each answer what the model was given.
    """

    def __init__(self, session: ChatSession, source: TextIO, out: TextIO, notes: TextIO, verbose: bool = False):
        self.session, self.verbose = session, verbose
        self.source, self.out, self.notes = source, out, notes
        self.interactive = source.isatty() and out.isatty()

    def loop(self) -> int:
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  line editing and history in input()
            self._note("/help shows the commands, /quit leaves")
        for message in read_messages(self._lines()):
            command = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", message, re.DOTALL)
            try:
                if command:
                    if not self._command(command[1], (command[2] or "").strip()):
                        return 0
                elif message.strip():
                    self._answer(message[1:] if message.startswith("//") else message)
            except UserError as error:
                self._note(f"error: {error}")
        return 0

    def ask(self, message: str) -> None:
        """Answer a message that was given beforehand, which is noted first. Raises :class:`UserError`."""
        self._note(f"> {message}")
        self._answer(message)

    def _lines(self) -> Iterator[str]:
        """Lines without their end; on a terminal Ctrl-C clears the line instead of leaving."""
        if not self.interactive:
            for line in self.source:
                yield line.rstrip("\r\n")
            return
        while True:
            try:
                yield input("> ")
            except KeyboardInterrupt:
                self._note("\n(/quit leaves)")
            except EOFError:
                self._note("")
                return

    def _command(self, name: str, argument: str) -> bool:
        """Run one command; False means: leave."""
        if name in ("quit", "exit"):
            return False
        if name == "help":
            self._note(HELP)
        elif name == "clear":
            self.session.clear()
            self._note("(the conversation is forgotten)")
        elif name == "system":
            if argument:
                self.session.system = argument
            self._note(f"(system prompt: {self.session.shown_system or 'none'})")
        elif name == "save":
            self._save(argument)
        else:
            near = difflib.get_close_matches(name, _COMMANDS, 1)
            raise UserError(
                f"there is no command /{name}", hint=f"/{near[0]}" if near else "/help, or // to say it to the model"
            )
        return True

    def _save(self, argument: str) -> None:
        if not argument:
            raise UserError("/save needs a file", hint="/save conversation.json")
        path = Path(argument).expanduser()
        try:
            write_text(path, json.dumps({"messages": self.session.record()}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", where=path) from None
        self._note(f"(saved {len(self.session.messages)} messages to {path})")

    def _answer(self, message: str) -> None:
        with stop_on_ctrl_c() as stopped:
            reply = self.session.reply(message, self._show, stopped, on_trim=self._say_trimmed)
        self.out.write("\n")
        self.out.flush()
        if reply.reason == "length":
            self._note(f"(cut at generate.max_new_tokens={self.session.max_new_tokens})")
        elif reply.reason == "interrupted":
            self._note("(stopped)")
        if self.verbose:
            self._note(self.session.shown_prompt)
            self._note(
                f"({reply.prompt_tokens} prompt tokens, {reply.reused} of them kept; {reply.new_tokens} new ones)"
            )

    def _say_trimmed(self, turns: int, length: int) -> None:
        was = "turn no longer fits" if turns == 1 else "turns no longer fit"
        self._note(f"(the oldest {turns} {was} into the context of {length} tokens; the model does not see them now)")

    def _show(self, text: str) -> None:
        if text:
            self.out.write(text)
            self.out.flush()

    def _note(self, text: str) -> None:
        print(text, file=self.notes, flush=True)


def read_messages(lines: Iterator[str]) -> Iterator[str]:
    """Join lines into messages: a backslash at the end or a block between triple quotes goes over several lines."""
    for line in lines:
        if line.startswith(_FENCE):
            yield _read_block(line.removeprefix(_FENCE), lines)
            continue
        parts = [line]
        while parts[-1].endswith("\\"):
            parts[-1] = parts[-1][:-1]
            following = next(lines, None)
            if following is None:
                break
            parts.append(following)
        yield "\n".join(parts)


def _read_block(first: str, lines: Iterator[str]) -> str:
    parts = [first] if first else []
    if first.endswith(_FENCE):
        return first.removesuffix(_FENCE)
    for line in lines:
        if line.rstrip().endswith(_FENCE):
            last = line.rstrip().removesuffix(_FENCE)
            return "\n".join([*parts, last] if last else parts)
        parts.append(line)
    return "\n".join(parts)  # the input ended inside the block


@contextlib.contextmanager
def stop_on_ctrl_c() -> Iterator[list]:
    """A list that is empty until Ctrl-C is pressed; a second Ctrl-C interrupts as usual."""
    pressed: list = []

    def handler(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)
