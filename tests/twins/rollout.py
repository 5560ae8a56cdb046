"""The rules of a rollout as plain as they can be said: what gateway/rollout/machine.py must agree with.

Names of states and outcomes are text, time is whatever the caller says it is, and nothing is immutable.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from gateway.rollout.spec import MetricSpec, RolloutSpec

ENDS = ("SUCCEEDED", "ABORTED", "FAILED")


class RolloutModel:
    def __init__(self, spec: RolloutSpec):
        self.spec = spec
        self.attempt = 1
        self.begin_attempt()

    def begin_attempt(self) -> None:
        self.state = "PENDING"
        self.step = self.skipped = 0
        self.started = self.ended = 0.0
        self.pause = ""
        self.paused_at = 0.0
        self.begin_count()

    def begin_count(self) -> None:
        self.answered = self.failed = self.seen = self.compared = 0
        self.held = 0.0
        self.is_released = self.is_own_pause = False
        self.strikes: Counter[str] = Counter()
        self.outcomes: dict[str, str] = {}

    # Verbs. False: it makes no sense now.

    def command(self, verb: str, now: float) -> bool:
        self.set_clock(now)
        steps = self.state in ("STEPPING", "PAUSED")
        if verb == "pause" and steps:
            if self.pause != "manual":
                self.pause_for("manual", now)
        elif verb == "resume" and self.state == "STEPPING":
            pass
        elif verb == "resume" and self.pause in ("manual", "inconclusive"):
            self.is_released = self.is_released or self.is_own_pause
            self.strikes.pop("inconclusive", None)
            self.unpause(now)
        elif verb == "promote" and steps:
            self.next_step(now)
        elif verb == "promote_full" and steps:
            self.leave("PROMOTING", now)
        elif verb in ("promote", "promote_full") and self.state == "PROMOTING":
            pass
        elif verb == "abort" and self.state not in ("SUCCEEDED", "FAILED"):
            if self.state not in ("ABORTING", "ABORTED"):
                self.leave("ABORTING", now)
        elif verb == "retry" and self.state in ("ABORTED", "FAILED"):
            self.attempt += 1
            self.begin_attempt()
        else:
            return False
        return True

    # Looks.

    def look(
        self,
        now: float,
        canary: str,
        stable_ready: bool,
        settled: bool,
        delta: Any,
        outcomes: dict[str, str],
        gates: dict[str, bool | None],
    ) -> None:
        """``outcomes`` of every counter, and of the queries that were asked."""
        if self.state in ENDS:
            return
        self.set_clock(now)
        gone = canary in ("", "FAILED", "UNLOADING", "UNLOADED")
        if self.state in ("PENDING", "LOADING", "WARMING"):
            if canary == "FAILED":
                self.leave("FAILED", now)
            elif canary == "READY" and stable_ready:
                self.enter_step(0, now)
            elif canary in ("READY", "WARMING"):
                self.state = "WARMING"
            elif self.state == "PENDING":
                self.state = "LOADING"
        elif self.state == "PROMOTING":
            if gone:
                self.leave("ABORTING", now)
            elif settled and canary == "READY":
                self.leave("SUCCEEDED", now)
        elif self.state == "ABORTING":
            if settled:
                self.leave("ABORTED", now)
        else:
            self.count(delta)
            self.note_outcomes(outcomes)
            if gone or self.is_bad(now):
                self.leave("ABORTING", now)
            elif self.pause in ("manual", "inconclusive"):
                pass
            elif canary == "READY" and stable_ready:
                self.go_on(now, bool(delta.canary.requests or delta.compared), gates)

    def count(self, delta: Any) -> None:
        if self.skipped < self.spec.skip_requests:
            self.skipped += delta.canary.requests
        else:
            self.seen += delta.canary.requests
        self.compared += delta.compared
        self.answered += delta.canary.requests
        self.failed += delta.canary.errors

    def note_outcomes(self, outcomes: dict[str, str]) -> None:
        self.outcomes.update(outcomes)
        for metric in self.spec.metrics:
            if metric.source != "prometheus" or metric.name not in outcomes:
                continue
            missing, failed = f"error:{metric.name}", f"query:{metric.name}"
            match outcomes[metric.name]:
                case "no_data":
                    self.strikes[missing] += 1
                case "fail":
                    self.strikes[failed] += 1
                    del self.strikes[missing]
                case _:
                    del self.strikes[missing], self.strikes[failed]

    def is_bad(self, now: float) -> bool:
        switch = self.spec.kill_switch
        is_enough = switch is not None and self.answered >= switch.min_requests
        if is_enough and self.failed / self.answered >= switch.error_rate:
            return True
        for metric in self.spec.metrics:
            if not metric.critical:
                continue
            outcome = self.outcomes.get(metric.name, "no_data")
            limit = self.spec.limits.failures if metric.source == "prometheus" else -1
            if outcome == "fail" and self.strikes[f"query:{metric.name}"] > limit:
                return True
            if outcome == "no_data" and metric.on_no_data == "fail" and self.lacks(metric, now):
                return True
        by_hand = self.held + (now - self.paused_at if self.pause == "manual" else 0)
        return now - self.started - by_hand > self.spec.progress_deadline_s

    def go_on(self, now: float, is_news: bool, gates: dict[str, bool | None]) -> None:
        awaited = [m for m in self.spec.metrics if m.critical and self.can_measure(m)]
        lacking = [m for m in awaited if self.outcome(m) == "no_data" and self.lacks(m, now)]
        is_enough = self.is_time_over(now) and self.has_requests()
        unknown = [
            m for m in awaited if self.outcome(m) in ("no_data", "fail") and m not in lacking
        ]
        doubtful = [m for m in awaited if self.outcome(m) == "inconclusive"]
        if any(m.on_no_data == "hold" for m in lacking):
            self.strikes.pop("inconclusive", None)
            self.pause_for("no_data", now)
        elif unknown or not is_enough:
            self.strikes.pop("inconclusive", None)
            self.unpause(now)
        elif doubtful:
            limit = self.spec.limits.inconclusive
            if limit is not None:
                self.strikes["inconclusive"] += is_news
            if limit is not None and self.strikes["inconclusive"] > limit:
                self.pause_for("inconclusive", now)
            else:
                self.unpause(now)
        else:
            self.strikes.pop("inconclusive", None)
            self.ask(now, gates)

    def ask(self, now: float, gates: dict[str, bool | None]) -> None:
        guards = [g.name for g in self.spec.gates if g.steps is None or self.step in g.steps]
        for name in guards:
            if name in gates:
                self.strikes[f"gate:{name}"] += 1
                if gates[name] is not None:
                    del self.strikes[f"gate:{name}"]
        refusing = [g for g in guards if gates.get(g) is False]
        silent = [g for g in guards if g in gates and gates[g] is None]
        limit = self.spec.limits.errors
        if refusing or any(self.strikes[f"gate:{name}"] > limit for name in silent):
            self.pause_for("gate", now)
        elif not all(gates.get(name) for name in guards):
            if self.pause == "no_data":
                self.unpause(now)
        elif self.spec.steps[self.step].pause and not self.is_released:
            self.pause_for("manual", now)
            self.is_own_pause = True
        else:
            self.next_step(now)

    # What a step wants.

    def outcome(self, metric: MetricSpec) -> str:
        return self.outcomes.get(metric.name, "no_data")

    def can_measure(self, metric: MetricSpec) -> bool:
        step = self.spec.steps[self.step]
        if metric.source == "prometheus":
            return True
        if metric.source == "agreement":
            return step.mirror_percent > 0 and step.weight_bp != 10_000
        return step.weight_bp not in (0, 10_000)

    def lacks(self, metric: MetricSpec, now: float) -> bool:
        if not self.can_measure(metric) or not self.is_time_over(now):
            return False
        if metric.source == "prometheus":
            return self.strikes[f"error:{metric.name}"] > self.spec.limits.errors
        return self.has_requests() or self.spec.steps[self.step].min_duration_s > 0

    def is_time_over(self, now: float) -> bool:
        return now - self.started >= self.spec.steps[self.step].min_duration_s

    def has_requests(self) -> bool:
        step = self.spec.steps[self.step]
        return (self.answered if step.weight_bp else self.compared) >= step.min_requests

    # Moves.

    def set_clock(self, now: float) -> None:
        if self.state not in ENDS:
            self.started, self.paused_at = min(self.started, now), min(self.paused_at, now)

    def pause_for(self, why: str, now: float) -> None:
        if self.pause != why:
            self.state, self.pause, self.paused_at = "PAUSED", why, now
            self.is_own_pause = False

    def unpause(self, now: float) -> None:
        if self.pause == "manual":
            self.held += now - self.paused_at
        self.state, self.pause, self.is_own_pause = "STEPPING", "", False

    def next_step(self, now: float) -> None:
        if self.step + 1 == len(self.spec.steps):
            self.leave("PROMOTING", now)
        else:
            self.enter_step(self.step + 1, now)

    def enter_step(self, step: int, now: float) -> None:
        self.begin_count()
        self.state, self.step, self.started, self.pause = "STEPPING", step, now, ""

    def leave(self, state: str, now: float) -> None:
        if self.pause == "manual":
            self.held += now - self.paused_at
        self.state, self.pause, self.ended = state, "", now
