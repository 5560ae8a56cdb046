"""Whether a canary is worse than what it is compared with: verdicts with their numbers.

Counters are judged four times a second and whenever a step may end, so every test holds at all looks together
(`sequential`). A verdict is about the margin: FAIL when it is shown that the canary is worse by more, PASS
when it is shown that it is not.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gateway.clock import NS_PER_MS, NS_PER_S
from gateway.rollout.observation import Arm, Observation, Sketch
from gateway.rollout.sequential import Bounds, Quantile, Rate, difference, ratio
from gateway.rollout.spec import MetricSpec, RolloutSpec, Source

MIN_SAMPLE = 20
"""Samples of each side before which no test decides; only the kill-switch acts on fewer."""

ROW_CLASSES = 9
"""Classes of rows that runs are counted by (`ledger.rows_class`). Any of them may come to be compared."""


class Outcome(enum.Enum):
    """What a look at a metric says."""

    PASS = "pass"  # noqa: S105 - no password
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    NO_DATA = "no_data"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured value (None: nothing was), and the bounds of what is not refuted of the true one."""

    value: float | None
    low: float | None = None
    high: float | None = None
    samples: int | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a look at a metric says, and by which numbers.

    Attributes:
        metric: its name.
        source: where its numbers come from. Rates are parts of 1, durations are seconds.
        outcome: what follows.
        test: ``noninferiority``, ``inferiority`` or (of a query) ``threshold``.
        limit: the margin or bound that the outcome is about; of durations at least the slack.
        direction: of a query, whether lower or higher is better.
        alpha: how often a test like this one may be wrong, at any of its looks.
        canary: of the new version.
        baseline: of what it is compared with; None where it is compared with a bound.
        change: of rates the canary's less the baseline's, of durations their quotient.
        quantile: of durations, the one that is compared.
        rows: the class of rows of the runs that decided.
    """

    metric: str
    source: Source
    outcome: Outcome
    test: str
    limit: float
    direction: str
    alpha: float | None
    canary: Estimate
    baseline: Estimate | None = None
    change: Estimate | None = None
    quantile: float | None = None
    rows: int | None = None

    def to_document(self) -> dict[str, Any]:
        """For JSON, with the line that `text` makes of it."""
        document = _jsonable(asdict(self))
        return {**document, "outcome": self.outcome.value, "text": self.text()}

    def text(self) -> str:
        """One line: what was measured, and what that says of the limit."""
        measured = f"{self._title()} {self._shown(self.canary)}"
        if self.baseline is not None:
            measured += f" against {self._shown(self.baseline)}"
        return f"{measured}: {self._conclusion()}"

    def _title(self) -> str:
        title = self.metric if self.quantile is None else f"{self.metric} p{100 * self.quantile:g}"
        if self.rows is None:
            return title
        return f"{title} of {f'up to {self.rows}' if self.rows else 'the most'} rows"

    def _shown(self, estimate: Estimate) -> str:
        if estimate.value is None:
            return "nothing"
        match self.source:
            case "prometheus":
                return f"{estimate.value:g}"
            case "latency" | "compute":
                scale, unit = 1e3, "ms"
            case _:
                scale, unit = 100.0, "%"
        value, low, high = (
            "?" if x is None else _digits(scale * x)
            for x in (estimate.value, estimate.low, estimate.high)
        )
        return f"{value} {unit} ({low}–{high})"

    def _conclusion(self) -> str:
        if self.outcome is Outcome.NO_DATA:
            return "nothing to compare"
        if self.outcome is Outcome.INCONCLUSIVE:
            return f"not yet known whether it is {self._limit_in_words(is_worse=True)}"
        is_worse = self.outcome is Outcome.FAIL
        words = self._limit_in_words(is_worse)
        return f"not shown to be {words}" if self._is_unrefuted else words

    @property
    def _is_unrefuted(self) -> bool:
        """It passed because nothing speaks against it."""
        return self.test == "inferiority" and self.outcome is Outcome.PASS

    def _limit_in_words(self, is_worse: bool) -> str:
        """``more than 1 percentage point worse``; where ``is_worse`` is not asked for, the contrary."""
        is_worse = is_worse or self._is_unrefuted
        match self.source:
            case "agreement":
                return f"{'below' if is_worse else 'at least'} {100 * self.limit:g} %"
            case "prometheus" if self.direction == "lower":
                return f"{'above' if is_worse else 'at most'} {self.limit:g}"
            case "prometheus":
                return f"{'below' if is_worse else 'at least'} {self.limit:g}"
            case "latency" | "compute":
                words = f"more than {100 * self.limit:.3g} % slower"
            case _:
                points = "point" if self.limit == 0.01 else "points"
                words = f"more than {100 * self.limit:g} percentage {points} worse"
        return words if is_worse else f"not {words}"


def alpha_of(spec: RolloutSpec) -> float:
    """What each test of each step may use up of 1 - confidence.

    A rollout rolls back when any metric fails in any step, so all of these share it evenly. The two sides of
    a test do not: one region decides both ways. Queries have no test and get no part. Promotion needs every
    step to pass, so a version that is worse is promoted with a probability of this part at most.
    """
    tests = len(spec.steps) * sum(metric.source != "prometheus" for metric in spec.metrics)
    return (1 - spec.confidence) / max(1, tests)


def judge(
    metric: MetricSpec, seen: Observation, alpha: float, bounds: Sequence[int], minimum: int
) -> Verdict:
    """Judge by what was counted since the step began.

    Args:
        metric: of any source but ``prometheus``.
        seen: all of the step so far, however often it was judged before.
        alpha: see `alpha_of`.
        bounds: upper bounds of the sketches' buckets in ns, of which the last is open.
        minimum: samples of the canary with which a metric passes that asks only whether it is shown to be
            worse. Of ``compute`` it is `MIN_SAMPLE`: one run may have answered many requests.
    """
    canary, baseline = seen.canary, seen.baseline
    match metric.source:
        case "errors":
            return _judge_rates(metric, _errors(canary), _errors(baseline), alpha, minimum)
        case "refusals":
            return _judge_rates(metric, _refusals(canary), _refusals(baseline), alpha, minimum)
        case "latency":
            pair = canary.latency, baseline.latency
            return _judge_durations(metric, *pair, alpha, bounds, minimum)
        case "compute":
            return _judge_compute(metric, canary, baseline, alpha, bounds)
        case "agreement":
            return _judge_agreement(metric, seen, alpha, minimum)
        case "prometheus":
            raise ValueError("a query is judged by judge_value")


def judge_value(metric: MetricSpec, value: float | None) -> Verdict:
    """Judge what a query answered; None or not a number: no data."""
    if value is None or math.isnan(value):
        outcome, value = Outcome.NO_DATA, None
    else:
        is_good = value <= metric.limit if metric.direction == "lower" else value >= metric.limit
        outcome = Outcome.PASS if is_good else Outcome.FAIL
    return _verdict(metric, outcome, None, Estimate(value), test="threshold")


def _errors(arm: Arm) -> Rate:
    return Rate(arm.errors, arm.requests)


def _refusals(arm: Arm) -> Rate:
    return Rate(arm.refusals, arm.requests)


def _judge_rates(
    metric: MetricSpec, canary: Rate, baseline: Rate, alpha: float, minimum: int
) -> Verdict:
    worse = difference(canary, baseline, alpha)
    outcome = _decide(metric, (canary.trials, baseline.trials), worse, metric.limit, minimum)
    ours, theirs = _of_rate(canary, alpha), _of_rate(baseline, alpha)
    value = None if ours.value is None or theirs.value is None else ours.value - theirs.value
    return _verdict(metric, outcome, alpha, ours, theirs, Estimate(value, *worse))


def _judge_agreement(metric: MetricSpec, seen: Observation, alpha: float, minimum: int) -> Verdict:
    """By the rate of copies that do not agree: it is expected to be small, as errors are."""
    differing = Rate(seen.compared - seen.agreed, seen.compared)
    low, high = differing.bounds(alpha)
    outcome = _decide(metric, (seen.compared,), Bounds(low, high), 1 - metric.limit, minimum)
    value = seen.agreed / seen.compared if seen.compared else None
    return _verdict(metric, outcome, alpha, Estimate(value, 1 - high, 1 - low, seen.compared))


def _judge_compute(
    metric: MetricSpec, canary: Arm, baseline: Arm, alpha: float, bounds: Sequence[int]
) -> Verdict:
    """By class of rows: any class can fail it, the one that the canary ran most can pass it.

    Classes of which one side has too few runs come after all others.
    """

    def rank(rows: int) -> tuple[bool, int]:
        ours, theirs = (sum(arm.compute[rows].values()) for arm in (canary, baseline))
        return min(ours, theirs) >= MIN_SAMPLE, ours

    both = canary.compute.keys() & baseline.compute.keys()
    ranked = sorted(both, key=rank, reverse=True)
    verdicts = [
        _judge_durations(
            metric,
            canary.compute[rows],
            baseline.compute[rows],
            alpha / ROW_CLASSES,
            bounds,
            MIN_SAMPLE,
            rows,
        )
        for rows in ranked
    ]
    if not verdicts:
        return _judge_durations(metric, {}, {}, alpha / ROW_CLASSES, bounds, MIN_SAMPLE)
    failed = [verdict for verdict in verdicts if verdict.outcome is Outcome.FAIL]
    return (failed or verdicts)[0]


def _judge_durations(
    metric: MetricSpec,
    canary: Sketch,
    baseline: Sketch,
    alpha: float,
    bounds: Sequence[int],
    minimum: int,
    rows: int | None = None,
) -> Verdict:
    ours, theirs = (Quantile(side, bounds, metric.quantile) for side in (canary, baseline))
    slower = ratio(ours, theirs, alpha)
    samples = ours.samples, theirs.samples
    limit = metric.limit
    if theirs.samples:
        limit = max(limit, metric.slack_ms * NS_PER_MS / max(1.0, theirs.estimate()))
    outcome = _decide(metric, samples, slower, 1 + limit, minimum)
    change = Estimate(ours.estimate() / theirs.estimate() if all(samples) else None, *slower)
    both = _of_quantile(ours, alpha), _of_quantile(theirs, alpha)
    return _verdict(
        metric, outcome, alpha, *both, change, limit=limit, quantile=metric.quantile, rows=rows
    )


def _decide(
    metric: MetricSpec, samples: Sequence[int], worse: Bounds, limit: float, minimum: int
) -> Outcome:
    """What bounds of how much worse the canary is (``samples``: it first) say of the limit."""
    if not all(samples):
        return Outcome.NO_DATA
    if min(samples) < MIN_SAMPLE:
        return Outcome.INCONCLUSIVE
    if worse.low > limit:
        return Outcome.FAIL
    is_shown = worse.high < limit
    if is_shown or (metric.test == "inferiority" and samples[0] >= minimum):
        return Outcome.PASS
    return Outcome.INCONCLUSIVE


def _of_rate(rate: Rate, alpha: float) -> Estimate:
    value = rate.hits / rate.trials if rate.trials else None
    return Estimate(value, *rate.bounds(alpha), rate.trials)


def _of_quantile(durations: Quantile, alpha: float) -> Estimate:
    low, high = durations.bounds(alpha)
    value = durations.estimate() / NS_PER_S if durations.samples else None
    return Estimate(value, low / NS_PER_S, high / NS_PER_S, durations.samples)


def _verdict(
    metric: MetricSpec,
    outcome: Outcome,
    alpha: float | None,
    canary: Estimate,
    baseline: Estimate | None = None,
    change: Estimate | None = None,
    *,
    limit: float | None = None,
    test: str | None = None,
    quantile: float | None = None,
    rows: int | None = None,
) -> Verdict:
    return Verdict(
        metric=metric.name,
        source=metric.source,
        outcome=outcome,
        test=metric.test if test is None else test,
        limit=metric.limit if limit is None else limit,
        direction=metric.direction,
        alpha=alpha,
        canary=canary,
        baseline=baseline,
        change=change,
        quantile=quantile,
        rows=rows,
    )


def _jsonable(document: dict[str, Any]) -> dict[str, Any]:
    """The same with None for infinity, which JSON does not have."""
    return {
        key: _jsonable(value)
        if isinstance(value, dict)
        else (None if isinstance(value, float) and not math.isfinite(value) else value)
        for key, value in document.items()
    }


def _digits(value: float) -> str:
    """As many as a reader needs."""
    return f"{value:.1f}" if value >= 1 or value == 0 else f"{value:.2g}"
