"""Copies of requests: sent after the answer, compared by rule, bounded, and nobody's request."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import bytestrings
from gateway.frontend import mirror
from gateway.frontend.agreement import agrees
from gateway.protocols.call import OutputTensor
from gateway.serving.routing import BASIS_POINTS, ModelRoute, Shadow, Share
from gateway.tensors import DATATYPES
from tests.unit.test_dispatcher import Bench
from tests.unit.test_fastlane import Front, ask, ask_raw, doubled, make_front, tripled

__all__ = ["make_front"]  # a fixture

# Rules


def tensor(values, datatype: str = "FP32", name: str = "y") -> OutputTensor:
    """An output of these values."""
    kind = DATATYPES[datatype]
    if datatype == "BYTES":
        array = np.array(values, object)
        data = bytestrings.serialise(array.reshape(-1))
    else:
        dtype = ml_dtypes.bfloat16 if datatype == "BF16" else kind.dtype
        array = np.array(values, dtype)
        data = array.tobytes()
    return OutputTensor(name, kind, array.shape, memoryview(data))


INF, NAN = math.inf, math.nan

VERDICTS = [
    # rule, tolerance, datatype, one, the other, whether they agree
    ("exact", 9, "FP32", [[1, 2]], [[1, 2]], True),
    ("exact", 9, "FP32", [[1, 2]], [[1, 2.000001]], False),
    ("exact", 0, "FP32", [NAN], [NAN], True),
    ("exact", 0, "FP32", [0.0], [-0.0], False),
    ("tolerance", 0, "FP32", [0.0], [-0.0], True),
    ("tolerance", 0.5, "FP32", [1.0, -3], [2.0, -5], True),
    ("tolerance", 0.5, "FP32", [1.0], [2.25], False),
    ("tolerance", 0.5, "FP32", [NAN, 1], [NAN, 1.5], True),
    ("tolerance", 9, "FP32", [NAN], [1], False),
    ("tolerance", 9, "FP32", [1], [NAN], False),
    ("tolerance", 0.1, "FP32", [INF, -INF, 1], [INF, -INF, 1.1], True),
    ("tolerance", 9, "FP32", [INF], [-INF], False),
    ("tolerance", 9, "FP32", [INF], [1], False),
    ("tolerance", 9, "FP32", [1], [INF], False),
    ("tolerance", 0.1, "FP16", [1], [1.1], True),
    ("tolerance", 0.1, "BF16", [100], [105], True),
    ("tolerance", 0.01, "BF16", [100], [105], False),
    ("tolerance", 0, "INT64", [1 << 60], [(1 << 60) + 1], False),
    ("tolerance", 0, "UINT64", [(1 << 64) - 1], [(1 << 64) - 2], False),
    ("tolerance", 0.5, "UINT8", [0, 255], [0, 254], True),
    ("tolerance", 0.5, "UINT8", [3], [250], False),
    ("tolerance", 9, "BOOL", [True], [False], False),
    ("tolerance", 9, "BYTES", [b"a"], [b"b"], False),
    ("tolerance", 0, "BYTES", [b"a"], [b"a"], True),
    ("tolerance", 0, "FP32", 1.0, 1.0, True),
    ("tolerance", 0.5, "FP32", 1.0, 2.0, True),
    ("tolerance", 0, "FP32", np.zeros((0, 3)), np.zeros((0, 3)), True),
    ("tolerance", 9, "FP32", [[1, 2]], [1, 2], False),
    ("tolerance", 9, "FP32", [1, 2], [1, 2, 3], False),
    ("top1", 0, "FP32", [[1, 2, 0], [5, 4, 3]], [[0, 9, 8], [1, 0, 0]], True),
    ("top1", 0, "FP32", [[1, 2, 0], [5, 4, 3]], [[0, 9, 8], [0, 1, 0]], False),
    ("top1", 0, "INT8", [[-3, 4]], [[-9, 0]], True),
    ("top1", 0, "FP32", [[[1, 2], [2, 1]]], [[[1, 2], [1, 2]]], False),
    ("top1", 0, "INT64", [3, 4], [3, 4], True),  # classes of two rows
    ("top1", 0, "INT64", [3, 4], [3, 5], False),
    ("top1", 0, "INT64", [[3], [4]], [[3], [5]], False),
    ("top1", 0, "FP32", [[0.5]], [[0.5]], True),
    ("top1", 0, "FP32", [[0.5]], [[0.6]], False),  # nothing else could tell
    ("top1", 0, "BYTES", [b"cat"], [b"cat"], True),
    ("top1", 0, "BYTES", [b"cat"], [b"dog"], False),
    ("cosine", 0, "FP32", [[1, 2]], [[10, 20]], True),
    ("cosine", 0, "FP64", [[1e300, 2e300]], [[1e-300, 2e-300]], True),
    ("cosine", 0.01, "FP32", [[1, 0]], [[1, 0.1]], True),
    ("cosine", 0.001, "FP32", [[1, 0]], [[1, 0.1]], False),
    ("cosine", 0.1, "FP32", [[1, 0], [1, 0]], [[1, 0], [0, 1]], False),
    ("cosine", 0.1, "FP32", [[0, 0]], [[0.0, -0.0]], True),
    ("cosine", 0.1, "FP32", [[0, 0]], [[1, 0]], False),
    ("cosine", 0.1, "FP32", [[NAN, 1]], [[1, 1]], False),
    ("cosine", 0.1, "FP32", [[INF, 1]], [[INF, 2]], False),
    ("cosine", 0.1, "FP32", 3.0, 5.0, True),
    ("cosine", 0.1, "FP32", [2.0, -1.0], [4.0, 1.0], False),  # two rows of one element
]


@pytest.mark.parametrize(("rule", "tolerance", "datatype", "one", "other", "verdict"), VERDICTS)
def test_when_two_outputs_agree(rule, tolerance, datatype, one, other, verdict):
    shadow = Shadow(2, 1, rule, tolerance)
    pair = [tensor(one, datatype)], [tensor(other, datatype)]
    assert agrees(shadow, *pair, is_batched=True) is verdict


def test_of_an_unbatched_model_one_axis_is_one_row():
    shadow = Shadow(2, 1, "top1")
    pair = [tensor([1, 5, 2])], [tensor([0, 9, 0])]
    assert agrees(shadow, *pair, is_batched=False)
    assert not agrees(shadow, *pair, is_batched=True)


@pytest.mark.parametrize("rule", ["exact", "tolerance", "top1", "cosine"])
def test_outputs_that_are_not_the_same_ones_do_not_agree(rule):
    shadow = Shadow(2, 1, rule, 1e6)
    y, z = tensor([[1, 2]]), tensor([[1, 2]], name="z")
    assert agrees(shadow, [y, z], [z, y], is_batched=True)
    assert not agrees(shadow, [y], [z], is_batched=True)
    assert not agrees(shadow, [y, z], [y], is_batched=True)
    assert not agrees(shadow, [y], [y, z], is_batched=True)
    assert not agrees(shadow, [y], [tensor([[1, 2]], "FP64")], is_batched=True)


def test_a_single_float_is_left_to_the_outputs_that_have_a_largest_element():
    scores, other_scores = tensor([[1, 2]]), tensor([[3, 4]])
    assert agrees(
        Shadow(2, 1, "top1"),
        [scores, tensor([[0.5]], name="z")],
        [other_scores, tensor([[0.6]], name="z")],
        is_batched=True,
    )


numbers = st.floats(width=32)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), st.floats(0, 10))
def test_tolerance_is_what_it_says_for_every_element(pairs, tolerance):
    def is_close(a: float, b: float) -> bool:
        if math.isnan(a) or math.isnan(b):
            return math.isnan(a) and math.isnan(b)
        if math.isinf(a):
            return a == b
        return abs(a - b) <= tolerance * (1 + abs(a))

    one, other = ([pair[i] for pair in pairs] for i in range(2))
    shadow = Shadow(2, 1, "tolerance", tolerance)
    wanted = all(is_close(a, b) for a, b in pairs)
    assert agrees(shadow, [tensor(one)], [tensor(other)], is_batched=True) == wanted


@given(
    st.sampled_from(["exact", "tolerance", "top1", "cosine"]),
    st.lists(numbers, min_size=1, max_size=6),
)
def test_everything_agrees_with_itself(rule, values):
    one = [tensor([values])]
    assert agrees(Shadow(2, 1, rule), one, [tensor([values])], is_batched=True)


# Copies


class Watched:
    """A front whose version 1 answers, with copies of everything to version 2."""

    def __init__(self, make, compare: str = "exact", clients: int = 1, **options) -> None:
        self.front: Front = make()
        self.bench: Bench = self.front.add(**options)
        self.front.direct(
            ModelRoute((Share(1, BASIS_POINTS),), shadow=Shadow(2, BASIS_POINTS, compare, 0.1))
        )
        self.clients = [self.front.connect() for _ in range(clients)]

    @property
    def version(self):
        return self.front.table.models["m"][2]

    def ask(self, request: bytes) -> None:
        """Each client asks, and has its answer before anything is known of the copy."""
        for client in self.clients:
            client.send(request)
        self.front.bench.run_all(self.front.bench.workers[0])
        for client in self.clients:
            assert client.answer()[0] == 200
        assert self.bench.dispatcher.intake.in_flight == 0

    def run_copies(self, **how) -> list[int]:
        """A later turn of the loop; the rows of the batches of copies."""
        self.front.loop.turn()
        return self.bench.run_all(self.bench.workers[0], **how)

    def counted(self) -> dict[str, int]:
        """What the watched version's ledger has, as far as it is not 0."""
        totals = self.bench.metrics.ledger.read().requests()
        names = ("compared", "agreed", "shadow_dropped", "shadow_failed", "succeeded", "failed")
        found = {name: getattr(totals, name) for name in names}
        assert not self.front.mirror._under_way
        return {name: count for name, count in found.items() if count}


@pytest.mark.parametrize("request_of", [ask, ask_raw])
def test_a_copy_follows_the_answer_and_is_compared(make_front, request_of):
    watched = Watched(make_front)
    for _ in range(4):  # nothing of it is learned: the kernel would keep no inputs
        watched.ask(request_of(1, 2))
        assert watched.run_copies() == [2]
    assert watched.counted() == {"compared": 4, "agreed": 4}
    assert watched.front.mirror.held_bytes == 0
    assert watched.front.door.served == 4


def test_a_copy_that_differs_does_not_agree(make_front):
    watched = Watched(make_front, model=tripled)
    watched.ask(ask(1))
    watched.run_copies()
    assert watched.counted() == {"compared": 1}


def test_large_outputs_are_compared_in_a_thread(make_front, monkeypatch):
    monkeypatch.setattr(mirror, "INLINE_BYTES", 0)
    watched = Watched(make_front)
    waiting = []

    class Done:
        def __init__(self, compare, *arguments) -> None:
            self.run = lambda: compare(*arguments)

        def add_done_callback(self, callback) -> None:
            waiting.append((self, callback))

        def exception(self) -> None:
            return None

        def result(self) -> bool:
            return self.run()

    monkeypatch.setattr(
        watched.front.loop, "run_in_executor", lambda _, *what: Done(*what), raising=False
    )
    watched.ask(ask(1))
    watched.run_copies()
    ((done, callback),) = waiting  # the slot has been freed meanwhile
    callback(done)
    assert watched.counted() == {"compared": 1, "agreed": 1}


def test_a_run_that_fails_on_a_copy_neither_agrees_nor_shows(make_front):
    watched = Watched(make_front)
    watched.ask(ask(1))
    watched.run_copies(ok=lambda _rows: False)
    assert watched.counted() == {"compared": 1, "shadow_failed": 1}


def test_an_answer_that_cannot_be_kept_is_an_answer_all_the_same(make_front, monkeypatch):
    def fail(_outputs):
        raise MemoryError

    monkeypatch.setattr(mirror, "_owned", fail)
    watched = Watched(make_front)
    watched.ask(ask(1))
    assert watched.run_copies() == []
    assert watched.counted() == {"shadow_dropped": 1}


def test_no_more_copies_than_so_many(make_front, monkeypatch):
    monkeypatch.setattr(mirror, "MAX_SHADOWS", 2)
    watched = Watched(make_front, clients=5)
    watched.ask(ask(1))
    watched.run_copies()
    assert watched.counted() == {"compared": 2, "agreed": 2, "shadow_dropped": 3}


def test_no_more_bytes_than_so_many(make_front, monkeypatch):
    watched = Watched(make_front, clients=3)
    request = ask(1, 2)
    inputs = 4 * mirror.LISTED_BYTES
    monkeypatch.setattr(mirror, "MAX_SHADOW_BYTES", 2 * inputs)
    watched.ask(request)  # room for the inputs of two, and for no outputs
    assert watched.front.mirror.held_bytes == 0
    assert watched.counted() == {"shadow_dropped": 3}
    monkeypatch.setattr(mirror, "MAX_SHADOW_BYTES", 2 * inputs + 2 * 16)
    watched.ask(request)
    watched.run_copies()
    assert watched.front.mirror.held_bytes == 0
    assert watched.counted() == {"compared": 2, "agreed": 2, "shadow_dropped": 4}


def test_copies_leave_half_of_the_queue_to_clients(make_front):
    watched = Watched(make_front, clients=3, max_queue_size=4)
    watched.ask(ask(1))
    watched.run_copies()
    assert watched.counted() == {"compared": 2, "agreed": 2, "shadow_dropped": 1}


def test_a_copy_that_waits_for_too_long_is_dropped(make_front):
    watched = Watched(make_front)
    watched.ask(ask(1))
    watched.front.loop.turn()
    watched.front.loop.fire()
    assert watched.counted() == {"shadow_dropped": 1}
    assert watched.bench.dispatcher.intake.in_flight == 0
    assert watched.run_copies() == []


@pytest.mark.parametrize("is_sent", [True, False])
@pytest.mark.parametrize("is_the_end", [True, False])
def test_an_unload_and_the_end_do_not_wait_for_copies(make_front, is_sent, is_the_end):
    watched = Watched(make_front)
    watched.ask(ask(1))
    if is_sent:
        watched.front.loop.turn()
        assert watched.version.in_flight == 1
    if is_the_end:
        watched.front.mirror.close()
    else:
        watched.front.mirror.drop(watched.version)
    assert watched.version.in_flight == 0
    assert watched.run_copies() == []
    assert watched.counted() == {"shadow_dropped": 1}
    watched.ask(ask(1))
    watched.run_copies()
    compared = 0 if is_the_end else 1
    assert watched.counted().get("compared", 0) == compared
    assert watched.front.mirror.held_bytes == 0


def test_a_version_that_is_gone_gets_no_copy(make_front):
    watched = Watched(make_front)
    watched.ask(ask(1))
    watched.version.dispatcher = None
    assert watched.run_copies() == []
    assert watched.counted() == {"shadow_dropped": 1}


def test_who_leaves_and_who_fails_leave_no_copy_behind(make_front):
    watched = Watched(make_front, clients=2)
    front = watched.front
    gone, failed = watched.clients
    gone.send(ask(1))
    assert front.mirror.held_bytes > 0
    gone.leave()
    failed.send(ask(2))
    front.run(ok=lambda _rows: False)
    assert failed.answer()[0] == 500
    assert watched.run_copies() == []
    assert front.mirror.held_bytes == 0
    assert watched.counted() == {}


def test_the_answer_is_the_same_with_and_without_a_copy(make_front):
    watched = Watched(make_front)
    (client,) = watched.clients
    heard = []
    for route in (None, ModelRoute.to(1)):
        if route is not None:
            watched.front.direct(route)
        client.send(ask(1, id="i"))
        watched.front.bench.run_all(watched.front.bench.workers[0])
        status, headers, body = client.answer()
        heard.append((status, headers.keys(), headers["x-model-version"], body))
        assert doubled(1) == [2, 3]
    assert heard[0] == heard[1]
