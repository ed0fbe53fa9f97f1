"""`make serve ENGINE=vllm`: vLLM's own OpenAI server, given what the server of this repository would have been given."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from research.core.config.schema import Config
from research.core.engine.vllm import all_adapters, require_vllm, server_command, without_counterpart
from research.core.serve.server import read_keys
from research.tasks.answering import find_parts
from research.tasks.sources import say


def run(cfg: Config) -> int:
    """Become that server. Raises UserErrors for weights, keys and adapters that do not fit, and without vLLM."""
    require_vllm()
    parts, keys = find_parts(cfg), read_keys(cfg.serve.api_keys)
    given = {Path(cfg.adapter).resolve().name: Path(cfg.adapter)} if cfg.adapter else {}
    adapters = all_adapters(parts.source, given)
    for name in without_counterpart(cfg):
        say(f"note: {name} has no effect with engine.mode=vllm: vLLM's server knows nothing like it")
    command = server_command(parts.source, cfg.serve.name or cfg.model.name, cfg, adapters, keys)
    if len(keys) == 1:
        os.environ["VLLM_API_KEY"] = keys[0]
    shown = ["***" if word in keys else word for word in command]
    say(f"+ {shlex.join([sys.executable, *shown])}")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *command])
