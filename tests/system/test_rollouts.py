"""Rollouts of real versions under a steady load: what clients see of them, and what kills leave of them."""

from __future__ import annotations

import random
import time

import pytest

from tests.system.rolling import (
    ENDS,
    MODEL,
    Admin,
    Answer,
    Load,
    bucket,
    exposure,
    is_whole,
    kill_all,
    make_repository,
    stored,
)
from tests.system.server import LANES, Server

JUDGED = {
    "metrics": [
        {"name": "errors", "source": "errors", "margin": 0.03},
        {"name": "compute", "source": "compute", "margin": 0.2, "test": "inferiority"},
        {"name": "agreement", "source": "agreement", "bound": 0.95},
    ],
    "skip_requests": 10,
    "abort_keep_warm_s": 0,
    "progress_deadline_s": 60,
}
"""A rollout that is judged by everything that is counted here."""

COPIES = {"weight_bp": 0, "mirror_percent": 50, "min_requests": 20}

STEPS = [COPIES, *({"weight_bp": weight, "min_requests": 60} for weight in (2000, 5000))]

BY_HAND = {"metrics": [], "kill_switch": None, "abort_keep_warm_s": 0}
"""A rollout that nothing but commands moves."""


@pytest.fixture
def repository(tmp_path):
    return make_repository(tmp_path)


def step(weight_bp: int, **more: object) -> dict[str, object]:
    return {"weight_bp": weight_bp, "pause": True, "min_requests": 0} | more


def failures(answers: list[Answer], version: int = -1) -> list[Answer]:
    """Answers that are not right, but for those of one version."""
    return [answer for answer in answers if not answer.is_right and answer.version != version]


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
            admin.register(name.split()[0], number)
            rollout = admin.start(JUDGED | {"canary": number, "steps": STEPS})
            begun = len(load.answers)
            rollout = admin.wait_end(rollout["id"])
            answers, events = load.answers[begun:], admin.events(rollout["id"])
            print(name, rollout["state"], rollout["reason"], len(answers), {v: sum(a.version==v for a in answers) for v in {a.version for a in answers}}, exposure(answers, rollout, events), [(round(e["at_s"]-rollout["created_s"],2), e["kind"], e["text"]) for e in events])
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
