"""The dispatcher with a worker that the test plays: a real lane, a real consumer, one process.

Every step of a batch's life is taken by hand, so each interleaving is deterministic.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import pytest

from gateway._kernels import ring
from gateway.clock import monotonic_ns
from gateway.errors import (
    DeadlineExceeded,
    InferenceFailed,
    InvalidRequest,
    QueueFull,
    TooLarge,
    Unavailable,
)
from gateway.protocols.call import InferCall, InputTensor
from gateway.serving import geometry, memory
from gateway.serving.channel import Channel
from gateway.serving.dispatcher import Dispatcher, Limits
from gateway.serving.placement import Placement
from gateway.serving.request import Request, State
from gateway.telemetry.metrics import Metrics
from gateway.tensors import DATATYPES, Signature, TensorSpec

FP32 = DATATYPES["FP32"]
SIGNATURE = Signature(
    (TensorSpec("x", FP32, ("n", 2)),), (TensorSpec("y", FP32, ("n", 2)),), max_batch_size=4
)
SEGV, KILL = 11, 9
FAR_US = 10**9


class Loop:
    """Stands in for the event loop: nothing fires by itself."""

    def __init__(self) -> None:
        self.pending: list[tuple[float, Callable, Request]] = []

    def call_soon(self, function, *args) -> None:
        function(*args)

    def call_later(self, delay_s, function, request):
        entry = (delay_s, function, request)
        self.pending.append(entry)
        pending = self.pending

        class Handle:
            def cancel(self) -> None:
                if entry in pending:
                    pending.remove(entry)

        return Handle()

    def fire(self) -> None:
        for _delay_s, function, request in list(self.pending):
            function(request)


@dataclass
class Outcome:
    """How a request ended: its output rows, or its error; both empty while it has not."""

    request: Request
    rows: list = field(default_factory=list)
    errors: list = field(default_factory=list)


class Worker:
    """A worker in the test's hands: seals, runs y = 2x, publishes, or dies at any step."""

    def __init__(self, board: mmap.mmap, seat: int, incarnation: int) -> None:
        self.incarnation = incarnation
        self.consumer = ring.Consumer(board, seat, incarnation)
        self.ours, self.theirs = Channel.pair()
        self.ours.setblocking(False)
        self.lanes: dict[int, tuple[geometry.LaneSpec, mmap.mmap, mmap.mmap]] = {}
        self.fds: list[int] = []

    def close(self) -> None:
        self.ours.close()
        for fd in self.fds:
            os.close(fd)

    def read_mail(self) -> None:
        while True:
            try:
                received = self.ours.receive()
            except BlockingIOError:
                return
            if received is None:
                return
            message, (control, inputs, outputs, bell) = received
            self.fds += (control, inputs, outputs, bell)
            spec = geometry.LaneSpec.from_wire(message["spec"])
            size = ring.control_bytes(spec.slot_count, spec.dims_per_slot)
            self.consumer.attach(
                message["lane"],
                memory.map_writable(control, size),
                spec.slot_count,
                spec.dims_per_slot,
                bell,
            )
            self.lanes[message["lane"]] = (
                spec,
                memory.map_read_only(inputs, spec.slot_count * spec.input_slot_bytes),
                memory.map_writable(outputs, spec.slot_count * spec.output_slot_bytes),
            )

    def seal(self):
        """Take the best slot; (key, slot, word, rows) or None."""
        self.read_mail()
        best = self.consumer.best()
        if best is None:
            return None
        key, slot, word, rows, *_ = best
        assert self.consumer.seal(key, slot, word, 1)
        return key, slot, word, rows

    def publish(self, taken, ok: bool = True) -> None:
        key, slot, word, rows = taken
        spec, inputs, outputs = self.lanes[key]
        x = np.frombuffer(inputs, np.float32, rows * 2, slot * spec.input_slot_bytes)
        region = memoryview(outputs)[
            slot * spec.output_slot_bytes : (slot + 1) * spec.output_slot_bytes
        ]
        if ok:
            at = geometry.head_bytes(1)
            region[at : at + rows * 8] = (2 * x).tobytes()
        else:
            geometry.write_error(region, "ONNX Runtime failed (FAIL)")
        self.consumer.publish(key, slot, word, ok, 10, 20)


class Bench:
    """A dispatcher, its lanes and its workers."""

    def __init__(self, workers: int = 1, max_queue_size: int = 100, timeout_ns: int = 0) -> None:
        size = ring.board_bytes(workers + 12)
        self.board = mmap.mmap(-1, size)
        self.loop = Loop()
        self.lanes = []
        self.convictions = 0
        self.metrics = Metrics().version("m", 1)
        self.dispatcher = Dispatcher(
            SIGNATURE,
            Limits(max_queue_size, timeout_ns, 1 << 20),
            self.board,
            self.metrics,
            self.loop,
            self.lanes.append,
            self.convict,
        )
        self.incarnations = 0
        self.workers: list[Worker] = []
        for _ in range(workers):
            self.hire()

    def convict(self) -> None:
        self.convictions += 1

    def hire(self) -> Worker:
        worker = Worker(self.board, self.incarnations, self.incarnations + 1)
        self.incarnations += 1
        self.workers.append(worker)
        self.dispatcher.worker_up(worker.incarnation, worker.theirs)
        return worker

    def ask(self, *values: float, timeout_us: int | None = None) -> Outcome:
        """Submit a request with one row per value."""
        data = [v for value in values for v in (value, value + 0.5)]
        call = InferCall([InputTensor("x", FP32, (len(values), 2), data)], rows=len(values))
        call.timeout_us = timeout_us
        outcome = Outcome(None)

        def on_answer(outputs, _timing) -> None:
            outcome.rows.append(np.frombuffer(outputs[0].data, np.float32).tolist())

        outcome.request = self.dispatcher.submit(
            call, monotonic_ns(), on_answer, outcome.errors.append
        )
        return outcome

    def deliver(self) -> None:
        for lane in self.lanes:
            self.dispatcher.on_bell(lane)

    def close(self) -> None:
        self.dispatcher.fail_all(InferenceFailed("the test is over"))
        self.dispatcher.close()
        for worker in self.workers:
            worker.close()

    def run_all(self, worker: Worker, ok: Callable[[list], bool] = lambda _rows: True) -> list[int]:
        """Let a worker run until nothing is left; the rows of each batch."""
        sizes = []
        while (taken := worker.seal()) is not None:
            key, slot, _word, rows = taken
            spec, inputs, _ = worker.lanes[key]
            x = np.frombuffer(inputs, np.float32, rows * 2, slot * spec.input_slot_bytes)
            worker.publish(taken, ok(x[::2].tolist()))
            sizes.append(rows)
            self.deliver()
        return sizes


@pytest.fixture
def make_bench():
    """Makes benches, and closes what they opened."""
    with ExitStack() as stack:

        def make(**options) -> Bench:
            bench = Bench(**options)
            stack.callback(bench.close)
            return bench

        yield make


def doubled(*values: float) -> list[list[float]]:
    return [[v for value in values for v in (2 * value, 2 * value + 1)]]


def test_requests_share_a_slot_until_a_worker_takes_it(make_bench):
    bench = make_bench()
    first, second = bench.ask(1), bench.ask(2, 3)
    taken = bench.workers[0].seal()
    third = bench.ask(4)  # too late for the sealed one
    bench.workers[0].publish(taken)
    bench.deliver()
    assert first.rows == doubled(1)
    assert second.rows == doubled(2, 3)
    assert third.rows == []
    assert bench.run_all(bench.workers[0]) == [1]
    assert third.rows == doubled(4)


def test_a_request_of_several_rows_is_never_split(make_bench):
    bench = make_bench()
    outcomes = [bench.ask(1, 2, 3), bench.ask(4, 5), bench.ask(6)]
    assert bench.run_all(bench.workers[0]) == [3, 3]
    assert [o.rows for o in outcomes] == [doubled(1, 2, 3), doubled(4, 5), doubled(6)]


@pytest.mark.parametrize("position", range(4))
def test_a_cancelled_request_leaves_its_mates_whole(make_bench, position):
    bench = make_bench()
    outcomes = [bench.ask(10 * i) for i in range(4)]
    bench.dispatcher.cancel(outcomes[position].request)
    assert bench.run_all(bench.workers[0]) == [3]
    for i, outcome in enumerate(outcomes):
        assert outcome.rows == ([] if i == position else doubled(10 * i))
        assert outcome.errors == []


def test_rows_of_different_length_close_the_gap(make_bench):
    bench = make_bench()
    outcomes = [bench.ask(1), bench.ask(2, 3), bench.ask(4)]
    bench.dispatcher.cancel(outcomes[0].request)
    late = bench.ask(5)
    assert bench.run_all(bench.workers[0]) == [4]
    assert [o.rows for o in [*outcomes[1:], late]] == [doubled(2, 3), doubled(4), doubled(5)]


def test_cancelling_the_only_request_frees_the_slot(make_bench):
    bench = make_bench()
    bench.dispatcher.cancel(bench.ask(1).request)
    assert bench.workers[0].seal() is None
    assert bench.dispatcher.waiting() == 0
    assert bench.ask(2).request.state is State.PLACED
    assert bench.run_all(bench.workers[0]) == [1]


def test_a_sealed_request_runs_though_cancelled_and_its_result_is_dropped(make_bench):
    bench = make_bench()
    gone, mate = bench.ask(1), bench.ask(2)
    taken = bench.workers[0].seal()
    bench.dispatcher.cancel(gone.request)
    bench.workers[0].publish(taken)
    bench.deliver()
    assert (gone.rows, gone.errors) == ([], [])
    assert mate.rows == doubled(2)


def test_an_expired_request_is_answered_while_the_worker_is_busy_and_never_runs(make_bench):
    bench = make_bench()
    bench.ask(1)
    busy = bench.workers[0].seal()
    late = bench.ask(2, timeout_us=FAR_US)
    bench.loop.fire()
    assert isinstance(late.errors[0], DeadlineExceeded)
    bench.workers[0].publish(busy)
    bench.deliver()
    assert bench.run_all(bench.workers[0]) == []


def test_an_expiry_after_the_seal_lets_the_run_answer(make_bench):
    bench = make_bench()
    outcome = bench.ask(1, timeout_us=FAR_US)
    taken = bench.workers[0].seal()
    bench.loop.fire()
    assert outcome.errors == []
    bench.workers[0].publish(taken)
    bench.deliver()
    assert outcome.rows == doubled(1)
    assert bench.loop.pending == []


def test_beyond_workers_plus_one_full_slots_requests_queue_in_order(make_bench):
    bench = make_bench(workers=1)
    outcomes = [bench.ask(i) for i in range(40)]
    states = [o.request.state for o in outcomes]
    assert states.count(State.PLACED) == 8  # two slots of four
    assert states.count(State.QUEUED) == 32
    assert bench.dispatcher.waiting() == 40
    assert bench.run_all(bench.workers[0]) == [4] * 10
    assert [o.rows for o in outcomes] == [doubled(i) for i in range(40)]
    assert bench.dispatcher.waiting() == 0


def test_a_full_queue_refuses_and_frees_up(make_bench):
    bench = make_bench(max_queue_size=6)
    outcomes = [bench.ask(i) for i in range(6)]
    with pytest.raises(QueueFull):
        bench.ask(99)
    taken = bench.workers[0].seal()  # four of them wait no longer
    more = [bench.ask(i) for i in range(4)]
    with pytest.raises(QueueFull):
        bench.ask(99)
    bench.workers[0].publish(taken)
    bench.deliver()
    bench.run_all(bench.workers[0])
    assert all(o.rows for o in [*outcomes, *more])


def test_queued_requests_can_expire_and_be_cancelled(make_bench):
    bench = make_bench()
    placed = [bench.ask(i) for i in range(8)]
    expired, cancelled, kept = bench.ask(20, timeout_us=FAR_US), bench.ask(21), bench.ask(22)
    bench.loop.fire()
    bench.dispatcher.cancel(cancelled.request)
    assert isinstance(expired.errors[0], DeadlineExceeded)
    assert sum(bench.run_all(bench.workers[0])) == 9
    assert kept.rows == doubled(22)
    assert all(o.rows for o in placed)


def test_data_that_does_not_decode_is_refused_wherever_the_request_would_go(make_bench):
    bench = make_bench()
    for _ in range(12):  # an empty lane, an open slot, a full one, the queue
        call = InferCall([InputTensor("x", FP32, (1, 2), [1.0, "a"])], rows=1)
        with pytest.raises(InvalidRequest, match="input 'x'"):
            bench.dispatcher.submit(call, 1, lambda *_: None, lambda _: None)
        bench.ask(1)
    assert sum(bench.run_all(bench.workers[0])) == 12


@pytest.mark.parametrize("culprit", range(4))
def test_a_run_that_raises_fails_only_the_culprit(make_bench, culprit):
    bench = make_bench()
    outcomes = [bench.ask(i) for i in range(4)]
    sizes = bench.run_all(bench.workers[0], ok=lambda rows: culprit not in rows)
    assert sizes == [4, 1, 1, 1, 1]
    for i, outcome in enumerate(outcomes):
        if i == culprit:
            assert isinstance(outcome.errors[0], InferenceFailed)
            assert outcome.rows == []
        else:
            assert outcome.rows == doubled(i)


def test_a_death_reruns_the_batch_elsewhere(make_bench):
    bench = make_bench(workers=2)
    outcomes = [bench.ask(1), bench.ask(2)]
    bench.workers[0].seal()
    bench.dispatcher.worker_died(1)
    bench.dispatcher.worker_exited(1, KILL, False)
    assert bench.run_all(bench.workers[1]) == [2]
    assert [o.rows for o in outcomes] == [doubled(1), doubled(2)]


def test_a_death_after_publishing_answers_without_a_bell(make_bench):
    bench = make_bench(workers=2)
    outcome = bench.ask(1)
    bench.workers[0].publish(bench.workers[0].seal())
    bench.dispatcher.worker_died(1)
    assert outcome.rows == doubled(1)
    bench.deliver()  # the bit is still set: a hint that no longer matters
    assert outcome.rows == doubled(1)


def test_a_second_death_isolates_each_request(make_bench):
    bench = make_bench(workers=2)
    outcomes = [bench.ask(i) for i in range(3)]
    for incarnation, worker in enumerate(bench.workers[:2], 1):
        assert worker.seal()[3] == 3
        bench.dispatcher.worker_died(incarnation)
    assert bench.run_all(bench.hire()) == [1, 1, 1]
    assert [o.rows for o in outcomes] == [doubled(i) for i in range(3)]


def test_a_request_that_kills_workers_is_answered_with_an_error(make_bench):
    bench = make_bench(workers=1)
    mates = [bench.ask(1), bench.ask(2)]
    poison = bench.ask(666)
    worker = bench.workers[0]
    deaths = 0
    while not poison.errors:
        taken = worker.seal()
        key, slot, _word, rows = taken
        spec, inputs, _ = worker.lanes[key]
        x = np.frombuffer(inputs, np.float32, rows * 2, slot * spec.input_slot_bytes)
        if 666 in x:
            bench.dispatcher.worker_died(worker.incarnation)
            bench.dispatcher.worker_exited(worker.incarnation, SEGV, False)
            deaths += 1
            worker = bench.hire()
        else:
            worker.publish(taken)
            bench.deliver()
    assert deaths == 4  # twice as a batch, twice alone
    assert isinstance(poison.errors[0], InferenceFailed)
    assert bench.convictions == 1
    bench.run_all(worker)
    assert [m.rows for m in mates] == [doubled(1), doubled(2)]


def test_outside_kills_never_blame_a_request(make_bench):
    bench = make_bench()
    outcome = bench.ask(1)
    worker = bench.workers[0]
    for _ in range(10):
        assert worker.seal() is not None
        bench.dispatcher.worker_died(worker.incarnation)
        bench.dispatcher.worker_exited(worker.incarnation, KILL, False)
        worker = bench.hire()
    assert bench.run_all(worker) == [1]
    assert outcome.rows == doubled(1)


def test_our_own_time_out_blames(make_bench):
    bench = make_bench()
    outcome = bench.ask(1)
    worker = bench.workers[0]
    for _ in range(2):
        worker.seal()
        bench.dispatcher.worker_died(worker.incarnation)
        bench.dispatcher.worker_exited(worker.incarnation, KILL, True)
        worker = bench.hire()
    assert isinstance(outcome.errors[0], InferenceFailed)


def test_a_scribbling_worker_spoils_only_its_own_batch(make_bench):
    bench = make_bench(workers=1)
    victim = bench.ask(1)
    lane = bench.lanes[0]
    bench.workers[0].seal()
    control = lane._control
    head = ring.control_bytes(lane.spec.slot_count, lane.spec.dims_per_slot)
    stride = (head - ring.LAYOUT["lane"]) // lane.spec.slot_count
    index = victim.request.slot.index
    at = ring.LAYOUT["lane"] + index * stride
    control[at : at + 8] = b"\xff" * 8  # its word
    control[ring.LAYOUT["lane"] - 64 : ring.LAYOUT["lane"]] = b"\xff" * 64  # every done bit
    bench.deliver()
    assert isinstance(victim.errors[0], InferenceFailed)
    healthy = bench.ask(2)
    assert bench.run_all(bench.workers[0]) == [1]
    assert healthy.rows == doubled(2)


def test_failing_the_version_ends_every_request_once(make_bench):
    bench = make_bench()
    outcomes = [bench.ask(i) for i in range(12)]
    bench.workers[0].seal()
    bench.dispatcher.fail_all(InferenceFailed("gone"))
    assert all(len(o.errors) == 1 for o in outcomes)
    assert bench.dispatcher.waiting() == 0 or not outcomes[0].rows


def test_deadlines_take_the_shorter_of_request_and_model():
    assert Limits(1, 0, 1).deadline_ns(None, 1000) == 0
    assert Limits(1, 0, 1).deadline_ns(5, 1000) == 6000
    assert Limits(1, 2000, 1).deadline_ns(5, 1000) == 3000
    assert Limits(1, 2000, 1).deadline_ns(None, 1000) == 3000


def test_a_request_past_its_deadline_is_not_run_again_after_a_death(make_bench):
    bench = make_bench(workers=2)
    late, mate = bench.ask(1, timeout_us=1), bench.ask(2)
    bench.workers[0].seal()
    bench.loop.fire()  # too late to take it back: a worker has it
    assert late.errors == []
    bench.dispatcher.worker_died(1)
    assert isinstance(late.errors[0], DeadlineExceeded)
    assert bench.run_all(bench.workers[1]) == [2]  # its row runs along, unheard
    assert (late.rows, mate.rows) == ([], doubled(2))


def test_a_poison_request_is_convicted_though_other_workers_are_idle(make_bench):
    bench = make_bench(workers=6)
    poison = bench.ask(666)
    for worker in bench.workers[:2]:
        assert worker.seal() is not None
        bench.dispatcher.worker_died(worker.incarnation)
        if worker is bench.workers[1]:
            assert bench.workers[2].seal() is None  # nobody else dies before it is judged
        bench.dispatcher.worker_exited(worker.incarnation, SEGV, False)
    assert isinstance(poison.errors[0], InferenceFailed)
    assert bench.convictions == 1
    assert bench.dispatcher.waiting() == 0


def test_an_acquitted_request_runs_again(make_bench):
    bench = make_bench(workers=3)
    outcome = bench.ask(1)
    for worker, how in zip(bench.workers, (SEGV, KILL), strict=False):
        worker.seal()
        bench.dispatcher.worker_died(worker.incarnation)
        bench.dispatcher.worker_exited(worker.incarnation, how, False)
    assert bench.run_all(bench.workers[2]) == [1]
    assert outcome.rows == doubled(1)


def test_without_a_supervisor_nothing_waits_for_judgement(make_bench):
    bench = make_bench(workers=4)
    outcome = bench.ask(1)
    for worker in bench.workers[:2]:
        worker.seal()
        bench.dispatcher.worker_died(worker.incarnation)
    assert bench.workers[2].seal() is None
    bench.dispatcher.orphaned()
    assert bench.workers[2].seal() is not None
    bench.dispatcher.worker_died(bench.workers[2].incarnation)
    assert bench.run_all(bench.workers[3]) == [1]
    assert outcome.rows == doubled(1)


def test_a_row_that_fits_no_lane_is_refused_before_memory_is_taken(make_bench):
    bench = make_bench()
    dynamic = Signature(
        (TensorSpec("x", FP32, ("n", "a", "b")),), (TensorSpec("y", FP32, ("n", "b")),), 4
    )
    placement = Placement(dynamic, 1 << 20, bench.board, bench.lanes.append)
    with pytest.raises(TooLarge, match="lane_bytes"):
        placement.key(((0, 10**15),))  # no input bytes, and an output of 4 PB
    assert placement.lanes == []


def test_no_memory_for_a_lane_is_unavailable_and_leaks_nothing(make_bench, monkeypatch):
    bench = make_bench()
    before = len(os.listdir("/proc/self/fd"))

    def fail(*_args):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory, "map_read_only", fail)
    with pytest.raises(Unavailable):
        bench.ask(1)
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.undo()
    outcome = bench.ask(1)
    assert bench.run_all(bench.workers[0]) == [1]
    assert outcome.rows == doubled(1)


def test_ended_requests_leave_the_queue_though_its_head_is_stuck(make_bench):
    bench = make_bench(max_queue_size=20)
    [bench.ask(i) for i in range(10)]
    for i in range(500):
        bench.dispatcher.cancel(bench.ask(i).request)
    assert len(bench.dispatcher._queue) < 100
    assert sum(bench.run_all(bench.workers[0])) == 10


def test_a_slot_that_the_next_request_does_not_fit_is_complete(make_bench):
    bench = make_bench()
    bench.ask(1, 2, 3)
    bench.workers[0].read_mail()
    assert bench.workers[0].consumer.best()[7] is False
    bench.ask(4, 5)
    assert bench.workers[0].consumer.best()[7] is True


def test_a_bell_that_was_never_rung_is_armed_again(make_bench):
    """The dead worker had taken the arming; without another, its successor would not ring."""
    bench = make_bench(workers=2)
    first = bench.ask(1)
    lane = bench.lanes[0]
    bench.workers[0].publish(bench.workers[0].seal())
    os.eventfd_read(lane.bell)  # as if it had died between the two
    bench.dispatcher.worker_died(1)
    assert first.rows == doubled(1)
    second = bench.ask(2)
    bench.workers[1].publish(bench.workers[1].seal())
    os.eventfd_read(lane.bell)  # BlockingIOError: nobody rang
    bench.dispatcher.on_bell(lane)
    assert second.rows == doubled(2)


def test_a_full_slot_stays_complete_when_a_request_leaves_it(make_bench):
    bench = make_bench()
    outcomes = [bench.ask(i) for i in range(5)]  # the fifth closes the slot of the others
    bench.dispatcher.cancel(outcomes[1].request)
    bench.workers[0].read_mail()
    _key, _slot, _word, rows, *_, is_complete = bench.workers[0].consumer.best()
    assert (rows, is_complete) == (3, True)


def test_a_bell_after_the_end_is_not_heard(make_bench):
    bench = make_bench()
    bench.ask(1)
    (lane,) = bench.lanes
    bench.close()
    bench.workers.clear()  # closed with the bench
    bench.dispatcher.on_bell(lane)  # its descriptor is closed, and may be anybody's by now
