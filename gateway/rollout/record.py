"""A rollout as it is written to the store, and what follows from it.

The record is all there is: it is replaced, never changed, and written before anything acts on it. What
traffic does and which versions are loaded are functions of it, so that after a crash the same things are
done again, and doing them twice does no harm.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.rollout.observation import Observation
from gateway.rollout.spec import RolloutSpec
from gateway.serving.routing import BASIS_POINTS, ModelRoute, Pin, Shadow, Share, Sticky


class RolloutState(enum.Enum):
    """Where a rollout is. The last three are its ends."""

    PENDING = "PENDING"
    LOADING = "LOADING"
    WARMING = "WARMING"
    STEPPING = "STEPPING"
    PAUSED = "PAUSED"
    PROMOTING = "PROMOTING"
    ABORTING = "ABORTING"
    SUCCEEDED = "SUCCEEDED"
    ABORTED = "ABORTED"
    FAILED = "FAILED"  # the canary could not be loaded


ENDS = frozenset({RolloutState.SUCCEEDED, RolloutState.ABORTED, RolloutState.FAILED})

ROUTING = frozenset({RolloutState.STEPPING, RolloutState.PAUSED})
"""States in which the canary gets what its step says."""


class Pause(enum.Enum):
    """Why a rollout is PAUSED. ``MANUAL`` and ``INCONCLUSIVE`` need a person, the others end alone."""

    MANUAL = "manual"
    GATE = "gate"
    INCONCLUSIVE = "inconclusive"
    NO_DATA = "no_data"


@dataclass(frozen=True, slots=True)
class Rollout:
    """One rollout. Times are `clock.steady_s`: of the wall clock, but for its jumps.

    Attributes:
        id: unique, made at its creation.
        model: its name.
        spec: as it was asked for, with ``stable`` filled in.
        salt: of the hash that spreads keys; the same for all attempts.
        state: where it is.
        pause: why it is PAUSED; None in any other state.
        step: the one that it is in, from 0.
        attempt: from 1; `retry` begins the next.
        created_s: when it was created.
        changed_s: when its state or step last changed.
        step_started_s: when the step began; 0 before the first.
        held_s: time of the step that it was PAUSED by hand, but for the current pause.
        paused_s: when the current pause began; 0 without one.
        is_released: somebody has resumed this step's ``pause``.
        seen: what was measured in this step.
        skipped: first requests of the canary, in this attempt, that ``seen`` leaves out.
        answered: requests of the canary in this step, those left out as well.
        failed: of them, those that failed with 500 and above.
        strikes: looks in a row without success, by what was looked at (``query:NAME``, ``gate:NAME``,
            ``error:NAME``, ``inconclusive``).
        verdicts: by metric, the last verdict with its numbers (`analysis.Verdict.to_document`), and as
            ``decided`` the outcome that the log of events had last in this step.
        reason: why it is PAUSED, ended or ending, in words.
    """

    id: str
    model: str
    spec: RolloutSpec
    salt: str
    created_s: float
    changed_s: float
    state: RolloutState = RolloutState.PENDING
    pause: Pause | None = None
    step: int = 0
    attempt: int = 1
    step_started_s: float = 0.0
    held_s: float = 0.0
    paused_s: float = 0.0
    is_released: bool = False
    seen: Observation = field(default_factory=Observation)
    skipped: int = 0
    answered: int = 0
    failed: int = 0
    strikes: Mapping[str, int] = field(default_factory=dict)
    verdicts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reason: str = ""

    @property
    def is_active(self) -> bool:
        """Whether it has not ended."""
        return self.state not in ENDS

    @property
    def stable(self) -> int:
        """The version that is to be replaced."""
        if self.spec.stable is None:
            raise ValueError("a rollout's spec names its stable version")
        return self.spec.stable

    @property
    def canary(self) -> int:
        """The new version."""
        return self.spec.canary

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return {
            **plain,
            "spec": self.spec.model_dump(mode="json"),
            "state": self.state.value,
            "pause": None if self.pause is None else self.pause.value,
            "seen": self.seen.to_document(),
            "strikes": dict(self.strikes),
            "verdicts": {name: dict(verdict) for name, verdict in self.verdicts.items()},
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Rollout:
        """The inverse of `to_document`."""
        pause = document["pause"]
        return cls(
            **{name: document[name] for name in _PLAIN},
            spec=RolloutSpec.model_validate(document["spec"]),
            state=RolloutState(document["state"]),
            pause=None if pause is None else Pause(pause),
            seen=Observation.from_document(document["seen"]),
            strikes=document["strikes"],
            verdicts=document["verdicts"],
        )


_PLAIN = (
    "id",
    "model",
    "salt",
    "created_s",
    "changed_s",
    "step",
    "attempt",
    "step_started_s",
    "held_s",
    "paused_s",
    "is_released",
    "skipped",
    "answered",
    "failed",
    "reason",
)


def route_of(rollout: Rollout) -> ModelRoute:
    """Who answers the model's requests while a rollout is as it is: the stable version, but for a step."""
    match rollout.state:
        case RolloutState.PROMOTING | RolloutState.SUCCEEDED:
            return ModelRoute.to(rollout.canary)
        case state if state not in ROUTING:
            return ModelRoute.to(rollout.stable)
    spec, step = rollout.spec, rollout.spec.steps[rollout.step]
    sticky = spec.sticky
    to = {"canary": rollout.canary, "stable": rollout.stable}
    return ModelRoute(
        shares=_shares(rollout, step.weight_bp),
        salt=rollout.salt if sticky is None or sticky.salt is None else sticky.salt,
        sticky=None if sticky is None else Sticky(sticky.kind, sticky.name),
        pins=tuple(Pin(pin.header.lower(), pin.value, to[pin.to]) for pin in spec.match),
        shadow=_shadow(rollout, round(step.mirror_percent * BASIS_POINTS / 100)),
    )


def _shares(rollout: Rollout, weight_bp: int) -> tuple[Share, ...]:
    """The canary's share, then where it is asked for as much of the stable version's, then the rest."""
    slice_bp = min(weight_bp, BASIS_POINTS - weight_bp)
    if rollout.spec.baseline != "equal_slice":
        slice_bp = 0
    shares = (
        Share(rollout.canary, weight_bp),
        Share(rollout.stable, slice_bp, is_slice=True),
        Share(rollout.stable, BASIS_POINTS - weight_bp - slice_bp),
    )
    return tuple(share for share in shares if share.weight_bp)


def _shadow(rollout: Rollout, share_bp: int) -> Shadow | None:
    if not share_bp:
        return None
    agreement = rollout.spec.agreement
    if agreement is None:
        return Shadow(rollout.canary, share_bp)
    return Shadow(rollout.canary, share_bp, agreement.compare, agreement.tolerance)
