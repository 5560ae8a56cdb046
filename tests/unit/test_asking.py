"""What a rollout asks others, against a server that answers as it is told."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from dataclasses import replace

import pytest
from aiohttp import web

from gateway.control.asking import SIGNATURE, STAMP, Asking, check_asks
from gateway.errors import InvalidRequest
from gateway.rollout.record import Rollout, RolloutState
from gateway.rollout.spec import RolloutSpec
from gateway.settings import load_server_settings

SECRET = "a secret of some length"


class Others:
    """Prometheus and a webhook on one port; ``says`` is what both answer, ``heard`` what came."""

    def __init__(self) -> None:
        self.says: object = {}
        self.status = 200
        self.heard: list[tuple[str, dict[str, str], bytes]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def handle(self, http: web.Request) -> web.Response:
        query = {key.lower(): value for key, value in http.headers.items()} | dict(http.query)
        self.heard.append((http.path, query, await http.read()))
        await self.may_answer.wait()
        return web.json_response(self.says, status=self.status)


@pytest.fixture
async def others():
    made = Others()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    made.may_answer.set()
    await runner.cleanup()


def settings_of(others, **more):
    return load_server_settings(
        model_repository="models",
        prometheus_url=f"{others.url}/base/",
        webhook_hosts=["127.0.0.1"],
        webhook_secret=SECRET,
        **more,
    )


def rollout_of(others, **fields) -> Rollout:
    """In a step that lasts no longer: its gate is asked at once."""
    spec = RolloutSpec.model_validate(
        {
            "canary": 2,
            "stable": 1,
            "steps": [{"weight_bp": 100, "min_requests": 0}] * 2,
            "metrics": [],
            "interval_s": 0.1,
            **fields,
        }
    )
    rollout = Rollout("r", "m", spec, "salt", 1.0, 1.0)
    return replace(rollout, state=RolloutState.STEPPING, step_started_s=1.0)


def gated(others, **fields) -> Rollout:
    gate = {"name": "g", "url": f"{others.url}/gate", "timeout_s": 0.2}
    return rollout_of(others, gates=[gate], **fields)


def queried(others) -> Rollout:
    query = "rate({model}) / {canary} - {stable} + {other}"
    metric = {"name": "q", "source": "prometheus", "query": query, "bound": 1}
    return rollout_of(others, metrics=[metric])


async def answers(asking: Asking, rollout: Rollout):
    """What comes of one question."""
    asking.ask(rollout)
    while asking._asked.tasks:
        await asyncio.wait(asking._asked.tasks)
        await asyncio.sleep(0)  # the tasks' callbacks
    return asking.take(rollout)


@pytest.mark.parametrize(
    ("status", "says", "expected"),
    [
        (200, {"approved": True}, True),
        (200, {"approved": False}, False),
        (200, {"approved": "true"}, None),
        (200, {}, None),
        (200, ["approved"], None),
        (500, {"approved": True}, None),
        (302, {"approved": True}, None),
    ],
)
async def test_only_a_plain_yes_is_one(others, status, says, expected):
    others.status, others.says = status, says
    assert await answers(Asking(settings_of(others)), gated(others)) == ({}, {"g": expected})


async def test_a_gate_that_does_not_answer_in_time_has_not(others):
    others.may_answer.clear()
    assert await answers(Asking(settings_of(others)), gated(others)) == ({}, {"g": None})


async def test_a_gate_that_is_not_there_has_not_answered(others):
    rollout = rollout_of(others, gates=[{"name": "g", "url": "http://127.0.0.1:1/x"}])
    assert await answers(Asking(settings_of(others)), rollout) == ({}, {"g": None})


async def test_a_gate_knows_who_calls_and_what_for(others):
    await answers(Asking(settings_of(others)), gated(others))
    (path, headers, body), *more = others.heard
    assert path == "/gate"
    assert not more
    signed = headers[STAMP].encode() + b"." + body
    expected = hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
    assert headers[SIGNATURE] == f"sha256={expected}"
    assert b'"rollout":"r"' in body
    assert b'"weight_bp":100' in body


async def test_a_query_is_filled_in_and_its_one_value_read(others):
    others.says = {"data": {"result": [{"value": [1.0, "2.5"]}]}}
    assert await answers(Asking(settings_of(others)), queried(others)) == ({"q": 2.5}, {})
    path, query, _body = others.heard[0]
    assert path == "/base/api/v1/query"
    assert query["query"] == "rate(m) / 2 - 1 + {other}"


@pytest.mark.parametrize(
    "result",
    [
        None,
        [],
        [{"value": [1, "1"]}, {"value": [1, "1"]}],
        [{"value": [1, "NaN"]}],
        [{"value": [1, "many"]}],
        [{"value": "1"}],
        ["1"],
    ],
)
async def test_anything_but_one_number_is_no_answer(others, result):
    others.says = {"data": {"result": result}}
    assert await answers(Asking(settings_of(others)), queried(others)) == ({"q": None}, {})


async def test_an_answer_belongs_to_its_step(others):
    others.says = {"approved": True}
    rollout = gated(others)
    asking = Asking(settings_of(others))
    asking.ask(rollout)
    await asyncio.wait(asking._asked.tasks)
    assert asking.take(replace(rollout, step=1)) == ({}, {})
    assert asking.take(replace(rollout, attempt=2)) == ({}, {})
    assert asking.take(rollout) == ({}, {"g": True})
    assert asking.take(rollout) == ({}, {})


async def test_nothing_is_asked_twice_at_a_time(others):
    others.may_answer.clear()
    asking, rollout = Asking(settings_of(others)), gated(others)
    for _ in range(5):
        asking.ask(rollout)
    assert len(asking._asked.tasks) == 1
    asking.close()
    await asyncio.wait(asking._asked.tasks)


async def test_what_the_settings_do_not_allow_is_refused(others):
    plain = load_server_settings(model_repository="models")
    with pytest.raises(InvalidRequest, match="webhook_hosts"):
        check_asks(gated(others).spec, plain)
    with pytest.raises(InvalidRequest, match="prometheus_url"):
        check_asks(queried(others).spec, plain)
    check_asks(gated(others).spec, settings_of(others))
    check_asks(queried(others).spec, settings_of(others))
