"""Structured logs: one JSON object a line on stderr, without prompts and answers unless they are asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("research.core.serve.request")

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


@dataclass
class Entry:
    """What is written down of one HTTP request, filled on its way; None is left out."""

    id: str
    started: float = field(default_factory=time.perf_counter)
    fields: dict[str, Any] = field(default_factory=dict)

    def note(self, **fields: Any) -> None:
        self.fields.update({name: value for name, value in fields.items() if value is not None})

    def write(self, method: str, path: str, status: int, client: str | None) -> None:
        """The line of an ended request; ``status`` 499: its client has left."""
        level = logging.ERROR if status == 500 else logging.INFO
        record = {"id": self.id, "method": method, "path": path, "status": status, "client": client}
        record["seconds"] = round(time.perf_counter() - self.started, 4)
        logger.log(level, "request", extra=record | self.fields)


class JsonLines(logging.Formatter):
    """``{"time", "level", "event", ...}``, what was passed as ``extra`` beside them."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        if record.name != logger.name:
            line["logger"] = record.name
        line |= {name: value for name, value in vars(record).items() if name not in _PLAIN and value is not None}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_as_json(stream=None) -> None:
    """Send the log of the server, of uvicorn (warnings and errors) and of the engine to ``stream`` (stderr) as JSON lines."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("research", logging.INFO), ("uvicorn", logging.WARNING), ("asyncio", logging.ERROR)):
        one = logging.getLogger(name)
        one.handlers, one.propagate = [handler], False
        one.setLevel(level)
