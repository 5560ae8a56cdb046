"""From what runs and what is recorded to what is shown."""

from __future__ import annotations

from gateway.control.catalogue import REPOSITORY, Catalogue
from gateway.control.models import ModelSupervision
from gateway.control.version import VersionSupervision
from gateway.control.views import DRAINING, REGISTERED, RETIRED, ModelView, VersionView, WorkerView
from gateway.errors import NotFound
from gateway.rollout.record import Rollout
from gateway.serving.routes import VersionState
from gateway.serving.routing import ModelRoute

_STATES = {VersionState.UNLOADING: DRAINING, VersionState.UNLOADED: RETIRED}


def model_view(model: ModelSupervision, catalogue: Catalogue, rollout: Rollout | None) -> ModelView:
    """A model with all its versions.

    Args:
        model: as it runs.
        catalogue: what is recorded.
        rollout: its active one.
    """
    numbers = set(model.versions) | {record.number for record in catalogue.of(model.name)}
    route = model.route
    by = "policy"
    if model.record.route is not None:
        by = "hand" if rollout is None else "rollout"
    return ModelView(
        name=model.name,
        revision=model.record.revision,
        route=None if route is None else route.to_wire(),
        route_by=by,
        labels=dict(model.record.labels),
        versions=[version_view(model, catalogue, number) for number in sorted(numbers)],
        rollout=None if rollout is None else rollout.id,
    )


def version_view(model: ModelSupervision, catalogue: Catalogue, number: int) -> VersionView:
    """One version, loaded or only recorded. NotFound."""
    running, record = model.versions.get(number), catalogue.get(model.name, number)
    if running is None and record is None:
        raise NotFound(f"model '{model.name}' has no version {number}")
    return VersionView(
        number=number,
        state=REGISTERED if running is None else _STATES.get(running.state, running.state.value),
        reason="" if running is None else running.reason,
        since_s=running.since_s if running is not None else record.registered_s if record else 0.0,
        digest="" if record is None else record.digest,
        nbytes=0 if record is None else record.nbytes,
        source=REPOSITORY if record is None else record.source,
        registered_s=0.0 if record is None else record.registered_s,
        is_wanted=None if record is None else record.is_wanted,
        memory_bytes=0 if running is None else running.memory_bytes,
        traffic_bp=_traffic_bp(model.route, number),
        labels=[label for label, leads_to in model.record.labels.items() if leads_to == number],
        signature=None if running is None or not running.signature else running.signature,
        workers=[] if running is None else _workers(running),
    )


def _traffic_bp(route: ModelRoute | None, number: int) -> int:
    if route is None:
        return 0
    return sum(share.weight_bp for share in route.shares if share.version == number)


def _workers(version: VersionSupervision) -> list[WorkerView]:
    starts = version.worker_starts()
    return [
        WorkerView(
            seat.index,
            seat.instance.device,
            None if seat.child is None else seat.child.pid,
            seat.is_loaded,
            max(0, starts[seat.index] - 1),
        )
        for seat in version.seats
    ]
