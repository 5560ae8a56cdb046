"""The dispatcher with a worker that the test plays: a real lane, a real consumer, one process.

Every step of a batch's life is taken by hand, so each interleaving is deterministic.
"""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest

from gateway import bytestrings
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
from gateway.protocols.call import InferCall, InputTensor, OutputTensor, check_call
from gateway.serving import deadlines, descriptors, geometry, memory, spill, strings
from gateway.serving import queue as queue_module
from gateway.serving.attached import AttachedLane
from gateway.serving.channel import Channel
from gateway.serving.dispatcher import Dispatcher
from gateway.serving.limits import Limits
from gateway.serving.policy import RISE_NS
from gateway.serving.request import Request, State
from gateway.telemetry.metrics import Metrics
from gateway.tensors import DATATYPES, Padding, Signature, TensorSpec

FP32, INT64, BYTES = DATATYPES["FP32"], DATATYPES["INT64"], DATATYPES["BYTES"]
SIGNATURE = Signature(
    (TensorSpec("x", FP32, ("n", 2)),), (TensorSpec("y", FP32, ("n", 2)),), max_batch_size=4
)
VARIABLE = Signature(
    (TensorSpec("x", FP32, ("n", "length")),), (TensorSpec("y", FP32, ("n", "length")),), 4
)
SEGV, KILL = 11, 9
FAR_US = 10**9
SPILL_BYTES = 1 << 16


class Loop:
    """Stands in for the event loop: nothing fires by itself."""

    def __init__(self) -> None:
        self.pending: list[tuple[float, Callable, Request]] = []

    def call_soon(self, function, *args) -> None:
        function(*args)

    def call_later(self, delay_s, function, *args):
        entry = (delay_s, function, args)
        self.pending.append(entry)
        pending = self.pending

        class Handle:
            def cancel(self) -> None:
                if entry in pending:
                    pending.remove(entry)

        return Handle()

    def fire(self) -> None:
        """Let the time of all that is pending come."""
        with patch.object(deadlines, "monotonic_ns", lambda: 1 << 62):
            self._fire()

    def _fire(self) -> None:
        for entry in list(self.pending):
            _delay_s, function, args = entry
            self.pending.remove(entry)
            function(*args)


@dataclass
class Outcome:
    """How a request ended: its outputs by name, or its error; both empty while it has not."""

    request: Request | None = None
    answers: list[dict[str, np.ndarray]] = field(default_factory=list)
    errors: list = field(default_factory=list)

    @property
    def rows(self) -> list[list[float]]:
        """The elements of y, of each answer."""
        return [answer["y"].reshape(-1).tolist() for answer in self.answers]


class Taken(NamedTuple):
    """A slot that a worker has sealed."""

    key: int
    slot: int
    word: int
    rows: int
    shape: geometry.SlotShape


def double(arrays):
    """What the models of these tests do unless they say otherwise."""
    return [2 * arrays["x"]]


class Worker:
    """A worker in the test's hands: seals, runs the model, publishes, or dies at any step."""

    def __init__(self, bench: Bench, seat: int, incarnation: int) -> None:
        self.signature, self.model = bench.signature, bench.model
        self.incarnation = incarnation
        self.consumer = ring.Consumer(bench.board, seat, incarnation)
        self.ours, self.theirs = Channel.pair()
        self.ours.setblocking(False)
        self.lanes: dict[int, AttachedLane] = {}

    def close(self) -> None:
        self.ours.close()
        for key, lane in self.lanes.items():
            self.consumer.detach(key)
            lane.close()

    def read_mail(self) -> None:
        while True:
            try:
                received = self.ours.receive()
            except BlockingIOError:
                return
            if received is None:
                return
            message, fds = received
            lane = AttachedLane(geometry.LaneSpec.from_wire(message["spec"]), fds)
            self.consumer.attach(
                message["lane"],
                lane.control,
                lane.spec.slot_count,
                lane.spec.dims_per_slot,
                lane.bell,
            )
            self.lanes[message["lane"]] = lane

    def seal(self) -> Taken | None:
        """Take the best slot, if there is one."""
        self.read_mail()
        best = self.consumer.best()
        if best is None:
            return None
        key, slot, word, rows, capacity, *_ = best
        assert self.consumer.seal(key, slot, word, 1)
        flat = self.consumer.dims(key, slot)
        is_described, dims = geometry.unflatten(self.signature, flat)
        shape = geometry.shape_of(self.signature, dims, capacity, is_described=is_described)
        return Taken(key, slot, word, rows, shape)

    def arrays(self, taken: Taken) -> dict[str, np.ndarray]:
        """The inputs of a sealed slot."""
        lane = self.lanes[taken.key]
        arrays = lane.read_arrays(taken.slot, taken.shape, taken.rows, taken.rows)
        return {name: array.copy() for name, array in arrays.items()}

    def publish(self, taken: Taken, ok: bool = True, spilled_to: int | None = None) -> None:
        """Write the outputs, or an error, and publish.

        ``spilled_to``: a memfd for outputs that are described; to send it is the test's part.
        """
        with self.lanes[taken.key].output_region(taken.slot) as region:
            if not ok:
                descriptors.write_error(region, "ONNX Runtime failed (FAIL)")
            elif taken.shape.outputs is None:
                self._describe(region, self.model(self.arrays(taken)), spilled_to)
            else:
                outputs = self.model(self.arrays(taken))
                for p, array in zip(taken.shape.outputs, outputs, strict=True):
                    region[p.offset : p.offset + array.nbytes] = array.tobytes()
        self.consumer.publish(taken.key, taken.slot, taken.word, ok, 10, 20)

    def _describe(self, region: memoryview, outputs, spilled_to: int | None) -> None:
        end = geometry.head_bytes(len(outputs))
        described, written = [], []
        for array in outputs:
            is_text = array.dtype == object
            data = bytestrings.serialise(array.reshape(-1)) if is_text else array.tobytes()
            described.append((array.shape, end, len(data)))
            written.append((end, data))
            end = geometry.align(end + len(data))
        descriptors.write_descriptors(region, described, is_spilled=spilled_to is not None)
        for at, data in written:
            if spilled_to is None:
                region[at : at + len(data)] = data
            else:
                os.pwrite(spilled_to, data, at)

    def spill(self, taken: Taken, fd: int | None = None) -> None:
        """Publish with the outputs in a memfd that was passed on before, as a worker does it."""
        made = memory.create("spill", SPILL_BYTES) if fd is None else fd
        spill.send(self.ours, taken.key, taken.slot, made)
        self.publish(taken, spilled_to=made)
        os.close(made)


class Bench:
    """A dispatcher, its lanes and its workers."""

    def __init__(
        self,
        workers: int = 1,
        max_queue_size: int = 100,
        timeout_ns: int = 0,
        signature: Signature = SIGNATURE,
        model: Callable = double,
        lane_bytes: int = 1 << 20,
        levels: int = 0,
        default_level: int = 1,
    ) -> None:
        size = ring.board_bytes(workers + 12)
        self.board = mmap.mmap(-1, size)
        self.loop = Loop()
        self.lanes = []
        self.convictions = 0
        self.signature, self.model = signature, model
        self.metrics = Metrics().version("m", 1)
        self.dispatcher = Dispatcher(
            signature,
            Limits(max_queue_size, timeout_ns, lane_bytes, levels, default_level),
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
        worker = Worker(self, self.incarnations, self.incarnations + 1)
        self.incarnations += 1
        self.workers.append(worker)
        self.dispatcher.worker_up(worker.incarnation, worker.theirs)
        return worker

    def ask(self, *values: float, **options) -> Outcome:
        """Submit a request with one row per value, as a list."""
        data = [v for value in values for v in (value, value + 0.5)]
        return self.submit([InputTensor("x", FP32, (len(values), 2), data)], **options)

    def send(self, *, options: dict | None = None, **arrays) -> Outcome:
        """Submit a request with these arrays, as bytes."""
        specs = {spec.name: spec for spec in self.signature.inputs}
        tensors = []
        for name, array in arrays.items():
            array = np.asarray(array)
            is_text = array.dtype == object
            data = bytestrings.serialise(array.reshape(-1)) if is_text else array.tobytes()
            tensors.append(InputTensor(name, specs[name].datatype, array.shape, memoryview(data)))
        return self.submit(tensors, **(options or {}))

    def submit(
        self,
        tensors: list[InputTensor],
        timeout_us: int | None = None,
        priority: int = 0,
        arrived_ns: int | None = None,
    ) -> Outcome:
        call = InferCall(tensors, timeout_us=timeout_us, priority=priority)
        check_call(call, self.signature, 1 << 30)
        outcome = Outcome()

        def on_answer(outputs, _timing) -> None:
            outcome.answers.append({tensor.name: as_array(tensor) for tensor in outputs})

        if arrived_ns is None:
            arrived_ns = monotonic_ns()
        outcome.request = self.dispatcher.submit(call, arrived_ns, on_answer, outcome.errors.append)
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
        """Let a worker run until nothing is left; the rows of each batch.

        ``ok`` says by the first elements of x's rows whether a run succeeds.
        """
        sizes = []
        while (taken := worker.seal()) is not None:
            first = [row.reshape(-1)[0] for row in worker.arrays(taken)["x"]]
            worker.publish(taken, ok(first))
            sizes.append(taken.rows)
            self.deliver()
        return sizes


def as_array(tensor: OutputTensor) -> np.ndarray:
    """A copy of an output."""
    if tensor.datatype.numpy is None:
        return strings.as_array(bytestrings.elements(tensor.data), tensor.shape)
    return np.frombuffer(bytes(tensor.data), tensor.datatype.dtype).reshape(tensor.shape)


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
        with pytest.raises(InvalidRequest, match="input 'x'"):
            bench.submit([InputTensor("x", FP32, (1, 2), [1.0, "a"])])
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
        assert worker.seal().rows == 3
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
        if 666 in worker.arrays(taken)["x"]:
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
    bench = make_bench(signature=VARIABLE)
    with pytest.raises(TooLarge, match="one row of this shape does not fit lane_bytes"):
        bench.send(x=np.zeros((1, (1 << 18) + 1), np.float32))
    assert bench.lanes == []
    assert bench.dispatcher.waiting() == 0


def test_more_rows_than_a_slot_of_this_shape_holds_are_refused(make_bench):
    """Rows of 512 KiB: two of them fit a lane of 1 MiB, though the model takes four."""
    bench = make_bench(signature=VARIABLE)
    row = np.ones((1, 1 << 17), np.float32)
    with pytest.raises(TooLarge, match=r"holds 2 rows of this shape, the request has 3"):
        bench.send(x=np.repeat(row, 3, 0))
    outcome = bench.send(x=np.repeat(row, 2, 0))
    assert bench.run_all(bench.workers[0]) == [2]
    np.testing.assert_array_equal(outcome.answers[0]["y"], np.full((2, 1 << 17), 2))


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
    _key, _slot, _word, rows, *_, is_complete, _due_ns = bench.workers[0].consumer.best()
    assert (rows, is_complete) == (3, True)


def test_a_bell_after_the_end_is_not_heard(make_bench):
    bench = make_bench()
    bench.ask(1)
    (lane,) = bench.lanes
    bench.close()
    bench.workers.clear()  # closed with the bench
    bench.dispatcher.on_bell(lane)  # its descriptor is closed, and may be anybody's by now


# Shapes


def same(outcome: Outcome, **expected) -> bool:
    """Whether a request got exactly this, once."""
    (answer,) = outcome.answers
    assert answer.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(answer[name], array)
        assert answer[name].shape == np.shape(array)
    return outcome.errors == []


def test_requests_of_other_dims_never_share_a_slot(make_bench):
    bench = make_bench(signature=VARIABLE)
    arrays = [np.full((1, length), length, np.float32) for length in (3, 5, 3, 0, 5)]
    outcomes = [bench.send(x=x) for x in arrays]
    worker, sizes = bench.workers[0], []
    while (taken := worker.seal()) is not None:
        sizes.append(taken.rows)
        worker.publish(taken)
        bench.deliver()
    assert sorted(sizes) == [1, 2, 2]
    assert all(same(o, y=2 * x) for o, x in zip(outcomes, arrays, strict=True))


WITH_SCALE = Signature(
    (TensorSpec("x", FP32, ("n", 2)), TensorSpec("scale", FP32, (), optional=True)),
    (TensorSpec("y", FP32, ("n", 2)),),
    max_batch_size=4,
)


def test_a_request_with_an_optional_input_runs_by_itself(make_bench):
    bench = make_bench(
        signature=WITH_SCALE, model=lambda arrays: [arrays["x"] * arrays.get("scale", 2)]
    )
    x = np.ones((1, 2), np.float32)
    scales = [None, 3, None, 3, 5]
    outcomes = [
        bench.send(x=x) if scale is None else bench.send(x=x, scale=np.float32(scale))
        for scale in scales
    ]
    assert sorted(bench.run_all(bench.workers[0])) == [1, 1, 1, 2]
    for outcome, scale in zip(outcomes, scales, strict=True):
        assert same(outcome, y=x * (scale or 2))


def test_a_cancelled_request_with_an_optional_input_leaves_nothing(make_bench):
    bench = make_bench(signature=WITH_SCALE, model=lambda a: [a["x"] * a.get("scale", 2)])
    x = np.ones((3, 2), np.float32)
    bench.dispatcher.cancel(bench.send(x=x, scale=np.float32(9)).request)
    outcome = bench.send(x=x, scale=np.float32(5))
    assert bench.run_all(bench.workers[0]) == [3]
    assert same(outcome, y=5 * x)


def test_an_optional_input_survives_the_death_of_a_worker(make_bench):
    bench = make_bench(
        workers=2, signature=WITH_SCALE, model=lambda a: [a["x"] * a.get("scale", 2)]
    )
    x = np.ones((2, 2), np.float32)
    outcome = bench.send(x=x, scale=np.float32(5))
    bench.workers[0].seal()
    bench.dispatcher.worker_died(1)
    bench.dispatcher.worker_exited(1, KILL, False)
    assert bench.run_all(bench.workers[1]) == [2]
    assert same(outcome, y=5 * x)


WHOLE = Signature((TensorSpec("x", FP32, None),), (TensorSpec("y", FP32, None),), 0)


def test_a_whole_model_gets_one_request_at_a_time_of_whatever_dims(make_bench):
    def transposed(arrays):
        return [np.ascontiguousarray(arrays["x"].T).reshape(arrays["x"].T.shape)]

    bench = make_bench(signature=WHOLE, model=transposed)
    arrays = [
        np.float32(7),
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.empty((0, 3), np.float32),
        np.arange(2, dtype=np.float32).reshape(1, 1, 1, 1, 1, 1, 1, 2),
        np.arange(6, dtype=np.float32).reshape(2, 3) + 1,
    ]
    outcomes = [bench.send(x=x) for x in arrays]
    worker, sizes = bench.workers[0], []
    while (taken := worker.seal()) is not None:
        sizes.append(taken.rows)
        worker.publish(taken)
        bench.deliver()
    assert sizes == [1] * 5
    assert all(same(o, y=x.T) for o, x in zip(outcomes, arrays, strict=True))


def test_two_requests_of_a_whole_model_do_not_lie_in_one_slot(make_bench):
    bench = make_bench(signature=WHOLE)
    first, second = (bench.send(x=np.ones(3, np.float32)) for _ in range(2))
    assert first.request.slot is not second.request.slot


# Padding

PADDED = Signature(
    (TensorSpec("ids", INT64, ("n", "length")),),
    (TensorSpec("y", INT64, ("n", "length")), TensorSpec("sum", INT64, ("n",))),
    max_batch_size=4,
    padding=(Padding("length", (4, 8), True, (("ids", -1),)),),
)


def doubles_and_sums(arrays):
    return [2 * arrays["ids"], arrays["ids"].sum(1)]


def ids(length: int, rows: int = 1) -> np.ndarray:
    return np.arange(10 * length, 10 * length + rows * length).reshape(rows, length)


def padded_sum(array: np.ndarray, bucket: int) -> np.ndarray:
    return array.sum(1) - (bucket - array.shape[1])


def run_padded(bench, worker, culprit: int | None = None) -> list[tuple[int, ...]]:
    """Run what there is; the dims of each batch. A batch with ``culprit`` in it fails."""
    dims = []
    while (taken := worker.seal()) is not None:
        array = worker.arrays(taken)["ids"]
        dims.append(array.shape)
        worker.publish(taken, culprit is None or culprit not in array)
        bench.deliver()
    return dims


def test_padded_requests_share_a_slot_and_get_their_own_lengths_back(make_bench):
    bench = make_bench(signature=PADDED, model=doubles_and_sums)
    lengths = (3, 5, 4, 1, 8, 9)
    outcomes = [bench.send(ids=ids(length)) for length in lengths]
    assert sorted(run_padded(bench, bench.workers[0])) == [(1, 9), (2, 8), (3, 4)]
    for outcome, length, bucket in zip(outcomes, lengths, (4, 8, 4, 4, 8, 9), strict=True):
        x = ids(length)
        assert same(outcome, y=2 * x, sum=padded_sum(x, bucket))


@pytest.mark.parametrize("position", range(3))
def test_a_cancelled_padded_request_leaves_its_mates_whole(make_bench, position):
    bench = make_bench(signature=PADDED, model=doubles_and_sums)
    outcomes = [bench.send(ids=ids(length)) for length in (3, 1, 2)]
    bench.dispatcher.cancel(outcomes[position].request)
    assert run_padded(bench, bench.workers[0]) == [(2, 4)]
    for i, length in enumerate((3, 1, 2)):
        if i != position:
            assert same(outcomes[i], y=2 * ids(length), sum=padded_sum(ids(length), 4))


def test_padded_requests_that_are_run_again_alone_get_their_own_lengths_back(make_bench):
    bench = make_bench(signature=PADDED, model=doubles_and_sums)
    outcomes = [bench.send(ids=ids(length, 2 - length % 2)) for length in (3, 2)]
    culprit = bench.send(ids=np.array([[666]]))
    dims = run_padded(bench, bench.workers[0], culprit=666)
    assert dims == [(4, 4), (1, 4), (2, 4), (1, 4)]
    assert same(outcomes[0], y=2 * ids(3), sum=padded_sum(ids(3), 4))
    assert same(outcomes[1], y=2 * ids(2, 2), sum=padded_sum(ids(2, 2), 4))
    assert isinstance(culprit.errors[0], InferenceFailed)


def test_padded_requests_may_come_as_lists_and_may_have_to_queue(make_bench):
    bench = make_bench(signature=PADDED, model=doubles_and_sums)
    outcomes = [
        bench.submit([InputTensor("ids", INT64, (1, length), ids(length).tolist(), True)])
        for length in (1, 2, 3) * 6
    ]
    assert State.QUEUED in {outcome.request.state for outcome in outcomes}
    assert sum(rows for rows, _ in run_padded(bench, bench.workers[0])) == 18
    for outcome, length in zip(outcomes, (1, 2, 3) * 6, strict=True):
        assert same(outcome, y=2 * ids(length), sum=padded_sum(ids(length), 4))


def test_a_list_that_does_not_decode_is_refused_also_where_it_is_padded(make_bench):
    bench = make_bench(signature=PADDED, model=doubles_and_sums)
    mate = bench.send(ids=ids(3))
    with pytest.raises(InvalidRequest, match="input 'ids'"):
        bench.submit([InputTensor("ids", INT64, (1, 2), [1, "a"])])
    assert run_padded(bench, bench.workers[0]) == [(1, 4)]
    assert same(mate, y=2 * ids(3), sum=padded_sum(ids(3), 4))


# Strings

TEXTS = Signature(
    (TensorSpec("s", BYTES, ("n", 2)),),
    (TensorSpec("t", BYTES, ("n", 2)), TensorSpec("sizes", INT64, ("n",))),
    max_batch_size=4,
    describes_outputs=True,
)


def reversed_and_measured(arrays):
    """Each row in reverse, and how many bytes it has."""
    s = arrays["s"]
    return [s[:, ::-1], np.array([sum(map(len, row)) for row in s], np.int64)]


def texts(*rows: tuple[bytes, bytes]) -> np.ndarray:
    return strings.as_array([element for row in rows for element in row], (len(rows), 2))


def got_reversed(outcome: Outcome, array: np.ndarray) -> bool:
    backwards, sizes = reversed_and_measured({"s": array})
    return same(outcome, t=backwards, sizes=sizes)


def run_texts(bench, worker, culprit: bytes | None = None) -> list[int]:
    sizes = []
    while (taken := worker.seal()) is not None:
        sizes.append(taken.rows)
        worker.publish(taken, culprit is None or culprit not in worker.arrays(taken)["s"])
        bench.deliver()
    return sizes


ODD = [(b"", b"a"), (b"\0", b"\xff\xfe"), ("zürich".encode(), b""), (b"a\0b", b"x" * 80)]


def test_requests_of_strings_share_a_slot_and_keep_every_byte(make_bench):
    bench = make_bench(signature=TEXTS, model=reversed_and_measured)
    arrays = [texts(ODD[0]), texts(*ODD[1:3]), texts(ODD[3])]
    outcomes = [bench.send(s=array) for array in arrays]
    assert run_texts(bench, bench.workers[0]) == [4]
    assert all(got_reversed(o, a) for o, a in zip(outcomes, arrays, strict=True))


def test_strings_of_very_unlike_sizes_do_not_share_a_slot(make_bench):
    """A slot's heap is of a size class, so that one long text does not starve short ones of room."""
    bench = make_bench(signature=TEXTS, model=reversed_and_measured)
    arrays = [texts((b"short", b"")), texts((b"x" * 5000, b"long")), texts((b"too", b"short"))]
    outcomes = [bench.send(s=array) for array in arrays]
    assert sorted(run_texts(bench, bench.workers[0])) == [1, 2]
    assert all(got_reversed(o, a) for o, a in zip(outcomes, arrays, strict=True))


@pytest.mark.parametrize("position", range(3))
def test_a_cancelled_request_of_strings_leaves_its_mates_whole(make_bench, position):
    bench = make_bench(signature=TEXTS, model=reversed_and_measured)
    arrays = [texts(ODD[0]), texts(*ODD[1:3]), texts(ODD[3])]
    outcomes = [bench.send(s=array) for array in arrays]
    bench.dispatcher.cancel(outcomes[position].request)
    late = bench.send(s=texts((b"late", b"comer")))
    run_texts(bench, bench.workers[0])
    assert outcomes[position].answers == []
    for i, outcome in enumerate(outcomes):
        assert i == position or got_reversed(outcome, arrays[i])
    assert got_reversed(late, texts((b"late", b"comer")))


def test_the_heap_that_cancelled_requests_took_is_not_written_twice(make_bench):
    """Four rows of up to 256 bytes: what left the slot has used the heap up before its rows."""
    bench = make_bench(signature=TEXTS, model=reversed_and_measured)
    arrays = [texts((bytes([65 + i]) * 120, bytes([97 + i]) * 120)) for i in range(6)]  # 248 each
    outcomes = [bench.send(s=array) for array in arrays[:3]]
    first_slot = outcomes[0].request.slot
    for gone in outcomes[1:]:
        bench.dispatcher.cancel(gone.request)
    outcomes += [bench.send(s=array) for array in arrays[3:]]
    assert outcomes[3].request.slot is first_slot  # 992 bytes of the heap's 1024
    assert outcomes[4].request.slot is not first_slot
    assert outcomes[5].request.slot is outcomes[4].request.slot
    assert run_texts(bench, bench.workers[0]) == [2, 2]
    for i in (0, 3, 4, 5):
        assert got_reversed(outcomes[i], arrays[i])


def test_an_emptied_slot_has_its_whole_heap_again(make_bench):
    bench = make_bench(signature=TEXTS, model=reversed_and_measured)
    array = texts((b"x" * 120, b"y" * 120))
    for _ in range(20):
        bench.dispatcher.cancel(bench.send(s=array).request)
    outcomes = [bench.send(s=array) for _ in range(4)]
    assert run_texts(bench, bench.workers[0]) == [4]
    assert all(got_reversed(o, array) for o in outcomes)


def test_strings_survive_a_batch_that_is_run_again_one_by_one(make_bench):
    bench = make_bench(signature=TEXTS, model=reversed_and_measured)
    arrays = [texts(*ODD[:2]), texts(ODD[3])]
    outcomes = [bench.send(s=array) for array in arrays]
    culprit = bench.send(s=texts((b"poison", b"")))
    assert run_texts(bench, bench.workers[0], culprit=b"poison") == [4, 2, 1, 1]
    assert all(got_reversed(o, a) for o, a in zip(outcomes, arrays, strict=True))
    assert isinstance(culprit.errors[0], InferenceFailed)


def test_strings_that_had_to_queue_keep_every_byte(make_bench):
    bench = make_bench(signature=TEXTS, model=reversed_and_measured)
    arrays = [texts(row) for row in ODD * 5]
    outcomes = [bench.send(s=array) for array in arrays]
    assert State.QUEUED in {outcome.request.state for outcome in outcomes}
    assert sum(run_texts(bench, bench.workers[0])) == 20
    assert all(got_reversed(o, a) for o, a in zip(outcomes, arrays, strict=True))


def test_a_worker_that_describes_other_strings_than_it_wrote_is_not_believed(make_bench):
    bench = make_bench(signature=TEXTS, model=reversed_and_measured)
    outcome = bench.send(s=texts(ODD[3]))
    worker = bench.workers[0]
    taken = worker.seal()
    with worker.lanes[taken.key].output_region(taken.slot) as region:
        end = geometry.head_bytes(2)
        described = [((1, 2), end, 5), ((1,), end, 8)]
        descriptors.write_descriptors(region, described)
    worker.consumer.publish(taken.key, taken.slot, taken.word, True, 10, 20)
    bench.deliver()
    assert isinstance(outcome.errors[0], InferenceFailed)


# Priorities

ONE_ROW = Signature(SIGNATURE.inputs, SIGNATURE.outputs, max_batch_size=1)


@pytest.fixture
def clock(monkeypatch):
    """The queue's clock, moved by the test; returns the time that it has moved to."""
    now_ns = [monotonic_ns()]
    monkeypatch.setattr(queue_module, "monotonic_ns", lambda: now_ns[0])

    def move(by_ns: int = 0) -> int:
        now_ns[0] += by_ns
        return now_ns[0]

    return move


def run_one(bench: Bench) -> None:
    """A worker runs one batch, and one queued request gets its place."""
    worker = bench.workers[0]
    worker.publish(worker.seal())
    bench.deliver()


def placed_in_turn(bench: Bench, outcomes: list[Outcome]) -> list[int]:
    """The order in which queued requests get a slot, one for each batch that is run."""
    order: list[int] = []
    while len(order) < len(outcomes):
        run_one(bench)
        for i, outcome in enumerate(outcomes):
            if outcome.request.state is not State.QUEUED and i not in order:
                order.append(i)
    return order


@pytest.mark.parametrize(
    ("levels", "priorities", "order"),
    [
        (3, [3, 2, 1, 3, 1], [2, 4, 1, 0, 3]),
        (3, [3, 0, 1], [2, 1, 0]),  # none: the default level, the second
        (3, [99, 3, 2], [2, 0, 1]),  # beyond the last: the last
        (0, [3, 2, 1], [0, 1, 2]),  # the model has no levels
    ],
)
def test_higher_priorities_overtake_in_the_queue(make_bench, clock, levels, priorities, order):
    bench = make_bench(signature=ONE_ROW, levels=levels, default_level=2)
    for i in range(2):  # one to run, and one that lies ready
        bench.ask(100 + i)
    outcomes = [bench.ask(i, priority=p, arrived_ns=clock()) for i, p in enumerate(priorities)]
    assert placed_in_turn(bench, outcomes) == order
    bench.run_all(bench.workers[0])
    assert [o.rows for o in outcomes] == [doubled(i) for i in range(len(priorities))]


def test_a_low_priority_rises_as_it_waits(make_bench, clock):
    bench = make_bench(signature=ONE_ROW, levels=2)
    for i in range(2):
        bench.ask(100 + i)
    low = bench.ask(0, priority=2, arrived_ns=clock())
    early = bench.ask(1, priority=1, arrived_ns=clock(RISE_NS // 2))
    late = bench.ask(2, priority=1, arrived_ns=clock(RISE_NS // 2))
    run_one(bench)
    # Both others are of the level that it has risen to, and came later.
    assert [o.request.state for o in (low, early, late)] == [
        State.PLACED,
        State.QUEUED,
        State.QUEUED,
    ]
    assert bench.run_all(bench.workers[0]) == [1] * 4
    assert all(o.rows for o in (low, early, late))


def test_requests_of_a_failed_batch_come_before_any_priority(make_bench, clock):
    bench = make_bench(levels=2)
    worker = bench.workers[0]
    mates = [bench.ask(i, priority=2) for i in range(4)]
    [bench.ask(10 + i, priority=2) for i in range(4)]
    high = [bench.ask(20 + i, priority=1) for i in range(4)]
    worker.publish(worker.seal(), ok=False)
    bench.deliver()
    assert mates[0].request.state is State.PLACED
    assert {o.request.state for o in high} == {State.QUEUED}
    bench.run_all(worker)
    assert [o.rows for o in mates] == [doubled(i) for i in range(4)]


# Spills

DESCRIBED = Signature(SIGNATURE.inputs, SIGNATURE.outputs, max_batch_size=4, describes_outputs=True)


def open_fds() -> int:
    gc.collect()  # what an earlier test left is not to go in the middle of this one
    return len(os.listdir("/proc/self/fd"))


def test_spilled_outputs_reach_each_request_of_the_batch(make_bench):
    bench = make_bench(signature=DESCRIBED)
    outcomes = [bench.ask(1), bench.ask(2, 3)]
    worker = bench.workers[0]
    taken = worker.seal()
    before = open_fds()
    worker.spill(taken)
    bench.deliver()
    assert [o.rows for o in outcomes] == [doubled(1), doubled(2, 3)]
    assert open_fds() == before
    again = bench.ask(4)  # the slot is as good as before
    assert bench.run_all(worker) == [1]
    assert again.rows == doubled(4)


def test_spills_of_several_slots_are_told_apart(make_bench):
    bench = make_bench(workers=2, signature=DESCRIBED)
    outcomes = [bench.ask(i) for i in range(8)]
    taken = [worker.seal() for worker in bench.workers]
    for worker, slot in zip(reversed(bench.workers), reversed(taken), strict=True):
        worker.spill(slot)
    bench.deliver()
    assert [o.rows for o in outcomes] == [doubled(i) for i in range(8)]


def test_outputs_larger_than_a_lane_arrive(make_bench):
    wide = Signature(
        (TensorSpec("x", FP32, ("n", 2)),), (TensorSpec("y", FP32, ("n", 1 << 19)),), 4
    )
    bench = make_bench(
        signature=wide, model=lambda arrays: [np.repeat(arrays["x"], 1 << 18, axis=1)]
    )
    outcomes = [bench.ask(1), bench.ask(2)]
    worker = bench.workers[0]
    for _ in outcomes:
        taken = worker.seal()
        assert (taken.rows, taken.shape.outputs) == (1, None)
        worker.spill(taken, memory.create("spill", 4 << 20))
        bench.deliver()
    for outcome, value in zip(outcomes, (1, 2), strict=True):
        x = np.array([[value, value + 0.5]], np.float32)
        assert same(outcome, y=np.repeat(x, 1 << 18, axis=1))
    with pytest.raises(TooLarge, match="holds 1 rows"):
        bench.ask(1, 2)


def never(worker, taken):
    """Says that it has spilled, and has passed nothing on."""
    fd = memory.create("spill", SPILL_BYTES)
    worker.publish(taken, spilled_to=fd)
    os.close(fd)


def unsealed(worker, taken):
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SPILL_BYTES)
    worker.spill(taken, fd)


def too_small(worker, taken):
    fd = memory.create("spill", geometry.head_bytes(1) + 4)
    spill.send(worker.ours, taken.key, taken.slot, fd)
    other = memory.create("spill", SPILL_BYTES)
    worker.publish(taken, spilled_to=other)
    os.close(fd)
    os.close(other)


def for_another_slot(worker, taken):
    fd = memory.create("spill", SPILL_BYTES)
    spill.send(worker.ours, taken.key, taken.slot + 1, fd)
    worker.publish(taken, spilled_to=fd)
    os.close(fd)


@pytest.mark.parametrize("badly", [never, unsealed, too_small, for_another_slot])
def test_a_spill_that_cannot_be_used_fails_its_request_and_nothing_else(make_bench, badly):
    bench = make_bench(workers=2, signature=DESCRIBED)
    full = [bench.ask(i) for i in range(4)]
    victim = bench.ask(9)
    worker, other = bench.workers
    good, bad = worker.seal(), other.seal()
    badly(other, bad)
    worker.spill(good)
    bench.deliver()
    assert isinstance(victim.errors[0], InferenceFailed)
    assert "inconsistent" in victim.errors[0].message
    assert [o.rows for o in full] == [doubled(i) for i in range(4)]
    healthy = bench.ask(5)
    assert bench.run_all(worker) == [1]
    assert healthy.rows == doubled(5)


@pytest.mark.parametrize("badly", [never, unsealed, too_small])
def test_requests_of_a_batch_without_its_spill_are_run_again_alone(make_bench, badly):
    bench = make_bench(signature=DESCRIBED)
    outcomes = [bench.ask(1), bench.ask(2)]
    worker = bench.workers[0]
    badly(worker, worker.seal())
    bench.deliver()
    assert bench.run_all(worker) == [1, 1]
    assert [o.rows for o in outcomes] == [doubled(1), doubled(2)]


def test_a_worker_that_dies_after_its_spill_has_answered(make_bench):
    bench = make_bench(workers=2, signature=DESCRIBED)
    outcomes = [bench.ask(1), bench.ask(2)]
    worker = bench.workers[0]
    taken = worker.seal()
    before = open_fds()
    worker.spill(taken)
    worker.ours.close()
    bench.dispatcher.worker_died(1)
    assert [o.rows for o in outcomes] == [doubled(1), doubled(2)]
    bench.deliver()
    assert [len(o.answers) for o in outcomes] == [1, 1]
    assert open_fds() == before - 2  # both ends of its channel


def test_a_spill_of_a_worker_that_died_before_publishing_is_not_taken_for_the_next_one_s(
    make_bench,
):
    bench = make_bench(workers=2, signature=DESCRIBED)
    outcome = bench.ask(1)
    worker, heir = bench.workers
    taken = worker.seal()
    fd = memory.create("spill", SPILL_BYTES)  # zeros: not the answer
    spill.send(worker.ours, taken.key, taken.slot, fd)
    os.close(fd)
    bench.dispatcher.worker_died(1)
    bench.dispatcher.worker_exited(1, KILL, False)
    heir.spill(heir.seal())
    bench.deliver()
    assert outcome.rows == doubled(1)


def test_a_cancelled_request_s_spill_is_given_back(make_bench):
    bench = make_bench(signature=DESCRIBED)
    gone = bench.ask(1)
    worker = bench.workers[0]
    taken = worker.seal()
    bench.dispatcher.cancel(gone.request)
    before = open_fds()
    worker.spill(taken)
    bench.deliver()
    assert (gone.answers, gone.errors) == ([], [])
    assert open_fds() == before
