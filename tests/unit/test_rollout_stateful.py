"""The state machine against the plain model, with a crash (write, forget, read) before every step."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.errors import Conflict
from gateway.rollout.analysis import Estimate, Outcome, Verdict
from gateway.rollout.facts import Facts, Step, asks
from gateway.rollout.machine import MOVES, RolloutMachine, wants_canary
from gateway.rollout.observation import Arm, Observation
from gateway.rollout.record import Pause, Rollout, RolloutState, route_of
from gateway.rollout.spec import MetricSpec, RolloutSpec
from gateway.serving.routes import VersionState
from tests.twins.rollout import RolloutModel

STABLE, CANARY = 1, 2
BEGAN = 1e6
STEPS = st.fixed_dictionaries(
    {
        "min_duration_s": st.sampled_from([0, 0, 8]),
        "min_requests": st.sampled_from([0, 10]),
        "pause": st.sampled_from([False, False, True]),
        "mirror_percent": st.just(50),
    }
)
ON_NO_DATA = st.sampled_from(["hold", "hold", "fail", "pass"])
KINDS = {
    "rollout.state",
    "rollout.step",
    "rollout.paused",
    "rollout.resumed",
    "rollout.promoting",
    "rollout.succeeded",
    "rollout.aborting",
    "rollout.aborted",
    "rollout.failed",
}


@st.composite
def specs(draw: Any) -> RolloutSpec:
    steps = draw(st.lists(STEPS, min_size=1, max_size=4))
    weights = sorted(draw(st.sampled_from([500, 0, 5000, 10_000])) for _ in steps)
    critical = st.sampled_from([True, True, False])
    metrics = [
        {"name": "errors", "source": "errors"},
        {"name": "same", "source": "agreement"},
        {"name": "query", "source": "prometheus", "query": "up", "bound": 1},
    ]
    chosen = draw(st.lists(st.sampled_from(metrics), max_size=3, unique_by=lambda m: m["name"]))
    return RolloutSpec.model_validate(
        {
            "canary": CANARY,
            "stable": STABLE,
            "steps": [s | {"weight_bp": w} for s, w in zip(steps, weights, strict=True)],
            "metrics": [
                m | {"on_no_data": draw(ON_NO_DATA), "critical": draw(critical)} for m in chosen
            ],
            "skip_requests": draw(st.sampled_from([0, 15])),
            "limits": {
                "failures": draw(st.integers(0, 1)),
                "errors": draw(st.integers(0, 1)),
                "inconclusive": draw(st.sampled_from([1, 2, None])),
            },
            "gates": [
                {
                    "name": f"gate{n}",
                    "url": "http://gate/",
                    "steps": draw(st.sampled_from([None, [0]])),
                }
                for n in range(draw(st.integers(0, 2)))
            ],
            "progress_deadline_s": draw(st.sampled_from([1000, 60])),
            "abort_keep_warm_s": draw(st.sampled_from([0, 10])),
        }
    )


@st.composite
def deltas(draw: Any) -> Observation:
    requests = draw(st.sampled_from([6, 0, 12, 30]))
    errors = requests if draw(st.integers(0, 12)) == 0 else 0
    compared = draw(st.sampled_from([0, 10]))
    return Observation(Arm(requests, errors), Arm(2 * requests), compared, compared)


class Rollouts(RuleBasedStateMachine):
    @initialize(spec=specs(), outcome=st.sampled_from(["pass", "inconclusive", "no_data"]))
    def create(self, spec: RolloutSpec, outcome: str) -> None:
        self.now = BEGAN
        self.outcomes = {metric.name: outcome for metric in spec.metrics}
        self.gates: dict[str, bool | None] = {gate.name: True for gate in spec.gates}
        self.machine = RolloutMachine(self.judge)
        self.rollout = Rollout("id", "model", spec, "salt", self.now, self.now)
        self.model = RolloutModel(spec)

    def judge(
        self, metric: MetricSpec, seen: Observation, *, alpha: float, minimum: int
    ) -> Verdict:
        outcome = Outcome(self.outcomes[metric.name])
        limit = metric.limit
        estimate = Estimate(0.5, 0.0, 1.0, seen.canary.requests)
        return Verdict(metric.name, metric.source, outcome, metric.test, limit, "", alpha, estimate)

    @rule(what=st.data(), outcome=st.sampled_from(["pass", "inconclusive", "no_data", "fail"]))
    def measure(self, what, outcome):
        """What a metric says from now on."""
        if self.outcomes:
            self.outcomes[what.draw(st.sampled_from(sorted(self.outcomes)))] = outcome

    @rule(what=st.data(), answer=st.sampled_from([True, False, None]))
    def answer(self, what, answer):
        """What a gate says from now on."""
        if self.gates:
            self.gates[what.draw(st.sampled_from(sorted(self.gates)))] = answer

    @precondition(lambda self: self.rollout.is_active)
    @rule(
        passed_s=st.sampled_from([1, 5]),
        is_settled=st.booleans(),
        delta=deltas(),
        is_asked=st.sampled_from([True, True, False]),
        times=st.integers(1, 3),
    )
    def look(self, passed_s, is_settled, delta, is_asked, times):
        for _ in range(times):
            self.look_at(passed_s, is_settled=is_settled, delta=delta, is_asked=is_asked)

    @rule(passed_s=st.sampled_from([-40, 0, 20]), is_stable_ready=st.booleans())
    def look_at_another_time(self, passed_s, is_stable_ready):
        self.look_at(passed_s, is_stable_ready=is_stable_ready, is_settled=True)

    @rule(canary=st.sampled_from([None, *VersionState]))
    def look_at_another_canary(self, canary):
        self.look_at(1, canary=canary)

    @precondition(lambda self: self.rollout.state in (RolloutState.PENDING, RolloutState.LOADING))
    @rule(canary=st.sampled_from([None, VersionState.LOADING, VersionState.WARMING]))
    def load(self, canary):
        self.look_at(1, canary=canary)

    def look_at(
        self,
        passed_s: float,
        *,
        canary: VersionState | None = VersionState.READY,
        is_stable_ready: bool = True,
        is_settled: bool = False,
        delta: Observation = Observation(),  # noqa: B008 - immutable
        is_asked: bool = True,
    ) -> None:
        self.crash()
        self.now += passed_s
        spec = self.rollout.spec
        queries, gates = asks(self.rollout, self.now) if is_asked else ((), ())
        values = {"pass": 0.0, "fail": 2.0}
        answered = {m.name: values.get(self.outcomes[m.name]) for m in queries}
        approved = {gate.name: self.gates[gate.name] for gate in gates}
        facts = Facts(
            now_s=self.now,
            canary=canary,
            is_stable_ready=is_stable_ready,
            is_settled=is_settled,
            delta=delta,
            queries=answered,
            gates=approved,
        )
        said = {None: "no_data", 0.0: "pass", 2.0: "fail"}
        counters = {m.name: self.outcomes[m.name] for m in spec.metrics if m.source != "prometheus"}
        self.model.look(
            self.now,
            "" if canary is None else canary.value,
            is_stable_ready,
            is_settled,
            delta,
            counters | {name: said[value] for name, value in answered.items()},
            approved,
        )
        before = self.rollout
        self.take(self.machine.advance(before, facts))
        if self.rollout.state is RolloutState.PROMOTING is not before.state:
            assert before.step + 1 == len(spec.steps)
        assert self.rollout.step in (before.step, before.step + 1)
        if not before.is_active:
            assert self.rollout is before

    @rule(verb=st.sampled_from(["resume", "pause", "promote", "promote_full", "abort", "retry"]))
    def command(self, verb):
        self.ask_for(verb)

    @precondition(lambda self: self.rollout.state in (RolloutState.ABORTED, RolloutState.FAILED))
    @rule()
    def retry(self):
        self.ask_for("retry")

    def ask_for(self, verb: str) -> None:
        self.crash()
        before = self.rollout
        is_sensible = self.model.command(verb, self.now)
        try:
            step = self.machine.command(before, verb, self.now, "someone")
        except Conflict:
            assert not is_sensible
            return
        assert is_sensible
        self.take(step)
        if verb == "promote":
            assert self.rollout.step in (before.step, before.step + 1)
        elif verb != "retry":
            assert self.rollout.step == before.step

    def crash(self) -> None:
        """All that a new process has is what was written."""
        written = json.dumps(self.rollout.to_document(), allow_nan=False)
        read = Rollout.from_document(json.loads(written))
        assert read == self.rollout
        self.rollout = read

    def take(self, step: Step) -> None:
        before, after = self.rollout, step.rollout
        assert after is before or after != before
        moves = [note for note in step.notes if note.kind in KINDS]
        has_moved = (before.state, before.pause, before.step) != (
            after.state,
            after.pause,
            after.step,
        )
        assert len(moves) == has_moved or (after.pause is not None and len(moves) == 1)
        if before.state is not after.state:
            assert after.state in MOVES[before.state]
        for note in step.notes:
            assert note.text
            json.dumps(note.numbers, allow_nan=False)
        has_fallen = canary_bp(after) < canary_bp(before)
        assert not has_fallen or after.state is RolloutState.ABORTING
        assert after.salt == before.salt
        self.rollout = after

    @invariant()
    def agrees_with_the_model(self):
        rollout, model = self.rollout, self.model
        assert rollout.state.value == model.state
        assert (rollout.pause.value if rollout.pause else "") == model.pause
        assert (rollout.step, rollout.attempt) == (model.step, model.attempt)
        assert (rollout.skipped, rollout.seen.canary.requests) == (model.skipped, model.seen)
        assert (rollout.answered, rollout.failed) == (model.answered, model.failed)
        assert rollout.strikes == {name: n for name, n in model.strikes.items() if n}
        assert {k: v["outcome"] for k, v in rollout.verdicts.items()} == model.outcomes
        assert rollout.is_released == model.is_released
        assert (rollout.step_started_s, rollout.held_s) == (model.started, model.held)
        keeps = max(0.0, self.now - model.ended) < rollout.spec.abort_keep_warm_s
        expected = {"ABORTED": keeps, "FAILED": False}.get(model.state, True)
        assert wants_canary(rollout, self.now) == expected

    @invariant()
    def is_whole(self):
        rollout = self.rollout
        assert (rollout.pause is not None) == (rollout.state is RolloutState.PAUSED)
        assert (rollout.paused_s > 0) == (rollout.pause is not None)
        named = set(route_of(rollout).versions())
        if rollout.state in (RolloutState.PROMOTING, RolloutState.SUCCEEDED):
            assert named == {CANARY}
        elif rollout.state not in (RolloutState.STEPPING, RolloutState.PAUSED):
            assert named == {STABLE}

    @invariant()
    def asks_only_what_it_needs(self):
        queries, gates = asks(self.rollout, self.now)
        if self.rollout.state not in (RolloutState.STEPPING, RolloutState.PAUSED):
            assert not queries
            assert not gates
        if self.rollout.pause in (Pause.MANUAL, Pause.INCONCLUSIVE):
            assert not gates


def canary_bp(rollout: Rollout) -> int:
    return sum(s.weight_bp for s in route_of(rollout).shares if s.version == CANARY)


TestRollouts = Rollouts.TestCase
TestRollouts.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
