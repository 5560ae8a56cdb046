"""What was measured of a canary and of what it is compared with, since a step's begin.

Plain numbers that can be written to the store and read again: a rollout goes on with them after a crash.
Durations are *sketches*: how many fell into each bucket of `gateway.telemetry.ledger`, whose bounds are
3 % apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Sketch = Mapping[int, int]
"""Counts by number of bucket; buckets without any are left out."""


@dataclass(frozen=True, slots=True)
class Arm:
    """What one side answered.

    Attributes:
        requests: all that were answered, or failed.
        errors: of those, with a status of 500 and above.
        refusals: of those, with 400 to 499 but 429 (queue full) and 499 (client gone).
        latency: durations of requests that were answered with outputs, by bucket.
        compute: durations of runs, by class of rows (`ledger.rows_class`), then by bucket.
    """

    requests: int = 0
    errors: int = 0
    refusals: int = 0
    latency: Sketch = field(default_factory=dict)
    compute: Mapping[int, Sketch] = field(default_factory=dict)

    def __add__(self, more: Arm) -> Arm:
        classes = self.compute.keys() | more.compute.keys()
        return Arm(
            self.requests + more.requests,
            self.errors + more.errors,
            self.refusals + more.refusals,
            _added(self.latency, more.latency),
            {
                rows: _added(self.compute.get(rows, {}), more.compute.get(rows, {}))
                for rows in sorted(classes)
            },
        )

    def to_document(self) -> dict[str, Any]:
        """For JSON, whose keys are text."""
        return {
            "requests": self.requests,
            "errors": self.errors,
            "refusals": self.refusals,
            "latency": _document(self.latency),
            "compute": {str(rows): _document(sketch) for rows, sketch in self.compute.items()},
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Arm:
        """The inverse of `to_document`."""
        return cls(
            document["requests"],
            document["errors"],
            document["refusals"],
            _sketch(document["latency"]),
            {int(rows): _sketch(sketch) for rows, sketch in document["compute"].items()},
        )


@dataclass(frozen=True, slots=True)
class Observation:
    """Both arms, and what mirroring gave: copies that were compared, and those whose outputs agreed."""

    canary: Arm = field(default_factory=Arm)
    baseline: Arm = field(default_factory=Arm)
    compared: int = 0
    agreed: int = 0

    def __add__(self, more: Observation) -> Observation:
        return Observation(
            self.canary + more.canary,
            self.baseline + more.baseline,
            self.compared + more.compared,
            self.agreed + more.agreed,
        )

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "canary": self.canary.to_document(),
            "baseline": self.baseline.to_document(),
            "compared": self.compared,
            "agreed": self.agreed,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Observation:
        """The inverse of `to_document`."""
        return cls(
            Arm.from_document(document["canary"]),
            Arm.from_document(document["baseline"]),
            document["compared"],
            document["agreed"],
        )


def _added(a: Sketch, b: Sketch) -> dict[int, int]:
    total = dict(a)
    for bucket, count in b.items():
        total[bucket] = total.get(bucket, 0) + count
    return total


def _document(sketch: Sketch) -> dict[str, int]:
    return {str(bucket): count for bucket, count in sketch.items()}


def _sketch(document: Mapping[str, int]) -> dict[int, int]:
    return {int(bucket): count for bucket, count in document.items()}
