"""Prometheus metrics and the counters behind the Open Inference Protocol's statistics.

One `Metrics` per front end owns the registry; one `VersionMetrics` per model version holds the labelled
children, so that nothing is looked up per request.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gateway.clock import NS_PER_S, wall_ms

DURATION_BUCKETS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10,
)  # fmt: skip
"""Upper bounds of the duration histograms: a small model answers in 100 µs, a large one in seconds."""

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

_LABELS = ("model", "version")


@dataclass(slots=True)
class Duration:
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """One more."""
        self.count += 1
        self.ns += ns


@dataclass(slots=True)
class Statistics:
    """What ``/v2/models/{m}/stats`` shows of a version, since its front end started.

    ``inference_count`` counts rows, ``execution_count`` batches; durations are of requests, and
    ``batches`` maps a number of rows to the runs of that size.
    """

    last_inference_ms: int = 0
    inference_count: int = 0
    execution_count: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    batches: dict[int, Duration] = field(default_factory=lambda: defaultdict(Duration))


class Metrics:
    """The registry of one process and its metric families."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gateway_requests_total",
            "Inference requests answered, by HTTP status.",
            (*_LABELS, "code"),
            registry=self.registry,
        )
        self.request_duration = self._histogram(
            "gateway_request_duration_seconds",
            "From the request's headers being read to its answer being encoded.",
            DURATION_BUCKETS_S,
        )
        self.queue_duration = self._histogram(
            "gateway_queue_duration_seconds",
            "From a request's arrival to the begin of its batch's run.",
            DURATION_BUCKETS_S,
        )
        self.compute_duration = self._histogram(
            "gateway_compute_duration_seconds", "Run of a batch in a worker.", DURATION_BUCKETS_S
        )
        self.batch_rows = self._histogram(
            "gateway_batch_size", "Rows of the batches that were run.", BATCH_BUCKETS
        )
        self.queue_depth = Gauge(
            "gateway_queue_depth",
            "Requests that no worker has taken yet.",
            _LABELS,
            registry=self.registry,
        )
        self.by_version = (
            self.request_duration,
            self.queue_duration,
            self.compute_duration,
            self.batch_rows,
            self.queue_depth,
        )
        self.worker_up = Gauge(
            "gateway_worker_up",
            "Whether the worker of an instance is ready.",
            (*_LABELS, "instance"),
            registry=self.registry,
        )
        self.worker_restarts = Counter(
            "gateway_worker_restarts_total",
            "Workers started anew after a death.",
            (*_LABELS, "instance"),
            registry=self.registry,
        )

    def version(self, model: str, version: int) -> VersionMetrics:
        """The metrics of one version."""
        return VersionMetrics(self, model, version)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, _LABELS, buckets=buckets, registry=self.registry)


class VersionMetrics:
    """The metrics of one version of a model.

    After `remove` it goes on counting in `statistics`, and no series of its version is made anew: requests
    that name a version which is unloaded are answered, but not worth a series for ever.
    """

    def __init__(self, metrics: Metrics, model: str, version: int) -> None:
        self._metrics = metrics
        self._labels = labels = (model, str(version))
        self._request = metrics.request_duration.labels(*labels)
        self._queue = metrics.queue_duration.labels(*labels)
        self._compute = metrics.compute_duration.labels(*labels)
        self._rows = metrics.batch_rows.labels(*labels)
        self._depth = metrics.queue_depth.labels(*labels)
        self._codes: dict[int, Counter] = {}
        self._instances: set[int] = set()
        self._is_removed = False
        self.statistics = Statistics()

    def batch(self, rows: int, compute_ns: int) -> None:
        """A batch was run."""
        self._rows.observe(rows)
        self._compute.observe(compute_ns / NS_PER_S)
        self.statistics.execution_count += 1
        self.statistics.batches[rows].add(compute_ns)

    def answered(self, rows: int, total_ns: int, queue_ns: int, compute_ns: int) -> None:
        """A request of `rows` rows was answered with its outputs."""
        self._count(200)
        self._request.observe(total_ns / NS_PER_S)
        self._queue.observe(queue_ns / NS_PER_S)
        statistics = self.statistics
        statistics.last_inference_ms = wall_ms()
        statistics.inference_count += rows
        statistics.success.add(total_ns)
        statistics.queue.add(queue_ns)
        statistics.compute_infer.add(compute_ns)

    def failed(self, code: int, total_ns: int) -> None:
        """A request ended with an error."""
        self._count(code)
        self._request.observe(total_ns / NS_PER_S)
        self.statistics.fail.add(total_ns)

    def queue_depth(self, requests: int) -> None:
        """How many requests wait."""
        self._depth.set(requests)

    def worker(self, instance: int, *, up: bool, restarted: bool = False) -> None:
        """A worker came up or went."""
        if self._is_removed:
            return
        self._instances.add(instance)
        labels = (*self._labels, str(instance))
        self._metrics.worker_up.labels(*labels).set(up)
        restarts = self._metrics.worker_restarts.labels(*labels)
        if restarted:
            restarts.inc()

    def remove(self) -> None:
        """The version is unloaded: take its series out of what is scraped. Again: nothing."""
        if self._is_removed:
            return
        self._is_removed = True
        metrics, labels = self._metrics, self._labels
        for code in self._codes:
            metrics.requests.remove(*labels, str(code))
        for instance in self._instances:
            metrics.worker_up.remove(*labels, str(instance))
            metrics.worker_restarts.remove(*labels, str(instance))
        for family in metrics.by_version:
            family.remove(*labels)

    def _count(self, code: int) -> None:
        counter = self._codes.get(code)
        if counter is None:
            if self._is_removed:
                return
            counter = self._codes[code] = self._metrics.requests.labels(*self._labels, str(code))
        counter.inc()
