"""The kernel slots, in each build, and its plain twin: what requests and slots are made of."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.builds import BUILDS, IMPLEMENTATIONS, load

SHAPE = SimpleNamespace(capacity=4, outputs=())


@pytest.fixture(params=IMPLEMENTATIONS)
def slots(request):
    return load(request.param, "slots")


def key_of(slots, *, takes_mates: bool = True, shape: SimpleNamespace = SHAPE, **fields):
    return slots.ShapeKey(7, shape, 16, 1, takes_mates, **fields)


def request_of(slots, key=None, **fields):
    values = {"rows": 2, "level": 1, "arrived_ns": 5, "deadline_ns": 9, **fields}
    return slots.Request(key or key_of(slots), **values)


# State by state, those that each one may become.
MAY_BECOME = {
    "NEW": {"QUEUED", "PLACED", "ENDED"},
    "QUEUED": {"PLACED", "ENDED"},
    "PLACED": {"QUEUED", "ENDED"},
    "ENDED": set(),
}

PATHS = {"NEW": [], "QUEUED": ["QUEUED"], "PLACED": ["PLACED"], "ENDED": ["ENDED"]}
"""The moves that lead from a new request to each state."""


@pytest.mark.parametrize("before", MAY_BECOME)
@pytest.mark.parametrize("after", MAY_BECOME)
def test_only_these_moves_are_legal(slots, before, after):
    request = request_of(slots)
    for step in PATHS[before]:
        request.move(slots.State[step])
    assert request.state is slots.State[before]
    if after in MAY_BECOME[before]:
        request.move(slots.State[after])
        assert request.state is slots.State[after]
    else:
        with pytest.raises(RuntimeError):
            request.move(slots.State[after])
        assert request.state is slots.State[before]


@given(st.lists(st.sampled_from(sorted(MAY_BECOME)), max_size=8))
def test_every_build_moves_as_the_twin_does(moves):
    walks = []
    for name in IMPLEMENTATIONS:
        slots = load(name, "slots")
        request, walk = request_of(slots), []
        for move in moves:
            try:
                request.move(slots.State[move])
            except RuntimeError:
                walk.append("refused")
            walk.append(request.state.name)
        walks.append(walk)
    assert walks.count(walks[-1]) == len(IMPLEMENTATIONS)


def test_a_request_knows_its_rows_and_has_no_place(slots):
    key = key_of(slots)
    request = request_of(slots, key, due_ns=8)
    assert request.key is key
    assert (request.rows, request.level) == (2, 1)
    assert (request.arrived_ns, request.deadline_ns, request.due_ns) == (5, 9, 8)
    assert (request.slot, request.start, request.blame, request.solo) == (None, 0, 0, False)
    assert request_of(slots).due_ns == 0


def test_a_request_of_a_shape_without_mates_is_alone(slots):
    assert request_of(slots, key_of(slots, takes_mates=False)).solo


def test_times_have_64_bits(slots):
    request = request_of(slots, arrived_ns=2**64 - 1, deadline_ns=2**63)
    assert (request.arrived_ns, request.deadline_ns) == (2**64 - 1, 2**63)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("ns", [-1, 2**64])
def test_times_of_more_bits_are_refused(build, ns):
    with pytest.raises(OverflowError):
        request_of(load(build, "slots"), arrived_ns=ns)


def test_a_key_says_what_its_slots_hold(slots):
    key = key_of(slots, dims=(2, 3))
    assert (key.id, key.shape, key.string_bytes, key.lane) == (7, SHAPE, 16, 1)
    assert (key.capacity, key.limit, key.takes_mates, key.dims) == (4, 4, True, (2, 3))
    assert key.cursor is None
    slot = slots.Slot(1, 0)
    key.cursor, key.limit = slot, 3
    assert (key.cursor, key.limit, key.capacity) == (slot, 3, 4)


@pytest.mark.parametrize(("outputs", "is_bound"), [((), True), (None, False)])
def test_a_key_says_whether_outputs_are_described(slots, outputs, is_bound):
    shape = SimpleNamespace(capacity=4, outputs=outputs)
    assert key_of(slots, shape=shape).is_bound is is_bound


def test_a_cleared_slot_is_as_a_new_one(slots):
    def content(slot) -> tuple:
        return (
            slot.requests, slot.rows, slot.string_bytes, slot.deaths, slot.last_owner,
            slot.awaits_judgement,
        )  # fmt: skip

    slot, new = slots.Slot(3, 5), slots.Slot(3, 5)
    assert (slot.lane, slot.index, slot.key) == (3, 5, None)
    slot.requests.append(request_of(slots))
    slot.rows, slot.string_bytes, slot.deaths, slot.last_owner = 2, 64, 1, 9
    slot.awaits_judgement = True
    assert content(slot) != content(new)
    slot.clear()
    assert content(slot) == content(new) == ([], 0, 0, 0, 0, False)
    assert slot.requests is not new.requests


def test_an_intake_begins_open_and_empty(slots):
    intake = slots.Intake(10)
    assert (intake.bound, intake.in_flight, intake.receiving) == (10, 0, 0)
    assert (intake.has_queue, intake.is_open) == (False, True)


# A slot's requests, when it is done

MEMORY_BYTES = 64


def memory_of(slots, inputs=None, outputs=None):
    return slots.SlotMemory(
        None,
        bytearray(MEMORY_BYTES) if inputs is None else inputs,
        bytes(MEMORY_BYTES) if outputs is None else outputs,
        MEMORY_BYTES,
        MEMORY_BYTES,
    )


def test_requests_that_answer_through_methods_are_left_to_the_caller(slots):
    slot, requests = slots.Slot(0, 0), [request_of(slots) for _ in range(4)]
    for request, state in zip(requests, ("PLACED", "ENDED", "QUEUED", "PLACED"), strict=True):
        request.move(slots.State[state])
    slot.requests = requests
    rest = memory_of(slots).answer(slot, 1, 2)
    assert list(rest) == [requests[0], requests[3]]
    assert requests[0].state is slots.State.PLACED
    requests[0].move(slots.State.ENDED)
    requests[3].move(slots.State.ENDED)
    assert list(memory_of(slots).answer(slot, 1, 2)) == []


def test_memory_is_held_until_it_is_closed(slots):
    inputs, outputs = bytearray(MEMORY_BYTES), bytearray(MEMORY_BYTES)
    memory = memory_of(slots, inputs, outputs)
    for each in (inputs, outputs):
        with pytest.raises(BufferError):
            each.append(0)
    memory.close()
    memory.close()
    for each in (inputs, outputs):
        each.append(0)


def test_inputs_have_to_be_writable(slots):
    with pytest.raises(BufferError):
        memory_of(slots, inputs=bytes(MEMORY_BYTES))
