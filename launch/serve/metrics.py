"""What /metrics tells Prometheus, in a registry of the server's own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

#: upper bounds of the histograms: seconds, and rows
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counters and histograms; safe to use from any thread."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "zerobert_requests", "Requests that are over, by path and status", ("path", "status"), registry=registry
        )
        self.seconds = Histogram(
            "zerobert_request_seconds", "From a request's head to the end of its answer",
            ("path",), buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.rows = Counter("zerobert_rows", "Rows that were computed", registry=registry)
        self.tokens = Counter("zerobert_tokens", "Tokens that were computed", registry=registry)
        self.truncated = Counter("zerobert_truncated_rows", "Rows whose text was cut", registry=registry)
        self.batch_rows = Histogram(
            "zerobert_batch_rows", "Rows that were computed together", buckets=ROWS, registry=registry
        )
        self.batch_requests = Histogram(
            "zerobert_batch_requests", "Requests that were computed together", buckets=ROWS, registry=registry
        )
        self.batch_seconds = Histogram(
            "zerobert_batch_seconds", "Time to compute them", buckets=SECONDS, registry=registry
        )

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A figure that is asked for when the metrics are."""
        Gauge(f"zerobert_{name}", about, registry=self.registry).set_function(value)

    def batch(self, jobs: int, rows: int, tokens: int, truncated: int, seconds: float) -> None:
        """Some requests were computed together, in so many seconds."""
        self.rows.inc(rows)
        self.tokens.inc(tokens)
        self.truncated.inc(truncated)
        self.batch_rows.observe(rows)
        self.batch_requests.observe(jobs)
        self.batch_seconds.observe(seconds)

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request is over."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """All of them in Prometheus' text format, version 0.0.4."""
        return generate_latest(self.registry)
