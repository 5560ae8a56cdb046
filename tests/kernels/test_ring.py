"""The batch ring, alone in one process: the same cases for each build, its twin and pairs of both."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import pytest

from tests.kernels.builds import BUILDS, load
from tests.twins import ring as twin
from tests.twins.ring import CORRUPT, DONE, EDIT, FAILED, FREE, OPEN, RETRY, SEALED, Word

SLOTS = 4
DIMS = 3
SHAPE_ID = 77
CAPACITY = 8
INCARNATION = 5
LAST_GENERATION = 2**32 - 1

PAIRS = {
    "release": ("release", "release"),
    "debug": ("debug", "debug"),
    "twin": ("twin", "twin"),
    "twin feeds release": ("twin", "release"),
    "debug feeds twin": ("debug", "twin"),
}
"""Front end's and worker's implementation: both work on the same bytes, so any two must agree."""


class Ring:
    """One lane and a board of two seats, with a consumer on each, in this process's memory."""

    def __init__(self, front: ModuleType, back: ModuleType, slots: int = SLOTS, dims: int = DIMS):
        self.front, self.back = front, back
        self.slots, self.dims = slots, dims
        self.control = bytearray(front.control_bytes(slots, dims))
        self.board = bytearray(front.board_bytes(2))
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        self.producer = front.Producer(self.control, slots, dims, self.board)
        self.consumer = self.join(0, INCARNATION)
        self.other = self.join(1, INCARNATION + 1)
        self.raw = twin.Lane(self.control, slots, dims)

    def join(self, seat: int, incarnation: int) -> Any:
        consumer = self.back.Consumer(self.board, seat, incarnation)
        consumer.attach("lane", self.control, self.slots, self.dims, self.bell)
        return consumer

    def open(self, slot: int = 0, rows: int = 2, oldest_ns: int = 100) -> None:
        self.producer.open(slot, rows, oldest_ns, SHAPE_ID, CAPACITY, (4, 5))

    def seal(self, slot: int = 0) -> int:
        """Seal the slot as it stands; returns the word to publish with."""
        word = self.word(slot).pack()
        assert self.consumer.seal("lane", slot, word, 1000)
        return word

    def publish(self, slot: int, word: int, ok: bool = True) -> bool:
        return self.consumer.publish("lane", slot, word, ok, 2000, 3000)

    def word(self, slot: int = 0) -> Word:
        return self.raw.word(slot)

    def scribble(self, slot: int, **fields: int) -> None:
        """Change fields of the slot's word, as only a broken worker does."""
        self.raw.set_field(slot, twin.SLOT_WORD, self.word(slot)._replace(**fields).pack())

    def reach(self, phase: str, slot: int = 0) -> None:
        """Bring a FREE slot of two rows into a phase by legal steps (CORRUPT needs a scribble)."""
        if phase == "FREE":
            return
        self.open(slot)
        for step in {
            "OPEN": "",
            "EDIT": "e",
            "SEALED": "s",
            "DONE": "sd",
            "FAILED": "sf",
            "RETRY": "sr",
            "EDIT of RETRY": "sre",
            "SEALED again": "srs",
            "DONE again": "srsd",
            "CORRUPT": "sc",
        }[phase]:
            match step:
                case "e":
                    assert self.producer.edit(slot)
                case "s":
                    word = self.seal(slot)
                case "d" | "f":
                    assert self.publish(slot, word, ok=step == "d")
                case "r":
                    self.producer.retry(slot)
                case "c":
                    self.scribble(slot, rows=7)

    def image(self) -> bytes:
        return bytes(self.control) + bytes(self.board)

    def is_waiting(self) -> list[bool]:
        return [seat[3] for seat in self.front.seats(self.board)]

    def rings(self) -> int:
        """How often the bell rang since it was last asked."""
        try:
            return os.eventfd_read(self.bell)
        except BlockingIOError:
            return 0


@pytest.fixture(params=PAIRS)
def sides(request: pytest.FixtureRequest) -> tuple[ModuleType, ModuleType]:
    front, back = PAIRS[request.param]
    return load(front, "ring"), load(back, "ring")


@pytest.fixture
def make(sides: tuple[ModuleType, ModuleType]) -> Iterator[Callable[..., Ring]]:
    with ExitStack() as cleanup:

        def make(**geometry: int) -> Ring:
            ring = Ring(*sides, **geometry)
            cleanup.callback(os.close, ring.bell)
            return ring

        yield make


@pytest.fixture
def ring(make: Callable[..., Ring]) -> Ring:
    return make()


# --- Layout ------------------------------------------------------------------------------------


PHASES = ("FREE", "OPEN", "EDIT", "SEALED", "DONE", "FAILED", "RETRY", "CORRUPT")
CONSTANTS = (*PHASES, "MAX_SLOTS", "MAX_ROWS", "MAX_INCARNATION")


@pytest.mark.parametrize("build", BUILDS)
def test_kernel_and_twin_agree_on_constants_and_sizes(build: str) -> None:
    kernel = load(build, "ring")
    assert kernel.LAYOUT == twin.LAYOUT
    for name in CONSTANTS:
        assert getattr(kernel, name) == getattr(twin, name)
    for slots in (1, 63, 64, 65, 512):
        for dims in (0, 1, 8, 9, 65536):
            assert kernel.control_bytes(slots, dims) == twin.control_bytes(slots, dims)
    for count in (1, 2, 100):
        assert kernel.board_bytes(count) == twin.board_bytes(count)


def test_only_the_debug_build_has_steps() -> None:
    assert [load(build, "ring").set_steps(0) for build in BUILDS] == [False, True]


@pytest.mark.parametrize("geometry", [(0, 0), (-1, 0), (513, 0), (1, -1), (1, 65537)])
def test_control_bytes_refuses(sides: Any, geometry: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"slot|dims"):
        sides[0].control_bytes(*geometry)


@pytest.mark.parametrize("seats", [0, -1])
def test_board_bytes_refuses(sides: Any, seats: int) -> None:
    with pytest.raises(ValueError, match="seat"):
        sides[0].board_bytes(seats)


def test_every_field_lies_where_the_layout_says(make: Callable[..., Ring]) -> None:
    ring = make(slots=70, dims=9)
    raw, slot = ring.raw, 69
    assert len(ring.control) == 256 + 70 * 256
    assert [raw.head(at) for at in (0, 4, 8, 12)] == [0x474E5247, 3, 70, 9]
    dims = tuple(range(-4, 5))
    ring.producer.open(slot, 3, 111, 222, 33, dims, 444)
    assert raw.word(slot) == (OPEN, 0, 3, 0)
    assert [raw.field(slot, at) for at in (8, 16, 24, 32, 40)] == [111, 222, 33, 0, 444]
    ring.producer.complete(slot)
    assert raw.field(slot, 32) == 1
    assert raw.bits(twin.LANE_OPEN_BITS) == [slot]
    assert ring.consumer.dims("lane", slot) == dims
    assert ring.producer.arm()
    assert raw.head(64) == 1
    word = ring.seal(slot)
    assert raw.word(slot) == (SEALED, INCARNATION, 3, 0)
    assert ring.front.seats(ring.board)[0] == (INCARNATION, 0, 1000, False)
    assert raw.bits(twin.LANE_OPEN_BITS) == []
    assert ring.publish(slot, word)
    assert raw.word(slot) == (DONE, INCARNATION, 3, 0)
    assert [raw.field(slot, at) for at in (64, 72)] == [2000, 3000]
    assert ring.producer.times(slot) == (2000, 3000)
    assert raw.bits(twin.LANE_DONE_BITS) == [slot]
    assert raw.head(64) == 0
    assert ring.front.seats(ring.board)[0] == (INCARNATION, 1, 0, False)


# --- Every operation in every phase ------------------------------------------------------------

REFUSED = "refused"
OPERATIONS: dict[str, Callable[[Ring], Any]] = {
    "open": lambda ring: ring.open(),
    "append": lambda ring: ring.producer.append(0, 1),
    "edit": lambda ring: ring.producer.edit(0),
    "edited": lambda ring: ring.producer.edited(0, 1),
    "edited to nothing": lambda ring: ring.producer.edited(0, 0),
    "retry": lambda ring: ring.producer.retry(0),
    "free": lambda ring: ring.producer.free(0),
    "seal": lambda ring: ring.consumer.seal("lane", 0, ring.word().pack(), 1),
}
# Of each phase: its code, and of each operation that is not refused its result and the phase after.
TRANSITIONS: dict[str, tuple[int, dict[str, tuple[Any, int]]]] = {
    "FREE": (FREE, {"open": (None, OPEN)}),
    "OPEN": (OPEN, {"append": (True, OPEN), "edit": (True, EDIT), "seal": (True, SEALED)}),
    "EDIT": (EDIT, {"edited": (None, OPEN), "edited to nothing": (None, FREE)}),
    "SEALED": (
        SEALED,
        {
            "append": (False, SEALED),
            "edit": (False, SEALED),
            "retry": (None, RETRY),
            "free": (None, FREE),
        },
    ),
    "DONE": (DONE, {"append": (False, DONE), "edit": (False, DONE), "free": (None, FREE)}),
    "FAILED": (FAILED, {"append": (False, FAILED), "edit": (False, FAILED), "free": (None, FREE)}),
    "RETRY": (RETRY, {"edit": (True, EDIT), "seal": (True, SEALED)}),
    "EDIT of RETRY": (EDIT, {"edited": (None, RETRY), "edited to nothing": (None, FREE)}),
    "SEALED again": (
        SEALED,
        {"edit": (False, SEALED), "retry": (None, RETRY), "free": (None, FREE)},
    ),
    "DONE again": (DONE, {"edit": (False, DONE), "free": (None, FREE)}),
    "CORRUPT": (
        CORRUPT,
        {"append": (False, CORRUPT), "edit": (False, CORRUPT), "free": (None, FREE)},
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("phase", TRANSITIONS)
def test_transition(ring: Ring, phase: str, operation: str) -> None:
    code, allowed = TRANSITIONS[phase]
    ring.reach(phase)
    assert ring.producer.phase(0) == code
    before = ring.image()
    result, after = allowed.get(operation, (REFUSED, code))
    if result is REFUSED:
        with pytest.raises(ValueError, match=r"."):
            OPERATIONS[operation](ring)
    else:
        assert OPERATIONS[operation](ring) is result
    assert ring.producer.phase(0) == after
    if result in (REFUSED, False):
        assert ring.image() == before


@pytest.mark.parametrize("phase", TRANSITIONS)
def test_publish_only_what_one_has_sealed(ring: Ring, phase: str) -> None:
    ring.reach(phase)
    word, code = ring.word(), ring.producer.phase(0)
    mine = phase in ("SEALED", "SEALED again")
    if phase == "CORRUPT":
        word = word._replace(rows=2)
    assert ring.other.publish("lane", 0, word.pack(), True, 1, 2) is False
    assert ring.producer.phase(0) == code
    assert ring.publish(0, word.pack()) is mine
    assert ring.producer.phase(0) == (DONE if mine else code)
    assert ring.producer.collect() == ([0] if mine or phase in ("FAILED", *DONES) else [])


DONES = ("DONE", "DONE again")


def test_owner_is_who_sealed(ring: Ring) -> None:
    ring.open()
    assert ring.producer.owner(0) == 0
    word = ring.seal()
    assert ring.producer.owner(0) == INCARNATION
    ring.publish(0, word, ok=False)
    assert (ring.producer.phase(0), ring.producer.owner(0)) == (FAILED, INCARNATION)


# --- Rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, CAPACITY + 1, 0x10000])
def test_open_refuses_rows(ring: Ring, rows: int) -> None:
    with pytest.raises(ValueError, match="rows"):
        ring.open(rows=rows)
    assert ring.producer.phase(0) == FREE


def test_open_refuses_a_capacity_that_the_word_cannot_count(ring: Ring) -> None:
    with pytest.raises(ValueError, match="rows"):
        ring.producer.open(0, 1, 0, 0, 0x10000)
    ring.producer.open(0, 0xFFFF, 0, 0, 0xFFFF)
    assert ring.consumer.best()[3] == 0xFFFF


def test_open_refuses_more_dims_than_a_slot_records(ring: Ring) -> None:
    with pytest.raises(ValueError, match="dims"):
        ring.producer.open(0, 1, 0, 0, 1, (1,) * (DIMS + 1))


def test_append_fills_a_slot_to_its_capacity(ring: Ring) -> None:
    ring.open(rows=1)
    assert ring.producer.append(0, CAPACITY - 1)
    assert ring.producer.rows(0) == CAPACITY
    with pytest.raises(ValueError, match="rows"):
        ring.producer.append(0, 1)
    assert ring.consumer.best()[3] == CAPACITY


@pytest.mark.parametrize("rows", [0, CAPACITY, 2**32 - 1])
def test_append_refuses_rows(ring: Ring, rows: int) -> None:
    ring.open()
    with pytest.raises(ValueError, match="rows"):
        ring.producer.append(0, rows)
    assert ring.word() == (OPEN, 0, 2, 0)


def test_append_that_loses_to_a_seal_changes_nothing(ring: Ring) -> None:
    ring.open()
    word = ring.seal()
    assert not ring.producer.append(0, 1)
    assert ring.producer.rows(0) == 2
    assert ring.publish(0, word)
    assert ring.producer.phase(0) == DONE


def test_a_seal_that_loses_to_an_append_takes_nothing(ring: Ring) -> None:
    ring.open()
    stale = ring.consumer.best()
    assert ring.producer.append(0, 1)
    assert not ring.consumer.seal("lane", 0, stale[2], 1)
    assert ring.front.seats(ring.board)[0] == (INCARNATION, 0, 0, False)
    fresh = ring.consumer.best()
    assert fresh[3] == 3
    assert ring.consumer.seal("lane", 0, fresh[2], 1)


def test_only_one_of_two_workers_seals(ring: Ring) -> None:
    ring.open()
    found = ring.consumer.best()
    assert ring.other.best() == found
    assert ring.other.seal("lane", 0, found[2], 1)
    assert not ring.consumer.seal("lane", 0, found[2], 1)
    assert ring.producer.owner(0) == INCARNATION + 1


@pytest.mark.parametrize("phase", ["OPEN", "RETRY"])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_edit_goes_back_to_where_it_was(ring: Ring, phase: str, rows: int) -> None:
    ring.reach(phase)
    found = ring.consumer.best()
    assert ring.producer.edit(0)
    assert ring.consumer.best() is None
    assert not ring.consumer.seal("lane", 0, found[2], 1)
    ring.producer.edited(0, rows)
    if rows:
        assert ring.producer.phase(0) == getattr(twin, phase)
        assert ring.consumer.best() == (*found[:2], ring.word().pack(), rows, *found[4:])
    else:
        assert ring.word() == (FREE, 0, 0, 1)
        assert ring.consumer.best() is None
    assert ring.raw.bits(twin.LANE_OPEN_BITS) == ([0] if rows else [])
    assert ring.producer.rows(0) == rows


def test_an_edit_cannot_add_rows(ring: Ring) -> None:
    ring.reach("EDIT")
    with pytest.raises(ValueError, match="rows"):
        ring.producer.edited(0, 3)
    assert ring.producer.phase(0) == EDIT


@pytest.mark.parametrize("phase", ["SEALED", "SEALED again"])
def test_edit_that_loses_to_a_seal_changes_nothing(ring: Ring, phase: str) -> None:
    ring.reach(phase)
    assert not ring.producer.edit(0)
    assert ring.producer.phase(0) == SEALED
    with pytest.raises(ValueError, match=r"(?i)edit"):
        ring.producer.edited(0, 1)


def test_an_edited_slot_takes_rows_again(ring: Ring) -> None:
    ring.reach("EDIT")
    ring.producer.edited(0, 1)
    assert ring.producer.append(0, CAPACITY - 1)
    assert ring.consumer.best()[3] == CAPACITY


def test_retry_keeps_rows_age_and_shape_and_another_worker_runs_it(ring: Ring) -> None:
    ring.open(oldest_ns=123)
    ring.seal()
    ring.producer.retry(0)
    assert ring.producer.owner(0) == 0
    found = ring.other.best()
    assert found == ("lane", 0, ring.word().pack(), 2, CAPACITY, 123, SHAPE_ID, True, 0)
    assert ring.other.seal("lane", 0, found[2], 1)
    assert ring.other.publish("lane", 0, found[2], True, 1, 2)
    assert ring.producer.owner(0) == INCARNATION + 1


def test_a_worker_that_lost_its_slot_publishes_nothing(ring: Ring) -> None:
    ring.open()
    word = ring.seal()
    ring.producer.retry(0)
    assert not ring.publish(0, word)
    assert ring.producer.phase(0) == RETRY
    assert ring.producer.collect() == []


# --- Generations -------------------------------------------------------------------------------


def set_generation(ring: Ring, slot: int, generation: int) -> None:
    """Move a FREE slot to a generation that nobody can reach within a test.

    The kernel's mirror is a C array behind the fourth word of its object (head, vtable, control,
    board, mirror): believed only if it shows the generations that the test has made.
    """
    for count in range(3):
        assert ring.word(slot).generation == count
        ring.reach("DONE", slot)
        ring.producer.free(slot)
    if isinstance(ring.producer, twin.Producer):
        ring.producer.mirrors[slot].generation = generation
    else:
        mirror = ctypes.c_void_p.from_address(id(ring.producer) + 40).value
        assert mirror is not None
        field = ctypes.c_uint32.from_address(mirror + 20 * slot)
        assert field.value == 3, "the kernel's mirror has another layout"
        field.value = generation
    ring.scribble(slot, generation=generation)


def test_generation_wraps(ring: Ring) -> None:
    for slot in (0, SLOTS - 1):
        set_generation(ring, slot, LAST_GENERATION)
        assert ring.producer.phase(slot) == FREE
        ring.open(slot)
        assert ring.word(slot) == (OPEN, 0, 2, LAST_GENERATION)
        word = ring.seal(slot)
        assert ring.publish(slot, word)
        assert ring.producer.phase(slot) == DONE
        ring.producer.free(slot)
        assert ring.word(slot) == (FREE, 0, 0, 0)
        ring.open(slot)
        assert not ring.consumer.seal("lane", slot, word, 1)
        assert ring.consumer.best()[2] == Word(OPEN, 0, 2, 0).pack()
        ring.seal(slot)


def test_a_word_of_an_earlier_generation_seals_and_publishes_nothing(ring: Ring) -> None:
    ring.open()
    word = ring.seal()
    ring.publish(0, word)
    ring.producer.free(0)
    ring.open()
    assert ring.word().generation == 1
    assert not ring.consumer.seal("lane", 0, word, 1)
    ring.seal()
    assert not ring.publish(0, word)
    assert ring.producer.phase(0) == SEALED


# --- Finding work ------------------------------------------------------------------------------


def test_best_is_the_oldest(ring: Ring) -> None:
    for slot, oldest_ns in enumerate((30, 10, 20, 10)):
        ring.open(slot, oldest_ns=oldest_ns)
    order = []
    while (found := ring.consumer.best()) is not None:
        order.append(found[1])
        assert ring.consumer.seal("lane", found[1], found[2], 1)
    assert order == [1, 3, 2, 0]


def test_best_prefers_retries_whatever_their_age(ring: Ring) -> None:
    for slot, oldest_ns in enumerate((40, 5, 30, 20)):
        ring.open(slot, oldest_ns=oldest_ns)
    for slot in (0, 2):
        ring.seal(slot)
        ring.producer.retry(slot)
    order = []
    while (found := ring.consumer.best()) is not None:
        order.append((found[1], found[7]))
        assert ring.consumer.seal("lane", found[1], found[2], 1)
    assert order == [(2, True), (0, True), (1, False), (3, False)]


def test_a_slot_that_nothing_more_can_join_does_not_overtake_an_older_row(ring: Ring) -> None:
    for slot, (rows, oldest_ns) in enumerate(((1, 10), (CAPACITY, 40), (2, 30), (1, 20))):
        ring.open(slot, rows, oldest_ns=oldest_ns)
    ring.producer.complete(2)
    order = []
    while (found := ring.consumer.best()) is not None:
        order.append((found[1], found[7]))
        assert ring.consumer.seal("lane", found[1], found[2], 1)
    assert order == [(0, False), (3, False), (2, True), (1, True)]


def test_completeness_ends_with_the_slots_use(ring: Ring) -> None:
    ring.open()
    ring.producer.complete(0)
    assert ring.publish(0, ring.seal(0))
    ring.producer.free(0)
    ring.open()
    assert ring.consumer.best()[7] is False


@pytest.mark.parametrize("phase", ["FREE", "RETRY"])
def test_only_an_open_slot_is_completed(ring: Ring, phase: str) -> None:
    ring.reach(phase)
    with pytest.raises(ValueError, match=r"OPEN|complete"):
        ring.producer.complete(0)


def test_best_looks_across_lanes(make: Callable[..., Ring]) -> None:
    ring, second = make(), make(slots=130, dims=0)
    ring.consumer.attach("second", second.control, 130, 0, second.bell)
    for slot, oldest_ns in ((129, 10), (64, 30), (63, 50)):
        second.producer.open(slot, 1, oldest_ns, 1, 2)
    for slot, oldest_ns in ((0, 20), (3, 40)):
        ring.open(slot, oldest_ns=oldest_ns)
    second.seal(63)
    second.producer.retry(63)
    order = []
    while (found := ring.consumer.best()) is not None:
        order.append(found[:2])
        assert ring.consumer.seal(*found[:3], 1)
    assert order == [("second", 63), ("second", 129), ("lane", 0), ("second", 64), ("lane", 3)]


def test_offers_are_all_of_them_in_the_order_in_which_they_would_be_taken(
    make: Callable[..., Ring],
) -> None:
    ring, second = make(), make(slots=2, dims=0)
    ring.consumer.attach("second", second.control, 2, 0, second.bell)
    assert ring.consumer.offers() == []
    for slot, (rows, oldest_ns) in enumerate(((1, 10), (CAPACITY, 40), (1, 30), (1, 20))):
        ring.open(slot, rows, oldest_ns)
    second.producer.open(0, 1, 10, 1, 2)
    second.producer.open(1, 1, 50, 1, 2)
    ring.seal(3)
    ring.producer.retry(3)
    offers = ring.consumer.offers()
    places = [("lane", 3), ("lane", 0), ("second", 0), ("lane", 2), ("lane", 1), ("second", 1)]
    assert [offer[:2] for offer in offers] == places
    for offer in offers:
        assert ring.consumer.best() == offer
        assert ring.consumer.seal(*offer[:3], 1)


# --- Taking ------------------------------------------------------------------------------------


def test_take_seals_what_best_would_show(ring: Ring) -> None:
    assert ring.consumer.take(7, False) is None
    ring.open()
    best = ring.consumer.best()
    assert ring.consumer.take(7, False) == (best, True)
    assert ring.producer.phase(0) == SEALED
    assert ring.front.seats(ring.board)[0] == (INCARNATION, 0, 7, False)
    assert ring.consumer.take(8, False) is None


@pytest.mark.parametrize(
    ("due_ns", "may_hold", "is_taken"), [(0, False, True), (0, True, False), (9, False, False)]
)
def test_take_leaves_alone_what_may_be_held_back(
    ring: Ring, due_ns: int, may_hold: bool, is_taken: bool
) -> None:
    ring.producer.open(0, 1, 5, SHAPE_ID, CAPACITY, (), due_ns)
    best = ring.consumer.best()
    assert ring.consumer.take(7, may_hold) == (best, is_taken)
    assert ring.producer.phase(0) == (SEALED if is_taken else OPEN)


def test_take_seals_what_is_complete_whatever_it_may_hold(ring: Ring) -> None:
    ring.producer.open(0, CAPACITY, 5, SHAPE_ID, CAPACITY, (), 9)
    ring.producer.open(1, 1, 6, SHAPE_ID, CAPACITY, (), 9)
    ring.producer.complete(1)
    ring.reach("RETRY", 2)
    assert [ring.consumer.take(7, True)[0][1] for _ in range(3)] == [2, 0, 1]


def test_take_wakes_another_worker_where_there_is_more(ring: Ring) -> None:
    ring.other.announce()
    ring.open(0)
    assert ring.consumer.take(7, False)
    assert ring.is_waiting() == [False, True]
    ring.open(1)
    ring.open(2)
    assert ring.consumer.take(7, False)
    assert ring.is_waiting() == [False, False]


def test_the_earliest_due_time_is_the_slots(ring: Ring) -> None:
    ring.producer.open(0, 1, 5, SHAPE_ID, CAPACITY, ())
    seen = []
    for due_ns in (0, 50, 0, 70, 30):
        assert ring.producer.append(0, 1, due_ns)
        seen.append(ring.consumer.best()[8])
    assert seen == [0, 50, 50, 50, 30]
    ring.seal(0)
    assert not ring.producer.append(0, 1, 10)


def test_a_due_time_ends_with_the_slots_use(ring: Ring) -> None:
    ring.producer.open(0, 1, 5, SHAPE_ID, CAPACITY, (), 9)
    assert ring.publish(0, ring.seal(0))
    ring.producer.free(0)
    ring.open()
    assert ring.consumer.best()[8] == 0


def test_a_worker_is_busy_from_its_first_slot_to_the_last_of_its_run(ring: Ring) -> None:
    for slot in range(3):
        ring.open(slot)
    words = [ring.word(slot).pack() for slot in range(3)]
    assert ring.consumer.seal("lane", 0, words[0], 10)
    assert ring.consumer.seal("lane", 1, words[1], 20)
    assert ring.other.seal("lane", 2, words[2], 30)
    assert not ring.consumer.seal("lane", 2, words[2], 40)
    assert ring.front.seats(ring.board)[0] == (INCARNATION, 0, 10, False)
    assert ring.consumer.publish("lane", 1, words[1], True, 50, 60, False)
    assert ring.front.seats(ring.board)[0] == (INCARNATION, 0, 10, False)
    assert ring.consumer.publish("lane", 0, words[0], True, 50, 60)
    assert ring.front.seats(ring.board)[0] == (INCARNATION, 1, 0, False)


def test_a_worker_that_holds_another_batch_is_busy_since_that_one(ring: Ring) -> None:
    ring.open(0)
    word = ring.seal(0)
    assert ring.publish(0, word)
    assert ring.front.seats(ring.board)[0][1:3] == (1, 0)
    ring.consumer.stay_busy(77)
    assert ring.front.seats(ring.board)[0][1:3] == (1, 77)


def test_a_dead_workers_slots_in_two_lanes_are_each_front_ends_to_rerun(
    make: Callable[..., Ring],
) -> None:
    ring, second = make(), make()
    ring.consumer.attach("second", second.control, SLOTS, DIMS, second.bell)
    ring.open(0)
    second.open(1)
    for offer in ring.consumer.offers():
        assert ring.consumer.seal(*offer[:3], 1)
    # It dies here: it publishes nothing, and its number is not used again.
    for lane, slot in ((ring, 0), (second, 1)):
        assert [lane.producer.owner(n) == INCARNATION for n in range(SLOTS)] == [
            n == slot for n in range(SLOTS)
        ]
        lane.producer.retry(slot)
    ring.other.attach("second", second.control, SLOTS, DIMS, second.bell)
    taken = [ring.other.take(2, False) for _ in range(3)]
    assert [found and found[0][:2] for found in taken] == [("lane", 0), ("second", 1), None]
    for (key, slot, word, *_), _is_sealed in taken[:2]:
        assert ring.other.publish(key, slot, word, True, 3, 4)
    assert ring.producer.phase(0) == second.producer.phase(1) == DONE


def test_others_wait(ring: Ring) -> None:
    assert not ring.consumer.others_wait()
    ring.consumer.announce()
    assert not ring.consumer.others_wait()
    ring.other.announce()
    assert ring.consumer.others_wait()


@pytest.mark.parametrize(
    ("recommended", "best"), [((0, 0), 0), ((8, 0), 0), ((8, 4), 8), ((8, 8), 8)]
)
def test_slots_are_closed_where_every_worker_knows_better(
    ring: Ring, recommended: tuple[int, int], best: int
) -> None:
    for consumer, rows in zip((ring.consumer, ring.other), recommended, strict=True):
        consumer.recommend(rows)
    assert ring.producer.best_rows() == best
    ring.join(0, INCARNATION + 2)  # who has learned nothing yet
    assert ring.producer.best_rows() == 0


@pytest.mark.parametrize("phase", ["FREE", "EDIT", "SEALED", "DONE", "FAILED", "CORRUPT"])
def test_best_sees_only_what_can_be_sealed(ring: Ring, phase: str) -> None:
    ring.reach(phase)
    assert ring.consumer.best() is None
    for n in range(SLOTS):
        ring.raw.set_bit(twin.LANE_OPEN_BITS, n)
    assert ring.consumer.best() is None


def test_a_detached_lane_is_not_looked_at(ring: Ring) -> None:
    ring.open()
    ring.consumer.detach("lane")
    assert ring.consumer.best() is None
    for call in (
        lambda: ring.consumer.seal("lane", 0, ring.word().pack(), 1),
        lambda: ring.publish(0, ring.word().pack()),
        lambda: ring.consumer.dims("lane", 0),
        lambda: ring.consumer.detach("lane"),
    ):
        with pytest.raises(KeyError):
            call()
    ring.consumer.attach("lane", ring.control, SLOTS, DIMS, ring.bell)
    assert ring.consumer.best() is not None


def test_dims_are_those_of_the_slot(ring: Ring) -> None:
    ring.producer.open(1, 1, 0, 0, 1, (7, -8, 2**62))
    assert ring.consumer.dims("lane", 1) == (7, -8, 2**62)
    assert ring.consumer.dims("lane", 0) == (0, 0, 0)
    ring.open(2)
    assert ring.consumer.dims("lane", 2)[:2] == (4, 5)


# --- What a broken worker may do ---------------------------------------------------------------

SCRIBBLES = [
    ("FREE", {"phase": phase}) for phase in (OPEN, EDIT, SEALED, DONE, FAILED, RETRY, 7, 15)
]
SCRIBBLES += [("OPEN", {"phase": phase}) for phase in (FREE, EDIT, SEALED, DONE, FAILED, RETRY, 9)]
SCRIBBLES += [("EDIT", {"phase": phase}) for phase in (FREE, OPEN, RETRY)]
SCRIBBLES += [("EDIT", {"phase": phase, "owner": 9}) for phase in (SEALED, DONE, FAILED)]
SCRIBBLES += [("RETRY", {"phase": phase}) for phase in (FREE, OPEN, EDIT, DONE)]
SCRIBBLES += [("SEALED", {"phase": phase}) for phase in (FREE, OPEN, EDIT, RETRY, 8)]
SCRIBBLES += [(phase, {"generation": 1}) for phase in TRANSITIONS]
SCRIBBLES += [(phase, {"rows": 3}) for phase in TRANSITIONS]
SCRIBBLES += [(phase, {"owner": 9}) for phase in ("FREE", "OPEN", "EDIT", "RETRY")]
SCRIBBLES += [(phase, {"owner": 0}) for phase in ("SEALED", "DONE", "FAILED")]


@pytest.mark.parametrize(
    ("phase", "fields"), SCRIBBLES, ids=[f"{phase} {fields}" for phase, fields in SCRIBBLES]
)
def test_a_word_that_contradicts_the_mirror_is_corrupt(
    ring: Ring, phase: str, fields: dict[str, int]
) -> None:
    ring.reach(phase)
    ring.scribble(0, **fields)
    assert ring.producer.phase(0) == CORRUPT
    with pytest.raises(ValueError, match=r"sealed|SEALED"):
        ring.producer.retry(0)
    ring.producer.free(0)
    assert ring.word() == (FREE, 0, 0, 1)
    ring.reach("DONE")
    assert ring.producer.phase(0) == DONE


def test_an_edit_overwrites_a_scribbled_word(ring: Ring) -> None:
    ring.reach("EDIT")
    ring.scribble(0, phase=FREE, rows=9, generation=9)
    ring.producer.edited(0, 2)
    assert ring.word() == (OPEN, 0, 2, 0)


@pytest.mark.parametrize("slots", [5, 64, 65, 512])
def test_bits_beyond_the_slots_are_nobodys(make: Callable[..., Ring], slots: int) -> None:
    ring = make(slots=slots)
    ring.control[twin.LANE_OPEN_BITS : twin.LANE_BYTES] = b"\xff" * 128
    assert ring.consumer.best() is None
    assert not ring.producer.arm()
    assert ring.producer.collect() == list(range(slots))
    assert ring.producer.collect() == []
    assert ring.producer.arm()
    ring.open(slots - 1)
    assert ring.consumer.best()[1] == slots - 1


def test_missing_bits_hide_a_slot_and_no_more(ring: Ring) -> None:
    ring.open(0)
    ring.open(1)
    ring.raw.clear_bit(twin.LANE_OPEN_BITS, 0)
    assert ring.consumer.best()[1] == 1
    assert ring.producer.edit(0)
    ring.producer.edited(0, 2)
    assert ring.consumer.best()[1] == 0


def test_a_scribbled_capacity_lets_no_row_in(ring: Ring) -> None:
    ring.open(rows=CAPACITY)
    ring.raw.set_field(0, twin.SLOT_CAPACITY, 2**64 - 1)
    with pytest.raises(ValueError, match="rows"):
        ring.producer.append(0, 1)


@pytest.mark.parametrize("at", [twin.LANE_MAGIC, twin.LANE_LAYOUT, twin.LANE_SLOTS, twin.LANE_DIMS])
def test_a_scribbled_header_is_refused_and_moves_nobody_who_is_attached(
    ring: Ring, at: int
) -> None:
    ring.raw.set_head(at, ring.raw.head(at) + 1)
    with pytest.raises(ValueError, match=r"layout|geometry|header"):
        ring.consumer.attach("again", ring.control, SLOTS, DIMS, ring.bell)
    ring.reach("DONE", SLOTS - 1)
    assert ring.producer.collect() == [SLOTS - 1]
    assert ring.producer.phase(SLOTS - 1) == DONE


@pytest.mark.parametrize("geometry", [(SLOTS - 1, DIMS), (SLOTS, DIMS - 1)])
def test_attach_refuses_another_geometry(ring: Ring, geometry: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"geometry|header"):
        ring.consumer.attach("again", ring.control, *geometry, ring.bell)


# --- Reports and the bell ----------------------------------------------------------------------


def test_the_bell_rings_once_for_each_time_it_was_armed(ring: Ring) -> None:
    for slot in range(SLOTS):
        ring.open(slot)
    ring.publish(0, ring.seal(0))
    assert ring.rings() == 0
    assert not ring.producer.arm()
    assert ring.producer.collect() == [0]
    assert ring.producer.arm()
    ring.publish(1, ring.seal(1))
    ring.publish(3, ring.seal(3), ok=False)
    assert ring.rings() == 1
    assert ring.producer.collect() == [1, 3]
    ring.publish(2, ring.seal(2))
    assert ring.rings() == 0
    assert ring.producer.collect() == [2]
    assert ring.producer.collect() == []


def test_collect_disarms(ring: Ring) -> None:
    ring.open()
    assert ring.producer.arm()
    assert ring.producer.collect() == []
    ring.publish(0, ring.seal())
    assert ring.rings() == 0


def test_who_lingers_sees_a_report_without_a_bell(ring: Ring) -> None:
    for slot in range(2):
        ring.open(slot)
    assert ring.producer.arm()
    assert not ring.producer.linger(1000)  # in vain: the bell is armed again
    ring.publish(0, ring.seal(0))
    assert ring.rings() == 1
    assert ring.producer.linger(1000)
    assert ring.producer.collect() == [0]
    assert ring.producer.arm()
    ring.publish(1, ring.seal(1))
    assert ring.producer.linger(1 << 40)  # seen at once
    assert ring.producer.collect() == [1]


def test_arm_that_fails_leaves_the_bell_disarmed(ring: Ring) -> None:
    ring.open(0)
    ring.open(1)
    ring.publish(0, ring.seal(0))
    assert not ring.producer.arm()
    ring.publish(1, ring.seal(1))
    assert ring.rings() == 0
    assert ring.producer.collect() == [0, 1]


def test_collect_over_several_words_of_bits(make: Callable[..., Ring]) -> None:
    ring = make(slots=512, dims=0)
    reported = [0, 63, 64, 127, 300, 511]
    for slot in reversed(reported):
        ring.producer.open(slot, 1, 0, 0, 1)
        ring.publish(slot, ring.seal(slot))
    assert not ring.producer.arm()
    assert ring.producer.collect() == reported


def test_a_bell_that_is_gone_harms_nobody(ring: Ring) -> None:
    gone = os.dup(ring.bell)
    ring.consumer.detach("lane")
    ring.consumer.attach("lane", ring.control, SLOTS, DIMS, gone)
    os.close(gone)
    ring.open()
    assert ring.producer.arm()
    assert ring.publish(0, ring.seal())
    assert ring.producer.collect() == [0]


# --- Waiting and waking ------------------------------------------------------------------------


def test_a_wake_goes_to_one_who_waits(ring: Ring) -> None:
    assert not ring.producer.wake()
    ring.other.announce()
    assert ring.is_waiting() == [False, True]
    assert ring.producer.wake()
    assert ring.is_waiting() == [False, False]
    assert not ring.producer.wake()
    assert ring.other.retract()
    ring.consumer.announce()
    assert not ring.consumer.retract()


def test_one_wake_for_each_call(ring: Ring) -> None:
    ring.consumer.announce()
    ring.other.announce()
    assert ring.producer.wake()
    assert ring.is_waiting() == [False, True]
    assert ring.producer.wake()
    assert not ring.producer.wake()


def test_wake_all(ring: Ring) -> None:
    ring.producer.wake_all()
    ring.consumer.announce()
    ring.other.announce()
    ring.producer.wake_all()
    assert ring.is_waiting() == [False, False]
    assert ring.consumer.retract()
    assert ring.other.retract()


def test_sleep_after_a_wake_up_returns_at_once(ring: Ring) -> None:
    ring.consumer.announce()
    assert ring.producer.wake()
    ring.consumer.sleep(0)
    ring.consumer.announce()
    ring.consumer.nudge()
    ring.consumer.sleep(0)
    assert ring.is_waiting() == [False, False]


def test_sleep_ends_at_its_deadline(ring: Ring) -> None:
    ring.consumer.announce()
    ring.consumer.sleep(1)
    assert ring.is_waiting() == [False, False]


def test_nudge_takes_its_own_seat_back(ring: Ring) -> None:
    ring.consumer.announce()
    ring.other.announce()
    ring.consumer.nudge()
    assert ring.is_waiting() == [False, True]
    assert ring.consumer.retract()


def test_pass_on_wakes_another_if_there_is_work(ring: Ring) -> None:
    ring.other.announce()
    assert not ring.consumer.pass_on()
    ring.open()
    assert ring.consumer.pass_on()
    assert ring.is_waiting() == [False, False]
    assert not ring.consumer.pass_on()


def test_pass_on_never_wakes_oneself(ring: Ring) -> None:
    ring.open()
    ring.consumer.announce()
    assert not ring.consumer.pass_on()
    assert ring.is_waiting() == [True, False]


def test_a_new_incarnation_takes_the_seat_over(ring: Ring) -> None:
    ring.consumer.announce()
    ring.open()
    ring.publish(0, ring.seal())
    ring.consumer = ring.join(0, 4095)
    assert ring.front.seats(ring.board)[0] == (4095, 0, 0, False)
    ring.open(1)
    ring.seal(1)
    assert ring.producer.owner(1) == 4095


@pytest.mark.parametrize("waker", ["wake", "wake_all", "nudge", "pass_on"])
@pytest.mark.parametrize("build", BUILDS)
def test_a_sleeper_is_woken_by_another_thread(build: str, waker: str) -> None:
    kernel = load(build, "ring")
    ring = Ring(kernel, kernel)
    announced, awake = threading.Semaphore(0), threading.Semaphore(0)

    def worker() -> None:
        for _ in range(20):
            ring.consumer.announce()
            announced.release()
            ring.consumer.sleep(0)
            awake.release()

    thread = threading.Thread(target=worker, daemon=True)
    ring.open()
    thread.start()
    wake = {
        "wake": ring.producer.wake,
        "wake_all": ring.producer.wake_all,
        "nudge": ring.consumer.nudge,
        "pass_on": ring.other.pass_on,
    }[waker]
    for _ in range(20):
        assert announced.acquire(timeout=10)
        wake()
        assert awake.acquire(timeout=10)
    thread.join(timeout=10)
    assert not thread.is_alive()
    os.close(ring.bell)


# --- Memory and arguments ----------------------------------------------------------------------


@pytest.mark.parametrize("slot", [-1, SLOTS, 2**40])
def test_slots_out_of_range(ring: Ring, slot: int) -> None:
    word = Word(OPEN, 0, 1, 0).pack()
    producer, consumer = ring.producer, ring.consumer
    for call in (
        lambda: ring.open(slot),
        lambda: producer.append(slot, 1),
        lambda: producer.edit(slot),
        lambda: producer.edited(slot, 1),
        lambda: producer.retry(slot),
        lambda: producer.free(slot),
        lambda: producer.phase(slot),
        lambda: producer.owner(slot),
        lambda: producer.rows(slot),
        lambda: producer.times(slot),
        lambda: consumer.seal("lane", slot, word, 1),
        lambda: consumer.publish("lane", slot, word, True, 1, 2),
        lambda: consumer.dims("lane", slot),
    ):
        with pytest.raises(IndexError):
            call()


@pytest.mark.parametrize("bad", [-1, 2**64])
def test_numbers_that_no_field_holds(ring: Ring, bad: int) -> None:
    before = ring.image()
    for call in (
        lambda: ring.open(rows=bad),
        lambda: ring.producer.open(0, 1, bad, 0, 1),
        lambda: ring.producer.open(0, 1, 0, bad, 1),
        lambda: ring.producer.open(0, 1, 0, 0, bad),
        lambda: ring.producer.append(0, bad),
        lambda: ring.producer.edited(0, bad),
        lambda: ring.consumer.seal("lane", 0, bad, 1),
        lambda: ring.consumer.seal("lane", 0, 0, bad),
        lambda: ring.consumer.publish("lane", 0, bad, True, 0, 0),
        lambda: ring.consumer.publish("lane", 0, 0, True, bad, 0),
        lambda: ring.consumer.publish("lane", 0, 0, True, 0, bad),
        lambda: ring.consumer.sleep(bad),
        lambda: ring.back.Consumer(ring.board, 0, bad),
    ):
        with pytest.raises(OverflowError):
            call()
    assert ring.image() == before


@pytest.mark.parametrize("incarnation", [0, 4096])
def test_incarnations_that_the_word_cannot_hold(ring: Ring, incarnation: int) -> None:
    with pytest.raises(ValueError, match="incarnation"):
        ring.back.Consumer(ring.board, 0, incarnation)


@pytest.mark.parametrize("seat", [-1, 2])
def test_seats_that_the_board_lacks(ring: Ring, seat: int) -> None:
    with pytest.raises(ValueError, match="seat"):
        ring.back.Consumer(ring.board, seat, 1)


@pytest.mark.parametrize(
    ("broken", "error"),
    [(lambda size: bytes(size), BufferError), (lambda size: bytearray(size - 1), ValueError)],
    ids=["read-only", "too small"],
)
def test_memory_that_will_not_do(ring: Ring, broken: Callable[[int], Any], error: Any) -> None:
    front, back = ring.front, ring.back
    control, board = broken(len(ring.control)), broken(64)
    with pytest.raises(error):
        front.Producer(control, SLOTS, DIMS, ring.board)
    with pytest.raises(error):
        front.Producer(bytearray(len(ring.control)), SLOTS, DIMS, board)
    with pytest.raises(error):
        back.Consumer(board, 0, 1)
    with pytest.raises(error):
        ring.consumer.attach("broken", control, SLOTS, DIMS, ring.bell)
    with pytest.raises(error):
        front.seats(board)


def test_memory_that_is_none(ring: Ring) -> None:
    for call in (
        lambda: ring.front.Producer(None, SLOTS, DIMS, ring.board),
        lambda: ring.back.Consumer(None, 0, 1),
        lambda: ring.consumer.attach("none", None, SLOTS, DIMS, ring.bell),
    ):
        with pytest.raises(TypeError):
            call()


def test_memory_is_held_until_it_is_let_go(sides: tuple[ModuleType, ModuleType]) -> None:
    front, back = sides
    control, boards = bytearray(front.control_bytes(1, 0)), [bytearray(64), bytearray(64)]
    producer = front.Producer(control, 1, 0, boards[0])
    consumer = back.Consumer(boards[1], 0, 1)
    consumer.attach("lane", control, 1, 0, -1)
    for memory in (control, *boards):
        with pytest.raises(BufferError):
            memory.append(0)
    producer.close()
    boards[0].append(0)
    with pytest.raises(BufferError):
        control.append(0)
    consumer.detach("lane")
    control.append(0)
    front.seats(boards[0])
    boards[0].append(0)


def test_a_closed_producer_refuses_everything_but_close(ring: Ring) -> None:
    producer = ring.producer
    ring.open()
    before = ring.image()
    producer.close()
    producer.close()
    for call in (
        lambda: ring.open(1),
        lambda: producer.append(0, 1),
        lambda: producer.edit(0),
        lambda: producer.edited(0, 1),
        lambda: producer.retry(0),
        lambda: producer.free(0),
        lambda: producer.phase(0),
        lambda: producer.owner(0),
        lambda: producer.rows(0),
        lambda: producer.times(0),
        producer.collect,
        producer.arm,
        producer.wake,
        producer.wake_all,
    ):
        with pytest.raises(ValueError, match="closed"):
            call()
    assert ring.image() == before
