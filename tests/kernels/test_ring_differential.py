"""Hypothesis drives a build of the ring and its twin side by side and compares all they show.

That is every result, every refusal and, after each step, every byte of the shared memory. A ledger of the
rows stands beside them: none is lost, and none is taken twice but through `retry`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.kernels.builds import BUILDS, load
from tests.twins import ring as twin
from tests.twins.ring import CORRUPT, DONE, EDIT, FAILED, FREE, OPEN, RETRY, SEALED, Word

LANES = 2
SLOTS = 2
DIMS = 1
CONSUMERS = 2
CAPACITY = 6

PLACES = [(lane, slot) for lane in range(LANES) for slot in range(SLOTS)]

lanes = st.integers(0, LANES - 1)
picks = st.integers(0, len(PLACES) - 1)
consumers = st.integers(0, CONSUMERS - 1)
some_rows = st.integers(0, 4)
times_ns = st.integers(0, 9)
words = st.builds(
    Word,
    phase=st.integers(0, 15),
    owner=st.integers(0, 3),
    rows=st.integers(0, CAPACITY),
    generation=st.integers(0, 2),
).map(Word.pack)


class Side:
    """Two lanes, a board and a consumer on each of its seats, all of one implementation."""

    def __init__(self, module: ModuleType):
        self.module = module
        self.board = bytearray(module.board_bytes(CONSUMERS))
        self.controls = [bytearray(module.control_bytes(SLOTS, DIMS)) for _ in range(LANES)]
        self.bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(LANES)]
        self.producers = [
            module.Producer(control, SLOTS, DIMS, self.board) for control in self.controls
        ]
        self.consumers = [self.join(seat, seat + 1) for seat in range(CONSUMERS)]

    def join(self, seat: int, incarnation: int) -> Any:
        consumer = self.module.Consumer(self.board, seat, incarnation)
        for key in range(LANES):
            consumer.attach(key, self.controls[key], SLOTS, DIMS, self.bells[key])
        return consumer

    def replace(self, seat: int, incarnation: int) -> None:
        self.consumers[seat] = self.join(seat, incarnation)

    def hear(self, lane: int) -> int:
        try:
            return os.eventfd_read(self.bells[lane])
        except BlockingIOError:
            return 0

    def close(self) -> None:
        for bell in self.bells:
            os.close(bell)


SIGNALS: dict[str, Callable[[Side, int], Any]] = {
    "collect": lambda side, lane: side.producers[lane].collect(),
    "arm": lambda side, lane: side.producers[lane].arm(),
    "hear": lambda side, lane: side.hear(lane),
    "wake": lambda side, lane: side.producers[lane].wake(),
    "wake_all": lambda side, lane: side.producers[lane].wake_all(),
    "announce": lambda side, who: side.consumers[who].announce(),
    "retract": lambda side, who: side.consumers[who].retract(),
    "sleep": lambda side, who: side.consumers[who].sleep(1),  # until long ago: nobody else is here
    "nudge": lambda side, who: side.consumers[who].nudge(),
    "pass_on": lambda side, who: side.consumers[who].pass_on(),
    "others_wait": lambda side, who: side.consumers[who].others_wait(),
    "offers": lambda side, who: side.consumers[who].offers(),
    "recommend": lambda side, who: side.consumers[who].recommend(who + 3),
    "best_rows": lambda side, lane: side.producers[lane].best_rows(),
}
"""What says something to the other side, of lane 0 or 1 or from seat 0 or 1."""


class Ledger:
    """Where every row is: in a slot, or gone from it in one way."""

    def __init__(self) -> None:
        self.in_slot: dict[tuple[int, int], list[int]] = {}
        self.gone: set[int] = set()
        self.taken: Counter[int] = Counter()
        self.retried: Counter[int] = Counter()
        self.count = 0

    def add(self, place: tuple[int, int], rows: int) -> None:
        self.in_slot.setdefault(place, []).extend(range(self.count, self.count + rows))
        self.count += rows

    def keep(self, place: tuple[int, int], rows: int) -> None:
        """Keep the last rows of a slot (an edit moves the tail up)."""
        ids = self.in_slot.pop(place)
        first = len(ids) - rows
        self.gone.update(ids[:first])
        if rows:
            self.in_slot[place] = ids[first:]

    def check(self) -> None:
        held = [row for ids in self.in_slot.values() for row in ids]
        assert sorted([*held, *self.gone]) == list(range(self.count))
        assert all(count <= 1 + self.retried[row] for row, count in self.taken.items())


def in_phase(*phases: int) -> Any:
    """Steps are worth while where a slot is in the right phase; test_ring.py has all the others."""
    return precondition(lambda self: self.places(*phases))


class KernelAndTwin(RuleBasedStateMachine):
    def __init__(self, kernel: ModuleType, scribbles: bool):
        super().__init__()
        self.kernel, self.twin = Side(kernel), Side(twin)
        self.scribbles = scribbles
        self.ledger = Ledger()
        self.seen: list[Any] = [None] * CONSUMERS
        self.sealed: dict[tuple[int, int], tuple[int, int]] = {}
        self.incarnation = CONSUMERS
        self.generations: Counter[tuple[int, int]] = Counter()

    def both(self, call: Callable[[Side], Any]) -> Any:
        """What the call returns, or the type of what it raises; the same on both sides."""
        answers = []
        for side in (self.kernel, self.twin):
            try:
                answers.append(call(side))
            except (ValueError, KeyError, IndexError, OverflowError) as error:
                answers.append(type(error))
        assert answers[0] == answers[1]
        assert type(answers[0]) is type(answers[1])
        return answers[0]

    def places(self, *phases: int) -> list[tuple[int, int]]:
        return [at for at in PLACES if self.twin.producers[at[0]].phase(at[1]) in phases]

    def picked(self, pick: int, *phases: int) -> tuple[int, int]:
        fitting = self.places(*phases)
        return fitting[pick % len(fitting)]

    # The front end.

    @in_phase(FREE)
    @rule(pick=picks, rows=some_rows, oldest_ns=times_ns, shape_id=times_ns, due_ns=times_ns)
    def open(self, pick: int, rows: int, oldest_ns: int, shape_id: int, due_ns: int) -> None:
        lane, slot = self.picked(pick, FREE)
        arguments = (slot, rows, oldest_ns, shape_id, CAPACITY, (shape_id,), due_ns)
        if self.both(lambda side: side.producers[lane].open(*arguments)) is None:
            self.ledger.add((lane, slot), rows)

    @in_phase(OPEN, SEALED, DONE, FAILED)
    @rule(pick=picks, rows=some_rows, due_ns=times_ns)
    def append(self, pick: int, rows: int, due_ns: int) -> None:
        """Also to slots that were sealed without the front end's knowing."""
        lane, slot = self.picked(pick, OPEN, SEALED, DONE, FAILED)
        if self.both(lambda side: side.producers[lane].append(slot, rows, due_ns)) is True:
            self.ledger.add((lane, slot), rows)

    @in_phase(OPEN, SEALED)
    @rule(pick=picks)
    def complete(self, pick: int) -> None:
        lane, slot = self.picked(pick, OPEN, SEALED)
        self.both(lambda side: side.producers[lane].complete(slot))

    @in_phase(OPEN, RETRY, SEALED)
    @rule(pick=picks)
    def edit(self, pick: int) -> None:
        lane, slot = self.picked(pick, OPEN, RETRY, SEALED)
        self.both(lambda side: side.producers[lane].edit(slot))

    @in_phase(EDIT)
    @rule(pick=picks, rows=some_rows)
    def edited(self, pick: int, rows: int) -> None:
        lane, slot = self.picked(pick, EDIT)
        if self.both(lambda side: side.producers[lane].edited(slot, rows)) is None:
            self.ledger.keep((lane, slot), rows)

    @in_phase(SEALED)
    @rule(pick=picks)
    def retry(self, pick: int) -> None:
        """Whether or not the owner is dead: if it is not, its `publish` must come to nothing."""
        lane, slot = self.picked(pick, SEALED)
        if self.both(lambda side: side.producers[lane].retry(slot)) is None:
            self.ledger.retried.update(self.ledger.in_slot[lane, slot])

    @in_phase(DONE, FAILED, CORRUPT)
    @rule(pick=picks)
    def free(self, pick: int) -> None:
        lane, slot = self.picked(pick, DONE, FAILED, CORRUPT)
        if self.both(lambda side: side.producers[lane].free(slot)) is None:
            self.ledger.gone.update(self.ledger.in_slot.pop((lane, slot), ()))

    # The workers.

    @in_phase(OPEN, RETRY)
    @rule(who=consumers)
    def look(self, who: int) -> None:
        self.seen[who] = self.both(lambda side: side.consumers[who].best())

    @in_phase(OPEN, RETRY)
    @rule(who=consumers, now_ns=times_ns, again=st.booleans())
    def seal(self, who: int, now_ns: int, again: bool) -> None:
        """What this worker sees, or what it saw when it looked, however long ago."""
        if again:
            self.look(who)
        if self.seen[who] is None:
            return
        lane, slot, word, rows, *_ = self.seen[who]
        if self.both(lambda side: side.consumers[who].seal(lane, slot, word, now_ns)) is True:
            self.was_sealed(who, lane, slot, word, rows)

    @in_phase(OPEN, RETRY)
    @rule(who=consumers, now_ns=times_ns, may_hold=st.booleans())
    def take(self, who: int, now_ns: int, may_hold: bool) -> None:
        taken = self.both(lambda side: side.consumers[who].take(now_ns, may_hold))
        if taken is not None and taken[1]:
            lane, slot, word, rows, *_ = taken[0]
            self.was_sealed(who, lane, slot, word, rows)

    def was_sealed(self, who: int, lane: int, slot: int, word: int, rows: int) -> None:
        self.sealed[lane, slot] = (who, word)
        self.both(lambda side: side.consumers[who].dims(lane, slot))
        if not self.scribbles:
            ids = self.ledger.in_slot[lane, slot]
            self.ledger.taken.update(ids)
            assert len(ids) == rows

    @precondition(lambda self: self.sealed.keys() & self.places(SEALED))
    @rule(
        pick=picks,
        late=st.booleans(),
        ok=st.booleans(),
        times=st.tuples(times_ns, times_ns),
        is_last=st.booleans(),
    )
    def publish(
        self, pick: int, late: bool, ok: bool, times: tuple[int, int], is_last: bool
    ) -> None:
        """What its last sealer has sealed; if late, even when it has been published since."""
        sealed = self.places(SEALED)
        fitting = [at for at in self.sealed if late or at in sealed]
        lane, slot = fitting[pick % len(fitting)]
        who, word = self.sealed[lane, slot]
        self.both(lambda side: side.consumers[who].publish(lane, slot, word, ok, *times, is_last))

    @in_phase(SEALED)
    @rule(pick=picks)
    def die(self, pick: int) -> None:
        """A new incarnation sits down where one that held a slot was, and knows nothing of it."""
        lane, slot = self.picked(pick, SEALED)
        owner = self.twin.producers[lane].owner(slot)
        for who, consumer in enumerate(self.twin.consumers):
            if consumer.incarnation == owner:
                self.incarnation += 1
                self.both(lambda side: side.replace(who, self.incarnation))  # noqa: B023
                self.seen[who] = None

    # Either.

    @rule(signal=st.sampled_from(sorted(SIGNALS)), which=st.integers(0, 1))
    def signal(self, signal: str, which: int) -> None:
        self.both(lambda side: SIGNALS[signal](side, which))

    # A broken worker.

    @precondition(lambda self: self.scribbles)
    @rule(place=st.sampled_from(PLACES), word=words)
    def scribble_on_a_word(self, place: tuple[int, int], word: int) -> None:
        lane, slot = place
        self.scribble(lane, twin.LANE_BYTES + slot * twin.record_bytes(DIMS), word)

    @precondition(lambda self: self.scribbles)
    @rule(lane=lanes, at=st.integers(0, 255), bits=st.integers(0, 2**64 - 1))
    def scribble_anywhere(self, lane: int, at: int, bits: int) -> None:
        self.scribble(lane, at * 8 % len(self.twin.controls[lane]), bits)

    def scribble(self, lane: int, at: int, value: int) -> None:
        for side in (self.kernel, self.twin):
            side.controls[lane][at : at + 8] = value.to_bytes(8, "little")

    # What always holds.

    @invariant()
    def memory_is_the_same(self) -> None:
        assert self.kernel.controls == self.twin.controls
        assert self.kernel.board == self.twin.board

    @invariant()
    def front_ends_say_the_same(self) -> None:
        self.both(lambda side: [observe(side.producers[lane], slot) for lane, slot in PLACES])

    @invariant()
    def every_row_is_somewhere(self) -> None:
        self.ledger.check()
        for (lane, slot), ids in self.ledger.in_slot.items():
            assert self.kernel.producers[lane].rows(slot) == len(ids)

    @precondition(lambda self: not self.scribbles)
    @invariant()
    def generations_only_grow(self) -> None:
        for lane, slot in PLACES:
            generation = self.twin.producers[lane].lane.word(slot).generation
            assert generation >= self.generations[lane, slot]
            self.generations[lane, slot] = generation

    def teardown(self) -> None:
        self.kernel.close()
        self.twin.close()


def observe(producer: Any, slot: int) -> tuple[Any, ...]:
    return producer.phase(slot), producer.owner(slot), producer.rows(slot), producer.times(slot)


@pytest.mark.parametrize("scribbles", [False, True], ids=["in order", "scribbled on"])
@pytest.mark.parametrize("build", BUILDS)
def test_kernel_and_twin(build: str, scribbles: bool) -> None:
    kernel = load(build, "ring")
    run_state_machine_as_test(
        lambda: KernelAndTwin(kernel, scribbles),
        settings=settings(
            max_examples=150,
            stateful_step_count=60,
            deadline=None,
            derandomize=True,
            database=None,
        ),
    )
