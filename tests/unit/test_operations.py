"""Operations asked of the supervisor: numbered, answered in any order, and never left hanging."""

import asyncio
from contextlib import closing, suppress

import pytest

from gateway.errors import GatewayError, InvalidRequest, NotFound, Unavailable
from gateway.frontend.operations import MAX_OPERATIONS, Operations
from gateway.serving.channel import Channel


@pytest.fixture
def ends():
    ours, supervisors = Channel.pair()
    ours.setblocking(False)
    with closing(ours), closing(supervisors):
        yield Operations(ours), supervisors


async def begin(operations, action, model):
    task = asyncio.get_running_loop().create_task(operations.run(action, model))
    await asyncio.sleep(0)
    return task


async def test_answers_find_who_asked(ends):
    operations, supervisor = ends
    first = await begin(operations, "load", "a")
    second = await begin(operations, "unload", "b")
    asked = [supervisor.receive()[0] for _ in range(2)]
    assert [(m["op"], m["action"], m["model"]) for m in asked] == [
        ("operation", "load", "a"),
        ("operation", "unload", "b"),
    ]
    operations.ended(asked[1]["number"], "", "")
    await second
    assert not first.done()
    operations.ended(asked[0]["number"], "not_found", "unknown model 'a'")
    with pytest.raises(NotFound, match="unknown model 'a'"):
        await first


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_request", InvalidRequest),
        ("unavailable", Unavailable),
        ("internal", GatewayError),
        ("anything else", GatewayError),
    ],
)
async def test_errors_by_code(ends, code, kind):
    operations, supervisor = ends
    task = await begin(operations, "load", "a")
    operations.ended(supervisor.receive()[0]["number"], code, "why")
    with pytest.raises(GatewayError, match="why") as caught:
        await task
    assert type(caught.value) is kind


async def test_an_answer_for_whoever_is_gone_is_dropped(ends):
    operations, supervisor = ends
    task = await begin(operations, "load", "a")
    number = supervisor.receive()[0]["number"]
    task.cancel()
    operations.ended(number, "", "")  # cancelled, and not yet told
    with pytest.raises(asyncio.CancelledError):
        await task
    operations.ended(number, "not_found", "")


async def test_the_supervisors_end_ends_what_waits_and_what_comes(ends):
    operations, _supervisor = ends
    task = await begin(operations, "load", "a")
    operations.orphaned()
    for waiting in (task, operations.run("unload", "b")):
        with pytest.raises(Unavailable, match="supervisor is gone"):
            await waiting


async def test_a_supervisor_whose_channel_is_closed(ends):
    operations, supervisor = ends
    supervisor.close()
    with pytest.raises(Unavailable, match="supervisor is gone"):
        await operations.run("load", "a")


async def test_only_so_many_wait(ends):
    operations, supervisor = ends
    tasks = []
    for _ in range(MAX_OPERATIONS):  # the supervisor reads, but does not answer
        tasks.append(await begin(operations, "load", "a"))
        supervisor.receive()
    with pytest.raises(Unavailable, match=f"{MAX_OPERATIONS} operations"):
        await operations.run("load", "a")
    tasks.pop().cancel()
    await asyncio.sleep(0)
    tasks.append(await begin(operations, "load", "a"))
    assert supervisor.receive()[0]["model"] == "a"
    operations.orphaned()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(answer) for answer in answers} == {Unavailable}


async def test_a_supervisor_that_does_not_read_is_busy():
    ours, supervisors = Channel.pair()
    with closing(ours), closing(supervisors):
        ours.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                ours.send("reclaimed")
        with pytest.raises(Unavailable, match="supervisor is busy"):
            await Operations(ours).run("load", "a")
