"""What the admin plane shows of models, versions, workers and rollouts, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

REGISTERED, DRAINING, RETIRED = "REGISTERED", "DRAINING", "RETIRED"
"""States of versions that front ends have other words for, or none."""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One instance: ``pid`` is None while there is no process."""

    instance: int
    device: str
    pid: int | None
    is_ready: bool
    restarts: int


@dataclass(frozen=True, slots=True)
class VersionView:
    """A version.

    Attributes:
        number: its own.
        state: REGISTERED, LOADING, WARMING, READY, DRAINING, RETIRED or FAILED.
        reason: why it is FAILED.
        since_s: when it came into this state, wall clock.
        digest: SHA-256 of its file in hex; empty until it is known.
        nbytes: of its file.
        source: where it came from.
        registered_s: when.
        is_wanted: see `store.records.VersionRecord`.
        memory_bytes: what its workers take together.
        traffic_bp: its part of the model's requests.
        labels: that lead to it.
        signature: what it takes and gives (`Signature.to_wire`); None until it was READY once.
        workers: its instances.
    """

    number: int
    state: str
    reason: str
    since_s: float
    digest: str
    nbytes: int
    source: str
    registered_s: float
    is_wanted: bool | None
    memory_bytes: int
    traffic_bp: int
    labels: Sequence[str]
    signature: Mapping[str, Any] | None
    workers: Sequence[WorkerView]


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model. ``route`` is `ModelRoute.to_wire`, None while nothing can answer.

    ``route_by`` says who decided it: ``policy``, ``hand`` or ``rollout``.
    """

    name: str
    revision: int
    route: Mapping[str, Any] | None
    route_by: str
    labels: Mapping[str, int]
    versions: Sequence[VersionView]
    rollout: str | None
    """The id of the rollout that is active."""


@dataclass(frozen=True, slots=True)
class VersionSample:
    """A version's counters at one moment, since it was loaded; rates are differences of two samples.

    ``latency`` and ``batch_rows`` are histograms (`ledger` bounds); times in ns.
    """

    model: str
    number: int
    requests: int
    errors: int
    rows: int
    batches: int
    queue_depth: int
    latency: Mapping[int, int]
    batch_rows: Sequence[int]
