"""Metrics and statistics: what is shown of the ledgers, by any front end, whoever counted or died."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
from collections.abc import Iterator

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gateway import errors
from gateway._kernels import ledger as kernel
from gateway._kernels import ring
from gateway.telemetry.ledger import SKETCH_BOUNDS_NS, Ledger, board_bytes, rows_class
from gateway.telemetry.metrics import Metrics, VersionMetrics

FRONTENDS, WORKERS = 2, 3
LABELS = {"model": "m", "version": "1"}


@pytest.fixture
def board() -> Iterator[int]:
    """A board's memfd."""
    fd = os.memfd_create("board")
    os.ftruncate(fd, board_bytes(FRONTENDS, WORKERS))
    yield fd
    os.close(fd)


def attached(board: int, frontend: int = 0) -> tuple[Metrics, VersionMetrics]:
    """A version as a front end sees it."""
    metrics = Metrics()
    version = metrics.version("m", 1)
    version.attach(Ledger.mapped(board, WORKERS), frontend)
    return metrics, version


def samples(metrics: Metrics) -> dict[tuple[str, frozenset], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset({**LABELS, **labels}.items())]


def versions(metrics: Metrics) -> set[tuple[str, str]]:
    return {(dict(labels)["model"], dict(labels)["version"]) for _name, labels in samples(metrics)}


def use_all(version: VersionMetrics) -> None:
    version.answered(2, 1000, 100, 500)
    version.failed(503, 1000)
    version.queue_depth(3)
    version.worker(0, up=True)


# The ledger


def test_a_ledger_knows_from_its_size_how_many_front_ends_there_are():
    for frontends, workers in ((1, 1), (1, 4), (3, 1), (64, 2)):
        snapshot = Ledger(bytearray(board_bytes(frontends, workers)), workers).read()
        assert len(snapshot.frontends) == len(snapshot.frontend_slices) == frontends
        assert len(snapshot.workers) == workers


def test_a_board_without_a_ledger_is_refused():
    with pytest.raises(ValueError, match="front ends"):
        Ledger(bytearray(ring.board_bytes(2)), 2).read()


def test_the_ledger_leaves_the_seats_alone():
    board = bytearray(board_bytes(FRONTENDS, WORKERS))
    ledger = Ledger(board, WORKERS)
    for index in range(FRONTENDS):
        ledger.requests(index).failed(400, 2**64 - 1)
        ledger.slice(index).failed(400, 2**64 - 1)
    for seat in range(WORKERS):
        ledger.batches(seat).batch(1, 1)
    assert not any(board[: ring.board_bytes(WORKERS)])
    consumer = ring.Consumer(memoryview(board)[: ring.board_bytes(WORKERS)], WORKERS - 1, 7)
    before = ledger.read()
    consumer.announce()
    consumer.retract()
    assert ledger.read() == before


def test_sums_are_over_all_sections_and_of_the_last_inference_the_latest():
    ledger = Ledger(bytearray(board_bytes(FRONTENDS, WORKERS)), WORKERS)
    first, second = ledger.requests(0), ledger.requests(1)
    first.answered(2, 10, 20, 30)
    second.answered(3, 100, 200, 300)
    second.failed(418, 7)
    first.waiting, second.waiting = 4, 5
    for seat, rows in enumerate((2, 3, 3)):
        ledger.batches(seat).batch(rows, 50, rows, 1)
    requests, batches = ledger.read().requests(), ledger.read().batches()
    assert (requests.rows, requests.waiting, requests.queue_ns) == (5, 9, 220)
    assert (requests.by_code, requests.succeeded, requests.failed) == ({200: 2, 0: 1}, 2, 1)
    assert requests.last_inference_ms == max(first.last_inference_ms, second.last_inference_ms)
    assert (batches.runs, batches.copied_rows, batches.held_ns) == (3, 8, 3)
    assert list(batches.by_rows.items()) == [(2, (1, 50)), (3, (2, 100))]


# Statistics


def test_the_statistics_of_a_version():
    version = Metrics().version("m", 1)
    nothing = version.statistics
    assert nothing.last_inference_ms == nothing.execution_count == nothing.success.count == 0
    version.answered(2, 1000, 100, 500)
    version.failed(503, 70)
    version.failed(404, 7)
    version.ledger.batches(0).batch(2, 400)
    s = version.statistics
    assert (s.inference_count, s.execution_count) == (2, 1)
    assert (s.success.count, s.success.ns, s.fail.count, s.fail.ns) == (1, 1000, 2, 77)
    assert (s.queue.count, s.queue.ns) == (1, 100)
    assert (s.compute_infer.count, s.compute_infer.ns) == (1, 500)
    assert {rows: (runs.count, runs.ns) for rows, runs in s.batches.items()} == {2: (1, 400)}
    assert s.last_inference_ms > 0


def test_a_slice_is_summed_by_itself_and_with_the_rest():
    ledger = Ledger(bytearray(board_bytes(FRONTENDS, WORKERS)), WORKERS)
    ledger.requests(0).answered(1, 10_000, 20, 30)
    ledger.requests(1).answered(2, 20_000, 20, 30)
    ledger.slice(0).answered(4, 30_000, 20, 30)
    ledger.slice(1).failed(503, 5)
    snapshot, sketches = ledger.read(), ledger.sketches()
    whole, part = snapshot.requests(), snapshot.slices()
    assert (whole.rows, whole.by_code) == (7, {200: 3, 503: 1})
    assert (part.rows, part.by_code) == (4, {200: 1, 503: 1})
    assert part.last_inference_ms == whole.last_inference_ms > 0
    assert [section.rows for section in snapshot.frontends] == [1, 2]
    assert [section.rows for section in snapshot.frontend_slices] == [4, 0]
    of = [kernel.sketch_bucket(ns) for ns in (10_000, 20_000, 30_000)]
    assert sketches.latency == dict.fromkeys(of, 1)
    assert sketches.slice_latency == {of[2]: 1}


@pytest.mark.parametrize("frontend", [-1, FRONTENDS, 2 * FRONTENDS])
def test_a_front_end_that_the_ledger_was_not_made_for_gets_no_section(frontend):
    board = bytearray(board_bytes(FRONTENDS, WORKERS))
    ledger = Ledger(board, WORKERS)
    for take in (ledger.requests, ledger.slice):
        with pytest.raises(ValueError, match="front end"):
            take(frontend)
    assert not any(board)


def test_runs_are_sketched_by_the_class_of_their_rows():
    ledger = Ledger(bytearray(board_bytes(FRONTENDS, WORKERS)), WORKERS)
    counters = ledger.batches(1)
    for rows in range(1, 300):
        counters.batch(rows, 2_000_000)
    found = ledger.sketches().compute
    assert {rows_class(rows) for rows in range(1, 300)} == set(found) == set(kernel.ROW_CLASSES)
    for most, sketch in found.items():
        in_class = sum(rows_class(rows) == most for rows in range(1, 300))
        assert sketch == {kernel.sketch_bucket(2_000_000): in_class}
    assert {rows: rows_class(rows) for rows in (1, 2, 3, 5, 64, 65, 128)} == {
        1: 1, 2: 2, 3: 4, 5: 8, 64: 64, 65: 128, 128: 128,
    }  # fmt: skip
    assert rows_class(129) == rows_class(10**6) == 0


def test_a_quantile_that_is_read_from_a_sketch_is_off_by_less_than_a_bucket():
    ledger, random_ns = Ledger.private(), random.Random(1)
    counters = ledger.requests(0)
    durations = sorted(int(random_ns.lognormvariate(14, 1)) for _ in range(999))
    for ns in durations:
        counters.answered(1, ns, 0, 0)
    counts = sorted(ledger.sketches().latency.items())
    buckets = [bucket for bucket, count in counts for _ in range(count)]
    for place in (0, 499, 989):
        ns, bound_ns = durations[place], SKETCH_BOUNDS_NS[buckets[place]]
        assert ns < bound_ns <= 1.032 * ns


# What is scraped


def test_every_front_end_shows_the_same_sums(board):
    (first, of_first), (second, of_second) = attached(board, 0), attached(board, 1)
    workers = Ledger.mapped(board, WORKERS)
    of_first.answered(2, 200_000, 100, 500)
    of_second.answered(3, 2_000_000_000, 300_000, 500)
    of_second.failed(429, 1)
    of_first.queue_depth(4)
    of_second.queue_depth(5)
    workers.batches(0).batch(5, 1_000_000)
    workers.batches(2).batch(600, 1)
    assert samples(first) == samples(second)
    assert of_first.statistics == of_second.statistics
    assert value(first, "gateway_requests_total", code="200") == 2
    assert value(first, "gateway_requests_total", code="429") == 1
    assert value(first, "gateway_queue_depth") == 9
    assert value(first, "gateway_request_duration_seconds_count") == 3
    assert value(first, "gateway_request_duration_seconds_sum") == pytest.approx(2.000200001)
    assert value(first, "gateway_request_duration_seconds_bucket", le="0.0001") == 1
    assert value(first, "gateway_request_duration_seconds_bucket", le="0.00025") == 2
    assert value(first, "gateway_request_duration_seconds_bucket", le="1.0") == 2
    assert value(first, "gateway_request_duration_seconds_bucket", le="+Inf") == 3
    assert value(first, "gateway_queue_duration_seconds_count") == 2
    assert value(first, "gateway_batch_size_sum") == 605
    assert value(first, "gateway_batch_size_bucket", le="8.0") == 1
    assert value(first, "gateway_batch_size_bucket", le="512.0") == 1
    assert value(first, "gateway_batch_size_bucket", le="+Inf") == 2
    assert value(first, "gateway_compute_duration_seconds_bucket", le="0.001") == 2
    assert value(first, "gateway_batch_copied_rows_total") == 0
    assert value(first, "gateway_batch_held_seconds_total") == 0


def test_copies_that_a_shadow_got_are_shown_and_are_no_requests(board):
    metrics, version = attached(board)
    for agrees in (True, True, False):
        version.counters.compared(agrees)
    for _ in range(4):
        version.counters.shadow_dropped()
    for _ in range(5):
        version.slice_counters.shadow_failed()
    shown = {
        kind: value(metrics, f"gateway_shadow_{kind}_total")
        for kind in ("compared", "agreed", "dropped", "failed")
    }
    assert shown == {"compared": 3, "agreed": 2, "dropped": 4, "failed": 5}
    assert version.statistics.success.count == version.statistics.fail.count == 0
    assert value(metrics, "gateway_request_duration_seconds_count") == 0


def test_a_process_that_counts_nothing_shows_the_same_and_writes_nothing(board):
    ours = Ledger.mapped(board, WORKERS)
    metrics, ready = Metrics(), {}
    shown = metrics.show("m", 1, ours, ready)
    with mmap.mmap(board, 0) as memory:
        assert samples(metrics)
        assert not any(memory[:])
        theirs, version = attached(board, 1)
        use_all(version)
        version.slice_counters.answered(1, 1000, 100, 500)
        ours.batches(0).batch(3, 1_000_000)
        before = memory[:]
        ready[0] = True
        assert samples(metrics) == samples(theirs)
        assert shown.statistics == version.statistics
        assert ours.sketches() == version.ledger.sketches()
        assert memory[:] == before
    assert value(metrics, "gateway_worker_up", instance="0") == 1
    shown.remove()
    shown.remove()
    assert versions(metrics) == set()


def test_statuses_without_a_cell_of_their_own_are_shown_as_other():
    metrics = Metrics()
    metrics.version("m", 1).failed(418, 1)
    assert value(metrics, "gateway_requests_total", code="other") == 1


def test_a_front_end_that_comes_back_shows_what_its_predecessor_counted(board):
    _metrics, gone = attached(board, 1)
    use_all(gone)
    metrics, version = attached(board, 1)
    assert value(metrics, "gateway_requests_total", code="200") == 1
    assert value(metrics, "gateway_queue_depth") == 0
    use_all(version)
    assert value(metrics, "gateway_requests_total", code="200") == 2


def test_workers_are_up_as_the_front_end_knows_and_restarts_as_they_counted(board):
    metrics, version = attached(board)
    ledger = Ledger.mapped(board, WORKERS)
    for seat, starts in ((0, 1), (1, 3)):
        for _ in range(starts):
            ledger.batches(seat)
    for instance in range(3):
        version.worker(instance, up=True)
    version.worker(1, up=False)
    up = [value(metrics, "gateway_worker_up", instance=str(i)) for i in range(3)]
    restarts = [value(metrics, "gateway_worker_restarts_total", instance=str(i)) for i in range(3)]
    assert (up, restarts) == ([1, 0, 1], [0, 2, 0])


FRONTEND = f"""
import sys
from gateway.telemetry.ledger import Ledger
from gateway.telemetry.metrics import Metrics
version = Metrics().version("m", 1)
version.attach(Ledger.mapped(int(sys.argv[1]), {WORKERS}), 1)
while True:
    version.answered(1, 1000, 100, 500)
    sys.stdout.write(".")
    sys.stdout.flush()
"""


def test_what_a_process_counted_outlives_it(board):
    metrics, version = attached(board, 0)
    command = [sys.executable, "-c", FRONTEND, str(board)]
    with subprocess.Popen(command, pass_fds=[board], stdout=subprocess.PIPE) as process:
        told = os.read(process.stdout.fileno(), 1)
        process.kill()
        told += process.stdout.read()
    assert told
    assert 0 <= version.statistics.success.count - len(told) <= 1
    _metrics, successor = attached(board, 1)
    before = version.statistics.inference_count
    successor.answered(10, 1000, 100, 500)
    assert version.statistics.inference_count == before + 10
    assert value(metrics, "gateway_queue_duration_seconds_count") == version.statistics.queue.count


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), ones=st.booleans(), reach=st.integers(1, 400_000))
def test_a_worker_that_scribbles_over_the_board_spoils_numbers_and_nothing_else(seed, ones, reach):
    with mmap.mmap(-1, board_bytes(FRONTENDS, WORKERS)) as board:
        metrics = Metrics()
        version = metrics.version("m", 1)
        version.attach(Ledger(board, WORKERS), 1)
        for instance in range(WORKERS):
            version.worker(instance, up=True)
        noise = b"\xff" * len(board) if ones else random.Random(seed).randbytes(len(board))
        at = seed % len(board)
        board[at : at + reach] = noise[at : at + reach]
        use_all(version)
        assert versions(metrics) == {("m", "1")}
        s = version.statistics
        orjson.dumps([s.last_inference_ms, s.inference_count, s.execution_count])
        orjson.dumps([[d.count, d.ns] for d in (s.success, s.fail, s.queue, s.compute_infer)])
        orjson.dumps([[rows, d.count, d.ns] for rows, d in s.batches.items()])
        orjson.dumps([*version.ledger.sketches()], option=orjson.OPT_NON_STR_KEYS)
        version.remove()
        use_all(version)
        del version


# Coming and going


def test_what_was_refused_before_the_version_was_served_is_shown_too(board):
    metrics = Metrics()
    version = metrics.version("m", 1)
    version.failed(503, 1000)
    assert value(metrics, "gateway_requests_total", code="503") == 1
    version.attach(Ledger.mapped(board, WORKERS), 0)
    version.failed(503, 1000)
    assert value(metrics, "gateway_requests_total", code="503") == 2
    assert value(attached(board, 1)[0], "gateway_requests_total", code="503") == 2


def test_a_slice_keeps_what_it_counted_before_and_after_the_version_was_served(board):
    version = Metrics().version("m", 1)
    version.slice_counters.answered(1, 1000, 100, 500)
    version.attach(Ledger.mapped(board, WORKERS), 1)
    version.slice_counters.answered(2, 1000, 100, 500)
    assert Ledger.mapped(board, WORKERS).read().slices().rows == 3
    version.remove()
    version.slice_counters.answered(4, 1000, 100, 500)
    assert version.ledger.read().slices().rows == 7
    assert Ledger.mapped(board, WORKERS).read().slices().rows == 3


def test_a_removed_version_has_no_series_and_makes_none(board):
    metrics, gone = attached(board)
    stays = metrics.version("m", 2)
    use_all(gone)
    use_all(stays)
    assert versions(metrics) == {("m", "1"), ("m", "2")}
    gone.remove()
    gone.remove()
    use_all(gone)
    assert versions(metrics) == {("m", "2")}
    assert gone.statistics.success.count == 2
    assert Ledger.mapped(board, WORKERS).read().requests().succeeded == 1


def test_a_removed_version_lets_go_of_its_board(board):
    before = len(os.listdir("/proc/self/fd"))
    _metrics, version = attached(board)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    version.remove()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_version_that_comes_back_begins_at_zero():
    metrics = Metrics()
    version = metrics.version("m", 1)
    use_all(version)
    version.remove()
    again = metrics.version("m", 1)
    again.failed(404, 1)
    version.remove()  # of the one before: nothing
    assert value(metrics, "gateway_requests_total", code="404") == 1
    assert ("gateway_requests_total", frozenset({**LABELS, "code": "200"}.items())) not in samples(
        metrics
    )


def test_every_status_that_errors_have_is_counted_for_itself():
    statuses = {
        kind.status
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.GatewayError)
    }
    assert statuses <= set(kernel.CODES)
