"""What Prometheus sees. Every name begins with ``qwen_``; docs/serving.md lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from research.core.engine.api import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """The server's own registry: two servers in one process do not share it."""

    def __init__(self, stats: Callable[[], Stats]):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "qwen_http_requests", "HTTP requests by path and status", ("path", "status"), registry=registry
        )
        self.seconds = Histogram(
            "qwen_http_request_seconds", "Until the last byte", ("path",), buckets=_SECONDS, registry=registry
        )
        self.open = Gauge("qwen_open_requests", "Prompts that run or wait in the engine", registry=registry)
        self.draining = Gauge("qwen_draining", "1 after SIGTERM", registry=registry)
        self.finished = Counter("qwen_answers", "Answers by what ended them", ("finish",), registry=registry)
        self.first_token = Histogram(
            "qwen_time_to_first_token_seconds",
            "From the request to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "qwen_time_between_tokens_seconds", "Between tokens of one answer", buckets=_STEP_SECONDS, registry=registry
        )
        self.prompt_tokens = Histogram("qwen_prompt_tokens", "Of a prompt", buckets=_TOKENS, registry=registry)
        self.answer_tokens = Histogram("qwen_answer_tokens", "Of an answer", buckets=_TOKENS, registry=registry)
        registry.register(_EngineStats(stats))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineStats(Collector):
    """The engine's gauges and counters, read when they are asked for."""

    def __init__(self, stats: Callable[[], Stats]):
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        now = self._stats()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"qwen_engine_{name}", text, value=getattr(now, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"qwen_engine_{name}", text, value=getattr(now, f"total_{name}"))


_GAUGES = {
    "running": "Answers in the batch",
    "waiting": "Answers that wait for room",
    "blocks": "Blocks of the KV cache",
    "free_blocks": "Blocks that a request can have",
    "cached_blocks": "Free blocks that hold a prefix",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts",
    "cached_tokens": "Of them found in the prefix cache",
    "new_tokens": "Tokens generated",
    "preemptions": "Answers put back to wait for room",
    "steps": "Forwards of the model",
}
