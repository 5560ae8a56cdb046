"""What a look at a rollout is told, and what the numbers of its step then say.

Everything here is a function of the record and of what it is given: what the state machine decides by,
without the decisions. Metrics that are not critical never hold a step up nor roll it back; their verdicts
are events.

A metric is waited for only in steps in which it can be measured at all: one that compares needs traffic
on both sides, agreement needs copies. In other steps it still rolls back when it fails (pins bring
requests to a canary without weight).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from gateway.rollout.analysis import Outcome, Verdict, alpha_of, judge_value
from gateway.rollout.observation import Arm, Observation
from gateway.rollout.record import ROUTING, Pause, Rollout
from gateway.rollout.spec import GateSpec, MetricSpec, StepSpec
from gateway.serving.routes import VersionState
from gateway.serving.routing import BASIS_POINTS

_DECIDED = frozenset({Outcome.PASS, Outcome.FAIL})


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is so at a look.

    Attributes:
        now_s: `clock.steady_s`.
        canary: its state, of a load that was begun for this attempt (what failed before `retry` is not
            told again); None: there is no such version. After a restart it is told from the moment on
            that its load has begun: a canary that is gone is rolled back.
        canary_reason: why it is FAILED.
        is_stable_ready: whether the stable version is READY.
        is_settled: the route that follows from the record is published, and acknowledged by every front
            end.
        delta: what was counted since the last look.
        queries: values of the prometheus metrics that were asked for this look; None: no answer.
        gates: what the gates said that were asked for this look; None: no answer. Both belong to the
            record's attempt and step: answers that were asked for in another are dropped by the caller.
    """

    now_s: float
    canary: VersionState | None
    is_stable_ready: bool
    is_settled: bool
    canary_reason: str = ""
    delta: Observation = field(default_factory=Observation)
    queries: Mapping[str, float | None] = field(default_factory=dict)
    gates: Mapping[str, bool | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Note:
    """Something for the log of events: its kind, a line for people, and the numbers that decided it."""

    kind: str
    text: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """A record and what is to be written with it, in one transaction.

    It is the very record that was given where nothing is to be written.
    """

    rollout: Rollout
    notes: tuple[Note, ...] = ()


class Judge(Protocol):
    """`analysis.judge`, its buckets' bounds given beforehand."""

    def __call__(
        self, metric: MetricSpec, seen: Observation, *, alpha: float, minimum: int
    ) -> Verdict:
        """The verdict on what was seen."""


class Standing(enum.Enum):
    """What a step still wants, gates apart."""

    WAITS = enum.auto()  # for time, requests or a verdict
    NO_DATA = enum.auto()  # its time is over, and something that must be measured was not
    DOUBTFUL = enum.auto()  # for nothing but verdicts that were looked for and not found
    MET = enum.auto()


def step_of(rollout: Rollout) -> StepSpec:
    """The step that it is in."""
    return rollout.spec.steps[rollout.step]


def elapsed_s(since_s: float, now_s: float) -> float:
    """Time since then; 0 where the clock was set back behind it before a restart."""
    return max(0.0, now_s - since_s)


def gates_of(rollout: Rollout) -> tuple[GateSpec, ...]:
    """The gates that guard its step."""
    gates = rollout.spec.gates
    return tuple(gate for gate in gates if gate.steps is None or rollout.step in gate.steps)


def struck(rollout: Rollout, name: str, count: int) -> Rollout:
    """The record with this many strikes of that name."""
    if rollout.strikes.get(name, 0) == count:
        return rollout
    strikes = {other: n for other, n in rollout.strikes.items() if other != name}
    return replace(rollout, strikes=strikes | {name: count} if count else strikes)


def counted(rollout: Rollout, delta: Observation) -> Rollout:
    """The record with what was counted since the last look.

    The canary's first requests go to the kill-switch alone; in the looks that brought them, the baseline is
    left out as well. Outputs do not depend on caches: every compared copy counts.
    """
    is_cold = rollout.skipped < rollout.spec.skip_requests
    kept = replace(delta, canary=Arm(), baseline=Arm()) if is_cold else delta
    return replace(
        rollout,
        seen=rollout.seen + kept,
        skipped=rollout.skipped + (delta.canary.requests if is_cold else 0),
        answered=rollout.answered + delta.canary.requests,
        failed=rollout.failed + delta.canary.errors,
    )


def judged(rollout: Rollout, queries: Mapping[str, float | None], judge: Judge) -> Step:
    """The record with the verdicts of this look; a note for each metric that is decided, or otherwise.

    A verdict has the outcome that was noted last in this step as ``decided``: one that is lost for a while
    and comes again is no news. A query that was not asked for this look keeps its verdict.
    """
    alpha, minimum = alpha_of(rollout.spec), step_of(rollout).min_requests
    verdicts, notes = dict(rollout.verdicts), []
    for metric in rollout.spec.metrics:
        if metric.source != "prometheus":
            verdict = judge(metric, rollout.seen, alpha=alpha, minimum=minimum)
        elif metric.name in queries:
            verdict = judge_value(metric, queries[metric.name])
            rollout = _query_strikes(rollout, metric.name, verdict.outcome)
        else:
            continue
        decided = rollout.verdicts.get(metric.name, {}).get("decided")
        is_news = verdict.outcome in _DECIDED and verdict.outcome.value != decided
        if is_news:
            decided = verdict.outcome.value
        verdicts[metric.name] = verdict.to_document() | {"decided": decided}
        if is_news:
            numbers = {"verdicts": {metric.name: verdicts[metric.name]}}
            notes.append(Note("rollout.verdict", verdict.text(), numbers))
    return Step(replace(rollout, verdicts=verdicts), tuple(notes))


def _query_strikes(rollout: Rollout, name: str, outcome: Outcome) -> Rollout:
    """A failed answer ends a row of missing ones; a missing one leaves a row of failures as it is."""
    missing = rollout.strikes.get(f"error:{name}", 0)
    if outcome is Outcome.NO_DATA:
        return struck(rollout, f"error:{name}", missing + 1)
    failures = rollout.strikes.get(f"query:{name}", 0) + 1 if outcome is Outcome.FAIL else 0
    return struck(struck(rollout, f"error:{name}", 0), f"query:{name}", failures)


def outcome_of(rollout: Rollout, metric: MetricSpec) -> Outcome:
    """A metric's last outcome in this step."""
    verdict = rollout.verdicts.get(metric.name)
    return Outcome.NO_DATA if verdict is None else Outcome(verdict["outcome"])


def is_killed(rollout: Rollout) -> bool:
    """Whether so many of the canary's requests failed that no test is waited for."""
    switch = rollout.spec.kill_switch
    if switch is None or rollout.answered < switch.min_requests:
        return False
    return rollout.failed >= switch.error_rate * rollout.answered


def is_overdue(rollout: Rollout, now_s: float) -> bool:
    """Whether the step takes longer than it may; the time that it was PAUSED by hand is not counted."""
    held_s = rollout.held_s
    if rollout.pause is Pause.MANUAL:
        held_s += elapsed_s(rollout.paused_s, now_s)
    spent_s = elapsed_s(rollout.step_started_s, now_s) - held_s
    return spent_s > rollout.spec.progress_deadline_s


def failure(rollout: Rollout, now_s: float) -> str | None:
    """Why a critical metric rolls back: it failed, or has no data and may not be without."""
    limits = rollout.spec.limits
    for metric in rollout.spec.metrics:
        if not metric.critical:
            continue
        match outcome_of(rollout, metric):
            case Outcome.FAIL:
                failures = rollout.strikes.get(f"query:{metric.name}", 0)
                if metric.source != "prometheus" or failures > limits.failures:
                    return str(rollout.verdicts[metric.name]["text"])
            case Outcome.NO_DATA:
                if metric.on_no_data == "fail" and _lacks(rollout, metric, now_s):
                    return _nothing_of(metric)
    return None


def standing(rollout: Rollout, now_s: float) -> tuple[Standing, str]:
    """What the step still wants before its gates are asked, and why where it has NO_DATA."""
    is_waiting = not (_is_time_over(rollout, now_s) and _has_requests(rollout))
    is_doubtful = False
    for metric in rollout.spec.metrics:
        if not metric.critical or not _is_measurable(metric, step_of(rollout)):
            continue
        match outcome_of(rollout, metric):
            case Outcome.NO_DATA if not _lacks(rollout, metric, now_s):
                is_waiting = True
            case Outcome.NO_DATA if metric.on_no_data == "hold":
                return Standing.NO_DATA, _nothing_of(metric)
            case Outcome.FAIL:
                is_waiting = True
            case Outcome.INCONCLUSIVE:
                is_doubtful = True
    if is_waiting:
        return Standing.WAITS, ""
    return Standing.DOUBTFUL if is_doubtful else Standing.MET, ""


def asks(rollout: Rollout, now_s: float) -> tuple[tuple[MetricSpec, ...], tuple[GateSpec, ...]]:
    """The queries and gates that the next look wants answers of.

    Queries in every look; gates only once nothing else keeps the step from its end, so that a webhook is
    called when its answer decides.
    """
    if rollout.state not in ROUTING:
        return (), ()
    queries = tuple(m for m in rollout.spec.metrics if m.source == "prometheus")
    if rollout.pause in (Pause.MANUAL, Pause.INCONCLUSIVE):
        return queries, ()
    is_met = standing(rollout, now_s)[0] is Standing.MET
    return queries, gates_of(rollout) if is_met else ()


def lost(rollout: Rollout, facts: Facts) -> str:
    """Why a canary cannot answer."""
    state = "not there" if facts.canary is None else facts.canary.value
    because = f": {facts.canary_reason}" if facts.canary_reason else ""
    return f"version {rollout.canary} is {state}{because}"


def numbers_of(rollout: Rollout, now_s: float) -> dict[str, Any]:
    """Of a record and its step, for a note: whatever it decides by is among them."""
    numbers: dict[str, Any] = {"attempt": rollout.attempt, "from": rollout.state.value}
    if rollout.step_started_s:
        numbers |= {
            "step": rollout.step,
            "weight_bp": step_of(rollout).weight_bp,
            "elapsed_s": elapsed_s(rollout.step_started_s, now_s),
            "answered": rollout.answered,
            "failed": rollout.failed,
            "compared": rollout.seen.compared,
            "strikes": dict(rollout.strikes),
            "verdicts": {name: dict(verdict) for name, verdict in rollout.verdicts.items()},
        }
    return numbers


def _nothing_of(metric: MetricSpec) -> str:
    return f"{metric.name}: nothing was measured in the step's time"


def _is_time_over(rollout: Rollout, now_s: float) -> bool:
    return elapsed_s(rollout.step_started_s, now_s) >= step_of(rollout).min_duration_s


def _has_requests(rollout: Rollout) -> bool:
    step = step_of(rollout)
    answered = rollout.answered if step.weight_bp else rollout.seen.compared
    return answered >= step.min_requests


def _is_measurable(metric: MetricSpec, step: StepSpec) -> bool:
    match metric.source:
        case "prometheus":
            return True
        case "agreement":
            return step.mirror_percent > 0 and step.weight_bp < BASIS_POINTS
        case _:
            return 0 < step.weight_bp < BASIS_POINTS


def _lacks(rollout: Rollout, metric: MetricSpec, now_s: float) -> bool:
    """Whether a metric without data should have some by now.

    A step without min_duration_s has no time that could be over before its requests have come.
    """
    if not _is_measurable(metric, step_of(rollout)) or not _is_time_over(rollout, now_s):
        return False
    if metric.source == "prometheus":
        return rollout.strikes.get(f"error:{metric.name}", 0) > rollout.spec.limits.errors
    return step_of(rollout).min_duration_s > 0 or _has_requests(rollout)
