"""Server-sent events, the live page's numbers, and how streams end."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from gateway.admin import stream as streams
from gateway.admin.live import FRESH_S, WINDOW_S, LiveFeed, quantile_ms, sample_document
from gateway.admin.operations import PREFIX
from gateway.control.views import VersionSample
from gateway.security.keys import key_id
from tests.unit.fakeplane import AdminPort, FakePlane

EVENTS = f"{PREFIX}/events"
STREAM = f"{EVENTS}?stream=true"
SAMPLE = VersionSample("m0", 1, 100, 2, 400, 50, 3, {10: 100}, (0, 50))


@pytest.fixture
def plane(tmp_path) -> FakePlane:
    return FakePlane(tmp_path, models=2)


@pytest.fixture
async def port(plane):
    async with AdminPort(plane) as port:
        yield port


async def _messages(answer, count: int) -> list[dict[str, str]]:
    """The next messages of a stream; a comment is one with an empty name."""
    found = []
    while len(found) < count:
        message = {}
        while line := (await answer.content.readline()).decode().rstrip("\n"):
            name, _, value = line.partition(":")
            message[name] = value.strip()
        found.append(message)
    return found


async def test_events_come_as_they_happen(port, plane):
    plane.add_event()
    async with port.session.get(EVENTS, headers={"Accept": "text/event-stream"}) as answer:
        assert answer.content_type == "text/event-stream"
        (first,) = await _messages(answer, 1)
        assert (first["id"], first["retry"]) == ("1", "2000")
        assert json.loads(first["data"])["kind"] == "version.ready"
        plane.add_event(kind="rollout.step")
        (second,) = await _messages(answer, 1)
        assert (second["id"], json.loads(second["data"])["kind"]) == ("2", "rollout.step")


async def test_a_stream_goes_on_where_it_was_cut(port, plane):
    for _ in range(4):
        plane.add_event()
    headers = {"Last-Event-ID": "3"}
    async with port.session.get(f"{STREAM}&after=1", headers=headers) as answer:
        assert [message["id"] for message in await _messages(answer, 1)] == ["4"]
    async with port.session.get(f"{STREAM}&after=1") as answer:
        assert [message["id"] for message in await _messages(answer, 3)] == ["2", "3", "4"]


async def test_the_newest_are_told_first_to_who_knows_none(port, plane):
    async with port.session.get(f"{STREAM}&last=2") as answer:
        plane.add_event()
        assert [message["id"] for message in await _messages(answer, 1)] == ["1"]
    for number in range(4):
        plane.add_event("m1" if number % 2 else "m0")
    async with port.session.get(f"{STREAM}&last=2") as answer:
        plane.add_event()
        assert [message["id"] for message in await _messages(answer, 3)] == ["4", "5", "6"]
    left = {"Last-Event-ID": "5"}
    async with port.session.get(f"{STREAM}&last=2", headers=left) as answer:
        assert [message["id"] for message in await _messages(answer, 1)] == ["6"]
    page = (await port.ask("GET", f"{EVENTS}?model=m1&last=1")).body
    assert ([event["id"] for event in page["events"]], page["next"]) == ([5], 5)
    assert (await port.ask("GET", f"{EVENTS}?last=0")).status == 400


@pytest.mark.parametrize("text", ["x", "-1", "²", "9" * 30])
async def test_a_last_event_id_is_a_number(port, text):
    async with port.session.get(STREAM, headers={"Last-Event-ID": text}) as answer:
        assert answer.status == 400


async def test_a_stream_of_one_model_waits_for_it_without_turning(port, plane, monkeypatch):
    asked = []
    events = plane.events

    async def counted(*arguments):
        asked.append(arguments)
        return await events(*arguments)

    monkeypatch.setattr(plane, "events", counted)
    plane.add_event("m0")
    async with port.session.get(f"{STREAM}&model=m1") as answer:
        plane.add_event("m1", rollout="r1")
        assert [message["id"] for message in await _messages(answer, 1)] == ["2"]
    async with port.session.get(f"{STREAM}&rollout=r1") as answer:
        assert [message["id"] for message in await _messages(answer, 1)] == ["2"]
    assert len(asked) < 10
    page = (await port.ask("GET", f"{EVENTS}?rollout=r1&limit=5")).body
    assert ([event["id"] for event in page["events"]], page["next"]) == ([2], 2)


async def test_a_silent_stream_beats(port, monkeypatch):
    monkeypatch.setattr(streams, "HEARTBEAT_S", 0.001)
    async with port.session.get(STREAM) as answer:
        first, *rest = await _messages(answer, 3)
        assert rest == [{"": ""}, {"": ""}]
        assert first["retry"] == "2000"


async def test_streams_end_with_the_server(port, plane):
    plane.add_event()
    async with port.session.get(STREAM) as answer:
        await _messages(answer, 1)
        stopping = asyncio.ensure_future(port.server.stop())
        assert await answer.content.read() == b""  # a proper end, not a broken connection
        await stopping


async def test_a_stream_ends_with_its_key(port, plane):
    key = plane.add_key("viewer")
    plane.add_event()
    headers = {"Authorization": f"Bearer {key}"}
    async with port.session.get(STREAM, headers=headers) as answer:
        await _messages(answer, 1)
        await plane.revoke_key(key_id(key), "somebody")
        plane.add_event()  # already read when the key is looked at
        await _messages(answer, 1)
        assert await answer.content.read() == b""


async def test_streams_are_bounded_and_given_back(port, plane, monkeypatch):
    monkeypatch.setattr(streams, "MAX_STREAMS", 1)
    plane.add_event()
    async with port.session.get(STREAM) as first:
        await _messages(first, 1)
        refused = await port.ask("GET", STREAM)
        assert (refused.status, refused.body["code"]) == (503, "unavailable")
        first.close()
    async with asyncio.timeout(30):
        status = 503
        while status == 503:
            plane.add_event()  # writing it, the server finds that the listener is gone
            async with port.session.get(STREAM) as answer:
                status = answer.status


async def test_who_does_not_read_is_cut(port, plane, monkeypatch):
    monkeypatch.setattr(streams, "SLOW_READER_S", 0.01)
    for _ in range(20):
        plane.add_event()
    plane.event_records = [replace(event, text="x" * (1 << 20)) for event in plane.event_records]
    is_cut = asyncio.Event()
    cut = streams._cut
    monkeypatch.setattr(streams, "_cut", lambda http: (cut(http), is_cut.set()))
    reader, writer = await asyncio.open_connection("127.0.0.1", port.port, limit=1024)
    writer.write(f"GET {STREAM} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    await is_cut.wait()
    sent = await reader.read()
    writer.close()
    assert len(sent) < 20 << 20
    assert not sent.endswith(b"0\r\n\r\n")  # no proper end


async def test_the_live_page_shows_models_rollouts_and_rates(port, plane, monkeypatch):
    monkeypatch.setattr(streams, "LIVE_S", 0.001)
    plane.sample_list = [SAMPLE]
    spec = {"canary": 2, "steps": [{"weight_bp": 500}]}
    await port.ask("POST", f"{PREFIX}/models/m0/rollouts", json=spec)
    async with port.session.get(f"{PREFIX}/live") as answer:
        first, second = [json.loads(m["data"]) for m in await _messages(answer, 2)]
    assert first.keys() == {"at_s", "models", "rollouts", "samples"}
    assert [model["name"] for model in first["models"]] == ["m0", "m1"]
    assert first["rollouts"][0]["state"] == "PENDING"
    assert first["samples"][0]["queue_depth"] == 3
    assert second["at_s"] == first["at_s"]  # one look serves all for a while


async def test_the_live_page_is_of_the_models_that_the_key_is_for(port, plane):
    key = plane.add_key("viewer", "m1")
    plane.sample_list = [SAMPLE]
    headers = {"Authorization": f"Bearer {key}"}
    async with port.session.get(f"{PREFIX}/live", headers=headers) as answer:
        (message,) = await _messages(answer, 1)
    document = json.loads(message["data"])
    assert [model["name"] for model in document["models"]] == ["m1"]
    assert document["samples"] == []


def test_rates_are_differences_of_two_looks():
    later = replace(
        SAMPLE, requests=160, errors=5, batches=80, latency={10: 150, 40: 7}, batch_rows=(9, 71)
    )
    found = sample_document(later, SAMPLE, 2.0)
    assert (found["requests_per_s"], found["errors_per_s"]) == (30.0, 1.5)
    assert found["batch_rows"] == [9, 21]
    assert found["p50_ms"] == quantile_ms({10: 1}, 0.5)
    assert found["p99_ms"] == quantile_ms({40: 1}, 0.5) > found["p50_ms"]


def test_without_an_earlier_look_there_are_no_rates():
    for before in (None, replace(SAMPLE, requests=1000)):
        found = sample_document(SAMPLE, before, 1.0)
        assert (found["requests_per_s"], found["p50_ms"], found["batch_rows"]) == (
            0.0,
            None,
            [0, 0],
        )


async def test_the_counters_are_looked_at_once_for_all(plane):
    now = [0.0]
    looks = []
    plane.samples = lambda: looks.append(now[0]) or [replace(SAMPLE, requests=len(looks) * 10)]
    feed = LiveFeed(plane, lambda: now[0], lambda: 1.0)

    async def rate() -> float:
        return (await feed.document(lambda _model: True))["samples"][0]["requests_per_s"]

    assert [await rate(), await rate()] == [0.0, 0.0]
    now[0] = 1.0
    assert [await rate(), await rate()] == [10.0, 10.0]
    assert looks == [0.0, 1.0]
    now[0] = 1.0 + WINDOW_S + FRESH_S + 1  # nobody listened for a while
    assert await rate() == 0.0
