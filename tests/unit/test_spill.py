"""Outputs that came in a memfd of their own, from a worker that is not trusted."""

from __future__ import annotations

import fcntl
import gc
import os

import pytest

from gateway.serving import memory, spill
from gateway.serving.channel import Channel
from gateway.serving.spill import Spills, viewed


@pytest.fixture
def ends():
    """The front end's end of a channel, and the worker's."""
    ours, theirs = Channel.pair()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def spills():
    made = Spills()
    yield made
    made.close()


def open_fds() -> int:
    gc.collect()  # what an earlier test left is not to go in the middle of this one
    return len(os.listdir("/proc/self/fd"))


def send(channel, content: bytes, lane: int = 0, slot: int = 0) -> None:
    """As a worker does it."""
    fd = memory.create("spill", len(content))
    with memory.map_writable(fd, len(content)) as mapping:
        mapping[:] = content
    spill.send(channel, lane, slot, fd)
    os.close(fd)


def content_of(mapping) -> bytes:
    with viewed(mapping) as view:
        return bytes(view)


def test_what_a_worker_passes_on_is_read_and_given_back(ends, spills):
    ours, theirs = ends
    before = open_fds()
    send(theirs, b"outputs")
    assert content_of(spills.take(ours, 0, 0)) == b"outputs"
    assert open_fds() == before


def test_each_slot_finds_its_own_in_any_order(ends, spills):
    ours, theirs = ends
    for lane, slot in ((0, 0), (0, 1), (1, 0)):
        send(theirs, b"%d-%d" % (lane, slot), lane, slot)
    for lane, slot in ((1, 0), (0, 1), (0, 0)):
        assert content_of(spills.take(ours, lane, slot)) == b"%d-%d" % (lane, slot)


def test_what_never_came_is_nothing_and_does_not_block(ends, spills):
    ours, theirs = ends
    assert spills.take(ours, 0, 0) is None
    assert spills.take(None, 0, 0) is None
    send(theirs, b"another's", 0, 1)
    assert spills.take(ours, 0, 0) is None
    assert spills.take(ours, 1, 1) is None


def test_it_is_taken_once(ends, spills):
    ours, theirs = ends
    send(theirs, b"once")
    spills.take(ours, 0, 0).close()
    assert spills.take(ours, 0, 0) is None


def test_a_worker_s_last_words_are_heard_after_its_end(ends, spills):
    ours, theirs = ends
    send(theirs, b"last words")
    theirs.close()
    assert content_of(spills.take(ours, 0, 0)) == b"last words"
    assert spills.take(ours, 0, 0) is None


def test_a_later_one_replaces_what_nobody_claimed(ends, spills):
    ours, theirs = ends
    before = open_fds()
    send(theirs, b"of a run that was given up")
    send(theirs, b"of the next")
    assert content_of(spills.take(ours, 0, 0)) == b"of the next"
    assert open_fds() == before


def test_what_nobody_claims_is_given_back_at_the_end(ends):
    ours, theirs = ends
    before = open_fds()
    made = Spills()
    send(theirs, b"a", 0, 1)
    send(theirs, b"b", 0, 2)
    assert made.take(ours, 0, 0) is None
    assert open_fds() == before + 2
    made.close()
    assert open_fds() == before


def unsealed() -> int:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 64)
    return fd


def growing_only() -> int:
    fd = unsealed()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    return fd


def empty() -> int:
    return memory.create("spill", 0)


def too_large() -> int:
    return memory.create("spill", spill.MAX_SPILL_BYTES + 4096)


def no_memfd() -> int:
    return os.open("/dev/null", os.O_RDONLY)


@pytest.mark.parametrize("make", [unsealed, growing_only, empty, too_large, no_memfd])
def test_what_reading_could_fault_on_is_refused(ends, spills, make):
    ours, theirs = ends
    before = open_fds()
    fd = make()
    spill.send(theirs, 0, 0, fd)
    os.close(fd)
    assert spills.take(ours, 0, 0) is None
    assert open_fds() == before


def test_a_message_without_its_descriptor_is_none(ends, spills):
    ours, theirs = ends
    theirs.send("spill", lane=0, slot=0)
    assert spills.take(ours, 0, 0) is None


def test_a_view_that_outlives_the_block_keeps_its_bytes(ends, spills):
    ours, theirs = ends
    send(theirs, b"kept")
    with viewed(spills.take(ours, 0, 0)) as view:
        kept = view[1:]
    assert bytes(kept) == b"ept"
