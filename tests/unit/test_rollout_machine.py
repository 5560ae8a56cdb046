"""A rollout's rules, one by one."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

from gateway.errors import Conflict
from gateway.rollout import analysis
from gateway.rollout.analysis import Estimate, Outcome, Verdict
from gateway.rollout.facts import Facts, Step, asks
from gateway.rollout.machine import RolloutMachine, wants_canary
from gateway.rollout.observation import Arm, Observation
from gateway.rollout.record import Pause, Rollout, RolloutState, route_of
from gateway.rollout.spec import RolloutSpec
from gateway.serving.routes import VersionState

PASS, FAIL, DOUBT, NONE = Outcome.PASS, Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.NO_DATA
S = RolloutState
QUERY = {"name": "query", "source": "prometheus", "query": "up", "bound": 1}
GATE = {"name": "gate", "url": "http://gate/"}
ERRORS = {"name": "errors", "source": "errors"}
BEGAN = 1e6


def traffic(requests: int, errors: int = 0, compared: int = 0) -> Observation:
    return Observation(Arm(requests, errors), Arm(10 * requests), compared, compared)


class Story:
    """A rollout that is looked at and told things; it begins in its first step."""

    def __init__(
        self, machine: RolloutMachine | None = None, *, is_begun: bool = True, **spec: Any
    ):
        spec.setdefault("steps", [{"weight_bp": 500, "min_requests": 10}, {"weight_bp": 5000}])
        spec.setdefault("metrics", [ERRORS])
        spec.setdefault("skip_requests", 0)
        self.says: dict[str, Outcome] = {}
        self.machine = machine or RolloutMachine(self.judge)
        self.now_s = BEGAN
        self.notes: list[Any] = []
        document = {"canary": 2, "stable": 1, **spec}
        self.rollout = Rollout(
            "id", "m", RolloutSpec.model_validate(document), "salt", BEGAN, BEGAN
        )
        if is_begun:
            self.look()
            assert self.rollout.state is S.STEPPING

    def judge(self, metric: Any, seen: Observation, *, alpha: float, minimum: int) -> Verdict:
        outcome = self.says.get(metric.name, PASS)
        estimate = Estimate(0.25, samples=seen.canary.requests)
        return Verdict(
            metric.name, metric.source, outcome, metric.test, metric.limit, "lower", alpha, estimate
        )

    def look(self, after_s: float = 1.0, **facts: Any) -> RolloutState:
        self.now_s += after_s
        facts = {
            "canary": VersionState.READY,
            "is_stable_ready": True,
            "is_settled": False,
        } | facts
        return self.take(self.machine.advance(self.rollout, Facts(now_s=self.now_s, **facts)))

    def tell(self, verb: Any, after_s: float = 1.0) -> RolloutState:
        self.now_s += after_s
        return self.take(self.machine.command(self.rollout, verb, self.now_s, "ann"))

    def take(self, step: Step) -> RolloutState:
        self.rollout, self.notes = step.rollout, [*step.notes]
        return self.rollout.state

    @property
    def kinds(self) -> list[str]:
        return [note.kind for note in self.notes]

    @property
    def pause(self) -> Pause | None:
        return self.rollout.pause


def test_a_rollout_goes_from_its_creation_to_the_end():
    story = Story(is_begun=False)
    assert story.look(canary=None) is S.LOADING
    assert story.look(canary=VersionState.LOADING) is S.LOADING
    assert story.kinds == []
    assert story.look(canary=VersionState.WARMING) is S.WARMING
    assert story.look() is S.STEPPING
    assert story.kinds == ["rollout.step"]
    assert story.look(delta=traffic(10)) is S.STEPPING
    assert story.rollout.step == 1
    assert story.look(delta=traffic(100)) is S.PROMOTING
    assert story.look() is S.PROMOTING
    assert story.look(is_settled=True, canary=VersionState.LOADING) is S.PROMOTING
    assert story.look(is_settled=True) is S.SUCCEEDED
    assert story.kinds == ["rollout.succeeded"]
    assert route_of(story.rollout).main == 2


def test_nothing_new_is_the_same_record():
    story = Story()
    story.look()
    before = story.rollout
    story.look()
    assert story.rollout is before


@pytest.mark.parametrize("state", [None, VersionState.LOADING, VersionState.WARMING])
def test_a_canary_that_cannot_be_loaded_fails_the_rollout(state: VersionState | None):
    story = Story(is_begun=False)
    story.look(canary=state)
    assert story.look(canary=VersionState.FAILED, canary_reason="bad file") is S.FAILED
    assert story.rollout.reason == "version 2 is FAILED: bad file"
    assert not wants_canary(story.rollout, story.now_s)


def test_no_step_begins_or_ends_without_the_stable_version():
    story = Story(is_begun=False)
    assert story.look(is_stable_ready=False) is S.WARMING
    assert "until version 1 is READY" in story.notes[0].text
    story.look()
    assert story.look(delta=traffic(10), is_stable_ready=False) is S.STEPPING
    assert story.rollout.step == 0
    story.look()
    assert story.rollout.step == 1


@pytest.mark.parametrize(
    "canary", [None, VersionState.FAILED, VersionState.UNLOADING, VersionState.UNLOADED]
)
@pytest.mark.parametrize("verb", [None, "pause", "promote_full"])
def test_a_canary_that_is_gone_rolls_back_at_once(canary: VersionState | None, verb: str | None):
    story = Story()
    if verb:
        story.tell(verb)
    assert story.look(canary=canary) is S.ABORTING
    assert story.kinds[-1] == "rollout.aborting"


def test_a_canary_that_is_loaded_again_after_a_restart_is_waited_for():
    story = Story()
    assert story.look(canary=VersionState.LOADING, delta=traffic(10)) is S.STEPPING
    assert story.rollout.step == 0
    story.look()
    assert story.rollout.step == 1


def test_first_requests_are_left_out_of_both_arms_but_not_of_the_kill_switch():
    story = Story(skip_requests=15, metrics=[], steps=[{"weight_bp": 500, "min_requests": 1000}])
    story.look(delta=traffic(10, 1, compared=3))
    story.look(delta=traffic(10, 1))
    assert (story.rollout.seen.canary, story.rollout.seen.baseline) == (Arm(), Arm())
    assert (story.rollout.seen.compared, story.rollout.skipped) == (3, 20)
    story.look(delta=traffic(10))
    assert (story.rollout.seen.canary.requests, story.rollout.seen.baseline.requests) == (10, 100)
    assert (story.rollout.answered, story.rollout.failed) == (30, 2)
    assert story.look(delta=traffic(30, 30)) is S.ABORTING


@pytest.mark.parametrize("is_paused", [False, True])
def test_the_kill_switch(is_paused: bool):
    story = Story(kill_switch={"error_rate": 0.95, "min_requests": 20}, skip_requests=1000)
    story.says["errors"] = DOUBT
    story.look()
    if is_paused:
        story.tell("pause")
    assert story.look(delta=traffic(19, 19)).value in ("STEPPING", "PAUSED")
    assert story.look(delta=traffic(1, 0)) is S.ABORTING
    assert story.kinds == ["rollout.killed", "rollout.aborting"]
    assert story.rollout.reason == "19 of 20 requests of the canary failed"
    assert story.notes[0].numbers["failed"] == 19


def test_a_step_lasts_for_its_time_and_its_requests():
    story = Story(steps=[{"weight_bp": 1, "min_requests": 10, "min_duration_s": 60}])
    assert story.look(58, delta=traffic(20)) is S.STEPPING
    assert story.look(1) is S.STEPPING
    assert story.look(1) is S.PROMOTING
    story = Story(steps=[{"weight_bp": 1, "min_requests": 10, "min_duration_s": 60}])
    assert story.look(100, delta=traffic(9)) is S.STEPPING
    assert story.look(delta=traffic(1)) is S.PROMOTING


def test_without_weight_compared_copies_count_and_nothing_else_is_waited_for():
    step = {"weight_bp": 0, "mirror_percent": 10, "min_requests": 10}
    same = {"name": "same", "source": "agreement"}
    story = Story(steps=[step], metrics=[ERRORS, same])
    story.says = {"errors": NONE, "same": DOUBT}
    assert story.look(delta=traffic(0, compared=10)) is S.STEPPING
    story.says["same"] = PASS
    assert story.look() is S.PROMOTING


def test_with_all_the_traffic_there_is_nothing_to_compare_with():
    story = Story(steps=[{"weight_bp": 10_000, "min_requests": 10}])
    story.says["errors"] = NONE
    assert story.look(delta=traffic(10)) is S.PROMOTING


def test_a_new_step_counts_anew():
    story = Story(skip_requests=1)
    story.look(delta=traffic(1))
    story.look(delta=traffic(10))
    note = story.notes[-1]
    assert (note.kind, note.numbers["answered"], note.numbers["to_weight_bp"]) == (
        "rollout.step",
        11,
        5000,
    )
    assert note.numbers["verdicts"]["errors"]["outcome"] == "pass"
    rollout = story.rollout
    assert (rollout.seen, rollout.answered, rollout.failed) == (Observation(), 0, 0)
    assert (rollout.verdicts, rollout.strikes, rollout.skipped) == ({}, {}, 1)
    assert rollout.step_started_s == story.now_s


@pytest.mark.parametrize("is_paused", [False, True])
def test_a_critical_metric_that_fails_rolls_back(is_paused: bool):
    story = Story()
    if is_paused:
        story.tell("pause")
    story.says["errors"] = FAIL
    assert story.look(delta=traffic(5)) is S.ABORTING
    assert story.kinds == ["rollout.verdict", "rollout.aborting"]
    assert story.rollout.reason == story.rollout.verdicts["errors"]["text"]
    assert story.notes[1].numbers["verdicts"]["errors"]["canary"]["samples"] == 5
    assert route_of(story.rollout).is_plain
    assert story.look(is_settled=True) is S.ABORTED
    assert story.kinds == ["rollout.aborted"]


@pytest.mark.parametrize("outcome", [FAIL, DOUBT, NONE])
def test_a_metric_that_is_not_critical_is_only_an_event(outcome: Outcome):
    story = Story(metrics=[ERRORS | {"critical": False, "on_no_data": "fail"}])
    story.says["errors"] = outcome
    story.look(delta=traffic(10))
    assert story.rollout.step == 1
    assert ("rollout.verdict" in story.kinds) == (outcome is FAIL)


def test_a_verdict_is_noted_when_it_is_decided_and_not_when_it_is_lost():
    story = Story(metrics=[ERRORS | {"critical": False}], limits={"inconclusive": None})
    said = [NONE, DOUBT, PASS, PASS, DOUBT, PASS, NONE, PASS, FAIL, DOUBT, FAIL, PASS, DOUBT]
    noted, shown = [], []
    for outcome in said:
        story.says["errors"] = outcome
        story.look(delta=traffic(0, compared=1))
        noted += [note.numbers["verdicts"]["errors"]["outcome"] for note in story.notes]
        shown.append(Outcome(story.rollout.verdicts["errors"]["outcome"]))
    assert noted == ["pass", "fail", "pass"]
    assert shown == said  # what is shown is the last look


def test_the_next_step_is_decided_anew():
    story = Story()
    story.look(delta=traffic(1))
    assert story.kinds == ["rollout.verdict"]
    story.look(delta=traffic(9))
    assert story.kinds == ["rollout.step"]
    story.look(delta=traffic(1))
    assert story.kinds == ["rollout.verdict"]


def test_a_record_of_before_verdicts_were_noted_by_decision_goes_on():
    story = Story()
    story.look(delta=traffic(1))
    verdicts = {"errors": dict(story.rollout.verdicts["errors"])}
    del verdicts["errors"]["decided"]
    story.rollout = replace(story.rollout, verdicts=verdicts)
    story.look(delta=traffic(1))
    assert story.kinds == ["rollout.verdict"]


@pytest.mark.parametrize(
    ("on_no_data", "state", "pause"),
    [("hold", S.PAUSED, Pause.NO_DATA), ("fail", S.ABORTING, None), ("pass", S.PROMOTING, None)],
)
def test_no_data_when_the_time_is_over(on_no_data: str, state: RolloutState, pause: Pause | None):
    steps = [{"weight_bp": 5, "min_duration_s": 60, "min_requests": 0}]
    story = Story(steps=steps, metrics=[ERRORS | {"on_no_data": on_no_data}])
    story.says["errors"] = NONE
    assert story.look(59) is S.STEPPING
    assert story.look(1) is state
    assert story.pause is pause


def test_no_data_ends_when_there_are_some():
    story = Story(steps=[{"weight_bp": 5, "min_duration_s": 60, "min_requests": 9}])
    story.says["errors"] = NONE
    assert story.look(60) is S.PAUSED
    assert story.rollout.reason == "errors: nothing was measured in the step's time"
    story.look()
    assert story.kinds == []
    with pytest.raises(Conflict, match="by itself"):
        story.tell("resume")
    story.says["errors"] = DOUBT
    assert story.look(delta=traffic(5)) is S.STEPPING
    assert story.kinds == ["rollout.resumed"]


def test_a_step_without_a_time_has_none_that_is_over_before_its_requests():
    story = Story(metrics=[ERRORS | {"on_no_data": "fail"}])
    story.says["errors"] = NONE
    assert story.look(1000) is S.STEPPING
    assert story.look(delta=traffic(10)) is S.ABORTING


def test_doubt_pauses_after_so_many_looks_and_a_person_ends_it():
    story = Story(limits={"inconclusive": 2})
    story.says["errors"] = DOUBT
    story.look(delta=traffic(9))
    assert not story.rollout.strikes  # its requests had not come yet
    for _ in range(2):
        assert story.look(delta=traffic(5)) is S.STEPPING
    assert story.look() is S.STEPPING  # nothing new was looked at
    assert story.look(delta=traffic(5)) is S.PAUSED
    assert story.pause is Pause.INCONCLUSIVE
    story.says["errors"] = PASS
    assert story.look(delta=traffic(5)) is S.PAUSED
    story.says["errors"] = DOUBT
    assert story.tell("resume") is S.STEPPING
    assert not story.rollout.strikes
    for _ in range(2):
        assert story.look(delta=traffic(5)) is S.STEPPING
    story.look(delta=traffic(5))
    assert story.tell("promote") is S.STEPPING
    assert story.rollout.step == 1


def test_doubt_without_a_limit_waits():
    story = Story()
    story.says["errors"] = DOUBT
    for _ in range(20):
        assert story.look(delta=traffic(5)) is S.STEPPING
    assert not story.rollout.strikes


def test_a_query_must_pass_and_is_asked_anew_in_each_step():
    story = Story(metrics=[QUERY])
    assert [m.name for m in asks(story.rollout, story.now_s)[0]] == ["query"]
    assert story.look(delta=traffic(10)) is S.STEPPING
    assert story.rollout.step == 0
    story.look(queries={"query": 0.5})
    assert story.rollout.step == 1
    story.look(delta=traffic(100))
    assert story.rollout.state is S.STEPPING


def test_failed_looks_at_a_query_are_tolerated_in_a_row():
    story = Story(metrics=[QUERY], limits={"failures": 1})
    assert story.look(queries={"query": 2.0}) is S.STEPPING
    assert story.look(queries={"query": 0.0}) is S.STEPPING
    assert story.look(queries={"query": 2.0}, delta=traffic(10)) is S.STEPPING
    assert story.rollout.step == 0
    assert story.look() is S.STEPPING  # it was not asked
    assert story.look(queries={"query": 2.0}) is S.ABORTING


@pytest.mark.parametrize(
    ("on_no_data", "state"), [("hold", S.PAUSED), ("fail", S.ABORTING), ("pass", S.PROMOTING)]
)
def test_a_query_without_an_answer(on_no_data: str, state: RolloutState):
    metric, steps = QUERY | {"on_no_data": on_no_data}, [{"weight_bp": 5, "min_requests": 10}]
    story = Story(metrics=[metric], limits={"errors": 1}, steps=steps)
    story.look(queries={"query": 0.0})
    assert story.look(queries={"query": None}, delta=traffic(10)) is S.STEPPING
    assert story.look(queries={"query": None}) is state
    if state is S.PAUSED:
        assert story.pause is Pause.NO_DATA
        assert story.look(queries={"query": 0.0}) is S.PROMOTING


def test_an_answer_ends_a_row_of_missing_ones():
    story = Story(metrics=[QUERY], limits={"errors": 1}, steps=[{"weight_bp": 5}])
    for value in (None, 0.0, None):
        assert story.look(queries={"query": value}) is S.STEPPING
    assert story.look(delta=traffic(100)) is S.STEPPING


def gated(**spec: Any) -> Story:
    steps = [{"weight_bp": 5, "min_requests": 10}]
    return Story(gates=[GATE], steps=steps, limits={"errors": 1}, **spec)


def test_a_gate_is_asked_when_everything_else_is_met():
    story = gated()
    assert asks(story.rollout, story.now_s)[1] == ()
    assert story.look(gates={"gate": True}) is S.STEPPING
    story.look(delta=traffic(10))
    assert [gate.name for gate in asks(story.rollout, story.now_s)[1]] == ["gate"]
    assert story.look() is S.STEPPING
    assert story.look(gates={"gate": True}) is S.PROMOTING


def test_a_gate_guards_its_steps():
    story = Story(gates=[GATE | {"steps": [1]}])
    story.look(delta=traffic(10))
    assert story.rollout.step == 1
    assert story.look(delta=traffic(100)) is S.STEPPING


def test_a_gate_that_refuses_pauses_until_it_agrees():
    story = gated()
    assert story.look(delta=traffic(10), gates={"gate": False}) is S.PAUSED
    assert (story.pause, story.rollout.reason) == (Pause.GATE, "gate gate does not agree")
    for answers in ({}, {"gate": False}, {"gate": None}):
        assert story.look(gates=answers) is S.PAUSED
        assert story.kinds == []
    assert asks(story.rollout, story.now_s)[1]
    assert story.look(gates={"gate": True}) is S.PROMOTING


def test_a_gate_that_does_not_answer_pauses_when_it_goes_on():
    story = gated()
    assert story.look(delta=traffic(10), gates={"gate": None}) is S.STEPPING
    assert story.look(gates={"gate": None}) is S.PAUSED
    assert story.rollout.reason == "gate gate gave no answer more than 1 times in a row"
    story.look(gates={"gate": None})
    assert story.kinds == []
    assert story.look(gates={"gate": True}) is S.PROMOTING


def test_a_gate_is_not_waited_for_when_the_metrics_no_longer_pass():
    story = gated()
    story.look(delta=traffic(10), gates={"gate": False})
    story.says["errors"] = DOUBT
    assert story.look(delta=traffic(1)) is S.STEPPING
    assert story.kinds == ["rollout.resumed"]


def test_data_that_come_end_their_pause_before_a_gate_is_asked():
    steps = [{"weight_bp": 5, "min_requests": 0, "min_duration_s": 60}]
    story = Story(gates=[GATE], steps=steps)
    story.says["errors"] = NONE
    assert story.look(60) is S.PAUSED
    story.says["errors"] = PASS
    assert story.look() is S.STEPPING


def test_a_step_with_a_pause_waits_to_be_resumed_once():
    steps = [{"weight_bp": 5, "min_requests": 10, "pause": True}]
    story = Story(gates=[GATE], steps=steps)
    story.tell("pause")
    story.tell("resume")
    assert not story.rollout.is_released  # a pause by hand is not the step's own
    assert story.look(delta=traffic(10), gates={"gate": True}) is S.PAUSED
    assert story.pause is Pause.MANUAL
    assert asks(story.rollout, story.now_s)[1] == ()
    assert story.look(gates={"gate": True}) is S.PAUSED
    assert story.tell("resume") is S.STEPPING
    assert story.look(gates={"gate": True}) is S.PROMOTING


def test_a_step_that_takes_too_long_rolls_back_pauses_by_hand_not_counted():
    story = Story(progress_deadline_s=100)
    story.look(60)
    story.tell("pause")
    story.look(500)
    story.tell("resume", 0)
    assert story.rollout.held_s == 500
    assert story.look(39) is S.STEPPING
    assert story.look(1) is S.ABORTING
    assert story.rollout.reason == "step 1 has not ended within 100 s"


def test_other_pauses_count_for_the_deadline():
    story = gated(progress_deadline_s=100)
    story.look(delta=traffic(10), gates={"gate": False})
    assert story.look(100) is S.ABORTING


def test_a_clock_that_is_set_back_takes_nothing_from_a_step():
    steps = [{"weight_bp": 5, "min_requests": 0, "min_duration_s": 60}]
    story = Story(steps=steps, progress_deadline_s=100)
    story.tell("pause")
    story.look(-5000)
    story.tell("resume", 10)
    assert story.rollout.held_s == 10
    assert story.look(49) is S.STEPPING
    assert story.look(1) is S.PROMOTING


def test_pause_replaces_another_reason_and_is_idempotent():
    story = gated()
    story.look(delta=traffic(10), gates={"gate": False})
    story.tell("pause")
    assert (story.pause, story.rollout.reason) == (Pause.MANUAL, "paused by ann")
    before = story.rollout
    story.tell("pause")
    assert story.rollout is before
    assert story.look(gates={"gate": True}) is S.PAUSED


def test_promote_goes_on_whatever_is_missing():
    story = Story()
    assert story.tell("promote") is S.STEPPING
    assert story.rollout.step == 1
    story.tell("pause")
    assert story.tell("promote") is S.PROMOTING
    assert "ann" in story.notes[0].text


def test_promote_fully_skips_what_is_left():
    story = Story()
    assert story.tell("promote_full") is S.PROMOTING
    assert route_of(story.rollout).main == 2


def test_everything_is_aborted_until_it_has_succeeded():
    story = Story()
    story.tell("promote_full")
    assert story.tell("abort") is S.ABORTING
    before = story.rollout
    assert story.tell("abort") is S.ABORTING
    assert story.rollout is before
    assert story.look(is_settled=True) is S.ABORTED
    assert story.rollout.reason == "aborted by ann"


def test_an_aborted_rollout_stays_so_until_it_is_retried():
    story = Story(abort_keep_warm_s=30, skip_requests=5)
    story.look(delta=traffic(10))
    story.tell("abort")
    story.look(is_settled=True)
    ended = story.rollout
    story.look(29, delta=traffic(10))
    assert story.rollout is ended
    assert wants_canary(ended, story.now_s)
    assert not wants_canary(ended, story.now_s + 1)
    assert story.tell("retry") is S.PENDING
    fresh = Rollout("id", "m", ended.spec, "salt", BEGAN, story.now_s)
    assert story.rollout == replace(fresh, attempt=2)
    assert wants_canary(story.rollout, story.now_s)


VERBS = ["pause", "resume", "promote", "promote_full", "abort", "retry"]
SENSIBLE = {
    "PENDING": "abort",
    "LOADING": "abort",
    "WARMING": "abort",
    "STEPPING": "pause resume promote promote_full abort",
    "PAUSED": "pause resume promote promote_full abort",
    "PROMOTING": "promote promote_full abort",
    "ABORTING": "abort",
    "SUCCEEDED": "",
    "ABORTED": "abort retry",
    "FAILED": "retry",
}


@pytest.mark.parametrize("state", RolloutState)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_makes_no_sense_is_a_conflict(state: RolloutState, verb: Any):
    story = Story()
    pause = Pause.MANUAL if state is S.PAUSED else None
    story.rollout = replace(story.rollout, state=state, pause=pause)
    if verb in SENSIBLE[state.value].split():
        story.tell(verb)
    else:
        with pytest.raises(Conflict, match=f"{verb} is for a rollout .* it is {state.value}"):
            story.tell(verb)


def test_an_illegal_move_is_a_defect():
    story = Story()
    with pytest.raises(RuntimeError, match="STEPPING to SUCCEEDED"):
        story.machine._move(Step(story.rollout), 1.0, S.SUCCEEDED, "rollout.succeeded", "no")


@pytest.mark.parametrize(("errors", "state"), [(0, S.PROMOTING), (60, S.ABORTING)])
def test_with_the_real_judge(errors: int, state: RolloutState):
    machine = RolloutMachine(functools.partial(analysis.judge, bounds=(1, 2, 4)))
    story = Story(machine, steps=[{"weight_bp": 1000}], metrics=[ERRORS | {"margin": 0.1}])
    looks = 0
    while story.look(delta=traffic(200, errors)) is S.STEPPING:
        looks += 1
        assert looks < 50
    assert story.rollout.state is state
