"""What versions have counted, read from their ledgers: now, and since the last look at a rollout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gateway._kernels.ledger import CODES
from gateway.control.version import VersionSupervision
from gateway.control.views import VersionSample
from gateway.rollout.observation import Arm, Observation, Sketch
from gateway.telemetry.ledger import Ledger, RequestTotals

_ERRORS = frozenset(code for code in CODES if code >= 500)
_REFUSALS = frozenset(code for code in CODES if 400 <= code < 500) - {429, 499}
_UNANSWERED = frozenset({499})


@dataclass(frozen=True, slots=True)
class _Reading:
    """One version's counters at one moment."""

    ledger: Ledger
    whole: Arm
    slice: Arm
    compared: int
    agreed: int


class Counting:
    """What was counted of two versions between looks. One for each attempt of a rollout."""

    def __init__(self) -> None:
        self._last: dict[int, _Reading] = {}
        self._before: dict[int, _Reading] = {}

    def since_last(
        self, canary: VersionSupervision | None, stable: VersionSupervision | None, *, sliced: bool
    ) -> Observation:
        """What was counted since the last call; nothing at the first, and where a version was reloaded.

        Args:
            canary: the new version.
            stable: what it is compared with.
            sliced: compared is only the slice of the stable version.
        """
        self._before = dict(self._last)
        old_canary, new_canary = self._read(canary)
        old_stable, new_stable = self._read(stable)
        arm, compared, agreed = Arm(), 0, 0
        if old_canary is not None and new_canary is not None:
            arm = _less(new_canary.whole, old_canary.whole)
            compared = new_canary.compared - old_canary.compared
            agreed = new_canary.agreed - old_canary.agreed
        baseline = Arm()
        if old_stable is not None and new_stable is not None:
            if sliced:
                baseline = _less(new_stable.slice, old_stable.slice)
            else:
                baseline = _less(new_stable.whole, old_stable.whole)
        return Observation(arm, baseline, compared, agreed)

    def undo(self) -> None:
        """Nothing came of what the last call gave: the next one gives it again."""
        self._last = self._before

    def _read(self, version: VersionSupervision | None) -> tuple[_Reading | None, _Reading | None]:
        """The reading before and the one of now, of the same ledger."""
        if version is None:
            return None, None
        old, new = self._last.get(version.number), _reading(version.ledger)
        self._last[version.number] = new
        return (old if old is not None and old.ledger is new.ledger else None), new


def sample(version: VersionSupervision) -> VersionSample:
    """A version's counters now."""
    snapshot, sketches = version.ledger.read(), version.ledger.sketches()
    requests, batches = snapshot.requests(), snapshot.batches()
    return VersionSample(
        model=version.model,
        number=version.number,
        requests=_count(requests, frozenset(CODES) - _UNANSWERED),
        errors=_count(requests, _ERRORS),
        rows=requests.rows,
        batches=batches.runs,
        queue_depth=requests.waiting,
        latency=sketches.latency,
        batch_rows=batches.row_buckets,
    )


def _reading(ledger: Ledger) -> _Reading:
    snapshot, sketches = ledger.read(), ledger.sketches()
    requests = snapshot.requests()
    return _Reading(
        ledger,
        _arm(requests, sketches.latency, sketches.compute),
        # Runs are a worker's, which does not know of slices: any of the version's will do.
        _arm(snapshot.slices(), sketches.slice_latency, sketches.compute),
        requests.compared,
        requests.agreed,
    )


def _arm(requests: RequestTotals, latency: Sketch, compute: Mapping[int, Sketch]) -> Arm:
    return Arm(
        _count(requests, frozenset(CODES) - _UNANSWERED),
        _count(requests, _ERRORS),
        _count(requests, _REFUSALS),
        latency,
        compute,
    )


def _count(requests: RequestTotals, codes: frozenset[int]) -> int:
    return sum(n for code, n in requests.by_code.items() if code in codes)


def _less(new: Arm, old: Arm) -> Arm:
    """Counters only grow, so that no difference is negative."""
    compute = {
        rows: sketch
        for rows, runs in new.compute.items()
        if (sketch := _fewer(runs, old.compute.get(rows, {})))
    }
    return Arm(
        new.requests - old.requests,
        new.errors - old.errors,
        new.refusals - old.refusals,
        _fewer(new.latency, old.latency),
        compute,
    )


def _fewer(new: Sketch, old: Sketch) -> dict[int, int]:
    less = {bucket: count - old.get(bucket, 0) for bucket, count in new.items()}
    return {bucket: count for bucket, count in less.items() if count}
