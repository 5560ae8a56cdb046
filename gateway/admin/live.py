"""The live page's documents: what is served now, and rates as differences of counters."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from gateway.clock import NS_PER_MS
from gateway.control.views import VersionSample
from gateway.errors import NotFound
from gateway.telemetry.ledger import SKETCH_BOUNDS_NS

if TYPE_CHECKING:
    from gateway.control.plane import ControlPlane

WINDOW_S = 3.0
"""Time that rates and quantiles are of; a listener sees a change within a second all the same."""

FRESH_S = 0.9
"""Time for which one look at the counters serves all listeners."""

Samples = Mapping[tuple[str, int], VersionSample]


@dataclass(frozen=True, slots=True)
class _Look:
    at_s: float
    samples: Samples


class LiveFeed:
    """Looks at the counters while somebody listens, at most once in `FRESH_S`.

    Args:
        plane: has them.
        now_s: a clock that only goes on.
        wall_s: the clock that the times of rollouts are of.
    """

    def __init__(
        self, plane: ControlPlane, now_s: Callable[[], float], wall_s: Callable[[], float]
    ) -> None:
        self._plane = plane
        self._now_s = now_s
        self._wall_s = wall_s
        self._looks: deque[_Look] = deque()
        self._document: dict[str, Any] = {}
        self._lock = asyncio.Lock()  # of several listeners in one moment, one looks

    async def document(self, may_see: Callable[[str], bool]) -> dict[str, Any]:
        """The newest document, with the models that somebody may see."""
        async with self._lock:
            if not self._looks or self._now_s() - self._looks[-1].at_s >= FRESH_S:
                self._document = await self._look()
            whole = self._document
        return {
            "at_s": whole["at_s"],
            "models": [model for model in whole["models"] if may_see(model.name)],
            "rollouts": [each for each in whole["rollouts"] if may_see(each["model"])],
            "samples": [each for each in whole["samples"] if may_see(each["model"])],
        }

    async def _look(self) -> dict[str, Any]:
        plane = self._plane
        now_s = self._now_s()
        samples = {(sample.model, sample.number): sample for sample in plane.samples()}
        self._looks.append(_Look(now_s, samples))
        while now_s - self._looks[0].at_s > WINDOW_S + FRESH_S:
            self._looks.popleft()
        first = self._looks[0]
        models = plane.registry.models()
        return {
            "at_s": self._wall_s(),
            "models": models,
            "rollouts": [
                document
                for model in models
                if model.rollout is not None
                and (document := await self._rollout(model.name, model.rollout)) is not None
            ],
            "samples": [
                sample_document(sample, first.samples.get(key), now_s - first.at_s)
                for key, sample in samples.items()
            ],
        }

    async def _rollout(self, model: str, id_: str) -> dict[str, Any] | None:
        try:
            return (await self._plane.rollout(model, id_)).to_document()
        except NotFound:  # it went with its model a moment ago
            return None


def sample_document(
    now: VersionSample, before: VersionSample | None, elapsed_s: float
) -> dict[str, Any]:
    """A version's counters, and what they say of the time since an earlier sample.

    Args:
        now: the newest sample.
        before: an earlier one; None, or one with greater counters: the version has begun since.
        elapsed_s: between the two.
    """
    if before is None or before.requests > now.requests or before.batches > now.batches:
        before = None
    per_s = 1 / elapsed_s if before is not None and elapsed_s > 0 else 0.0
    base = now if before is None else before  # no rates without two looks
    latency = _grown(now.latency, base.latency)
    rows = zip(now.batch_rows, base.batch_rows, strict=True)
    return {
        "model": now.model,
        "number": now.number,
        "requests": now.requests,
        "errors": now.errors,
        "rows": now.rows,
        "batches": now.batches,
        "queue_depth": now.queue_depth,
        "requests_per_s": (now.requests - base.requests) * per_s,
        "errors_per_s": (now.errors - base.errors) * per_s,
        "p50_ms": quantile_ms(latency, 0.5),
        "p99_ms": quantile_ms(latency, 0.99),
        "batch_rows": [count - earlier for count, earlier in rows],
    }


def quantile_ms(sketch: Mapping[int, int], quantile: float) -> float | None:
    """A quantile of a sketch of durations: the upper bound of its bucket; None where it is empty."""
    buckets = sorted(sketch)
    counts = list(accumulate(sketch[bucket] for bucket in buckets))
    if not counts:
        return None
    bucket = buckets[bisect_left(counts, quantile * counts[-1])]
    return SKETCH_BOUNDS_NS[min(bucket, len(SKETCH_BOUNDS_NS) - 1)] / NS_PER_MS


def _grown(now: Mapping[int, int], before: Mapping[int, int]) -> dict[int, int]:
    grown = {bucket: count - before.get(bucket, 0) for bucket, count in now.items()}
    return {bucket: count for bucket, count in grown.items() if count > 0}
