"""Channels: message borders, ends, descriptors, and what happens when there is no room."""

from __future__ import annotations

import asyncio
import os
import resource
import signal

import pytest

from gateway.control.process import Child
from gateway.serving.channel import MAX_MESSAGE_BYTES, Channel, MessageTooLarge


@pytest.fixture
def pair():
    left, right = Channel.pair()
    yield left, right
    left.close()
    right.close()


def test_messages_keep_their_borders_and_bring_descriptors(pair):
    left, right = pair
    read_end, write_end = os.pipe()
    left.send("a", (read_end,), value=1)
    left.send("b", value=[1, None, "x"])
    os.close(read_end)
    message, (received,) = right.receive()
    assert message == {"op": "a", "value": 1}
    assert right.receive() == ({"op": "b", "value": [1, None, "x"]}, [])
    os.write(write_end, b"z")
    assert os.read(received, 1) == b"z"
    assert not os.get_inheritable(received)
    os.close(received)
    os.close(write_end)


def test_the_end_of_the_peer_is_the_end_of_the_channel(pair):
    left, right = pair
    left.send("last words")
    left.close()
    assert right.receive()[0]["op"] == "last words"
    assert right.receive() is None
    assert right.send("anybody?") is False


def test_a_message_beyond_the_limit_is_refused(pair):
    with pytest.raises(MessageTooLarge):
        pair[0].send("x", text="a" * MAX_MESSAGE_BYTES)
    pair[0].send("x", text="a" * (MAX_MESSAGE_BYTES - 64))
    assert pair[1].receive()[0]["op"] == "x"


def test_without_room_for_descriptors_none_come_and_none_leak(pair):
    left, right = pair
    fds = [os.dup(0) for _ in range(3)]
    left.send("board", fds)
    before = set(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, hard))  # room for one of three
    try:
        message, received = right.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (message["op"], received) == ("board", [])
    assert set(os.listdir("/proc/self/fd")) == before
    for fd in fds:
        os.close(fd)


async def test_a_child_that_does_not_read_costs_its_sender_nothing():
    """More messages than a socket holds: kept in order, and let go of with the child."""
    ended = asyncio.Event()
    child = Child(
        "gateway.serving.worker",
        [],
        on_message=lambda *_: None,
        on_exit=lambda _status: ended.set(),
    )
    before = len(os.listdir("/proc/self/fd"))
    os.kill(child.pid, signal.SIGSTOP)
    read_end, write_end = os.pipe()
    for i in range(1500):
        child.send("load", (read_end,) if i % 100 == 0 else (), number=i, text="x" * 300)
    os.close(read_end)
    os.close(write_end)
    child.kill()
    await ended.wait()
    assert len(os.listdir("/proc/self/fd")) < before
