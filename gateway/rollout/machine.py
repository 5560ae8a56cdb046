"""The states of a rollout: what moves it from one to the next, by itself and by hand.

Level-triggered: a look decides by the record and by what is so now, never by what happened since, so that
a supervisor that died at any point goes on by looking again. The record that comes out is written before
anything acts on it.

- A canary that is judged worse rolls back while STEPPING and PAUSED, one that is gone also while PROMOTING.
  One that cannot be loaded FAILs the rollout: clients have not met it.
- No step ends while one of the two versions is not READY: there would be nothing to compare.
- A step's own ``pause`` comes last, so that who resumes it knows what metrics and gates say. The gates are
  then asked once more.
- Everything until SUCCEEDED can be aborted. An aborted rollout waits for `retry`; nothing retries by itself.

Rejected: events as input (a lost or repeated one would need care everywhere), and letting a pause stop the
judging (a canary that begins to fail during a night's pause must go).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from gateway.errors import Conflict
from gateway.rollout.facts import (
    Facts,
    Judge,
    Note,
    Standing,
    Step,
    counted,
    elapsed_s,
    failure,
    gates_of,
    is_killed,
    is_overdue,
    judged,
    lost,
    numbers_of,
    standing,
    step_of,
    struck,
)
from gateway.rollout.observation import Observation
from gateway.rollout.record import ROUTING, Pause, Rollout, RolloutState
from gateway.serving.routes import VersionState

Verb = Literal["pause", "resume", "promote", "promote_full", "abort", "retry"]

MOVES: Mapping[RolloutState, frozenset[RolloutState]] = {
    state: frozenset(RolloutState[name] for name in names.split())
    for state, names in {
        RolloutState.PENDING: "LOADING WARMING STEPPING FAILED ABORTING",
        RolloutState.LOADING: "WARMING STEPPING FAILED ABORTING",
        RolloutState.WARMING: "STEPPING FAILED ABORTING",
        RolloutState.STEPPING: "STEPPING PAUSED PROMOTING ABORTING",
        RolloutState.PAUSED: "STEPPING PAUSED PROMOTING ABORTING",
        RolloutState.PROMOTING: "SUCCEEDED ABORTING",
        RolloutState.ABORTING: "ABORTED",
        RolloutState.SUCCEEDED: "",
        RolloutState.ABORTED: "PENDING",
        RolloutState.FAILED: "PENDING",
    }.items()
}
"""STEPPING to itself is the next step, PAUSED to itself another reason."""

_GONE = frozenset({None, VersionState.FAILED, VersionState.UNLOADING, VersionState.UNLOADED})

_ACTS: Mapping[Verb, frozenset[RolloutState]] = {
    "pause": ROUTING,
    "resume": ROUTING,
    "promote": ROUTING,
    "promote_full": ROUTING,
    "abort": frozenset(s for s in RolloutState if RolloutState.ABORTING in MOVES[s]),
    "retry": frozenset({RolloutState.ABORTED, RolloutState.FAILED}),
}
"""States in which a verb makes sense."""

_DONE: Mapping[Verb, frozenset[RolloutState]] = {
    "promote": frozenset({RolloutState.PROMOTING}),
    "promote_full": frozenset({RolloutState.PROMOTING}),
    "abort": frozenset({RolloutState.ABORTING, RolloutState.ABORTED}),
}
"""States in which what a verb asks for is so already."""

_STEP_PAUSE = "the step is over and waits to be resumed"
"""The reason that tells a step's own pause, which `resume` releases, from one by hand, which leaves it."""

_OF_STEP: Mapping[str, Any] = {
    "held_s": 0.0,
    "is_released": False,
    "seen": Observation(),
    "answered": 0,
    "failed": 0,
    "strikes": {},
    "verdicts": {},
}
"""What a step begins with."""


def wants_canary(rollout: Rollout, now_s: float) -> bool:
    """Whether the canary must be loaded now: for a while after a roll-back too, so that a retry is quick."""
    match rollout.state:
        case RolloutState.ABORTED:
            return elapsed_s(rollout.changed_s, now_s) < rollout.spec.abort_keep_warm_s
        case state:
            return state is not RolloutState.FAILED


class RolloutMachine:
    """What is next. It has no state of its own; ``judge`` is `analysis.judge` with its bounds."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def advance(self, rollout: Rollout, facts: Facts) -> Step:
        """One look: at most one move.

        Gives the very record that it was given when nothing changed: there is nothing to write then.
        """
        if not rollout.is_active:
            return Step(rollout)
        step = self._advance(Step(_in_time(rollout, facts.now_s)), facts)
        return step if step.rollout != rollout else Step(rollout)

    def command(self, rollout: Rollout, verb: Verb, now_s: float, actor: str) -> Step:
        """What somebody asks for.

        ``promote`` goes on to the next step whatever this one still wants, ``promote_full`` past all of
        them. ``resume`` ends a pause by hand, a step's own, or one for want of a verdict. ``retry`` begins
        again with the same salt. A verb whose end is reached already changes nothing.

        Raises:
            Conflict: the verb makes no sense in this state.
        """
        if rollout.state in _DONE.get(verb, ()):
            return Step(rollout)
        acts = _ACTS[verb]
        if rollout.state not in acts:
            states = ", ".join(state.value for state in RolloutState if state in acts)
            raise Conflict(f"{verb} is for a rollout that is {states}; it is {rollout.state.value}")
        step = Step(_in_time(rollout, now_s))
        match verb:
            case "pause" if rollout.pause is Pause.MANUAL:
                return Step(rollout)
            case "resume" if rollout.pause is None:
                return Step(rollout)
            case "pause":
                return self._pause(step, now_s, Pause.MANUAL, f"paused by {actor}")
            case "resume":
                return self._resume(step, now_s, actor)
            case "promote":
                return self._next(step, now_s, f"promoted by {actor}")
            case "promote_full":
                return self._promote(step, now_s, f"promoted fully by {actor}")
            case "abort":
                return self._abort(step, now_s, f"aborted by {actor}")
            case "retry":
                return self._retry(step, now_s, actor)

    def _advance(self, step: Step, facts: Facts) -> Step:
        match step.rollout.state:
            case RolloutState.PENDING | RolloutState.LOADING | RolloutState.WARMING:
                return self._load(step, facts)
            case RolloutState.STEPPING | RolloutState.PAUSED:
                return self._look(step, facts)
            case RolloutState.PROMOTING if facts.canary in _GONE:
                return self._abort(step, facts.now_s, lost(step.rollout, facts))
            case RolloutState.PROMOTING if facts.is_settled and _is_ready(facts):
                return self._end(step, facts.now_s, RolloutState.SUCCEEDED, step.rollout.canary)
            case RolloutState.ABORTING if facts.is_settled:
                return self._end(step, facts.now_s, RolloutState.ABORTED, step.rollout.stable)
        return step

    def _load(self, step: Step, facts: Facts) -> Step:
        """Until both versions are READY; nothing changes for clients before that."""
        rollout, now_s = step.rollout, facts.now_s
        if facts.canary is VersionState.FAILED:
            reason = lost(rollout, facts)
            return self._move(step, now_s, RolloutState.FAILED, "rollout.failed", reason)
        if _is_ready(facts) and facts.is_stable_ready:
            return self._begin(step, now_s, 0, f"version {rollout.canary} is READY")
        to = RolloutState.LOADING
        if facts.canary in (VersionState.WARMING, VersionState.READY):
            to = RolloutState.WARMING
        if to not in MOVES[rollout.state]:
            return step  # it is so already, or a load that goes back is waited for where it was
        text = f"version {rollout.canary} is {to.value}"
        if _is_ready(facts):
            text = f"version {rollout.canary} waits until version {rollout.stable} is READY"
        return self._move(step, now_s, to, "rollout.state", text)

    def _look(self, step: Step, facts: Facts) -> Step:
        """Count, judge, roll back if anything says so; else see whether the step is over."""
        now_s = facts.now_s
        step = judged(counted(step.rollout, facts.delta), facts.queries, self._judge)
        rollout = step.rollout
        if facts.canary in _GONE:
            return self._abort(step, now_s, lost(rollout, facts))
        if is_killed(rollout):
            text = f"{rollout.failed} of {rollout.answered} requests of the canary failed"
            killed = Note("rollout.killed", text, numbers_of(rollout, now_s))
            return self._abort(replace(step, notes=(*step.notes, killed)), now_s, text)
        if (why := failure(rollout, now_s)) is not None:
            return self._abort(step, now_s, why)
        if is_overdue(rollout, now_s):
            limit_s = rollout.spec.progress_deadline_s
            text = f"step {rollout.step + 1} has not ended within {limit_s:g} s"
            return self._abort(step, now_s, text)
        if rollout.pause in (Pause.MANUAL, Pause.INCONCLUSIVE):
            return step
        if not (_is_ready(facts) and facts.is_stable_ready):
            return step
        return self._go_on(step, facts)

    def _go_on(self, step: Step, facts: Facts) -> Step:
        """What the step's standing says: wait, pause, or let the gates decide."""
        rollout, now_s = step.rollout, facts.now_s
        stands, why = standing(rollout, now_s)
        doubts = rollout.strikes.get("inconclusive", 0)
        limit = rollout.spec.limits.inconclusive
        if stands is not Standing.DOUBTFUL or limit is None:
            doubts = 0
        elif facts.delta.canary.requests or facts.delta.compared:
            doubts += 1  # a look at the same numbers says the same
        step = replace(step, rollout=struck(rollout, "inconclusive", doubts))
        match stands:
            case Standing.NO_DATA:
                return self._pause(step, now_s, Pause.NO_DATA, why)
            case Standing.DOUBTFUL if limit is not None and doubts > limit:
                text = f"no verdict in more than {limit} looks"
                return self._pause(step, now_s, Pause.INCONCLUSIVE, text)
            case Standing.MET:
                return self._ask(step, facts)
        return self._continue(step, now_s)

    def _ask(self, step: Step, facts: Facts) -> Step:
        """Everything else is met: the gates decide, by their answers in this look."""
        rollout, now_s = step.rollout, facts.now_s
        gates, limit = gates_of(rollout), rollout.spec.limits.errors
        answers = {gate.name: facts.gates[gate.name] for gate in gates if gate.name in facts.gates}
        for name, answer in answers.items():
            before = rollout.strikes.get(f"gate:{name}", 0)
            rollout = struck(rollout, f"gate:{name}", before + 1 if answer is None else 0)
        step = replace(step, rollout=rollout)
        for name, answer in answers.items():
            if answer is False:
                return self._pause(step, now_s, Pause.GATE, f"gate {name} does not agree")
        for name in answers:
            if rollout.strikes.get(f"gate:{name}", 0) > limit:
                text = f"gate {name} gave no answer more than {limit} times in a row"
                return self._pause(step, now_s, Pause.GATE, text)
        if len(answers) < len(gates) or not all(answers.values()):
            return step if rollout.pause is Pause.GATE else self._continue(step, now_s)
        if step_of(rollout).pause and not rollout.is_released:
            return self._pause(step, now_s, Pause.MANUAL, _STEP_PAUSE)
        return self._next(step, now_s, f"step {rollout.step + 1} is over")

    def _pause(self, step: Step, now_s: float, pause: Pause, why: str) -> Step:
        if step.rollout.pause is pause and step.rollout.reason == why:
            return step
        return self._move(step, now_s, RolloutState.PAUSED, "rollout.paused", why, pause=pause)

    def _continue(self, step: Step, now_s: float) -> Step:
        """End a pause whose reason is gone."""
        if step.rollout.pause is None:
            return step
        text = f"goes on: {step.rollout.pause.value} no longer"
        return self._move(step, now_s, RolloutState.STEPPING, "rollout.resumed", text, reason="")

    def _resume(self, step: Step, now_s: float, actor: str) -> Step:
        rollout = step.rollout
        if rollout.pause in (Pause.GATE, Pause.NO_DATA):
            raise Conflict("it goes on by itself when that ends which it waits for; or promote it")
        is_released = rollout.is_released or rollout.reason == _STEP_PAUSE
        step = replace(step, rollout=struck(rollout, "inconclusive", 0))
        return self._move(
            step,
            now_s,
            RolloutState.STEPPING,
            "rollout.resumed",
            f"resumed by {actor}",
            reason="",
            is_released=is_released,
        )

    def _next(self, step: Step, now_s: float, why: str) -> Step:
        """The step after this one; after the last, the canary gets everything."""
        following = step.rollout.step + 1
        if following == len(step.rollout.spec.steps):
            return self._promote(step, now_s, why)
        return self._begin(step, now_s, following, why)

    def _begin(self, step: Step, now_s: float, number: int, why: str) -> Step:
        steps = step.rollout.spec.steps
        share = steps[number].weight_bp / 100
        return self._move(
            step,
            now_s,
            RolloutState.STEPPING,
            "rollout.step",
            f"{why}: step {number + 1} of {len(steps)}, {share:g} % to the canary",
            reason="",
            step=number,
            step_started_s=now_s,
            **_OF_STEP,
        )

    def _promote(self, step: Step, now_s: float, why: str) -> Step:
        return self._move(step, now_s, RolloutState.PROMOTING, "rollout.promoting", why)

    def _abort(self, step: Step, now_s: float, why: str) -> Step:
        text = f"rolling back: {why}"
        return self._move(step, now_s, RolloutState.ABORTING, "rollout.aborting", text, reason=why)

    def _end(self, step: Step, now_s: float, to: RolloutState, version: int) -> Step:
        kind, reason = f"rollout.{to.value.lower()}", step.rollout.reason
        text = f"version {version} answers everything ({reason})"
        return self._move(step, now_s, to, kind, text, reason=reason)

    def _retry(self, step: Step, now_s: float, actor: str) -> Step:
        attempt = step.rollout.attempt + 1
        return self._move(
            step,
            now_s,
            RolloutState.PENDING,
            "rollout.state",
            f"attempt {attempt}, asked for by {actor}",
            reason="",
            attempt=attempt,
            step=0,
            step_started_s=0.0,
            skipped=0,
            **_OF_STEP,
        )

    def _move(
        self,
        step: Step,
        now_s: float,
        to: RolloutState,
        kind: str,
        text: str,
        /,
        *,
        pause: Pause | None = None,
        **changes: Any,
    ) -> Step:
        """The only way from one state to another; the note has the numbers of the state that is left.

        ``text`` is the record's reason too, unless ``changes`` has one.
        """
        rollout = step.rollout
        if to not in MOVES[rollout.state]:
            raise RuntimeError(f"a rollout cannot go from {rollout.state.value} to {to.value}")
        held_s = rollout.held_s
        if rollout.pause is Pause.MANUAL:
            held_s += elapsed_s(rollout.paused_s, now_s)
        moved: dict[str, Any] = {
            "state": to,
            "pause": pause,
            "changed_s": now_s,
            "held_s": held_s,
            "paused_s": 0.0 if pause is None else now_s,
            "reason": text,
        }
        after = replace(rollout, **moved | changes)
        numbers = numbers_of(rollout, now_s) | {"to": to.value}
        if to is RolloutState.STEPPING:
            numbers |= {"to_step": after.step, "to_weight_bp": step_of(after).weight_bp}
        return Step(after, (*step.notes, Note(kind, text, numbers)))


def _in_time(rollout: Rollout, now_s: float) -> Rollout:
    """The record with its times at the latest now: the clock may have been set back before a restart."""
    names = ("changed_s", "step_started_s", "paused_s")
    future: dict[str, Any] = {name: now_s for name in names if getattr(rollout, name) > now_s}
    return replace(rollout, **future) if future else rollout


def _is_ready(facts: Facts) -> bool:
    return facts.canary is VersionState.READY
