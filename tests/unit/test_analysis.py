"""What a canary's numbers say of it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway._kernels import ledger
from gateway.rollout.analysis import (
    MIN_SAMPLE,
    ROW_CLASSES,
    Outcome,
    alpha_of,
    judge,
    judge_value,
)
from gateway.rollout.observation import Arm, Observation
from gateway.rollout.sequential import Rate, difference
from gateway.rollout.spec import MetricSpec, RolloutSpec, StepSpec
from gateway.telemetry.ledger import SKETCH_BOUNDS_NS

PASS, FAIL, INCONCLUSIVE, NO_DATA = (
    Outcome.PASS,
    Outcome.FAIL,
    Outcome.INCONCLUSIVE,
    Outcome.NO_DATA,
)
ALPHA = 1e-3
MS = 1_000_000


def metric(source, **fields) -> MetricSpec:
    return MetricSpec(name=source, source=source, **fields)


def look(spec, seen, minimum=100, alpha=ALPHA):
    """A verdict; whatever it is, it can be shown and stored."""
    verdict = judge(spec, seen, alpha, SKETCH_BOUNDS_NS, minimum)
    document = verdict.to_document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["text"] == verdict.text()
    assert verdict.text().startswith(spec.name)
    return verdict


def failing(errors, requests, others=0, rest=0) -> Observation:
    return Observation(Arm(requests, errors), Arm(rest, others))


def durations(median_ms, samples, sigma=0.5, seed=0) -> dict[int, int]:
    """A sketch of lognormal durations."""
    drawn = np.random.default_rng(seed).lognormal(math.log(median_ms * MS), sigma, samples)
    sketch: dict[int, int] = {}
    for ns in drawn:
        bucket = ledger.sketch_bucket(int(ns))
        sketch[bucket] = sketch.get(bucket, 0) + 1
    return sketch


def lasting(ours_ms, theirs_ms, samples=4000) -> Observation:
    return Observation(
        Arm(latency=durations(ours_ms, samples, seed=1)),
        Arm(latency=durations(theirs_ms, samples, seed=2)),
    )


def running(**classes) -> Observation:
    """Runs by class of rows: ``_8=(canary's ms, stable's ms, canary's runs, stable's runs)``."""
    ours, theirs = {}, {}
    for name, (a_ms, b_ms, a_runs, b_runs) in classes.items():
        rows = int(name[1:])
        ours[rows] = durations(a_ms, a_runs, 0.2, rows)
        theirs[rows] = durations(b_ms, b_runs, 0.2, rows + 1)
    return Observation(Arm(compute=ours), Arm(compute=theirs))


# Rates


@pytest.mark.parametrize("source", ["errors", "refusals"])
@pytest.mark.parametrize(
    ("hits", "requests", "others", "rest", "outcome"),
    [
        (0, 0, 0, 0, NO_DATA),
        (0, 0, 10, 1000, NO_DATA),
        (10, 1000, 0, 0, NO_DATA),
        (0, 100, 5, 1000, INCONCLUSIVE),
        (100, 10_000, 1000, 100_000, PASS),
        (0, 2000, 0, 20_000, PASS),
        (300, 10_000, 1000, 100_000, FAIL),
        (200, 10_000, 1000, 100_000, INCONCLUSIVE),  # exactly the margin
    ],
)
def test_a_rate_is_judged_by_its_difference(source, hits, requests, others, rest, outcome):
    field = {"errors": "errors", "refusals": "refusals"}[source]
    seen = Observation(Arm(requests, **{field: hits}), Arm(rest, **{field: others}))
    assert look(metric(source), seen).outcome is outcome


def test_a_rate_is_judged_by_its_own_counter():
    seen = Observation(Arm(10_000, errors=0, refusals=3000), Arm(100_000))
    assert look(metric("errors"), seen).outcome is PASS
    assert look(metric("refusals"), seen).outcome is FAIL


def test_the_margin_decides():
    seen = failing(300, 10_000, 1000, 100_000)
    assert look(metric("errors", margin=0.05), seen).outcome is PASS
    assert look(metric("errors", margin=0.001), seen).outcome is FAIL


@pytest.mark.parametrize("test", ["noninferiority", "inferiority"])
def test_nothing_fails_before_a_minimum_sample(test):
    fewest = MIN_SAMPLE - 1
    spec = metric("errors", test=test)
    assert look(spec, failing(fewest, fewest, 0, 10_000), minimum=1).outcome is INCONCLUSIVE
    assert look(spec, failing(1, 1, 0, 10_000), minimum=0).outcome is INCONCLUSIVE
    assert look(spec, failing(MIN_SAMPLE, MIN_SAMPLE, 0, 10_000), minimum=1).outcome is FAIL


def test_one_error_of_few_requests_is_no_failure():
    for requests in range(MIN_SAMPLE, 200):
        assert look(metric("errors"), failing(1, requests, 0, 10_000)).outcome is not FAIL


def test_inferiority_passes_with_enough_samples_unless_it_is_shown():
    spec = metric("errors", test="inferiority")
    assert look(spec, failing(1, 99, 1, 1000), minimum=100).outcome is INCONCLUSIVE
    assert look(spec, failing(1, 100, 1, 1000), minimum=100).outcome is PASS
    assert look(spec, failing(60, 100, 1, 1000), minimum=100).outcome is FAIL
    assert look(spec, failing(60, 90, 1, 1000), minimum=100).outcome is FAIL
    assert look(spec, failing(0, 0, 1, 1000), minimum=0).outcome is NO_DATA
    asked = look(metric("errors"), failing(1, 100, 1, 1000), minimum=100)
    assert asked.outcome is INCONCLUSIVE


def test_a_verdict_has_its_numbers():
    verdict = look(metric("errors"), failing(310, 10_000, 1000, 100_000))
    low, high = difference(Rate(310, 10_000), Rate(1000, 100_000), ALPHA)
    document = verdict.to_document()
    assert document["change"] == {
        "value": pytest.approx(0.021),
        "low": low,
        "high": high,
        "samples": None,
    }
    assert document["canary"]["samples"] == 10_000
    assert document["baseline"]["low"] < document["baseline"]["value"] == 0.01
    assert (document["limit"], document["alpha"]) == (0.01, ALPHA)
    assert (document["metric"], document["source"]) == ("errors", "errors")
    assert (document["outcome"], document["test"]) == ("fail", "noninferiority")


@given(
    st.integers(0, 500), st.integers(0, 500), st.integers(0, 2000), st.integers(0, 2000), st.data()
)
def test_another_error_of_the_canary_never_makes_it_better(hits, others, good, rest, data):
    test = data.draw(st.sampled_from(["noninferiority", "inferiority"]))
    spec = metric("errors", test=test)
    order = [PASS, INCONCLUSIVE, FAIL]
    requests = hits + good + 1
    before = look(spec, failing(hits, requests, others, others + rest + 1)).outcome
    after = look(spec, failing(hits + 1, requests, others, others + rest + 1)).outcome
    assert order.index(after) >= order.index(before)


# Durations


@pytest.mark.parametrize(
    ("ours_ms", "margin", "outcome"),
    [(10, 0.2, PASS), (12, 0.05, FAIL), (12, 0.2, INCONCLUSIVE), (9, 0.05, PASS), (15, 0.2, FAIL)],
)
def test_durations_are_judged_by_their_ratio(ours_ms, margin, outcome):
    verdict = look(metric("latency", margin=margin), lasting(ours_ms, 10, 20_000))
    assert verdict.outcome is outcome
    assert verdict.change is not None
    assert verdict.canary.value == pytest.approx(ours_ms / 1000, rel=0.05)
    assert verdict.change.value == pytest.approx(ours_ms / 10, rel=0.05)


@pytest.mark.parametrize(
    ("ours_ms", "theirs_ms", "slack_ms", "outcome"),
    [
        (0.4, 0.2, 0.5, PASS),  # twice as slow, and nobody's loss
        (0.4, 0.2, 0.1, FAIL),
        (0.9, 0.2, 0.5, FAIL),
        (30, 20, 0.5, FAIL),
        (20, 20, 0.5, PASS),
    ],
)
def test_what_is_within_the_slack_is_good(ours_ms, theirs_ms, slack_ms, outcome):
    verdict = look(metric("latency", slack_ms=slack_ms), lasting(ours_ms, theirs_ms, 40_000))
    assert verdict.outcome is outcome
    expected = max(0.1, slack_ms / (1e3 * verdict.baseline.value))
    assert verdict.limit == pytest.approx(expected)


def test_the_quantile_is_the_one_that_was_asked_for():
    calm = durations(10, 9000, 0.1) | {ledger.sketch_bucket(500 * MS): 900}
    seen = Observation(Arm(latency=calm), Arm(latency=durations(10, 20_000, 0.1)))
    assert look(metric("latency"), seen).outcome is PASS
    verdict = look(metric("latency", quantile=0.95), seen)
    assert verdict.outcome is FAIL
    assert "p95" in verdict.text()


def test_durations_without_samples_of_both_are_no_data():
    assert look(metric("latency"), Observation()).outcome is NO_DATA
    assert look(metric("latency"), Observation(Arm(latency={300: 50}))).outcome is NO_DATA


def test_runs_are_compared_with_runs_of_as_many_rows():
    """The canary runs larger batches: slower runs, and not slower at all."""
    ours = {1: durations(1, 100, 0.2), 32: durations(20, 3000, 0.2, 1)}
    theirs = {1: durations(1, 20_000, 0.2, 2), 32: durations(20, 1000, 0.2, 3)}
    verdict = look(metric("compute"), Observation(Arm(compute=ours), Arm(compute=theirs)))
    assert verdict.outcome is PASS
    assert verdict.rows == 32
    assert verdict.alpha == ALPHA / ROW_CLASSES


def test_any_class_fails_compute():
    verdict = look(metric("compute"), running(_1=(1, 1, 5000, 5000), _8=(6, 3, 400, 400)))
    assert verdict.outcome is FAIL
    assert verdict.rows == 8
    assert "up to 8 rows" in verdict.text()


def test_the_class_that_the_canary_ran_most_passes_compute():
    seen = running(_1=(1, 1, 2000, 2000), _8=(3, 3, 25, 400), _0=(9, 9, 21, 30))
    verdict = look(metric("compute"), seen)
    assert (verdict.outcome, verdict.rows) == (PASS, 1)
    seen = running(_1=(1, 1, 200, 2000), _8=(3.55, 3, 400, 400))
    assert look(metric("compute"), seen).outcome is INCONCLUSIVE


def test_a_class_that_one_side_hardly_ran_does_not_hold_compute_up():
    seen = running(_1=(1, 1, 2000, 2000), _8=(3, 3, 9000, MIN_SAMPLE - 1))
    assert look(metric("compute"), seen).rows == 1


def test_compute_without_a_common_class_is_no_data():
    ours, theirs = Arm(compute={1: {300: 50}}), Arm(compute={8: {300: 50}})
    assert look(metric("compute"), Observation(ours, theirs)).outcome is NO_DATA


def test_a_run_answers_many_requests_so_compute_needs_fewer_of_them():
    spec = metric("compute", test="inferiority")
    seen = running(_32=(3.5, 3, MIN_SAMPLE, 400))
    assert look(spec, seen, minimum=1000).outcome is PASS


def test_there_is_a_part_of_alpha_for_every_class():
    assert len(ledger.ROW_CLASSES) == ROW_CLASSES


# Agreement and queries


@pytest.mark.parametrize(
    ("agreed", "compared", "outcome"),
    [
        (0, 0, NO_DATA),
        (15, 15, INCONCLUSIVE),
        (9980, 10_000, PASS),
        (9700, 10_000, FAIL),
        (990, 1000, INCONCLUSIVE),
    ],
)
def test_agreement_is_judged_by_its_bound(agreed, compared, outcome):
    seen = Observation(compared=compared, agreed=agreed)
    verdict = look(metric("agreement"), seen)
    assert verdict.outcome is outcome
    assert verdict.baseline is None


@pytest.mark.parametrize(
    ("direction", "value", "outcome"),
    [
        ("lower", 1.0, PASS),
        ("lower", 2.0, PASS),
        ("lower", 2.1, FAIL),
        ("lower", math.inf, FAIL),
        ("higher", 2.1, PASS),
        ("higher", 1.9, FAIL),
        ("higher", math.nan, NO_DATA),
        ("lower", math.nan, NO_DATA),
        ("lower", None, NO_DATA),
    ],
)
def test_a_query_is_judged_by_its_bound(direction, value, outcome):
    spec = metric("prometheus", query="up", bound=2.0, direction=direction)
    verdict = judge_value(spec, value)
    assert verdict.outcome is outcome
    document = verdict.to_document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["test"] == "threshold"


def test_a_query_has_no_counters():
    with pytest.raises(ValueError, match="judge_value"):
        judge(metric("prometheus", query="up", bound=1), Observation(), ALPHA, SKETCH_BOUNDS_NS, 1)


# Words


@pytest.mark.parametrize(
    ("spec", "seen", "text"),
    [
        (
            metric("errors"),
            failing(310, 10_000, 1000, 100_000),
            "errors 3.1 % (2.4–3.9) against 1.0 % (0.86–1.2): more than 1 percentage point worse",
        ),
        (
            metric("errors", margin=0.02),
            failing(0, 10_000, 0, 100_000),
            "errors 0.0 % (0.0–0.12) against 0.0 % (0.0–0.014): not more than 2 percentage points worse",
        ),
        (
            metric("errors", test="inferiority"),
            failing(2, 100, 10, 1000),
            "errors 2.0 % (0.017–12.7) against 1.0 % (0.19–2.9): "
            "not shown to be more than 1 percentage point worse",
        ),
        (
            metric("agreement"),
            Observation(compared=100, agreed=100),
            "agreement 100.0 % (92.3–100.0): not yet known whether it is below 99 %",
        ),
        (
            metric("agreement"),
            Observation(compared=10_000, agreed=9000),
            "agreement 90.0 % (88.4–91.5): below 99 %",
        ),
        (metric("errors"), failing(0, 0), "errors nothing against nothing: nothing to compare"),
    ],
)
def test_a_verdict_in_words(spec, seen, text):
    assert look(spec, seen).text() == text


def test_durations_in_words():
    text = look(metric("latency", margin=0.05), lasting(12, 10)).text()
    assert text.startswith("latency p50 1")
    assert " ms (1" in text
    assert text.endswith(": more than 5 % slower")
    few = Observation(Arm(latency={300: 2}), Arm(latency={300: 2}))
    assert "–inf)" in look(metric("latency"), few).text()


@pytest.mark.parametrize(
    ("direction", "value", "text"),
    [
        ("lower", 0.5, "prometheus 0.5: at most 2"),
        ("lower", 2.5, "prometheus 2.5: above 2"),
        ("higher", 2.5, "prometheus 2.5: at least 2"),
        ("higher", 0.5, "prometheus 0.5: below 2"),
        ("higher", None, "prometheus nothing: nothing to compare"),
    ],
)
def test_a_query_in_words(direction, value, text):
    spec = metric("prometheus", query="up", bound=2.0, direction=direction)
    assert judge_value(spec, value).text() == text


# The whole rollout


def plan(steps=3, **fields) -> RolloutSpec:
    weights = tuple(StepSpec(weight_bp=1000 * (i + 1)) for i in range(steps))
    return RolloutSpec(canary=2, stable=1, steps=weights, **fields)


def test_alpha_is_shared_by_steps_and_metrics_that_are_tested():
    query = metric("prometheus", query="up", bound=1)
    assert alpha_of(plan()) == pytest.approx(0.01 / 6)
    assert alpha_of(plan(1, confidence=0.95, metrics=(metric("errors"),))) == pytest.approx(0.05)
    assert alpha_of(plan(2, metrics=(metric("errors"), query))) == pytest.approx(0.005)
    assert alpha_of(plan(metrics=(query,))) == pytest.approx(0.01)


@settings(max_examples=5)
@given(st.integers(0, 2**32 - 1))
def test_an_equal_version_passes_and_one_that_is_worse_fails(seed):
    """At every look of a step at 20 %: what is decided is decided rightly."""
    rng = np.random.default_rng(seed)
    alpha = 1e-6
    for rate, wrong in ((0.01, FAIL), (0.06, PASS)):
        outcome, requests, errors, rest, others = INCONCLUSIVE, 0, 0, 0, 0
        while outcome is INCONCLUSIVE:
            requests, rest = requests + 100, rest + 400
            errors += int(rng.binomial(100, rate))
            others += int(rng.binomial(400, 0.01))
            seen = failing(errors, requests, others, rest)
            outcome = look(metric("errors"), seen, alpha=alpha).outcome
            assert outcome is not wrong
            assert requests < 20_000
