"""A worker's loop on lanes of several front ends, which the test plays: what it runs together, and how.

The loop runs in a thread on a real model. Its clock moves by a fixed step each time it is read, so every run
seems to take as long as any other: runs are dear, rows are cheap, and two slots are better run together.
"""

from __future__ import annotations

import itertools
import mmap
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from gateway._kernels import ring
from gateway.clock import NS_PER_MS
from gateway.serving import geometry, loader, loop, memory, running
from gateway.serving.plan import LoadPlan
from gateway.telemetry.ledger import Ledger
from gateway.tensors import Signature
from tests.zoo.building import parse

PATIENCE_S = 20
WIDTH = 3
DOUBLE = (
    "(float[n, 3] x) => (float[n, 3] y) { two = Constant <value = float {2}> ()  y = Mul (x, two) }"
)
PICK = (
    "(int64[n, 3] x) => (float[n, 3] y) "
    "{ table = Constant <value = float[4] {0, 1, 2, 3}> ()  y = Gather (table, x) }"
)
"""Fails where an element is not -4 to 3."""


class FrontEnd:
    """One lane, as a front end has it."""

    def __init__(self, number: int, signature: Signature, board: mmap.mmap) -> None:
        self.number, self.signature = number, signature
        self.shape = geometry.slot_shape(signature, ((WIDTH,),), 1 << 20)
        self.spec = geometry.lane_spec(signature, self.shape, 0, 1 << 20)
        sizes = (
            ring.control_bytes(self.spec.slot_count, self.spec.dims_per_slot),
            self.spec.slot_count * self.spec.input_slot_bytes,
            self.spec.slot_count * self.spec.output_slot_bytes,
        )
        self.fds = [memory.create("lane", size) for size in sizes]
        self.control, self.inputs, self.outputs = (
            memory.map_writable(fd, size) for fd, size in zip(self.fds, sizes, strict=True)
        )
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        self.producer = ring.Producer(self.control, *self.geometry, board)
        self.fds.append(os.dup(self.bell))

    @property
    def geometry(self) -> tuple[int, int]:
        return self.spec.slot_count, self.spec.dims_per_slot

    def fileno(self) -> int:
        """Of the channel to the worker, by which the worker knows it."""
        return 1000 + self.number

    def close(self) -> None:
        os.close(self.bell)

    def open(self, slot: int, rows: Sequence[Sequence[float]], due_ns: int = 0) -> None:
        [p] = self.shape.inputs
        data = np.asarray(rows, p.spec.datatype.dtype).tobytes()
        begin = slot * self.spec.input_slot_bytes + p.offset
        self.inputs[begin : begin + len(data)] = data
        flat = geometry.flatten(self.signature, self.shape)
        self.producer.open(slot, len(rows), slot + 1, 0, self.shape.capacity, flat, due_ns)

    def answer(self, slot: int) -> list[list[float]]:
        assert self.producer.phase(slot) == ring.DONE
        [p] = self.shape.outputs
        begin = slot * self.spec.output_slot_bytes + p.offset
        count = self.producer.rows(slot) * WIDTH
        return np.frombuffer(self.outputs, np.float32, count, begin).reshape(-1, WIDTH).tolist()

    def wait(self, *slots: int) -> None:
        """Until these were run, whether or not they failed."""
        left = set(slots)
        while left := left - set(self.producer.collect()):
            if self.producer.arm():
                ready, _, _ = select.select([self.bell], [], [], PATIENCE_S)
                assert ready, "the worker did nothing"
                os.eventfd_read(self.bell)


class Bench:
    """A worker's loop in a thread, with front ends whose lanes it serves."""

    def __init__(self, graph: str, folder, front_ends: int, allowed: tuple[int, ...] = ()) -> None:
        path = folder / "model.onnx"
        onnx.save(parse(graph), path)
        plan = LoadPlan(str(path), max_batch_size=8, allowed_batch_sizes=allowed)
        loaded = loader.load(plan, lambda: None)
        self.board = mmap.mmap(-1, ring.board_bytes(1))
        self.front_ends = [FrontEnd(n, loaded.signature, self.board) for n in range(front_ends)]
        self.consumer = ring.Consumer(self.board, 0, 1)
        self.letters: deque = deque()
        for front in self.front_ends:
            lane = {"op": "lane", "lane": 0, "spec": front.spec.to_wire()}
            self.letters += [(front, {"op": "frontend"}, []), (front, lane, front.fds)]
        mailbox = SimpleNamespace(letters=self.letters, wait=lambda: None)
        counters = Ledger.private().batches(0)
        self.worker = loop.Worker(loaded, self.consumer, counters, mailbox, None, 0, 1 << 20)
        self.thread = threading.Thread(target=self.worker.run)

    @property
    def runs(self) -> int:
        return ring.seats(self.board)[0][1]

    @property
    def is_busy(self) -> bool:
        return ring.seats(self.board)[0][2] != 0

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        self.letters.append((None, {"op": "exit"}, []))
        self.consumer.nudge()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()


@pytest.fixture
def make_bench(tmp_path, monkeypatch) -> Iterator[Callable[..., Bench]]:
    ticks = itertools.count(NS_PER_MS, 10 * NS_PER_MS)
    for module in (loop, running):
        monkeypatch.setattr(module, "monotonic_ns", lambda: next(ticks))
    with ExitStack() as cleanup:

        def make(graph: str = DOUBLE, front_ends: int = 2, **options) -> Bench:
            bench = Bench(graph, tmp_path, front_ends, **options)
            for front in bench.front_ends:
                cleanup.callback(front.close)
            return bench

        yield make


@pytest.fixture
def learned(make_bench) -> Iterator[Callable[..., Bench]]:
    """A bench whose worker has run a slot of every lane, and is not running now."""
    with ExitStack() as cleanup:

        def make(*arguments, **options) -> Bench:
            bench = make_bench(*arguments, **options)
            bench.start()
            cleanup.callback(bench.close)
            for _ in range(3):
                for front in bench.front_ends:
                    front.open(0, [[0] * WIDTH])
                    front.producer.wake()
                    front.wait(0)
                    front.producer.free(0)
            return bench

        yield make


def rows(*firsts: int) -> list[list[int]]:
    return [[first, 0, 1] for first in firsts]


def doubled(*firsts: int) -> list[list[float]]:
    return [[2.0 * first, 0.0, 2.0] for first in firsts]


def pause(bench: Bench) -> Callable[[], None]:
    """Keep the loop at its mail, with slots out of its sight; the result lets it go on."""
    reached, go_on = threading.Event(), threading.Event()

    class Gate:
        def __getitem__(self, _key: str) -> str:
            reached.set()
            assert go_on.wait(PATIENCE_S)
            return "nothing"

    bench.letters.append((None, Gate(), []))
    bench.consumer.nudge()
    assert reached.wait(PATIENCE_S)
    return go_on.set


@pytest.mark.parametrize("allowed", [(), (1, 8)])
def test_slots_of_several_front_ends_are_run_as_one_batch(learned, allowed):
    bench = learned(front_ends=3, allowed=allowed)
    go_on = pause(bench)
    before = bench.runs
    for front, firsts in zip(bench.front_ends, [(1, 2), (3,), (4, 5, 6)], strict=True):
        front.open(1, rows(*firsts))
    go_on()
    for front, firsts in zip(bench.front_ends, [(1, 2), (3,), (4, 5, 6)], strict=True):
        front.wait(1)
        assert front.answer(1) == doubled(*firsts)
    assert len({front.producer.times(1) for front in bench.front_ends}) == 1
    assert bench.runs == before + 1
    assert not bench.is_busy


def test_slots_that_do_not_fit_one_batch_are_run_apart(learned):
    bench = learned()
    go_on = pause(bench)
    before = bench.runs
    for front in bench.front_ends:
        front.open(1, rows(1, 2, 3, 4, 5))
    go_on()
    for front in bench.front_ends:
        front.wait(1)
        assert front.answer(1) == doubled(1, 2, 3, 4, 5)
    assert bench.runs == before + 2


def test_a_slot_that_is_run_again_is_run_alone(learned):
    bench = learned()
    first, second = bench.front_ends
    go_on = pause(bench)
    before = bench.runs
    other = ring.Consumer(mmap.mmap(-1, ring.board_bytes(1)), 0, 2)
    first.open(1, rows(1))
    other.attach((0, 0), first.control, *first.geometry, first.bell)
    assert other.take(1, False)
    other.detach((0, 0))
    first.producer.retry(1)
    second.open(1, rows(2))
    go_on()
    first.wait(1)
    second.wait(1)
    assert (first.answer(1), second.answer(1)) == (doubled(1), doubled(2))
    assert bench.runs == before + 2


@pytest.mark.parametrize("culprit", [0, 1])
def test_when_a_packed_run_fails_only_the_culprits_slot_fails(learned, culprit):
    bench = learned(PICK)
    go_on = pause(bench)
    before = bench.runs
    for i, front in enumerate(bench.front_ends):
        front.open(1, rows(99 if i == culprit else 3))
    go_on()
    for front in bench.front_ends:
        front.wait(1)
    assert bench.front_ends[culprit].producer.phase(1) == ring.FAILED
    assert bench.front_ends[1 - culprit].answer(1) == [[3.0, 0.0, 1.0]]
    assert bench.runs == before + 1
    assert not bench.is_busy


def test_a_slot_with_a_due_time_is_run_without_anybody_else_coming(learned):
    bench = learned(front_ends=1)
    [front] = bench.front_ends
    front.open(1, rows(7), due_ns=10**18)
    front.producer.wake()
    front.wait(1)
    assert front.answer(1) == doubled(7)
