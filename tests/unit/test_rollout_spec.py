"""What a rollout may be asked to do, and the record that it is kept in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.rollout.observation import Arm, Observation
from gateway.rollout.record import Pause, Rollout, RolloutState, route_of
from gateway.rollout.spec import DEFAULT_METRICS, MetricSpec, RolloutSpec
from gateway.serving.routing import ModelRoute, Pin, Shadow, Share, Sticky

STEP = {"weight_bp": 500}
QUERY = {"name": "q", "source": "prometheus", "query": "up", "bound": 1}


def spec(**fields: Any) -> RolloutSpec:
    return RolloutSpec.model_validate({"canary": 2, "stable": 1, "steps": [STEP]} | fields)


def in_state(state: RolloutState, **fields: Any) -> Rollout:
    return Rollout("id", "m", spec(**fields), "salt", 1.0, 1.0, state=state)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"stepz": []}, "stepz"),
        ({"steps": [STEP | {"weight": 5}]}, "weight"),
        ({"steps": []}, "steps"),
        ({"steps": [{"weight_bp": 10_001}]}, "weight_bp"),
        ({"steps": [{"weight_bp": 500}, {"weight_bp": 499}]}, "weights must not fall"),
        ({"steps": [{"weight_bp": 0}]}, "never met"),
        ({"stable": 2}, "two versions"),
        ({"canary": 0}, "canary"),
        ({"metrics": [*DEFAULT_METRICS, DEFAULT_METRICS[0]]}, "the same name"),
        ({"metrics": [{"name": "a", "source": "agreement"}]}, "mirror_percent"),
        ({"metrics": [QUERY | {"query": None}]}, "query and bound"),
        ({"metrics": [QUERY | {"margin": 0.1}]}, "margin says nothing about prometheus"),
        ({"sticky": {"key": "query:user"}}, "sticky"),
        ({"match": [{"header": "a b", "value": "x"}]}, "header"),
        ({"confidence": 1.0}, "confidence"),
        ({"progress_deadline_s": float("inf")}, "progress_deadline_s"),
        ({"gates": [{"name": "g", "url": "ftp://gate/"}]}, "url"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(fields: dict[str, Any], said: str):
    with pytest.raises(ValidationError, match=said):
        spec(**fields)


def test_outputs_are_compared_in_one_way():
    steps = [STEP | {"mirror_percent": 10}]
    top1 = {"name": "a", "source": "agreement"}
    with pytest.raises(ValidationError, match="one way only"):
        spec(steps=steps, metrics=[top1, top1 | {"name": "b", "compare": "exact"}])
    assert spec(steps=steps, metrics=[top1]).agreement == MetricSpec(name="a", source="agreement")


@pytest.mark.parametrize(
    ("metric", "limit"),
    [
        ({"source": "errors"}, 0.01),
        ({"source": "refusals", "margin": 0.0}, 0.0),
        ({"source": "compute"}, 0.1),
        ({"source": "latency", "margin": 0.05}, 0.05),
        ({"source": "agreement"}, 0.99),
        ({"source": "agreement", "bound": 0.5}, 0.5),
        ({"source": "prometheus", "query": "up", "bound": -3}, -3),
    ],
)
def test_the_limit_that_holds(metric: dict[str, Any], limit: float):
    assert MetricSpec.model_validate({"name": "m"} | metric).limit == limit


def test_a_record_is_read_as_it_was_written():
    every_source = [
        *DEFAULT_METRICS,
        {"name": "refusals", "source": "refusals", "margin": 0.5},
        {"name": "latency", "source": "latency", "quantile": 0.99},
        {"name": "same", "source": "agreement", "compare": "cosine", "tolerance": 0.1},
        QUERY | {"direction": "higher"},
    ]
    rollout = Rollout(
        "id",
        "m",
        spec(
            steps=[STEP | {"mirror_percent": 10}],
            metrics=every_source,
            sticky={"key": "cookie:user"},
            match=[{"header": "X-Canary", "value": "yes"}],
            gates=[{"name": "g", "url": "http://gate/"}],
        ),
        "salt",
        1.5,
        2.5,
        state=RolloutState.PAUSED,
        pause=Pause.GATE,
        paused_s=2.5,
        seen=Observation(Arm(3, 1, 1, {7: 3}, {0: {5: 1}}), Arm(4), 2, 1),
        strikes={"gate:g": 1},
        verdicts={"errors": {"outcome": "pass"}},
        reason="why",
    )
    written = json.dumps(rollout.to_document(), allow_nan=False)
    assert Rollout.from_document(json.loads(written)) == rollout


@pytest.mark.parametrize("state", RolloutState)
def test_the_route_of_every_state(state: RolloutState):
    shares = {
        RolloutState.STEPPING: (Share(2, 500), Share(1, 9500)),
        RolloutState.PAUSED: (Share(2, 500), Share(1, 9500)),
        RolloutState.PROMOTING: (Share(2, 10_000),),
        RolloutState.SUCCEEDED: (Share(2, 10_000),),
    }
    assert route_of(in_state(state)).shares == shares.get(state, (Share(1, 10_000),))


@pytest.mark.parametrize(
    ("weight_bp", "shares"),
    [
        (0, (Share(1, 10_000),)),
        (500, (Share(2, 500), Share(1, 500, is_slice=True), Share(1, 9000))),
        (5000, (Share(2, 5000), Share(1, 5000, is_slice=True))),
        (8000, (Share(2, 8000), Share(1, 2000, is_slice=True))),
        (10_000, (Share(2, 10_000),)),
    ],
)
def test_an_equal_slice_is_as_large_as_it_can_be(weight_bp: int, shares: tuple[Share, ...]):
    steps = [{"weight_bp": weight_bp, "min_requests": 0}]
    route = route_of(in_state(RolloutState.STEPPING, steps=steps, baseline="equal_slice"))
    assert route.shares == shares


def test_a_route_has_what_its_spec_says():
    route = route_of(
        in_state(
            RolloutState.STEPPING,
            steps=[STEP | {"mirror_percent": 12.5}],
            metrics=[{"name": "same", "source": "agreement", "compare": "exact"}],
            sticky={"key": "header:X-User", "salt": "own"},
            match=[{"header": "X-Pin", "value": "a", "to": "stable"}],
        )
    )
    assert route == ModelRoute(
        shares=(Share(2, 500), Share(1, 9500)),
        salt="own",
        sticky=Sticky("header", "x-user"),
        pins=(Pin("x-pin", "a", 1),),
        shadow=Shadow(2, 1250, "exact", 1e-3),
    )
