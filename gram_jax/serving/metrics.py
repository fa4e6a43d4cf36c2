"""What `/metrics` says, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from gram_jax.serving.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The numbers of a server, kept apart from those of others in the process."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._registry.register(_Engine(service))
        self._requests = Counter(
            "gram_requests",
            "Requests that ended, by route and HTTP status; 499: the client did not wait.",
            ["route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "gram_request_seconds",
            "From a request's first byte to its answer, of those that were answered.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    def ended(self, route: str, status: int, seconds: float) -> None:
        """Counts a request."""
        self._requests.labels(route, str(status)).inc()
        if status == 200:
            self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All numbers as they are now."""
        return generate_latest(self._registry)


class _Engine(Collector):
    """Numbers that others count, read when they are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        service, batcher = self._service, self._service.engine.batcher
        packed, engine = batcher.packed, service.engine.scorer.engine
        gauges = {
            "gram_ready": ("Whether requests are answered.", service.state() == "ready"),
            "gram_requests_in_progress": ("Waiting or computed.", service.admission.requests),
            "gram_waiting_tokens": ("Token places that wait.", batcher.waiting_tokens),
        }
        counters = {
            "gram_batches": ("Batches that were computed.", engine.batches),
            "gram_places": ("Token places of the batches, padding included.", engine.places),
            "gram_tokens": ("Tokens that were computed.", packed.tokens),
            "gram_sequences": ("Sequences that were scored.", packed.sequences),
            "gram_dropped": ("Requests that were dropped before they were done.", batcher.dropped),
            "gram_texts_without_prompt": ("Texts that came whole.", service.unsplit),
        }
        for name, (meaning, value) in gauges.items():
            yield GaugeMetricFamily(name, meaning, float(value))
        for name, (meaning, value) in counters.items():
            yield CounterMetricFamily(name, meaning, float(value))
