"""How often rollouts roll back an equal version or miss a worse one: simulated, judged by our own code.

    python benchmarks/rollout_power.py [--rollouts 2000]

Requests are drawn, 500 a second; every 0.25 s the counters so far are judged by `gateway.rollout.analysis`,
with each metric's part of a confidence of 0.99 (two metrics, three steps). The plan is 5 % for 10 s, 25 %
for 10 s, 50 % for 80 s: 50,000 requests of the model, of which 21,500 reach the canary. What is missed was
not rolled back within these. Each step judges its own requests only. Stable fails 1 % of requests and answers
in a lognormal time (median 10 ms, sigma 0.5).

Compared with a rule of fixed thresholds, as Flagger has it: every 10 s the canary's error rate and p99 of
these 10 s are checked, and the fifth failed check rolls back. Its thresholds lie where they serve it well: an
error rate of 2 %, and 1.1 times the true p99 of the stable version.

The figure needs matplotlib, see `benchmarks/policy.py`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from policy import draw
from report import RESULTS, Report

from gateway.clock import NS_PER_MS
from gateway.rollout.analysis import Outcome, alpha_of, judge
from gateway.rollout.observation import Arm, Observation
from gateway.rollout.sequential import Rate
from gateway.rollout.spec import MetricSpec, RolloutSpec, StepSpec
from gateway.serving.routing import BASIS_POINTS
from gateway.telemetry.ledger import SKETCH_BOUNDS_NS

RATE = 500
LOOKS_A_SECOND = 4
A_LOOK = RATE // LOOKS_A_SECOND
"""Requests a second, looks a second, and requests from one look to the next."""

PLAN = ((500, 10.0), (2500, 10.0), (5000, 80.0))
"""(weight in basis points, seconds) of the steps."""

BUDGET = int(RATE * sum(seconds for _, seconds in PLAN))
"""Requests within which a worse version must be rolled back."""

ERRORS = 0.01
MEDIAN_NS = 10 * NS_PER_MS
SIGMA = 0.5
"""Of the stable version."""

TARGET = 0.01
"""Part of rollouts that may end wrongly."""

INTERVAL_S = 10.0
FAILED_CHECKS = 5
ERROR_THRESHOLD = 0.02
P99_THRESHOLD = 1.1
"""Of the fixed rule; the last one is a multiple of the stable version's true p99."""

PROOF_ROLLOUTS = 10
"""Scenarios that wait for proof take much longer: they have one rollout for so many of the others."""


@dataclass(frozen=True)
class Scenario:
    """What is rolled out, and how it is judged.

    Attributes:
        name: in the table.
        errors: the canary's rate.
        base: the stable version's.
        slower: factor of the canary's durations.
        sigma: of both sides' logarithms of durations.
        margin: of latency.
        judged: sources that are looked at; each still has its part of two metrics' confidence.
        test: of `MetricSpec`; ``noninferiority`` stays in a step until it is decided.
        most: requests after which it is given up.
    """

    name: str
    errors: float = ERRORS
    base: float = ERRORS
    slower: float = 1.0
    sigma: float = SIGMA
    margin: float = 0.05
    judged: Sequence[str] = ("errors", "latency")
    test: str = "inferiority"
    most: int = BUDGET

    def spec(self) -> RolloutSpec:
        """What a user would write."""
        return RolloutSpec(
            canary=2,
            stable=1,
            steps=tuple(
                StepSpec(weight_bp=weight, min_duration_s=seconds) for weight, seconds in PLAN
            ),
            metrics=(
                MetricSpec(name="errors", source="errors", test=self.test),
                MetricSpec(
                    name="latency", source="latency", test=self.test, margin=self.margin, slack_ms=0
                ),
            ),
        )


EQUAL = Scenario("equal")
OUTAGE = Scenario("equal, both fail 4 %", errors=0.04, base=0.04, judged=("errors",))
WORSE = Scenario("errors 3 % against 1 %", errors=0.03, judged=("errors",))
SLOWER = Scenario("median 20 % slower", slower=1.2, judged=("latency",))
SCENARIOS = (
    EQUAL,
    OUTAGE,
    WORSE,
    replace(WORSE, name="errors 2.5 % against 1 %", errors=0.025),
    SLOWER,
    replace(SLOWER, name="median 20 % slower, margin 10 %", margin=0.1),
    replace(SLOWER, name="median 20 % slower, sigma 1", sigma=1.0),
)
PROOFS = (
    Scenario("equal", margin=0.2, test="noninferiority", most=400_000),
    replace(WORSE, test="noninferiority", most=1_000_000),
)


@dataclass(frozen=True)
class End:
    """How a rollout ended, and after how many requests: of the model, and of the canary."""

    outcome: Outcome
    requests: int
    canary: int


@dataclass
class Counts:
    """What one version answered, as draws add to it."""

    errors_rate: float
    chances: np.ndarray
    requests: int = 0
    errors: int = 0
    latency: np.ndarray = field(default_factory=lambda: np.zeros(len(SKETCH_BOUNDS_NS), np.int64))

    def draw(self, requests: int, rng: np.random.Generator, has_latency: bool) -> None:
        """Answer so many more."""
        errors = int(rng.binomial(requests, self.errors_rate))
        self.requests += requests
        self.errors += errors
        if has_latency:
            self.latency += rng.multinomial(requests - errors, self.chances)

    def clear(self) -> None:
        """Begin a step."""
        self.requests = self.errors = 0
        self.latency[:] = 0

    def arm(self) -> Arm:
        """As it is judged."""
        used = np.flatnonzero(self.latency)
        sketch = dict(zip(used.tolist(), self.latency[used].tolist(), strict=True))
        return Arm(self.requests, self.errors, latency=sketch)


def chances(median_ns: float, sigma: float) -> np.ndarray:
    """Of a lognormal duration, by bucket; the last has all that is longer."""
    upto = [
        0.5 * math.erfc(-math.log(bound / median_ns) / (sigma * math.sqrt(2)))
        for bound in SKETCH_BOUNDS_NS[:-1]
    ]
    return np.diff([0.0, *upto, 1.0])


def simulate(scenario: Scenario, seed: int) -> End:
    """One rollout, step by step and look by look."""
    rng = np.random.default_rng([seed, *scenario.name.encode(), *scenario.test.encode()])
    spec = scenario.spec()
    alpha = alpha_of(spec)
    metrics = [metric for metric in spec.metrics if metric.source in scenario.judged]
    has_latency = "latency" in scenario.judged
    canary = Counts(scenario.errors, chances(MEDIAN_NS * scenario.slower, scenario.sigma))
    stable = Counts(scenario.base, chances(MEDIAN_NS, scenario.sigma))
    requests = reached = 0
    for step in spec.steps:
        canary.clear()
        stable.clear()
        for look in itertools.count(1):
            n = int(rng.binomial(A_LOOK, step.weight_bp / BASIS_POINTS))
            canary.draw(n, rng, has_latency)
            stable.draw(A_LOOK - n, rng, has_latency)
            requests += A_LOOK
            reached += n
            seen = Observation(canary.arm(), stable.arm())
            outcomes = [
                judge(metric, seen, alpha, SKETCH_BOUNDS_NS, step.min_requests).outcome
                for metric in metrics
            ]
            if Outcome.FAIL in outcomes:
                return End(Outcome.FAIL, requests, reached)
            is_over = look >= step.min_duration_s * LOOKS_A_SECOND
            if is_over and canary.requests >= step.min_requests and set(outcomes) == {Outcome.PASS}:
                break
            if requests >= scenario.most:
                return End(Outcome.INCONCLUSIVE, requests, reached)
    return End(Outcome.PASS, requests, reached)


def fixed_rule(scenario: Scenario, rate: float, rollouts: int) -> list[End]:
    """The same rollouts by fixed thresholds; at another rate the steps are as many requests long."""
    rng = np.random.default_rng([rollouts, *scenario.name.encode()])
    threshold_ns = (
        P99_THRESHOLD * MEDIAN_NS * math.exp(scenario.sigma * statistics.NormalDist().inv_cdf(0.99))
    )
    return [_fixed_rule(scenario, rate, threshold_ns, rng) for _ in range(rollouts)]


def _fixed_rule(
    scenario: Scenario, rate: float, threshold_ns: float, rng: np.random.Generator
) -> End:
    requests = reached = failed = 0
    a_check = int(rate * INTERVAL_S)
    for weight in _weights(a_check):
        n = int(rng.binomial(a_check, weight))
        requests += a_check
        reached += n
        if n == 0:
            continue
        errors = rng.binomial(n, scenario.errors)
        durations = rng.lognormal(math.log(MEDIAN_NS * scenario.slower), scenario.sigma, n)
        is_slow = np.quantile(durations, 0.99) > threshold_ns
        failed += bool(errors > ERROR_THRESHOLD * n or is_slow)
        if failed == FAILED_CHECKS:
            return End(Outcome.FAIL, requests, reached)
    return End(Outcome.PASS, requests, reached)


def _weights(a_check: int) -> Iterator[float]:
    """The canary's part at each check."""
    for weight_bp, seconds in PLAN:
        yield from itertools.repeat(weight_bp / BASIS_POINTS, int(RATE * seconds / a_check))


def row(name: str, rule: str, ends: Sequence[End], reported: Outcome = Outcome.FAIL) -> list[str]:
    """A line of the table. Medians are of the rollouts that ended as ``reported``."""
    decided = [end for end in ends if end.outcome is reported]
    medians = [
        f"{statistics.median(values):,.0f}" if values else "–"
        for values in ([e.requests for e in decided], [e.canary for e in decided])
    ]
    shown = (Outcome.FAIL, Outcome.PASS, Outcome.INCONCLUSIVE)
    return [
        name,
        rule,
        f"{len(ends):,}",
        *(f"{100 * count(ends, outcome).hits / len(ends):.2f}" for outcome in shown),
        *medians,
    ]


def count(ends: Sequence[End], outcome: Outcome) -> Rate:
    """Those that ended so."""
    return Rate(sum(end.outcome is outcome for end in ends), len(ends))


def curve(ends: Sequence[End]) -> list[list[float]]:
    """(requests, percent rolled back until then), as steps."""
    times = sorted(end.requests for end in ends if end.outcome is Outcome.FAIL)
    return [[t, 100 * (i + 1) / len(ends)] for i, t in enumerate(times)]


def main() -> int:
    """Simulate, publish; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description="Power of rollouts' verdicts.")
    parser.add_argument("--rollouts", type=int, default=2000, help="of each scenario")
    rollouts = parser.parse_args().rollouts
    report = Report(
        "rollout_power",
        "Rollouts of equal and of worse versions: simulated, judged by the gateway's own code",
        ("canary", "rule", "rollouts", "rolled back %", "promoted %", "undecided %",
         "requests to the verdict, median", "of the canary"),
        left=2,
    )  # fmt: skip
    ours: dict[str, list[End]] = {}
    fixed: dict[str, list[End]] = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for scenario in SCENARIOS:
            ends = list(pool.map(partial(simulate, scenario), range(rollouts), chunksize=20))
            ours[scenario.name] = ends
            report.rows.append(row(scenario.name, "sequential test", ends))
            print(report.rows[-1], flush=True)
            if scenario.margin != EQUAL.margin:
                continue  # the rule has no margin
            fixed[scenario.name] = fixed_rule(scenario, RATE, rollouts)
            report.rows.append(row(scenario.name, "fixed thresholds", fixed[scenario.name]))
        for scenario in PROOFS:
            seeds = range(max(1, rollouts // PROOF_ROLLOUTS))
            ends = list(pool.map(partial(simulate, scenario), seeds))
            expected = Outcome.PASS if scenario.errors == scenario.base else Outcome.FAIL
            report.rows.append(row(scenario.name, "waits for proof", ends, expected))
            print(report.rows[-1], flush=True)
    slow_rate = RATE / 20
    quiet = fixed_rule(EQUAL, slow_rate, rollouts)
    report.rows.append(row(EQUAL.name, f"fixed thresholds, {slow_rate:g} requests/s", quiet))
    ok = publish(report, ours, fixed, quiet)
    return 0 if ok else 1


def publish(
    report: Report, ours: dict[str, list[End]], fixed: dict[str, list[End]], quiet: list[End]
) -> bool:
    """Say which targets were met, draw, write; whether all were met."""
    report.notes += [
        f"*sequential test*: `test: inferiority`, margins 1 percentage point and 5 %; within "
        f"{BUDGET:,} requests of the model; a step judges its own requests",
        "*waits for proof*: `test: noninferiority`, margins 1 percentage point and (equal) 20 %; a step "
        "ends with a verdict only, so a worse version stays at 5 %",
        f"*fixed thresholds*: every {INTERVAL_S:g} s, error rate over {ERROR_THRESHOLD:.0%} or p99 over "
        f"{P99_THRESHOLD:g} times the stable version's true one; {FAILED_CHECKS} failed checks roll back",
        "thresholds that are put right catch more where traffic is high; they need to be known beforehand, "
        "and for each model and rate of requests",
        "latency's margin is 5 % here, without slack; the default is 10 %, and half a millisecond",
    ]
    checks = [("equal versions rolled back: at most 1 %", count(ours[EQUAL.name], Outcome.FAIL))]
    for scenario in (WORSE, SLOWER):
        text = f"{scenario.name}: at most 1 % missed within {BUDGET:,} requests"
        ends = ours[scenario.name]
        checks.append((text, Rate(len(ends) - count(ends, Outcome.FAIL).hits, len(ends))))
    for text, wrong in checks:
        low, high = wrong.bounds(0.05)
        part = wrong.hits / wrong.trials
        report.target(
            text, part <= TARGET, f"{part:.2%}, with 95 % confidence {low:.2%}–{high:.2%}"
        )
    panels: list[dict[str, Any]] = [
        {
            "title": name,
            "lines": {"sequential": curve(ours[name]), "fixed": curve(fixed[name])},
            "most": BUDGET,
        }
        for name in (EQUAL.name, WORSE.name, SLOWER.name)
    ]
    panels[0]["lines"] |= {"quiet": curve(quiet), "outage": curve(fixed[OUTAGE.name])}
    figure = RESULTS / "rollout_power.png"
    if draw(panels, figure, "rollout_power_chart.py"):
        report.figure = figure.name
    else:
        print("no figure: it needs matplotlib, see the head of benchmarks/policy.py")
    report.publish()
    return all(wrong.hits <= TARGET * wrong.trials for _, wrong in checks)


if __name__ == "__main__":
    sys.exit(main())
