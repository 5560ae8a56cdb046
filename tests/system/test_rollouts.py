"""Rollouts of real versions under a steady load: what clients see of them, and what kills leave of them."""

from __future__ import annotations

import random
import time

import pytest

from tests.system.rolling import (
    KEYS,
    LAYERS,
    MODEL,
    Admin,
    Load,
    bucket,
    check_resumed,
    exposure,
    failures,
    is_whole,
    kill_all,
    make_repository,
    start_again,
    stored,
)
from tests.system.server import LANES, Server

ERRORS = {"name": "errors", "source": "errors", "margin": 0.02}

JUDGED = {
    "metrics": [
        ERRORS,
        {"name": "compute", "source": "compute", "margin": 1.0, "slack_ms": 0},
        {"name": "agreement", "source": "agreement", "bound": 0.85},
    ],
    "skip_requests": 10,
    "abort_keep_warm_s": 0,
    "progress_deadline_s": 60,
}
"""A rollout that is judged by everything that is counted here."""

COPIES = {"weight_bp": 0, "mirror_percent": 50, "min_requests": 20}

STEPS = [
    COPIES,
    {"weight_bp": 2000, "min_requests": 60, "mirror_percent": 75},
    {"weight_bp": 5000, "min_requests": 60},
]
"""With copies the canary runs as often as the other: a version that is asked less has colder caches."""

BY_HAND = {"metrics": [], "kill_switch": None, "abort_keep_warm_s": 0}
"""A rollout that nothing but commands moves."""


@pytest.fixture
def repository(tmp_path):
    return make_repository(tmp_path)


KILLS = 5

SLOW_LAYERS = 9 * LAYERS
"""Of a version that takes several times as long, on whatever machine and beside whatever else."""


def step(weight_bp: int, **more: object) -> dict[str, object]:
    return {"weight_bp": weight_bp, "pause": True, "min_requests": 0} | more


def is_at(number: int):
    """Whether a rollout waits at a step, so that its route is that step's for everybody."""
    return lambda rollout: rollout["step"] == number and rollout["state"] == "PAUSED"


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_good_versions_are_promoted_and_bad_ones_rolled_back(repository):
    versions = {
        "good": "SUCCEEDED",
        "failing": "ABORTED",
        "wrong": "ABORTED",
        "broken": "FAILED",
        "slow": "ABORTED",
        "good again": "SUCCEEDED",
    }
    with (
        Server(repository, GATEWAY_LOAD_TIMEOUT_S="20") as server,
        Admin(server.admin_url) as admin,
        Load(server.url) as load,
    ):
        for number, (name, end) in enumerate(versions.items(), 2):
            kind, layers = ("good", SLOW_LAYERS) if name == "slow" else (name.split()[0], LAYERS)
            admin.register(kind, number, layers=layers)
            rollout = admin.start(JUDGED | {"canary": number, "steps": STEPS})
            begun = len(load.answers)
            rollout = admin.wait_end(rollout["id"])
            answers, events = load.answers[begun:], admin.events(rollout["id"])
            assert rollout["state"] == end, f"{name}: {rollout['reason']}"
            bad = {"failing": number}.get(name, -1)
            assert not failures(answers, bad), name
            exposed = exposure(answers, rollout, events)
            assert exposed.answered <= exposed.most, name
            if name == "wrong":
                assert not any(answer.version == number for answer in answers), rollout["reason"]
            if end != "SUCCEEDED":
                stable = rollout["spec"]["stable"]
                route = admin.ask("GET", f"/models/{MODEL}/route")
                assert [share["version"] for share in route["shares"]] == [stable]


def test_a_canary_that_fails_everything_goes_within_a_second_of_traffic(repository):
    with (
        Server(repository) as server,
        Admin(server.admin_url) as admin,
        Load(server.url, rate=200) as load,
    ):
        admin.register("failing", 2, above=0)
        steps = [step(5000, min_duration_s=60)]
        rollout = admin.start(BY_HAND | {"canary": 2, "steps": steps, "kill_switch": {}})
        rollout = admin.wait_end(rollout["id"])
        events = {event["kind"]: event["at_s"] for event in admin.events(rollout["id"])}
        answered = len(load.answers)
        admin.wait(rollout["id"], lambda _: len(load.answers) > answered + 50)
    assert rollout["state"] == "ABORTED"
    failed = [answer for answer in load.answers if answer.status == 500]
    assert {answer.version for answer in failed} == {2}
    assert not [answer for answer in failures(load.answers) if answer not in failed]
    assert failed[-1].answered_s - failed[0].answered_s < 1, "the kill-switch is slow"
    assert failed[-1].answered_s < events["rollout.aborted"] + 0.1


@pytest.mark.slow
def test_a_canary_that_ends_its_workers_is_rolled_back(repository):
    with (
        Server(repository) as server,
        Admin(server.admin_url) as admin,
        Load(server.url, rate=400) as load,
    ):
        admin.register("crashing", 2)
        rollout = admin.start(
            JUDGED | {"canary": 2, "steps": STEPS[2:], "metrics": [ERRORS | {"margin": 0.005}]}
        )
        rollout = admin.wait_end(rollout["id"], 90)
        assert rollout["state"] == "ABORTED", rollout["reason"]
    assert not failures(load.answers, 2)


def test_commands_and_their_refusals(repository):
    path = f"/models/{MODEL}/rollouts"
    with Server(repository) as server, Admin(server.admin_url) as admin:
        for number in (2, 3):
            admin.register("good", number)
        spec = BY_HAND | {"canary": 2, "steps": [step(1000), step(3000), step(6000)]}
        assert admin.ask("POST", path, json=spec | {"dry_run": True})["dry_run"]
        rollout = admin.start(spec)
        mine = rollout["id"]
        assert rollout["spec"]["stable"] == 1
        admin.start(spec | {"canary": 3}, 409)
        admin.start(spec, 409)
        admin.wait(mine, is_at(0))
        admin.command(mine, "resume", 412, match='"99"')
        revision = admin.ask("GET", f"/models/{MODEL}")["revision"]
        assert admin.command(mine, "promote", match=f'"{revision}"')["step"] == 1
        admin.command(mine, "promote", 412, match=f'"{revision}"')
        admin.wait(mine, is_at(1))
        admin.ask(
            "PUT",
            f"/models/{MODEL}/route",
            409,
            json={"shares": [{"version": 1, "weight_bp": 10000}]},
        )
        admin.ask("POST", f"/models/{MODEL}/versions/1:unload", 409)
        admin.command(mine, "resume")
        admin.wait(mine, is_at(2))
        paused = admin.command(mine, "pause")
        assert paused["pause"] == "manual"
        admin.command(mine, "retry", 409)
        admin.command(mine, "abort")
        assert admin.wait_end(mine)["state"] == "ABORTED"
        admin.command(mine, "resume", 409)
        again = admin.command(mine, "retry")
        assert (again["state"], again["attempt"], again["salt"]) == ("PENDING", 2, rollout["salt"])
        admin.wait(mine, is_at(0))
        admin.command(mine, "promote?full=true")
        assert admin.wait_end(mine)["state"] == "SUCCEEDED"
        shown = admin.ask("GET", f"/models/{MODEL}")
        assert shown["labels"] == {"stable": 2}
        assert [share["version"] for share in shown["route"]["shares"]] == [2]
        kinds = [event["kind"] for event in admin.events(mine)]
        assert kinds[-1] == "rollout.succeeded"
        assert kinds.count("rollout.aborted") == 1


@pytest.mark.slow
@pytest.mark.parametrize("lane", LANES)
def test_weights_hold_and_keys_stay(repository, lane):
    """On two front ends, over every weight: splits are the weights', and no key goes back."""
    weights = (500, 2500, 6000, 10000)
    with (
        Server(repository, "--frontends", "2", **LANES[lane]) as server,
        Admin(server.admin_url) as admin,
    ):
        admin.register("good", 2)
        spec = BY_HAND | {"canary": 2, "steps": [step(weight) for weight in weights]}
        rollout = admin.start(spec | {"sticky": {"key": "header:X-User"}})
        mine = rollout["id"]
        admin.wait(mine, is_at(0))
        with Load(server.url, rate=400, keys=KEYS[:50]) as steady:
            for number, weight in enumerate(weights):
                admin.wait(mine, is_at(number))
                with Load(server.url, rate=None, most=2500) as drawn:
                    drawn.wait()
                assert not failures(drawn.answers)
                got = sum(answer.version == 2 for answer in drawn.answers)
                share, many = weight / 10_000, len(drawn.answers)
                assert abs(got - many * share) <= 4 * (many * share * (1 - share)) ** 0.5
                admin.command(mine, "promote")
            assert admin.wait_end(mine)["state"] == "SUCCEEDED"
    assert not failures(steady.answers)
    moved = {}
    for answer in sorted(steady.answers, key=lambda answer: answer.sent_s):
        since_s = moved.get(answer.key)
        if answer.version == 2:
            moved.setdefault(answer.key, answer.answered_s)
        else:
            assert since_s is None or answer.sent_s < since_s, f"{answer.key} went back"
    salt = rollout["salt"]
    assert moved.keys() >= {key for key in KEYS[:50] if bucket(salt, key) < weights[-2]}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_kills_at_any_moment_change_nothing_of_a_rollout(repository):
    """After each the same step goes on, with the numbers that the store has and the route that it says."""
    chance, lives = random.Random(5), 0
    steps = [{"weight_bp": weight, "min_requests": 60} for weight in (1500, 3000, 5000, 8000)]
    spec = {"canary": 2, "steps": steps, "metrics": [], "sticky": {"key": "header:X-User"}}
    identity, before, route = "", None, None
    while True:
        with start_again(repository) as server, Admin(server.admin_url) as admin:
            if before is not None:
                check_resumed(before, route, server, admin, identity)
            else:
                admin.register("good", 2)
                identity = admin.start(spec)["id"]
            with Load(server.url, rate=200, keys=KEYS):
                if lives == KILLS:
                    ended = admin.wait_end(identity)
                    break
                time.sleep(chance.uniform(0, 1.5))
                kill_all(server)
        lives += 1
        assert is_whole(repository)
        before, route = stored(repository, identity)
    assert ended["state"] == "SUCCEEDED"


@pytest.mark.parametrize("kind", ["broken", "hanging"])
def test_a_canary_that_cannot_be_loaded_does_not_keep_a_killed_server_from_its_start(
    repository, kind
):
    with start_again(repository, GATEWAY_LOAD_TIMEOUT_S="600") as server:
        with Admin(server.admin_url) as admin:
            admin.register("hanging", 2)
            mine = admin.start(BY_HAND | {"canary": 2, "steps": [step(5000)]})["id"]
            admin.wait(mine, lambda rollout: rollout["state"] == "WARMING")
        kill_all(server)
    if kind == "broken":
        (repository / MODEL / "2" / "model.onnx").write_bytes(b"no model at all")
    with (
        start_again(repository, GATEWAY_LOAD_TIMEOUT_S="8") as server,
        Admin(server.admin_url) as admin,
        Load(server.url, rate=100, most=50) as load,
    ):
        load.wait()
        assert admin.wait_end(mine)["state"] == "FAILED"
    assert not failures(load.answers)
    assert {answer.version for answer in load.answers} == {1}
