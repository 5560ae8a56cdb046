"""Whose turn it is: first in, first out, by level, and nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocols.call import InferCall, InputTensor
from gateway.serving import queue as queue_module
from gateway.serving.policy import RISE_NS
from gateway.serving.queue import SPARSE_QUEUE, RequestQueue
from gateway.serving.request import NO_SHAPE, CallRequest, State
from gateway.tensors import DATATYPES


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until the test moves it."""

    class Clock:
        now_ns = 1000

    made = Clock()
    monkeypatch.setattr(queue_module, "monotonic_ns", lambda: made.now_ns)
    return made


def request(level: int = 0, arrived_ns: int = 1000) -> CallRequest:
    call = InferCall([InputTensor("x", DATATYPES["INT8"], (1,), memoryview(b"x"))], rows=1)
    return CallRequest(call, NO_SHAPE, {}, level, arrived_ns, 0, lambda *_: None, lambda _: None)


def filled(requests, levels: int = 1) -> RequestQueue:
    made = RequestQueue(levels)
    for one in requests:
        made.put(one)
    return made


def take(queue: RequestQueue) -> CallRequest | None:
    """What is next, taken out as the dispatcher does it: it has been placed."""
    found = queue.next()
    if found is not None:
        found.move(State.PLACED)
        queue.remove_next(found)
    return found


def end(queue: RequestQueue, one: CallRequest) -> None:
    one.move(State.ENDED)
    queue.ended(one)


def drained(queue: RequestQueue) -> list[CallRequest]:
    found = []
    while (one := take(queue)) is not None:
        found.append(one)
    assert len(queue) == 0
    return found


def test_one_level_is_first_in_first_out(clock):
    requests = [request() for _ in range(5)]
    made = filled(requests)
    assert len(made) == 5
    assert list(made) == requests
    assert drained(made) == requests


def test_next_only_looks(clock):
    requests = [request(), request()]
    made = filled(requests)
    assert made.next() is made.next() is requests[0]
    assert len(made) == 2


def test_an_empty_queue_has_no_next(clock):
    made = RequestQueue(3)
    assert (made.next(), len(made), list(made)) == (None, 0, [])


def test_a_higher_level_overtakes_and_keeps_its_own_order(clock):
    low, middle, high, high_too = request(2), request(1), request(0), request(0)
    assert drained(filled([low, middle, high, high_too], 3)) == [high, high_too, middle, low]


def test_who_waits_rises_and_is_overtaken_no_more(clock):
    low = request(1, arrived_ns=1000)
    clock.now_ns = 1000 + RISE_NS - 1
    early = request(0, arrived_ns=clock.now_ns)
    made = filled([low, early], 2)
    assert made.next() is early
    clock.now_ns += 1  # one level higher, and it is the older one
    assert made.next() is low


def test_failed_batches_come_before_all_others_in_their_own_order(clock):
    waiting, again = [request(0), request(1)], [request(1), request(0)]
    made = filled(waiting, 2)
    for one in again:
        one.move(State.PLACED)
    made.put_first(again)
    assert len(made) == 4
    assert drained(made) == again + waiting


def test_the_latest_failed_batch_comes_first(clock):
    first, second = [request(), request()], [request()]
    made = RequestQueue(1)
    made.put_first(first)
    made.put_first(second)
    assert drained(made) == second + first


def test_requests_that_end_are_passed_over_wherever_they_are(clock):
    requests = [request(level) for level in (0, 0, 1, 1)]
    again = [request(), request()]
    made = filled(requests, 2)
    made.put_first(again)
    for one in (again[0], requests[0], requests[3]):
        end(made, one)
    assert len(made) == 3
    assert set(made) == {again[1], requests[1], requests[2]}
    assert drained(made) == [again[1], requests[1], requests[2]]


def test_data_of_a_request_that_ended_go_at_once(clock):
    one = request()
    made = filled([request(), one])
    end(made, one)
    assert one.call.inputs == []


def test_a_queue_whose_head_is_stuck_does_not_grow(clock):
    head = request()
    made = filled([head])
    for _ in range(10 * SPARSE_QUEUE):
        gone = request()
        made.put(gone)
        end(made, gone)
        assert sum(map(len, made._queues())) <= 2 * len(made) + SPARSE_QUEUE
    assert drained(made) == [head]


def test_an_emptied_queue_keeps_nothing(clock):
    requests = [request(level) for level in (0, 1, 1)]
    made = filled(requests, 2)
    for one in requests:
        end(made, one)
    assert made.next() is None
    assert [list(part) for part in made._queues()] == [[], [], []]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(0, 2)),
            st.tuples(st.just("take"), st.just(0)),
            st.tuples(st.just("end"), st.integers(0, 50)),
            st.tuples(st.just("again"), st.integers(1, 3)),
            st.tuples(st.just("wait"), st.integers(0, 3 * RISE_NS)),
        ),
        max_size=60,
    )
)
def test_it_agrees_with_a_plain_list(steps):
    """The reference looks through all who wait, each time."""
    clock_ns = 1000
    made, waiting, again = RequestQueue(3), [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue_module, "monotonic_ns", lambda: clock_ns)
        for step, number in steps:
            if step == "put":
                one = request(number, clock_ns)
                made.put(one)
                waiting.append(one)
            elif step == "wait":
                clock_ns += number
            elif step == "again":
                batch = [request(0, clock_ns) for _ in range(number)]
                made.put_first(batch)
                again[:0] = batch
            elif step == "end" and waiting + again:
                one = (waiting + again)[number % len(waiting + again)]
                end(made, one)
                (waiting if one in waiting else again).remove(one)
            elif step == "take":
                expected = again[0] if again else _oldest(waiting, clock_ns)
                assert take(made) is expected
                if expected is not None:
                    (again if again else waiting).remove(expected)
            assert len(made) == len(waiting) + len(again)
            assert set(made) == {*waiting, *again}


def _oldest(waiting, now_ns):
    """Levels are first in, first out within themselves; what has risen to one level goes by age."""
    heads = {one.level: one for one in reversed(waiting)}.values()
    return min(
        heads,
        key=lambda one: (
            one.level - (now_ns - one.arrived_ns) // RISE_NS,
            one.arrived_ns,
            one.level,
        ),
        default=None,
    )
