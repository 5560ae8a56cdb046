"""The loop of a worker on a GPU: when it takes the next batch, and what it does about failures and deaths."""

from __future__ import annotations

import os
from collections import deque
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from gateway._kernels import ring
from gateway.clock import monotonic_ns
from gateway.serving import descriptors, geometry, gpuworker, memory, onnxfile
from gateway.serving.gpuworker import GpuWorker, pipeline_for
from gateway.serving.loader import Loaded
from gateway.serving.pinning import Pins
from gateway.serving.plan import Execution, Understanding
from gateway.tensors import Signature
from tests.unit.fakecuda import FakeCudart, FakeGpuSession
from tests.zoo.building import parse

GRAPH = (
    "(float[n, 4] x) => (float[n, 4] y) { two = Constant <value = float {2}> ()  y = Mul (x, two) }"
)
CAPACITY = 4
DIMS = ((4,),)


class Lane:
    """A front end's side of a lane of one shape."""

    def __init__(self, worker: GpuWorker, signature: Signature, board, number: int) -> None:
        self.shape = geometry.shape_of(signature, DIMS, CAPACITY)
        self.spec = geometry.lane_spec(signature, self.shape, 0, 1 << 12)
        self._record = geometry.flatten(signature, self.shape)
        nbytes = (
            ring.control_bytes(self.spec.slot_count, self.spec.dims_per_slot),
            self.spec.slot_count * self.spec.input_slot_bytes,
            self.spec.slot_count * self.spec.output_slot_bytes,
        )
        fds = [memory.create("test", size) for size in nbytes]
        control, self.inputs, self.outputs = map(memory.map_writable, fds, nbytes)
        self.producer = ring.Producer(control, self.spec.slot_count, self.spec.dims_per_slot, board)
        self.channel = SimpleNamespace(fileno=lambda: number, close=lambda: None)
        bell = os.eventfd(0, os.EFD_CLOEXEC)
        message = {"lane": 0, "spec": self.spec.to_wire()}
        worker._channels[number] = self.channel
        worker._attach(self.channel, message, [*fds, bell])

    def put(self, slot: int, rows: int, value: float, *, full: bool = False) -> None:
        at = slot * self.spec.input_slot_bytes
        data = np.full((rows, 4), value, np.float32).tobytes()
        self.inputs[at : at + len(data)] = data
        self.producer.open(slot, rows, monotonic_ns(), 1, CAPACITY, self._record)
        if full:
            self.producer.complete(slot)

    def answer(self, slot: int, rows: int) -> float:
        """The one value that all of a finished slot's answers have."""
        assert self.producer.phase(slot) == ring.DONE
        (p,) = self.shape.outputs
        start = slot * self.spec.output_slot_bytes
        begin, end = p.span(0, rows)
        (value,) = set(np.frombuffer(self.outputs[start + begin : start + end], np.float32))
        return float(value)


@pytest.fixture
def made(tmp_path):
    """A worker on a fake GPU, and what is around it."""
    path = tmp_path / "model.onnx"
    onnx.save(parse(GRAPH), path)
    cudart = FakeCudart()
    session = FakeGpuSession(path, onnxfile.examine(path), Execution(), cudart)
    signature = Signature(session.inputs, session.outputs, CAPACITY)
    board = bytearray(ring.board_bytes(1))
    consumer = ring.Consumer(board, 0, 1)
    loaded = Loaded(session, signature, Understanding("", ""))
    runs: list[tuple[int, ...]] = []
    counters = SimpleNamespace(batch=lambda *numbers: runs.append(numbers))
    mailbox = SimpleNamespace(letters=deque())
    pipeline = pipeline_for(loaded, with_graphs=False)
    worker = GpuWorker(
        loaded, consumer, counters, mailbox, None, 0, 1 << 20,
        pipeline=pipeline, pins=Pins(session.gpu),
    )  # fmt: skip
    lanes = [Lane(worker, signature, board, number) for number in (90, 91)]
    return SimpleNamespace(
        worker=worker, lane=lanes[0], lanes=lanes, pipeline=pipeline, session=session, runs=runs,
        cudart=cudart, busy_since=lambda: ring.seats(board)[0][2],
    )  # fmt: skip


@pytest.fixture
def rests(made, monkeypatch):
    """Until when the worker slept, each time; it does not really."""
    slept: list[int] = []
    monkeypatch.setattr(made.worker, "_rest", lambda _offers, until_ns: slept.append(until_ns))
    return slept


def test_a_batch_is_begun_then_finished_when_there_is_no_other(made, rests):
    made.lane.put(0, 3, 21)
    made.worker._begin_first()
    assert made.pipeline.in_flight == 1
    assert made.lane.producer.phase(0) == ring.SEALED
    assert made.busy_since() > 0
    made.worker._go_on()
    assert made.lane.answer(0, 3) == 42
    assert made.busy_since() == 0
    assert [rows for rows, *_ in made.runs] == [3]
    assert rests == []


def test_a_full_slot_is_taken_while_the_first_runs_and_another_is_not(made, rests, monkeypatch):
    due_ns = monotonic_ns() + 10**12
    monkeypatch.setattr(type(made.pipeline), "due_ns", lambda _self: due_ns)
    made.lane.put(0, 1, 1)
    made.worker._begin_first()
    made.lane.put(1, 1, 2)
    made.worker._go_on()
    assert rests == [due_ns]
    assert made.lane.producer.phase(1) == ring.OPEN
    made.lane.producer.complete(1)
    made.worker._go_on()
    assert made.pipeline.is_full
    assert made.lane.producer.phase(0) == ring.SEALED
    made.worker._go_on()
    assert made.lane.answer(0, 1) == 2
    assert made.pipeline.in_flight == 1
    assert made.busy_since() == made.pipeline.began_ns  # not idle: it would not be missed
    made.worker._finish_all()
    assert made.lane.answer(1, 1) == 4
    assert made.busy_since() == 0


def test_what_is_there_is_taken_when_it_is_due(made, rests, monkeypatch):
    made.lane.put(0, 1, 1)
    made.worker._begin_first()
    made.lane.put(1, 2, 2)
    monkeypatch.setattr(type(made.pipeline), "due_ns", lambda _self: 1)
    made.worker._go_on()
    assert made.pipeline.in_flight == 2
    assert rests == []
    made.worker._finish_all()
    assert (made.lane.answer(0, 1), made.lane.answer(1, 2)) == (2, 4)


def test_a_front_end_that_is_gone_is_finished_and_unpinned_before_its_lane_is_unmapped(made):
    assert len(made.cudart.registered) == 4  # inputs and outputs of two lanes
    gone, stays = made.lanes
    gone.put(0, 2, 5)
    made.worker._begin_first()
    stays.put(0, 2, 6, full=True)
    made.worker._go_on()
    made.worker._forget_frontend(gone.channel)
    assert made.pipeline.in_flight == 0
    assert gone.answer(0, 2) == 10
    assert stays.answer(0, 2) == 12
    assert len(made.cudart.registered) == 2


def test_a_batch_that_fails_on_the_gpu_is_its_front_ends_to_divide(made):
    made.lane.put(0, 2, 1)
    made.worker._begin_first()
    made.cudart.fails["cudaEventSynchronize"] = 719
    made.worker._go_on()
    assert made.lane.producer.phase(0) == ring.FAILED
    assert descriptors.read_error(memoryview(made.lane.outputs)) == "the GPU failed"
    assert made.busy_since() == 0


def test_of_slots_that_fail_together_each_is_run_by_itself(made, monkeypatch):
    first, second = made.lanes
    first.put(0, 1, 1)
    made.worker._begin_first()
    made.worker._finish_all()
    first.producer.free(0)
    first.put(0, 1, 1)
    second.put(0, 2, 2)
    sealed = made.worker._consumer.offers()
    known = made.worker._runner.known(sealed[0][0], 1)
    for offered in sealed:
        assert made.worker._consumer.seal(*offered[:3], monotonic_ns())
        made.worker._runner.known(offered[0], 1) or made.worker._runner.learn(
            offered[0], offered[1], 1, CAPACITY
        )
    made.worker._fail(
        [(offered, known) for offered in sealed], gpuworker.RunError("together"), monotonic_ns()
    )
    assert (first.answer(0, 1), second.answer(0, 2)) == (2, 4)
