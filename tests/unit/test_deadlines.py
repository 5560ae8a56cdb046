"""One timer for every queued request that has a deadline."""

from __future__ import annotations

import pytest

from gateway.clock import NS_PER_S
from gateway.serving import deadlines
from gateway.serving.deadlines import SPARSE_HEAP, Deadlines
from gateway.serving.request import NO_SHAPE, Request, State


class Loop:
    """A clock that the test moves, and the timers that are set on it."""

    def __init__(self) -> None:
        self.now_ns = NS_PER_S
        self.timers: list[Timer] = []

    def call_later(self, delay_s: float, callback) -> Timer:
        timer = Timer(self, self.now_ns + round(delay_s * NS_PER_S), callback)
        self.timers.append(timer)
        return timer

    def move_to(self, now_ns: int) -> None:
        """Let time pass, and every timer fire that is due."""
        self.now_ns = now_ns
        while due := [timer for timer in self.timers if timer.due_ns <= now_ns]:
            self.timers.remove(due[0])
            due[0].callback()


class Timer:
    def __init__(self, loop: Loop, due_ns: int, callback) -> None:
        self._loop, self.due_ns, self.callback = loop, due_ns, callback

    def cancel(self) -> None:
        self._loop.timers.remove(self)


@pytest.fixture
def loop(monkeypatch) -> Loop:
    made = Loop()
    monkeypatch.setattr(deadlines, "monotonic_ns", lambda: made.now_ns)
    return made


def ended_by(loop: Loop) -> tuple[Deadlines, list[tuple[int, int]]]:
    """Deadlines, and the deadline and the time of each request that they ended."""
    ended: list[tuple[int, int]] = []

    def expire(request: Request) -> None:
        request.move(State.ENDED)
        ended.append((request.deadline_ns, loop.now_ns))

    return Deadlines(loop, expire), ended


def due_at(second: float) -> Request:
    return Request(NO_SHAPE, 1, 0, 0, round(second * NS_PER_S))


def seconds(ended: list[tuple[int, int]]) -> list[tuple[float, float]]:
    return [(deadline_ns / NS_PER_S, now_ns / NS_PER_S) for deadline_ns, now_ns in ended]


def test_requests_expire_in_the_order_of_their_deadlines(loop):
    watched, ended = ended_by(loop)
    for second in (5, 3, 4, 3, 2):
        watched.add(due_at(second))
        assert len(loop.timers) == 1
    for now in (2, 3, 4.5, 5):
        loop.move_to(round(now * NS_PER_S))
    assert seconds(ended) == [(2, 2), (3, 3), (3, 3), (4, 4.5), (5, 5)]
    assert loop.timers == []


def test_the_timer_is_set_anew_only_by_an_earlier_deadline(loop):
    watched, _ = ended_by(loop)
    watched.add(due_at(5))
    (timer,) = loop.timers
    watched.add(due_at(6))
    assert loop.timers == [timer]
    watched.add(due_at(4))
    assert [timer.due_ns for timer in loop.timers] == [4 * NS_PER_S]


def test_who_has_ended_does_not_expire(loop):
    watched, ended = ended_by(loop)
    requests = [due_at(second) for second in (2, 3, 4)]
    for request in requests:
        watched.add(request)
    requests[0].move(State.ENDED)
    requests[1].move(State.ENDED)
    loop.move_to(9 * NS_PER_S)
    assert seconds(ended) == [(4, 9)]


def test_a_deadline_in_the_past_expires_in_the_next_turn(loop):
    watched, ended = ended_by(loop)
    watched.add(due_at(0.5))
    assert ended == []
    loop.move_to(loop.now_ns)
    assert seconds(ended) == [(0.5, 1)]


def test_who_does_not_end_by_its_deadline_is_told_once(loop):
    """A worker has it: it is answered when it has run."""
    told: list[Request] = []
    watched = Deadlines(loop, told.append)
    request = due_at(2)
    watched.add(request)
    for second in (2, 3, 4):
        loop.move_to(second * NS_PER_S)
    assert told == [request]
    assert loop.timers == []


def test_what_has_ended_is_let_go_long_before_its_deadline(loop):
    watched, ended = ended_by(loop)
    kept = [due_at(1000 + number) for number in range(10)]
    for request in kept:
        watched.add(request)
    for _ in range(50 * SPARSE_HEAP):
        request = due_at(500)
        watched.add(request)
        request.move(State.ENDED)
    assert len(watched._heap) <= 2 * len(kept) + SPARSE_HEAP + 1
    loop.move_to(2000 * NS_PER_S)
    assert len(ended) == len(kept)


def test_nobody_is_watched_after_the_end(loop):
    watched, ended = ended_by(loop)
    watched.add(due_at(2))
    watched.close()
    assert loop.timers == []
    watched.close()
    loop.move_to(9 * NS_PER_S)
    assert ended == []
