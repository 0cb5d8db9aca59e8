"""What `/metrics` shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from lastrerank.engine import Engine

# Methods that are counted and logged by name.
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Metrics:
    """A registry of its own, so that several applications may live in one process."""

    def __init__(self, engine: Engine) -> None:
        own = self.registry = prometheus_client.CollectorRegistry()
        self._requests = prometheus_client.Counter(
            "lastrerank_requests", "HTTP requests", ["route", "method", "status"], registry=own
        )
        self._seconds = prometheus_client.Histogram(
            "lastrerank_request_seconds", "From first byte to last", ["route"], registry=own
        )
        self.documents = prometheus_client.Histogram(
            "lastrerank_documents", "Documents of a request", buckets=(1, 5, 10, 25, 50, 100, 250, 1000), registry=own
        )
        queued = prometheus_client.Gauge("lastrerank_queued_tokens", "Tokens queued", registry=own)
        queued.set_function(lambda: engine.queued_tokens)
        pending = prometheus_client.Gauge("lastrerank_pending_requests", "Requests not answered", registry=own)
        pending.set_function(lambda: engine.pending)
        own.register(_EngineCounters(engine))

    def observe(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a response."""
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return prometheus_client.generate_latest(self.registry)


class _EngineCounters(Collector):
    """The engine's own statistics as counters."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Any]:
        for name, value in vars(self.engine.statistics).items():
            text = f"Engine: {name.replace('_', ' ')}"
            yield CounterMetricFamily(f"lastrerank_engine_{name}", text, value=value)
