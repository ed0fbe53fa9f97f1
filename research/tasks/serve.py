"""`make serve`: a model behind HTTP, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from pathlib import Path

from research.core.config.schema import Config
from research.core.errors import ConfigError, UserError
from research.core.launch.environment import place
from research.core.launch.ranks import launch, needs_launch
from research.core.serve.journal import log_as_json
from research.core.serve.server import KEYS_VARIABLE, bind, read_keys, serve, url, warm_up
from research.core.serve.service import Served
from research.tasks import serve_vllm
from research.tasks.answering import EngineModel, mode, open_engine_model

# Names the file in which the first of several ranks leaves its status; seconds that the ranks get beyond the drain.
_ENDED, _LEAVING_S = "QWEN_SERVE_ENDED", 30


def run(cfg: Config) -> int:
    if mode(cfg) == "vllm":
        return serve_vllm.run(cfg)
    if mode(cfg) != "paged":
        raise ConfigError(
            "the server runs on the paged engine", where=f"engine.mode={cfg.engine.mode}", hint="engine.mode=paged"
        )
    if needs_launch(cfg):
        return serve_over_ranks(cfg)
    if place() is not None and place().rank > 0:
        # The launcher passes a stop on to every rank; the first one decides when there is nothing left to compute.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open_engine_model(cfg)  # leaves by SystemExit when the first rank's engine is closed
    # What can be wrong with the port, the keys and the folders is found before the weights are read.
    listener = bind(cfg.serve.host, cfg.serve.port)
    try:
        keys = read_keys(cfg.serve.api_keys)
        check_adapter_folder(cfg.serve.adapter_folder)
        model = open_engine_model(cfg)
        log_as_json()
        served = what_is_served(cfg, model, keys)
        warm_up(served)
        status = serve(served, listener, lambda: print(announcement(served, listener), flush=True))
    finally:
        listener.close()
    if _ENDED in os.environ:
        Path(os.environ[_ENDED]).write_text(str(status))
    return status


def serve_over_ranks(cfg: Config) -> int:
    """Start one rank per card, the first of which serves. A stop that it has followed in good order is status 0."""
    os.environ.setdefault("LAUNCH_GRACE_S", f"{cfg.serve.drain_s + _LEAVING_S:g}")
    with tempfile.TemporaryDirectory(prefix="serve-") as folder:
        ended = Path(folder) / "status"
        os.environ[_ENDED] = str(ended)
        status = launch(cfg)
        stopped = status in (128 + signal.SIGTERM, 128 + signal.SIGINT)
        return int(ended.read_text()) if stopped and ended.is_file() else status


def check_adapter_folder(folder: str | None) -> None:
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise UserError("folder of adapters not found", where=folder, hint="serve.adapter_folder=<folder>")


def what_is_served(cfg: Config, model: EngineModel, keys: tuple[str, ...]) -> Served:
    """The model of ``cfg`` under the name that requests use."""
    name = cfg.serve.name or cfg.model.name
    if name in model.engine.adapters:
        raise ConfigError(
            f"the model and an adapter are both called {name}", where=f"serve.name={name}", hint="serve.name=<another>"
        )
    dtype, _, device = model.how.partition(" on ")
    return Served(
        name=name,
        engine=model.engine,
        template=model.template,
        sampling=model.sampling,
        settings=cfg.serve,
        adapter=model.adapter,
        embedding=cfg.model.embedding,
        system=cfg.generate.system,
        api_keys=keys,
        info=(("model_dtype", dtype), ("model_device_type", device)),
    )


def announcement(served: Served, listener: socket.socket) -> str:
    """Where the server is and what it does, for the person who started it."""
    settings, at, sampling = served.settings, url(listener), served.sampling
    rates = f"{settings.requests_per_minute} a minute for each client" if settings.requests_per_minute else "no limit"
    chosen = "greedy" if sampling.greedy else f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}"
    lines = [
        f"{served.name} is served at {at}",
        f"  chat page   {at + '/' if settings.page else 'off (serve.page)'}",
        f"  OpenAI      {at}/v1",
        f"  adapters    {', '.join(served.engine.adapters) or 'none'}"
        + (f"; more from {settings.adapter_folder}" if settings.adapter_folder else ""),
        f"  context     {served.engine.length_limit} tokens, prompt and answer together",
        f"  sampling    {chosen} where a request says nothing",
        f"  keys        {len(served.api_keys) or 'none: everybody who reaches this address may ask'}",
        f"  limits      {settings.max_requests} requests at a time, {rates}, {settings.max_body_mb:g} MB each",
        f"  ends        with SIGTERM or Ctrl-C; running answers get {settings.drain_s:g} s",
    ]
    if not served.api_keys and listener.getsockname()[0] not in ("127.0.0.1", "::1"):
        lines.append(f"  note        open to the network without a key; serve.api_keys=<file>, or {KEYS_VARIABLE}")
    return "\n".join(lines)
