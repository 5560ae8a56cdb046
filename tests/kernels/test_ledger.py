"""The ledger: the same cases for each build and the twin, which must leave the same bytes."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.builds import BUILDS, IMPLEMENTATIONS, ROOT, load
from tests.twins import ledger as twin

OFFSET = 128
FRONTENDS, WORKERS = 2, 3
LARGEST = 2**64 - 1
DEADLINE_S = 60
FUZZ = settings(deadline=None, max_examples=80)
CONSTANTS = (
    *("CODES", "DURATION_BOUNDS_NS", "ROW_BOUNDS", "EXACT_ROWS", "LAYOUT"),
    *("SKETCH_BOUNDS_NS", "ROW_CLASSES"),
)
SECTIONS = 2 * FRONTENDS  # of requests


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def ledger(request: pytest.FixtureRequest) -> ModuleType:
    return load(request.param, "ledger")


@pytest.fixture(scope="module", params=BUILDS)
def compiled(request: pytest.FixtureRequest) -> ModuleType:
    return load(request.param, "ledger")


def fresh() -> bytearray:
    return bytearray(OFFSET + twin.ledger_bytes(FRONTENDS, WORKERS))


def frontend(ledger: ModuleType, board: Any, index: int = 0) -> Any:
    return ledger.RequestCounters(board, OFFSET, WORKERS, index)


def worker(ledger: ModuleType, board: Any, seat: int = 0) -> Any:
    return ledger.BatchCounters(board, OFFSET, seat)


def read(ledger: ModuleType, board: Any) -> tuple[list[dict], list[dict]]:
    return ledger.read(board, OFFSET, FRONTENDS, WORKERS)


def sketches(ledger: ModuleType, board: Any) -> tuple[dict, dict, dict]:
    return ledger.sketches(board, OFFSET, FRONTENDS, WORKERS)


def values(section: dict) -> list[int]:
    """All counters of a section, in an order that stays; neither gauges nor ``by_rows``."""
    gauges = ("waiting", "last_inference_ms", "by_rows")
    found = (v if isinstance(v, tuple) else (v,) for k, v in section.items() if k not in gauges)
    return [number for numbers in found for number in numbers]


# The layout


def test_kernel_and_twin_agree_on_constants_and_sizes(compiled):
    for name in CONSTANTS:
        assert getattr(compiled, name) == getattr(twin, name), name
    for sizes in ((1, 1), (1, 7), (64, 1), (5, 9)):
        assert compiled.ledger_bytes(*sizes) == twin.ledger_bytes(*sizes)


def test_sections_are_whole_cache_lines(ledger):
    assert ledger.LAYOUT["requests"] % 64 == ledger.LAYOUT["batches"] % 64 == 0


@pytest.mark.parametrize("bounds", ["DURATION_BOUNDS_NS", "ROW_BOUNDS"])
def test_each_bound_is_at_least_twice_the_one_before(ledger, bounds):
    # What the kernel's way of finding a bucket relies on.
    assert all(2 * a <= b for a, b in pairwise(getattr(ledger, bounds)))


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-1, 1), (1, -1), (2**40, 1), (1, 2**40)])
def test_sizes_that_no_version_has(ledger, sizes):
    with pytest.raises(ValueError, match=r"."):
        ledger.ledger_bytes(*sizes)


def test_a_section_must_lie_on_the_board(ledger):
    board = fresh()
    frontend(ledger, board, SECTIONS - 1)
    frontend(ledger, bytearray(len(board)), 0)
    for index in (SECTIONS, 10_000, -1, 2**40):
        with pytest.raises(ValueError, match=r"."):
            frontend(ledger, board, index)
    for seat in (10_000, -1, 2**40):
        with pytest.raises(ValueError, match=r"."):
            worker(ledger, board, seat)
    for offset in (-8, OFFSET + 8, len(board), 2**62, OFFSET - 4):
        with pytest.raises(ValueError, match=r"."):
            ledger.read(board, offset, FRONTENDS, WORKERS)
        with pytest.raises(ValueError, match=r"."):
            ledger.sketches(board, offset, FRONTENDS, WORKERS)
    assert board == fresh()[:OFFSET] + board[OFFSET:]


def test_writers_need_a_writable_board_and_readers_do_not(ledger):
    board = bytes(fresh())
    assert read(ledger, board) == read(twin, board)
    assert sketches(ledger, board) == ({}, {}, {})
    for make in (frontend, worker):
        with pytest.raises((BufferError, TypeError)):
            make(ledger, board)


def test_a_board_is_held_for_as_long_as_it_is_written(compiled):
    board = mmap.mmap(-1, len(fresh()))
    counters = [frontend(compiled, board), worker(compiled, board)]
    read(compiled, board)
    sketches(compiled, board)
    while counters:
        with pytest.raises(BufferError):
            board.close()
        counters.pop()
    board.close()


# Counting

NUMBERS = st.one_of(
    st.integers(0, 3000),
    st.integers(0, LARGEST),
    st.builds(
        lambda bound, by: bound + by,
        st.sampled_from(twin.DURATION_BOUNDS_NS + twin.SKETCH_BOUNDS_NS),
        st.integers(-1, 1),
    ),
)
STEPS = st.one_of(
    st.tuples(
        st.just("answered"),
        st.integers(0, SECTIONS - 1),
        st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    ),
    st.tuples(
        st.just("failed"),
        st.integers(0, SECTIONS - 1),
        st.tuples(st.one_of(st.sampled_from(twin.CODES), st.integers(-1, 600)), NUMBERS),
    ),
    st.tuples(st.just("compared"), st.integers(0, SECTIONS - 1), st.tuples(st.booleans())),
    st.tuples(
        st.sampled_from(["shadow_dropped", "shadow_failed", "absorb", "frontend"]),
        st.integers(0, SECTIONS - 1),
        st.just(()),
    ),
    st.tuples(st.just("waiting"), st.integers(0, SECTIONS - 1), st.tuples(NUMBERS)),
    st.tuples(
        st.just("batch"),
        st.integers(0, WORKERS - 1),
        st.lists(NUMBERS, min_size=2, max_size=4).map(tuple),
    ),
    st.tuples(st.just("worker"), st.integers(0, WORKERS - 1), st.just(())),
)


class Fleet:
    """Every front end and worker of one board, in this process."""

    def __init__(self, ledger: ModuleType):
        self.ledger = ledger
        self.board = fresh()
        self.frontends = [frontend(ledger, self.board, i) for i in range(SECTIONS)]
        self.workers = [worker(ledger, self.board, i) for i in range(WORKERS)]

    def take(self, step: str, index: int, arguments: tuple[int, ...]) -> None:
        match step:
            case "answered" | "failed" | "compared" | "shadow_dropped" | "shadow_failed":
                getattr(self.frontends[index], step)(*arguments)
            case "waiting":
                (self.frontends[index].waiting,) = arguments
            case "absorb":
                self.frontends[index].absorb(self.frontends[0])
            case "frontend":
                self.frontends[index] = frontend(self.ledger, self.board, index)
            case "batch":
                self.workers[index].batch(*arguments)
            case "worker":
                self.workers[index] = worker(self.ledger, self.board, index)

    def untimed(self) -> bytes:
        """The board without the one thing that is taken from a clock."""
        copy = bytearray(self.board)
        for i in range(SECTIONS):
            at = OFFSET + WORKERS * twin.LAYOUT["batches"] + i * twin.LAYOUT["requests"] + 16
            copy[at : at + 8] = bytes(8)
        return bytes(copy)


@FUZZ
@given(steps=st.lists(STEPS, max_size=40))
def test_kernel_and_twin_leave_the_same_bytes_and_read_them_alike(compiled, steps):
    fleet, model = Fleet(compiled), Fleet(twin)
    for step in steps:
        fleet.take(*step)
        model.take(*step)
    assert fleet.untimed() == model.untimed()
    assert read(compiled, fleet.board) == read(twin, fleet.board)
    assert sketches(compiled, fleet.board) == sketches(twin, fleet.board)


def test_every_value_finds_its_bucket(ledger):
    durations = {0, 1, LARGEST, *(2**n + by for n in range(1, 64) for by in (-1, 0, 1))}
    durations |= {bound + by for bound in ledger.DURATION_BOUNDS_NS for by in (-1, 0, 1)}
    for ns in durations:
        board = fresh()
        frontend(ledger, board).answered(1, ns, ns, 0)
        worker(ledger, board).batch(ns, ns)
        (requests, *_), (batches, *_) = read(ledger, board)
        of_ns = bisect_left(ledger.DURATION_BOUNDS_NS, ns)
        for name in ("request_buckets", "queue_buckets"):
            assert [i for i, n in enumerate(requests[name]) if n] == [of_ns], (name, ns)
        assert [i for i, n in enumerate(batches["run_buckets"]) if n] == [of_ns], ns
        of_rows = bisect_left(ledger.ROW_BOUNDS, ns)
        assert [i for i, n in enumerate(batches["row_buckets"]) if n] == [of_rows], ns


def test_what_a_request_counts(ledger):
    board = fresh()
    before_ms = time.time_ns() // 10**6
    frontend(ledger, board, 1).answered(3, 5_000_000, 200_000, 4_000_000)
    frontend(ledger, board, 1).failed(429, 70)
    frontend(ledger, board, 1).failed(418, 7)
    section = read(ledger, board)[0].pop(1)
    assert not any(any(values(other)) for i, other in enumerate(read(ledger, board)[0]) if i != 1)
    assert dict(zip(ledger.CODES, section["codes"], strict=True)) == {
        **dict.fromkeys(ledger.CODES, 0), 200: 1, 429: 1, 0: 1,
    }  # fmt: skip
    sums = {"rows": 3, "success_ns": 5_000_000, "fail_ns": 77}
    assert {name: section[name] for name in sums} == sums
    assert (section["queue_ns"], section["compute_ns"]) == (200_000, 4_000_000)
    assert (sum(section["request_buckets"]), sum(section["queue_buckets"])) == (3, 1)
    # The clock that is read is one of ticks.
    assert before_ms - 100 <= section["last_inference_ms"] <= time.time_ns() // 10**6


def test_what_a_batch_counts(ledger):
    board = fresh()
    counters = worker(ledger, board, 2)
    for rows in (1, 7, 7, 1024, 1025, 60_000, 0):
        counters.batch(rows, 100, copied_rows=2, held_ns=5)
    *others, section = read(ledger, board)[1]
    assert not any(any(values(other)) or other["by_rows"] for other in others)
    assert section["by_rows"] == {
        0: (1, 100), 1: (1, 100), 7: (2, 200), 1024: (1, 100), 1025: (2, 200),
    }  # fmt: skip
    assert (section["starts"], section["rows"], section["run_ns"]) == (1, 62_064, 700)
    assert (section["copied_rows"], section["held_ns"]) == (14, 35)


@pytest.mark.parametrize("number", [-1, 2**64])
def test_a_number_that_no_counter_holds_counts_nothing(ledger, number):
    board = fresh()
    requests, batches = frontend(ledger, board), worker(ledger, board)
    before = bytes(board)
    for place in range(4):
        numbers = [1, 1, 1, 1]
        numbers[place] = number
        with pytest.raises(OverflowError):
            requests.answered(*numbers)
        with pytest.raises(OverflowError):
            batches.batch(*numbers)
    with pytest.raises(OverflowError):
        requests.failed(400, number)
    with pytest.raises(OverflowError):
        requests.waiting = number
    assert board == before


def test_sums_wrap_as_64_bits_do(ledger):
    board = fresh()
    counters = frontend(ledger, board)
    counters.failed(500, LARGEST)
    counters.failed(500, 3)
    assert read(ledger, board)[0][0]["fail_ns"] == 2


# Successors


def test_a_successor_counts_on_and_its_gauges_begin_at_zero(ledger):
    board = fresh()
    counters = frontend(ledger, board)
    counters.answered(1, 2, 3, 4)
    counters.waiting = 5
    assert counters.waiting == 5
    worker(ledger, board).batch(1, 2)
    successor = frontend(ledger, board)
    assert successor.waiting == 0
    assert successor.last_inference_ms > 0
    successor.answered(1, 2, 3, 4)
    worker(ledger, board).batch(1, 2)
    (requests, *_), (batches, *_) = read(ledger, board)
    assert (requests["rows"], requests["success_ns"]) == (2, 4)
    assert (batches["starts"], batches["by_rows"]) == (2, {1: (2, 4)})
    assert sketches(ledger, board) == ({0: 2}, {}, {1: {0: 2}})


@pytest.mark.parametrize("at", range(8))
def test_a_section_with_another_head_begins_at_zero_and_leaves_its_neighbours(ledger, at):
    fleet = Fleet(ledger)
    for counters in fleet.frontends:
        counters.failed(400, 9)
    for counters in fleet.workers:
        counters.batch(1, 9)
    first_frontend = OFFSET + WORKERS * ledger.LAYOUT["batches"]
    fleet.board[first_frontend + at] ^= 0x80
    fleet.board[OFFSET + ledger.LAYOUT["batches"] + at] ^= 0x80
    fleet.take("frontend", 0, ())
    fleet.take("worker", 1, ())
    requests, batches = read(ledger, fleet.board)
    assert [section["fail_ns"] for section in requests] == [0, 9, 9, 9]
    assert [section["run_ns"] for section in batches] == [9, 0, 9]
    assert sketches(ledger, fleet.board) == ({}, {}, {1: {0: 2}})
    assert [section["starts"] for section in batches] == [1, 1, 1]


def test_absorbing_adds_counters_and_no_gauges(ledger):
    board, aside = fresh(), fresh()
    counters, other = frontend(ledger, board, 1), frontend(ledger, aside, 0)
    counters.failed(400, 1)
    counters.waiting = 2
    other.failed(400, 10)
    other.answered(5, 6, 7, 8)
    other.waiting = 9
    counters.absorb(other)
    section = read(ledger, board)[0][1]
    assert section["codes"][:2] == (1, 2)
    assert (section["fail_ns"], section["rows"], section["waiting"]) == (11, 5, 2)
    assert sketches(ledger, board)[0] == {0: 1}


# Sketches


def test_a_duration_is_in_the_bucket_between_whose_bounds_it_is(ledger):
    bounds = ledger.SKETCH_BOUNDS_NS
    assert (bounds[0], bounds[-1]) == (2**10 + 2**5, 2**36)
    assert all(a < b <= 1.032 * a for a, b in pairwise(bounds))
    for i, bound in enumerate(bounds[:-1]):
        assert (ledger.sketch_bucket(bound - 1), ledger.sketch_bucket(bound)) == (i, i + 1)
    for ns in (0, 1, 2**10 - 1, 2**10):
        assert ledger.sketch_bucket(ns) == 0
    for ns in (2**36 - 1, 2**36, 2**37, LARGEST):
        assert ledger.sketch_bucket(ns) == len(bounds) - 1
    for ns in (-1, 2**64):
        with pytest.raises(OverflowError):
            ledger.sketch_bucket(ns)


@FUZZ
@given(ns=st.one_of(NUMBERS, st.integers(2**10, 2**36)))
def test_any_duration_finds_its_bucket(compiled, ns):
    assert compiled.sketch_bucket(ns) == twin.sketch_bucket(ns)


def test_sketches_are_sums_and_of_slices_apart(ledger):
    board = fresh()
    for index, ns in ((0, 5_000), (1, 5_000), (FRONTENDS, 5_001), (SECTIONS - 1, 2**40)):
        frontend(ledger, board, index).answered(1, ns, 7, 9)
        frontend(ledger, board, index).failed(500, 77_000_000)
    latency, slices, compute = sketches(ledger, board)
    short, last = ledger.sketch_bucket(5_000), len(ledger.SKETCH_BOUNDS_NS) - 1
    assert latency == {short: 3, last: 1}
    assert slices == {short: 1, last: 1}
    assert compute == {}


def test_runs_are_sketched_by_class_of_rows(ledger):
    board = fresh()
    for seat, rows in ((0, 1), (1, 2), (2, 3), (0, 4), (1, 128), (2, 129), (0, 513), (1, LARGEST)):
        worker(ledger, board, seat).batch(rows, 1_000_000)
    place = ledger.sketch_bucket(1_000_000)
    expected = {1: 1, 2: 1, 4: 2, 128: 1, 0: 3}
    assert sketches(ledger, board)[2] == {rows: {place: n} for rows, n in expected.items()}


def test_sums_of_sketches_wrap_as_64_bits_do(ledger):
    board = fresh()
    for index in range(2):
        frontend(ledger, board, index).answered(1, 0, 0, 0)
        at = OFFSET + WORKERS * twin.LAYOUT["batches"] + index * twin.LAYOUT["requests"]
        cell = at + 8 * twin.LATENCY
        board[cell : cell + 8] = (LARGEST - 2 * index).to_bytes(8, "little")
    assert sketches(ledger, board)[0] == {0: LARGEST - 3}


def test_what_nobody_counted_in_takes_no_memory(compiled):
    fd = os.memfd_create("ledger")
    os.ftruncate(fd, OFFSET + compiled.ledger_bytes(1, 1))
    with mmap.mmap(fd, 0) as board:
        requests = [compiled.RequestCounters(board, OFFSET, 1, index) for index in range(2)]
        requests[1].absorb(requests[0])
        requests[0].answered(1, 5_000, 7, 9)
        batches = compiled.BatchCounters(board, OFFSET, 0)
        batches.batch(1, 4_000)
        compiled.read(board, OFFSET, 1, 1)
        compiled.sketches(board, OFFSET, 1, 1)
        resident_bytes = os.fstat(fd).st_blocks * 512
        del requests, batches
    os.close(fd)
    assert 0 < resident_bytes < compiled.LAYOUT["batches"] // 2


# Whatever lies there

HEADS = (
    *(
        OFFSET + i * twin.LAYOUT["batches"] + at
        for i in range(WORKERS)
        for at in (16, 56, 120, 144)
    ),
    *(
        OFFSET + WORKERS * twin.LAYOUT["batches"] + i * twin.LAYOUT["requests"] + at
        for i in range(SECTIONS)
        for at in (0, 24, 8 * twin.LATENCY)
    ),
)


@FUZZ
@given(data=st.data())
def test_any_bytes_are_numbers(compiled, data):
    board = fresh()
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.one_of(st.integers(0, len(board) - 1), st.sampled_from(HEADS)))
        noise = data.draw(st.binary(min_size=1, max_size=64))[: len(board) - at]
        board[at : at + len(noise)] = noise
    if data.draw(st.booleans()):
        board[OFFSET:] = b"\xff" * (len(board) - OFFSET)
    found = read(compiled, board)
    assert found == read(twin, board)
    for section in (*found[0], *found[1]):
        assert all(0 <= number <= LARGEST for number in values(section))
    assert sketches(compiled, board) == sketches(twin, board)
    frontend(compiled, board).answered(1, 2, 3, 4)
    worker(compiled, board).batch(1, 2)


# Several processes

WRITER = f"""
import mmap, sys
from tests.kernels.builds import load
ledger = load(sys.argv[1], "ledger")
board = mmap.mmap(int(sys.argv[2]), 0)
requests = ledger.RequestCounters(board, {OFFSET}, {WORKERS}, 0)
batches = ledger.BatchCounters(board, {OFFSET}, 0)
while True:
    requests.answered(1, 3, 5, 7)
    requests.failed(503, 11)
    batches.batch(1, 13)
"""


@pytest.fixture
def shared() -> Iterator[tuple[int, mmap.mmap]]:
    fd = os.memfd_create("ledger")
    os.ftruncate(fd, len(fresh()))
    with mmap.mmap(fd, 0) as board:
        yield fd, board
    os.close(fd)


@contextmanager
def writer(build: str, fd: int) -> Iterator[subprocess.Popen]:
    """A process that counts without end, and is killed at the end."""
    command = [sys.executable, "-c", WRITER, build, str(fd)]
    with subprocess.Popen(command, pass_fds=[fd], cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def until_counted(board: mmap.mmap, rows: int, process: subprocess.Popen) -> None:
    """Wait until so many more rows are counted."""
    begun = read(twin, board)[0][0]["rows"]
    deadline_s = time.monotonic() + DEADLINE_S
    while read(twin, board)[0][0]["rows"] < begun + rows:
        assert process.poll() is None, "the writer ended by itself"
        assert time.monotonic() < deadline_s


@pytest.mark.parametrize("build", BUILDS)
def test_what_a_killed_writer_counted_stays_and_its_successor_goes_on(build, shared):
    fd, board = shared
    counted = 0
    for _ in range(3):
        with writer(build, fd) as process:
            until_counted(board, 1000, process)
        (requests, *_), (batches, *_) = read(load(build, "ledger"), board)
        assert requests["rows"] >= counted + 1000
        counted = requests["rows"]
        # At most one step of each writer was cut short.
        assert abs(requests["success_ns"] - 3 * counted) <= 9
        assert abs(requests["codes"][0] - counted) <= 3
        assert abs(batches["rows"] - counted) <= 6
        latency, _slices, compute = sketches(load(build, "ledger"), board)
        assert abs(latency[0] - counted) <= 3
        assert abs(compute[1][0] - counted) <= 6
    assert batches["starts"] == 3


@pytest.mark.parametrize("build", BUILDS)
def test_a_reader_sees_every_number_grow_while_it_is_written(build, shared):
    fd, board = shared
    ledger = load(build, "ledger")
    with writer(build, fd) as process:
        until_counted(board, 1, process)
        last, first = [0], 0
        deadline_s = time.monotonic() + DEADLINE_S
        while last[0] < first + 5000:
            (requests, *_), (batches, *_) = read(ledger, board)
            latency, _slices, compute = sketches(ledger, board)
            runs, run_ns = batches["by_rows"].get(1, (0, 0))
            seen = [requests["rows"], runs, run_ns, *values(requests), *values(batches)]
            seen += [latency.get(0, 0), compute.get(1, {}).get(0, 0)]
            if first:
                assert all(now >= then for now, then in zip(seen, last, strict=True))
            first, last = first or seen[0], seen
            assert process.poll() is None
            assert time.monotonic() < deadline_s
