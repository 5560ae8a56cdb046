"""The batch ring in plain Python: what kernels/ring.pyx does, without atomics and without waiting.

It works on the same bytes as the kernel, so that in one process either side of a lane may be the twin
while the other is the kernel. A compare-and-swap is a comparison and a store; a fence is nothing; `sleep`
returns at once, as a futex wait may.
"""

import contextlib
import operator
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

FREE, OPEN, EDIT, SEALED, DONE, FAILED, RETRY = range(7)
CORRUPT = 15
MAX_SLOTS = 512
MAX_ROWS = 0xFFFF
MAX_INCARNATION = 0xFFF

MAGIC = 0x474E5247
VERSION = 3
LINE = 64

# Byte offsets of a lane's head (four 32-bit words, one more, two bitmaps) and its size.
LANE_MAGIC, LANE_LAYOUT, LANE_SLOTS, LANE_DIMS = 0, 4, 8, 12
LANE_ARMED, LANE_OPEN_BITS, LANE_DONE_BITS, LANE_BYTES = 64, 128, 192, 256
# Of a slot's record (64-bit words), which its dims follow.
SLOT_WORD, SLOT_OLDEST, SLOT_SHAPE, SLOT_CAPACITY, SLOT_COMPLETE, SLOT_DUE = 0, 8, 16, 24, 32, 40
SLOT_STARTED, SLOT_FINISHED, SLOT_BYTES = 64, 72, 128
# Of a seat: two 32-bit words, two of 64 bits, one of 32.
SEAT_STATE, SEAT_INCARNATION, SEAT_BATCHES, SEAT_BUSY, SEAT_BEST, SEAT_BYTES = 0, 4, 8, 16, 24, 64

LAYOUT = {
    "magic": MAGIC,
    "layout": VERSION,
    "lane": LANE_BYTES,
    "slot": SLOT_BYTES,
    "seat": SEAT_BYTES,
}

RUNNING, WAITING = 0, 1


def set_steps(seed: int, deaths: int = -1) -> bool:
    return False


def record_bytes(dims_per_slot: int) -> int:
    return (SLOT_BYTES + dims_per_slot * 8 + LINE - 1) // LINE * LINE


def control_bytes(slot_count: int, dims_per_slot: int) -> int:
    if not 1 <= slot_count <= MAX_SLOTS:
        raise ValueError("slot_count")
    if not 0 <= dims_per_slot <= 65536:
        raise ValueError("dims_per_slot")
    return LANE_BYTES + slot_count * record_bytes(dims_per_slot)


def board_bytes(seats: int) -> int:
    if seats < 1:
        raise ValueError("seats")
    return seats * SEAT_BYTES


def unsigned(value: int, bits: int) -> int:
    """The value, if a C integer of so many bits can hold it."""
    value = operator.index(value)
    if not 0 <= value < 1 << bits:
        raise OverflowError(f"{value} is not an unsigned integer of {bits} bits")
    return value


class Word(NamedTuple):
    """A slot's word: phase:4 | owner:12 | rows:16 | generation:32."""

    phase: int
    owner: int
    rows: int
    generation: int

    def pack(self) -> int:
        return self.phase << 60 | self.owner << 48 | self.rows << 32 | self.generation

    @classmethod
    def unpack(cls, word: int) -> "Word":
        return cls(word >> 60, word >> 48 & 0xFFF, word >> 32 & 0xFFFF, word & 0xFFFFFFFF)


class Memory:
    """A writable buffer as an array of 32-bit words and one of 64-bit words, held until `close`."""

    def __init__(self, owner, needed: int):
        with memoryview(owner) as view:
            if view.readonly:
                raise BufferError("not writable")
            if view.nbytes < needed:
                raise ValueError(f"{needed} bytes needed, {view.nbytes} given")
            with view.cast("B")[: view.nbytes // 8 * 8] as whole:
                self.u32, self.u64, self.i64 = map(whole.cast, "IQq")
        self.closed = False

    def close(self) -> None:
        self.closed = True
        for view in (self.u32, self.u64, self.i64):
            view.release()


class Lane:
    """A lane's control memory."""

    def __init__(self, control, slot_count: int, dims_per_slot: int):
        self.memory = Memory(control, control_bytes(slot_count, dims_per_slot))
        self.slot_count = slot_count
        self.dims_per_slot = dims_per_slot

    def check(self, slot: int) -> None:
        if self.memory.closed:
            raise ValueError("the lane is closed")
        if not 0 <= slot < self.slot_count:
            raise IndexError(slot)

    def place(self, slot: int) -> int:
        return LANE_BYTES + slot * record_bytes(self.dims_per_slot)

    def field(self, slot: int, offset: int) -> int:
        return self.memory.u64[(self.place(slot) + offset) // 8]

    def set_field(self, slot: int, offset: int, value: int) -> None:
        self.memory.u64[(self.place(slot) + offset) // 8] = value

    def word(self, slot: int) -> Word:
        return Word.unpack(self.field(slot, SLOT_WORD))

    def compare_and_swap(self, slot: int, expected: Word, desired: Word) -> bool:
        if self.word(slot) != expected:
            return False
        self.set_field(slot, SLOT_WORD, desired.pack())
        return True

    def dims(self, slot: int) -> memoryview:
        begin = (self.place(slot) + SLOT_BYTES) // 8
        return self.memory.i64[begin : begin + self.dims_per_slot]

    def head(self, offset: int) -> int:
        return self.memory.u32[offset // 4]

    def set_head(self, offset: int, value: int) -> None:
        self.memory.u32[offset // 4] = value

    def bits(self, bitmap: int) -> list[int]:
        """The slots whose bits are set."""
        words = self.memory.u64
        return [n for n in range(self.slot_count) if words[bitmap // 8 + n // 64] >> n % 64 & 1]

    def any_bits(self, bitmap: int) -> bool:
        """Whether a bit is set, of a slot or not, in the words of the bitmap that are in use."""
        return any(self.memory.u64[bitmap // 8 + n // 64] for n in range(0, self.slot_count, 64))

    def set_bit(self, bitmap: int, slot: int) -> None:
        self.memory.u64[bitmap // 8 + slot // 64] |= 1 << slot % 64

    def clear_bit(self, bitmap: int, slot: int) -> None:
        self.memory.u64[bitmap // 8 + slot // 64] &= ~(1 << slot % 64)

    def clear_bits(self, bitmap: int) -> None:
        for n in range(0, self.slot_count, 64):
            self.memory.u64[bitmap // 8 + n // 64] = 0


class Board:
    """The seats of a version's workers."""

    def __init__(self, board):
        self.memory = Memory(board, SEAT_BYTES)
        self.count = self.memory.u64.nbytes // SEAT_BYTES

    def state(self, seat: int) -> int:
        return self.memory.u32[(seat * SEAT_BYTES + SEAT_STATE) // 4]

    def set_state(self, seat: int, state: int) -> None:
        self.memory.u32[(seat * SEAT_BYTES + SEAT_STATE) // 4] = state

    def incarnation(self, seat: int) -> int:
        return self.memory.u32[(seat * SEAT_BYTES + SEAT_INCARNATION) // 4]

    def set_incarnation(self, seat: int, incarnation: int) -> None:
        self.memory.u32[(seat * SEAT_BYTES + SEAT_INCARNATION) // 4] = incarnation

    def best_rows(self, seat: int) -> int:
        return self.memory.u32[(seat * SEAT_BYTES + SEAT_BEST) // 4]

    def set_best_rows(self, seat: int, rows: int) -> None:
        self.memory.u32[(seat * SEAT_BYTES + SEAT_BEST) // 4] = rows

    def field(self, seat: int, offset: int) -> int:
        return self.memory.u64[(seat * SEAT_BYTES + offset) // 8]

    def set_field(self, seat: int, offset: int, value: int) -> None:
        self.memory.u64[(seat * SEAT_BYTES + offset) // 8] = value

    def wake_one(self, but: int | None = None) -> bool:
        for seat in range(self.count):
            if seat != but and self.state(seat) == WAITING:
                self.set_state(seat, RUNNING)
                return True
        return False


@dataclass
class Mirror:
    """What the front end knows of a slot, whatever shared memory says."""

    phase: int = FREE
    rows: int = 0
    generation: int = 0
    capacity: int = 0
    resume: int = FREE
    """The phase that an edit goes back to."""

    def word(self) -> Word:
        return Word(self.phase, 0, self.rows, self.generation)


class Producer:
    """The front end's side of a lane."""

    def __init__(self, control, slot_count: int, dims_per_slot: int, board):
        self.lane = Lane(control, slot_count, dims_per_slot)
        self.board = Board(board)
        self.mirrors = [Mirror() for _ in range(slot_count)]
        self.lane.memory.u64[: LANE_BYTES // 8] = memoryview(bytes(LANE_BYTES)).cast("Q")
        self.lane.set_head(LANE_MAGIC, MAGIC)
        self.lane.set_head(LANE_LAYOUT, VERSION)
        self.lane.set_head(LANE_SLOTS, slot_count)
        self.lane.set_head(LANE_DIMS, dims_per_slot)

    def close(self) -> None:
        self.lane.memory.close()
        self.board.memory.close()

    def mirror(self, slot: int) -> Mirror:
        self.lane.check(slot)
        return self.mirrors[slot]

    def publish(self, slot: int, phase: int, rows: int) -> None:
        mirror = self.mirrors[slot]
        mirror.phase = phase
        mirror.rows = rows
        if phase == FREE:
            mirror.generation = (mirror.generation + 1) % 2**32
            self.lane.clear_bit(LANE_OPEN_BITS, slot)
        else:
            self.lane.set_bit(LANE_OPEN_BITS, slot)
        self.lane.set_field(slot, SLOT_WORD, mirror.word().pack())

    def open(
        self,
        slot: int,
        rows: int,
        oldest_ns: int,
        shape_id: int,
        capacity: int,
        dims: Sequence[int] = (),
        due_ns: int = 0,
    ) -> None:
        rows = unsigned(rows, 32)
        fields = [unsigned(field, 64) for field in (oldest_ns, shape_id, capacity, due_ns)]
        mirror = self.mirror(slot)
        if mirror.phase != FREE:
            raise ValueError("not FREE")
        if not 1 <= rows <= capacity <= MAX_ROWS:
            raise ValueError("rows")
        if len(dims) > self.lane.dims_per_slot:
            raise ValueError("dims")
        self.lane.dims(slot)[: len(dims)] = memoryview(bytes(8 * len(dims))).cast("q")
        for i, dim in enumerate(dims):
            self.lane.dims(slot)[i] = dim
        offsets = (SLOT_OLDEST, SLOT_SHAPE, SLOT_CAPACITY, SLOT_DUE)
        for offset, field in zip(offsets, fields, strict=True):
            self.lane.set_field(slot, offset, field)
        self.lane.set_field(slot, SLOT_COMPLETE, 0)
        mirror.capacity = capacity
        self.publish(slot, OPEN, rows)

    def append(self, slot: int, rows: int, due_ns: int = 0) -> bool:
        rows, due_ns = unsigned(rows, 32), unsigned(due_ns, 64)
        mirror = self.mirror(slot)
        if mirror.phase != OPEN:
            raise ValueError("not OPEN")
        if not 1 <= rows <= mirror.capacity - mirror.rows:
            raise ValueError("rows")
        if due_ns and due_ns < (self.lane.field(slot, SLOT_DUE) or 1 << 64):
            self.lane.set_field(slot, SLOT_DUE, due_ns)
        expected = mirror.word()
        if not self.lane.compare_and_swap(
            slot, expected, expected._replace(rows=mirror.rows + rows)
        ):
            return False
        mirror.rows += rows
        return True

    def complete(self, slot: int) -> None:
        if self.mirror(slot).phase != OPEN:
            raise ValueError("not OPEN")
        self.lane.set_field(slot, SLOT_COMPLETE, 1)

    def edit(self, slot: int) -> bool:
        mirror = self.mirror(slot)
        if mirror.phase not in (OPEN, RETRY):
            raise ValueError("neither OPEN nor RETRY")
        expected = mirror.word()
        if not self.lane.compare_and_swap(slot, expected, expected._replace(phase=EDIT)):
            return False
        mirror.resume = mirror.phase
        mirror.phase = EDIT
        return True

    def edited(self, slot: int, rows: int) -> None:
        rows = unsigned(rows, 32)
        mirror = self.mirror(slot)
        if mirror.phase != EDIT:
            raise ValueError("not EDIT")
        if rows > mirror.rows:
            raise ValueError("rows")
        self.publish(slot, mirror.resume if rows else FREE, rows)

    def retry(self, slot: int) -> None:
        if self.phase(slot) != SEALED:
            raise ValueError("not SEALED")
        self.publish(slot, RETRY, self.mirrors[slot].rows)

    def free(self, slot: int) -> None:
        if self.phase(slot) not in (SEALED, DONE, FAILED, CORRUPT):
            raise ValueError("nobody has run it")
        self.publish(slot, FREE, 0)

    def phase(self, slot: int) -> int:
        mirror = self.mirror(slot)
        word = self.lane.word(slot)
        if word == mirror.word():
            return mirror.phase
        if (
            mirror.phase in (OPEN, RETRY)
            and (word.rows, word.generation) == (mirror.rows, mirror.generation)
            and word.phase in (SEALED, DONE, FAILED)
            and word.owner
        ):
            return word.phase
        return CORRUPT

    def owner(self, slot: int) -> int:
        self.lane.check(slot)
        return self.lane.word(slot).owner

    def rows(self, slot: int) -> int:
        return self.mirror(slot).rows

    def times(self, slot: int) -> tuple[int, int]:
        self.lane.check(slot)
        return self.lane.field(slot, SLOT_STARTED), self.lane.field(slot, SLOT_FINISHED)

    def collect(self) -> list[int]:
        self.lane.check(0)
        self.lane.set_head(LANE_ARMED, 0)
        slots = self.lane.bits(LANE_DONE_BITS)
        self.lane.clear_bits(LANE_DONE_BITS)
        return slots

    def arm(self) -> bool:
        self.lane.check(0)
        idle = not self.lane.any_bits(LANE_DONE_BITS)
        self.lane.set_head(LANE_ARMED, int(idle))
        return idle

    def linger(self, max_ns: int) -> bool:
        unsigned(max_ns, 64)
        return not self.arm()

    def wake(self) -> bool:
        self.lane.check(0)
        return self.board.wake_one()

    def best_rows(self) -> int:
        self.lane.check(0)
        occupied = [n for n in range(self.board.count) if self.board.incarnation(n)]
        stated = [self.board.best_rows(n) for n in occupied]
        return max(stated, default=0) if all(stated) else 0

    def wake_all(self) -> None:
        self.lane.check(0)
        while self.board.wake_one():
            pass


# key, slot, word, rows, capacity, oldest_ns, shape_id, is_complete, due_ns
Offered = tuple[Hashable, int, int, int, int, int, int, bool, int]


class Consumer:
    """A worker's side of all the lanes attached to it."""

    def __init__(self, board, seat: int, incarnation: int):
        unsigned(incarnation, 32)
        self.board = Board(board)
        if not 0 <= seat < self.board.count:
            raise ValueError("seat")
        if not 1 <= incarnation <= MAX_INCARNATION:
            raise ValueError("incarnation")
        self.seat = seat
        self.incarnation = incarnation
        self.lanes: dict[Hashable, Lane] = {}
        self.bells: dict[Hashable, int] = {}
        self.board.set_field(seat, SEAT_BATCHES, 0)
        self.board.set_field(seat, SEAT_BUSY, 0)
        self.board.set_best_rows(seat, 0)
        self.board.set_incarnation(seat, incarnation)
        self.board.set_state(seat, RUNNING)

    def attach(
        self, key: Hashable, control, slot_count: int, dims_per_slot: int, bell_fd: int
    ) -> None:
        lane = Lane(control, slot_count, dims_per_slot)
        header = [lane.head(at) for at in (LANE_MAGIC, LANE_LAYOUT, LANE_SLOTS, LANE_DIMS)]
        if header != [MAGIC, VERSION, slot_count, dims_per_slot]:
            lane.memory.close()
            raise ValueError("header")
        self.lanes[key] = lane
        self.bells[key] = bell_fd

    def detach(self, key: Hashable) -> None:
        self.lanes.pop(key).memory.close()
        del self.bells[key]

    def best(self) -> Offered | None:
        return next(iter(self.offers()), None)

    def offers(self) -> list[Offered]:
        found = []
        for order, (key, lane) in enumerate(self.lanes.items()):
            for slot in lane.bits(LANE_OPEN_BITS):
                word = lane.word(slot)
                if word.phase in (OPEN, RETRY):
                    is_full = word.rows >= lane.field(slot, SLOT_CAPACITY)
                    is_complete = is_full or lane.field(slot, SLOT_COMPLETE) != 0
                    is_complete = is_complete or word.phase == RETRY
                    oldest_ns = lane.field(slot, SLOT_OLDEST)
                    rank = word.phase != RETRY, oldest_ns, order, slot
                    found.append((rank, key, lane, word, is_complete))
        offers = []
        for rank, key, lane, word, is_complete in sorted(found, key=lambda entry: entry[0]):
            _, oldest_ns, _, slot = rank
            capacity, shape_id = lane.field(slot, SLOT_CAPACITY), lane.field(slot, SLOT_SHAPE)
            stated = (word.pack(), word.rows, capacity, oldest_ns, shape_id)
            offers.append((key, slot, *stated, is_complete, lane.field(slot, SLOT_DUE)))
        return offers

    def take(self, now_ns: int, may_hold: bool) -> tuple[Offered, bool] | None:
        unsigned(now_ns, 64)
        best = self.best()
        if best is None:
            return None
        key, slot, word, *_, is_complete, due_ns = best
        if not is_complete and (may_hold or due_ns):
            return best, False
        self.seal(key, slot, word, now_ns)
        self.pass_on()
        return best, True

    def seal(self, key: Hashable, slot: int, word: int, now_ns: int) -> bool:
        seen = Word.unpack(unsigned(word, 64))
        unsigned(now_ns, 64)
        lane = self.lanes[key]
        lane.check(slot)
        if seen.phase not in (OPEN, RETRY):
            raise ValueError("neither OPEN nor RETRY")
        sealed = seen._replace(phase=SEALED, owner=self.incarnation)
        if not lane.compare_and_swap(slot, seen, sealed):
            return False
        if self.board.field(self.seat, SEAT_BUSY) == 0:
            self.board.set_field(self.seat, SEAT_BUSY, now_ns)
        lane.clear_bit(LANE_OPEN_BITS, slot)
        return True

    def dims(self, key: Hashable, slot: int) -> tuple[int, ...]:
        lane = self.lanes[key]
        lane.check(slot)
        return tuple(lane.dims(slot))

    def publish(
        self,
        key: Hashable,
        slot: int,
        word: int,
        ok: bool,
        started_ns: int,
        finished_ns: int,
        is_last: bool = True,
    ) -> bool:
        seen = Word.unpack(unsigned(word, 64))
        started_ns, finished_ns = unsigned(started_ns, 64), unsigned(finished_ns, 64)
        lane = self.lanes[key]
        lane.check(slot)
        lane.set_field(slot, SLOT_STARTED, started_ns)
        lane.set_field(slot, SLOT_FINISHED, finished_ns)
        if is_last:
            batches = self.board.field(self.seat, SEAT_BATCHES)
            self.board.set_field(self.seat, SEAT_BATCHES, batches + 1)
        sealed = seen._replace(phase=SEALED, owner=self.incarnation)
        published = lane.compare_and_swap(
            slot, sealed, sealed._replace(phase=DONE if ok else FAILED)
        )
        if published:
            lane.set_bit(LANE_DONE_BITS, slot)
            if lane.head(LANE_ARMED):
                lane.set_head(LANE_ARMED, 0)
                with contextlib.suppress(OSError):
                    os.eventfd_write(self.bells[key], 1)
        if is_last:
            self.board.set_field(self.seat, SEAT_BUSY, 0)
        return published

    def stay_busy(self, since_ns: int) -> None:
        self.board.set_field(self.seat, SEAT_BUSY, unsigned(since_ns, 64))

    def pass_on(self) -> bool:
        return self.best() is not None and self.board.wake_one(but=self.seat)

    def others_wait(self) -> bool:
        others = set(range(self.board.count)) - {self.seat}
        return any(self.board.state(seat) == WAITING for seat in others)

    def recommend(self, rows: int) -> None:
        self.board.set_best_rows(self.seat, unsigned(rows, 32))

    def announce(self) -> None:
        self.board.set_state(self.seat, WAITING)

    def retract(self) -> bool:
        woken = self.board.state(self.seat) == RUNNING
        self.board.set_state(self.seat, RUNNING)
        return woken

    def sleep(self, until_ns: int) -> None:
        unsigned(until_ns, 64)
        self.board.set_state(self.seat, RUNNING)

    def nudge(self) -> None:
        self.board.set_state(self.seat, RUNNING)


def seats(board) -> list[tuple[int, int, int, bool]]:
    view = Board(board)
    try:
        return [
            (
                view.incarnation(seat),
                view.field(seat, SEAT_BATCHES),
                view.field(seat, SEAT_BUSY),
                view.state(seat) == WAITING,
            )
            for seat in range(view.count)
        ]
    finally:
        view.memory.close()
