"""Prometheus metrics and the Open Inference Protocol's statistics, both read from the ledgers.

Nothing is kept here that is counted per request: front ends and workers count in shared memory
(`gateway.telemetry.ledger`), and a scrape reads it. So every front end and the supervisor show the same
numbers, and they outlive the process that counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString

from gateway.clock import NS_PER_S
from gateway.telemetry.ledger import BATCH_BUCKETS, DURATION_BUCKETS_S, Ledger, Snapshot

OTHER_CODE = "other"
"""The label of HTTP statuses that have no cell of their own."""

_LABELS = ("model", "version")

_SHADOW = {
    "compared": "Copies of other versions' requests whose outputs were compared.",
    "agreed": "Copies whose outputs agreed.",
    "dropped": "Copies that were not sent, as too many were on their way.",
    "failed": "Copies that ended with an error.",
}
"""What is counted of the copies that a version gets as a shadow, and what it means."""

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Duration:
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0


@dataclass(frozen=True, slots=True)
class Statistics:
    """What ``/v2/models/{m}/stats`` shows of a version, since it was loaded.

    ``inference_count`` counts rows, ``execution_count`` batches; durations are of requests, and
    ``batches`` maps a number of rows to the runs of that size (`ledger.MORE_ROWS`: and larger).
    """

    last_inference_ms: int
    inference_count: int
    execution_count: int
    success: Duration
    fail: Duration
    queue: Duration
    compute_infer: Duration
    batches: dict[int, Duration]


class Metrics(Collector):
    """The registry of one process, and the versions that it shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._versions: dict[tuple[str, int], ShownVersion] = {}

    def version(self, model: str, version: int) -> VersionMetrics:
        """The metrics of one version, shown from now on in place of an earlier one's of that name."""
        made = self._versions[model, version] = VersionMetrics(self, model, version)
        return made

    def show(
        self, model: str, version: int, ledger: Ledger, workers: dict[int, bool]
    ) -> ShownVersion:
        """The same for a process that counts nothing and only reads.

        Args:
            model: its name.
            version: its number.
            ledger: the version's; nothing is written to it.
            workers: by instance, whether its worker is ready; the caller keeps it up to date.
        """
        made = self._versions[model, version] = ShownVersion(self, model, version, ledger, workers)
        return made

    def forget(self, version: ShownVersion) -> None:
        """Show it no longer; nothing where it is not shown."""
        key = version.model, version.version
        if self._versions.get(key) is version:
            del self._versions[key]

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Every family, as of now."""
        families = _Families()
        for version in self._versions.values():
            labels = (version.model, str(version.version))
            families.add(labels, version.ledger.read(), version.workers)
        return families.all()


class ShownVersion:
    """The metrics of one version of a model, for whoever looks at them. See `Metrics.show`.

    Attributes:
        ledger: where everybody counts.
        workers: by instance, whether its worker is ready.
    """

    def __init__(
        self,
        metrics: Metrics,
        model: str,
        version: int,
        ledger: Ledger,
        workers: dict[int, bool],
    ) -> None:
        self._metrics = metrics
        self.model = model
        self.version = version
        self.ledger = ledger
        self.workers = workers

    def remove(self) -> None:
        """The version is unloaded: show it no longer. Again: nothing."""
        self._metrics.forget(self)

    @property
    def statistics(self) -> Statistics:
        """The protocol's statistics, as of now."""
        snapshot = self.ledger.read()
        requests, batches = snapshot.requests(), snapshot.batches()
        return Statistics(
            last_inference_ms=requests.last_inference_ms,
            inference_count=requests.rows,
            execution_count=batches.runs,
            success=Duration(requests.succeeded, requests.success_ns),
            fail=Duration(requests.failed, requests.fail_ns),
            queue=Duration(requests.succeeded, requests.queue_ns),
            compute_infer=Duration(requests.succeeded, requests.compute_ns),
            batches={rows: Duration(*runs) for rows, runs in batches.by_rows.items()},
        )


class VersionMetrics(ShownVersion):
    """The same as one front end counts and sees them. See `Metrics.version`.

    Before `attach` there is no ledger to share, and after `remove` none any more: meanwhile it counts in
    private memory.

    Attributes:
        counters: where this front end counts. `attach` and `remove` put another in its place.
        slice_counters: where it counts requests of the version's slice instead, if there is one.
        is_attached: whether the ledger is memory which everybody shares.
    """

    def __init__(self, metrics: Metrics, model: str, version: int) -> None:
        super().__init__(metrics, model, version, Ledger.private(), {})
        self._frontend = 0
        self.is_attached = False
        self.counters = self.ledger.requests(self._frontend)
        self.slice_counters = self.ledger.slice(self._frontend)

    def attach(self, ledger: Ledger, frontend: int) -> None:
        """Count where everybody does from now on, and take there what was counted before.

        Args:
            ledger: the version's.
            frontend: index of this front end, whose sections it writes.
        """
        counters, slice_counters = ledger.requests(frontend), ledger.slice(frontend)
        if not self.is_attached:
            counters.absorb(self.counters)
            slice_counters.absorb(self.slice_counters)
        self.is_attached = True
        self._frontend = frontend
        self.ledger, self.counters, self.slice_counters = ledger, counters, slice_counters

    def answered(self, rows: int, total_ns: int, queue_ns: int, compute_ns: int) -> None:
        """A request of `rows` rows was answered with its outputs."""
        self.counters.answered(rows, total_ns, queue_ns, compute_ns)

    def failed(self, code: int, total_ns: int) -> None:
        """A request ended with an error."""
        self.counters.failed(code, total_ns)

    def queue_depth(self, requests: int) -> None:
        """How many requests wait in this front end."""
        self.counters.waiting = requests

    def worker(self, instance: int, *, up: bool) -> None:
        """A worker came up or went."""
        self.workers[instance] = up

    def remove(self) -> None:
        """The version is unloaded: let go of its ledger, and show it no longer. Again: nothing.

        It goes on counting: requests that name a version which is unloaded are answered, but not worth a
        series for ever.
        """
        super().remove()
        if self.is_attached:
            self.is_attached = False
            self.ledger = self.ledger.copy()
            self.counters = self.ledger.requests(self._frontend)
            self.slice_counters = self.ledger.slice(self._frontend)


class _Families:
    """The metric families of one scrape."""

    def __init__(self) -> None:
        self._requests = CounterMetricFamily(
            "gateway_requests",
            "Inference requests answered, by HTTP status.",
            labels=(*_LABELS, "code"),
        )
        self._request_duration = _histogram(
            "gateway_request_duration_seconds",
            "From the request's headers being read to its answer being encoded.",
        )
        self._queue_duration = _histogram(
            "gateway_queue_duration_seconds",
            "From a request's arrival to the begin of its batch's run.",
        )
        self._compute_duration = _histogram(
            "gateway_compute_duration_seconds", "Run of a batch in a worker."
        )
        self._batch_rows = _histogram("gateway_batch_size", "Rows of the batches that were run.")
        self._copied_rows = CounterMetricFamily(
            "gateway_batch_copied_rows",
            "Rows of batches that were put together from several slots.",
            labels=_LABELS,
        )
        self._held = CounterMetricFamily(
            "gateway_batch_held_seconds",
            "Time that idle workers held batches back for more rows.",
            labels=_LABELS,
        )
        self._queue_depth = GaugeMetricFamily(
            "gateway_queue_depth", "Requests that no worker has taken yet.", labels=_LABELS
        )
        self._worker_up = GaugeMetricFamily(
            "gateway_worker_up",
            "Whether the worker of an instance is ready.",
            labels=(*_LABELS, "instance"),
        )
        self._worker_restarts = CounterMetricFamily(
            "gateway_worker_restarts",
            "Workers started anew after a death.",
            labels=(*_LABELS, "instance"),
        )
        self._shadow = {
            name: CounterMetricFamily(f"gateway_shadow_{name}", text, labels=_LABELS)
            for name, text in _SHADOW.items()
        }

    def add(self, labels: Labels, snapshot: Snapshot, workers: dict[int, bool]) -> None:
        """One version's series; `workers` says which instances are ready."""
        requests, batches = snapshot.requests(), snapshot.batches()
        for code, count in requests.by_code.items():
            self._requests.add_metric((*labels, str(code or OTHER_CODE)), count)
        _observed(
            self._request_duration,
            labels,
            DURATION_BUCKETS_S,
            requests.request_buckets,
            (requests.success_ns + requests.fail_ns) / NS_PER_S,
        )
        for family, buckets, total_ns in (
            (self._queue_duration, requests.queue_buckets, requests.queue_ns),
            (self._compute_duration, batches.run_buckets, batches.run_ns),
        ):
            _observed(family, labels, DURATION_BUCKETS_S, buckets, total_ns / NS_PER_S)
        _observed(self._batch_rows, labels, BATCH_BUCKETS, batches.row_buckets, batches.rows)
        self._copied_rows.add_metric(labels, batches.copied_rows)
        self._held.add_metric(labels, batches.held_ns / NS_PER_S)
        self._queue_depth.add_metric(labels, requests.waiting)
        for instance, is_up in sorted(workers.items()):
            self._worker_up.add_metric((*labels, str(instance)), is_up)
            self._worker_restarts.add_metric(
                (*labels, str(instance)), max(0, snapshot.workers[instance].starts - 1)
            )
        for name, count in (
            ("compared", requests.compared),
            ("agreed", requests.agreed),
            ("dropped", requests.shadow_dropped),
            ("failed", requests.shadow_failed),
        ):
            self._shadow[name].add_metric(labels, count)

    def all(self) -> Iterator[Metric]:
        """Each with its samples, in the order in which they are shown."""
        yield from (
            self._requests,
            self._request_duration,
            self._queue_duration,
            self._compute_duration,
            self._batch_rows,
            self._copied_rows,
            self._held,
            self._queue_depth,
            self._worker_up,
            self._worker_restarts,
            *self._shadow.values(),
        )


def _histogram(name: str, text: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, text, labels=_LABELS)


def _observed(
    family: HistogramMetricFamily,
    labels: Labels,
    bounds: Sequence[float],
    counts: Sequence[int],
    total: float,
) -> None:
    """Add a histogram whose last count is of what exceeds every bound."""
    names = map(floatToGoString, (*bounds, INF))
    family.add_metric(labels, list(zip(names, accumulate(counts), strict=True)), total)
