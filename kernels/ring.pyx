"""The batch ring: slots in shared memory whose batch closes when a worker takes it.

Two classes, one for each side of a lane. `Producer` belongs to the front end: it alone opens, edits,
retries and frees, and its private mirror of every slot's generation and rows is authoritative; what
shared memory says is only believed where it agrees. `Consumer` belongs to a worker: it finds the slot
to run next across the lanes attached to it, seals, publishes and sleeps. Neither touches tensor bytes:
rows are written before `append` publishes them and read after `seal` took them.

Every contested transition is one compare-and-swap on the slot's whole word (ring_layout.h). The bitmaps
only say where to look. Both sleepers follow one order, store - full fence - look again, so a wake-up is
never lost; without the fence it would be, on x86 too.

Nothing here allocates shared memory, opens a file descriptor or takes a time: callers do.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cdef extern from "atomics.h" nogil:
    int gw_set_steps(uint64_t seed, int64_t deaths)
    uint64_t gw_load64(const uint64_t *p)
    uint64_t gw_peek64(const uint64_t *p)
    void gw_poke64(uint64_t *p, uint64_t v)
    void gw_store64(uint64_t *p, uint64_t v)
    bint gw_cas64(uint64_t *p, uint64_t expected, uint64_t desired)
    uint64_t gw_swap64(uint64_t *p, uint64_t v)
    void gw_set_bits64(uint64_t *p, uint64_t bits)
    void gw_clear_bits64(uint64_t *p, uint64_t bits)
    uint32_t gw_load32(const uint32_t *p)
    void gw_store32(uint32_t *p, uint32_t v)
    uint32_t gw_swap32(uint32_t *p, uint32_t v)
    bint gw_cas32(uint32_t *p, uint32_t expected, uint32_t desired)
    void gw_fence()
    int gw_first_bit(uint64_t bits)
    int gw_futex_wait(uint32_t *word, uint32_t expected, uint64_t until_ns)
    void gw_futex_wake(uint32_t *word)
    void gw_ring_bell(int fd)
    void gw_pause()
    uint64_t gw_now_ns()

cdef extern from "ring_layout.h" nogil:
    enum:
        GW_MAGIC, GW_LAYOUT, GW_MAX_SLOTS, GW_LINE
        GW_FREE, GW_OPEN, GW_EDIT, GW_SEALED, GW_DONE, GW_FAILED, GW_RETRY
        GW_RUNNING, GW_WAITING
    uint64_t GW_WORD(unsigned phase, unsigned owner, unsigned rows, uint32_t generation)
    unsigned GW_PHASE(uint64_t word)
    unsigned GW_OWNER(uint64_t word)
    unsigned GW_ROWS(uint64_t word)
    uint32_t GW_GENERATION(uint64_t word)

FREE = GW_FREE
OPEN = GW_OPEN
EDIT = GW_EDIT
SEALED = GW_SEALED
DONE = GW_DONE
FAILED = GW_FAILED
RETRY = GW_RETRY
CORRUPT = 15
"""What `Producer.phase` says of a slot whose shared word contradicts the mirror."""

MAX_SLOTS = GW_MAX_SLOTS
MAX_ROWS = 0xFFFF
MAX_INCARNATION = 0xFFF
"""Owners are 1 to this; 0 is nobody."""

LAYOUT = {
    "magic": GW_MAGIC,
    "layout": GW_LAYOUT,
    "lane": sizeof(gw_lane),
    "slot": sizeof(gw_slot),
    "seat": sizeof(gw_seat),
}
"""Sizes in bytes, for the test that holds the twin's layout to this one."""


def set_steps(uint64_t seed, int64_t deaths=-1):
    """Test build only: yield at random before every atomic step, die (SIGKILL) after `deaths` steps.

    Seed 0 stops the yields. Returns False in a release build, where there are no steps.
    """
    return bool(gw_set_steps(seed, deaths))


cdef inline Py_ssize_t record_size(Py_ssize_t dims) noexcept nogil:
    return (<Py_ssize_t>sizeof(gw_slot) + dims * 8 + GW_LINE - 1) // GW_LINE * GW_LINE


def control_bytes(Py_ssize_t slot_count, Py_ssize_t dims_per_slot):
    """Bytes of a lane's control memory. ValueError unless 1 <= slots <= MAX_SLOTS, dims <= 65536."""
    if not 1 <= slot_count <= GW_MAX_SLOTS:
        raise ValueError(f"a lane has 1 to {GW_MAX_SLOTS} slots, not {slot_count}")
    if not 0 <= dims_per_slot <= 65536:
        raise ValueError(f"a slot records 0 to 65536 dims, not {dims_per_slot}")
    return <Py_ssize_t>sizeof(gw_lane) + slot_count * record_size(dims_per_slot)


def board_bytes(Py_ssize_t seats):
    """Bytes of a board for so many workers."""
    if seats < 1:
        raise ValueError("a board has at least one seat")
    return seats * <Py_ssize_t>sizeof(gw_seat)


cdef class _Mapping:
    """A writable buffer held for as long as kernels point into it."""

    def __cinit__(self, owner):
        PyObject_GetBuffer(owner, &self.view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self.held = True

    cdef void release(self):
        if self.held:
            self.held = False
            PyBuffer_Release(&self.view)

    def __dealloc__(self):
        self.release()


cdef class _Control:
    """A lane's control memory, checked once; geometry is private, as peers may scribble on it."""

    def __cinit__(self, control, Py_ssize_t slot_count, Py_ssize_t dims_per_slot):
        cdef Py_ssize_t needed = control_bytes(slot_count, dims_per_slot)
        self.mapping = _Mapping(control)
        if self.mapping.view.len < needed:
            raise ValueError(f"control memory: {needed} bytes needed, {self.mapping.view.len} given")
        self.lane = <gw_lane *>self.mapping.view.buf
        self.records = <char *>self.mapping.view.buf + sizeof(gw_lane)
        self.stride = record_size(dims_per_slot)
        self.slot_count = slot_count
        self.dims_per_slot = dims_per_slot

    cdef gw_slot *slot(self, Py_ssize_t index) noexcept nogil:
        return <gw_slot *>(self.records + index * self.stride)

    cdef int64_t *dims(self, Py_ssize_t index) noexcept nogil:
        return <int64_t *>(self.records + index * self.stride + sizeof(gw_slot))

    cdef int check(self, Py_ssize_t index) except -1:
        if self.lane is NULL:
            raise ValueError("the lane is closed")
        if not 0 <= index < self.slot_count:
            raise IndexError(f"no slot {index} in a lane of {self.slot_count}")
        return 0

    cdef void close(self):
        self.lane = NULL
        self.mapping.release()


cdef class _Board:
    """The seats of a version's workers."""

    def __cinit__(self, board):
        self.mapping = _Mapping(board)
        self.count = self.mapping.view.len // <Py_ssize_t>sizeof(gw_seat)
        if self.count < 1:
            raise ValueError("a board has at least one seat")
        self.seats = <gw_seat *>self.mapping.view.buf

    cdef bint wake_one(self, Py_ssize_t but) noexcept nogil:
        """Wake one waiting worker other than `but`; the caller has fenced since its last store."""
        cdef Py_ssize_t i
        for i in range(self.count):
            if i != but and gw_load32(&self.seats[i].state) == GW_WAITING:
                if gw_cas32(&self.seats[i].state, GW_WAITING, GW_RUNNING):
                    gw_futex_wake(&self.seats[i].state)
                    return True
        return False

    cdef void wake_all(self) noexcept nogil:
        """Wake every worker, even those marked RUNNING: whoever took a seat back with its CAS may have
        died before its futex call, and left a sleeper that nothing shows."""
        cdef Py_ssize_t i
        for i in range(self.count):
            gw_cas32(&self.seats[i].state, GW_WAITING, GW_RUNNING)
            gw_futex_wake(&self.seats[i].state)


cdef class Producer:
    """The front end's side of a lane: the only one that opens, edits, retries and frees slots.

    Not thread-safe: it belongs to the front end's event loop.

    Args:
        control: writable shared buffer of `control_bytes(slot_count, dims_per_slot)`, zeroed; its
            header is written here. Held until `close`.
        board: writable shared buffer with the seats of the version's workers. Held until `close`.
    """

    def __cinit__(self, control, Py_ssize_t slot_count, Py_ssize_t dims_per_slot, board):
        self.mirror = NULL
        self.control = _Control(control, slot_count, dims_per_slot)
        self.board = _Board(board)
        self.mirror = <Mirror *>calloc(slot_count, sizeof(Mirror))
        if self.mirror is NULL:
            raise MemoryError
        memset(self.control.lane, 0, sizeof(gw_lane))
        self.control.lane.slot_count = slot_count
        self.control.lane.dims_per_slot = dims_per_slot
        self.control.lane.layout = GW_LAYOUT
        self.control.lane.magic = GW_MAGIC

    def __dealloc__(self):
        free(self.mirror)

    def close(self):
        """Let go of the shared buffers; every later call but this one raises ValueError."""
        self.control.close()
        self.board.mapping.release()

    cdef uint64_t expected(self, Py_ssize_t slot) noexcept:
        cdef Mirror *m = &self.mirror[slot]
        return GW_WORD(m.phase, 0, m.rows, m.generation)

    cdef int require(self, Py_ssize_t slot, unsigned phase, str verb) except -1:
        self.control.check(slot)
        if self.mirror[slot].phase != phase:
            raise ValueError(f"cannot {verb} slot {slot} in phase {self.mirror[slot].phase}")
        return 0

    cdef void publish(self, Py_ssize_t slot, unsigned phase, unsigned rows) noexcept:
        """Write mirror and word where nobody else may write the word."""
        cdef Mirror *m = &self.mirror[slot]
        cdef uint64_t bit = <uint64_t>1 << (slot & 63)
        m.phase = phase
        m.rows = rows
        if phase == GW_FREE:
            m.generation += 1
            gw_clear_bits64(&self.control.lane.open_bits[slot >> 6], bit)
        else:
            gw_set_bits64(&self.control.lane.open_bits[slot >> 6], bit)
        gw_store64(&self.control.slot(slot).word, GW_WORD(phase, 0, rows, m.generation))

    def open(self, Py_ssize_t slot, unsigned rows, uint64_t oldest_ns, uint64_t shape_id,
             uint64_t capacity, dims=(), uint64_t due_ns=0):
        """FREE to OPEN with its first rows, whose bytes the caller has written.

        Args:
            slot: one that the mirror knows as FREE; ValueError otherwise.
            rows: 1 to capacity.
            oldest_ns: monotonic time of the first row.
            shape_id: equal ids promise equal dims and capacity.
            capacity: rows of this shape that fit the slot.
            dims: at most dims_per_slot ints, read by a worker that meets shape_id first.
            due_ns: monotonic time by which the rows are wanted, 0: no such time.
        """
        self.require(slot, GW_FREE, "open")
        if not 1 <= rows <= capacity <= 0xFFFF:
            raise ValueError(f"rows must be 1 to the capacity {capacity}, not {rows}")
        if len(dims) > self.control.dims_per_slot:
            raise ValueError(f"a slot records {self.control.dims_per_slot} dims, not {len(dims)}")
        cdef gw_slot *record = self.control.slot(slot)
        cdef Py_ssize_t i
        for i in range(len(dims)):
            self.control.dims(slot)[i] = dims[i]
        gw_poke64(&record.oldest_ns, oldest_ns)
        gw_poke64(&record.shape_id, shape_id)
        gw_poke64(&record.capacity, capacity)
        gw_poke64(&record.complete, 0)
        gw_poke64(&record.due_ns, due_ns)
        self.mirror[slot].capacity = capacity
        self.publish(slot, GW_OPEN, rows)

    cpdef bint append(self, Py_ssize_t slot, unsigned rows, uint64_t due_ns=0) except -1:
        """Add rows, whose bytes the caller has written behind the present ones, to an OPEN slot.

        Returns True when they joined, False when a worker had sealed the slot: the rows are then not
        part of it and belong into the next. `due_ns` is as in `open`; the slot keeps the earliest.
        """
        self.require(slot, GW_OPEN, "append to")
        cdef Mirror *m = &self.mirror[slot]
        if rows < 1 or rows > m.capacity - m.rows:
            raise ValueError(f"{rows} rows do not fit behind {m.rows}")
        cdef gw_slot *record = self.control.slot(slot)
        cdef uint64_t desired = GW_WORD(GW_OPEN, 0, m.rows + rows, m.generation)
        if due_ns != 0 and due_ns - 1 < gw_peek64(&record.due_ns) - 1:  # 0 is later than all
            gw_poke64(&record.due_ns, due_ns)
        if gw_cas64(&record.word, self.expected(slot), desired):
            m.rows += rows
            return True
        return False

    def complete(self, Py_ssize_t slot):
        """Say that nothing more will join an OPEN slot, so that no worker holds it back for more.

        The caller wakes a worker afterwards: one may be holding it.
        """
        self.require(slot, GW_OPEN, "complete")
        gw_store64(&self.control.slot(slot).complete, 1)

    def edit(self, Py_ssize_t slot):
        """Take an OPEN or RETRY slot out of the workers' reach; False when a worker was first.

        True obliges the caller to `edited`, once the bytes of the rows that stay lie contiguous.
        """
        self.control.check(slot)
        cdef Mirror *m = &self.mirror[slot]
        if m.phase != GW_OPEN and m.phase != GW_RETRY:
            raise ValueError(f"cannot edit slot {slot} in phase {m.phase}")
        cdef uint64_t desired = GW_WORD(GW_EDIT, 0, m.rows, m.generation)
        if gw_cas64(&self.control.slot(slot).word, self.expected(slot), desired):
            m.resume = m.phase
            m.phase = GW_EDIT
            return True
        return False

    def edited(self, Py_ssize_t slot, unsigned rows):
        """End an edit: back to where it was with `rows` rows, or FREE when none are left.

        The caller wakes a worker afterwards: one may have looked while the slot was out of reach.
        """
        self.require(slot, GW_EDIT, "end an edit of")
        cdef Mirror *m = &self.mirror[slot]
        if rows > m.rows:
            raise ValueError(f"an edit cannot add rows ({m.rows} to {rows})")
        self.publish(slot, m.resume if rows else GW_FREE, rows)

    def retry(self, Py_ssize_t slot):
        """SEALED by a worker whose death is confirmed, to RETRY: another one will run it."""
        self.control.check(slot)
        if self.phase(slot) != GW_SEALED:
            raise ValueError(f"slot {slot} is not sealed")
        self.publish(slot, GW_RETRY, self.mirror[slot].rows)

    def free(self, Py_ssize_t slot):
        """FREE with the next generation, from any phase in which no worker may still write.

        That is after DONE, FAILED or CORRUPT, or SEALED by a worker whose death is confirmed.
        ValueError in the others: there a worker could seal meanwhile; `edit` first.
        """
        cdef unsigned phase = self.phase(slot)
        if phase == GW_FREE or phase == GW_OPEN or phase == GW_EDIT or phase == GW_RETRY:
            raise ValueError(f"cannot free slot {slot} in phase {phase}")
        self.publish(slot, GW_FREE, 0)

    cpdef unsigned phase(self, Py_ssize_t slot) except? 99:
        """The slot's phase, CORRUPT where its shared word contradicts the mirror."""
        self.control.check(slot)
        cdef Mirror *m = &self.mirror[slot]
        cdef uint64_t word = gw_load64(&self.control.slot(slot).word)
        cdef unsigned phase = GW_PHASE(word)
        if word == self.expected(slot):
            return phase
        if m.phase != GW_OPEN and m.phase != GW_RETRY:
            return CORRUPT
        if GW_GENERATION(word) != m.generation or GW_ROWS(word) != m.rows or GW_OWNER(word) == 0:
            return CORRUPT
        if phase == GW_SEALED or phase == GW_DONE or phase == GW_FAILED:
            return phase
        return CORRUPT

    def owner(self, Py_ssize_t slot):
        """The incarnation that sealed the slot, 0 when nobody did."""
        self.control.check(slot)
        return GW_OWNER(gw_load64(&self.control.slot(slot).word))

    def rows(self, Py_ssize_t slot):
        """Rows in the slot, from the mirror."""
        self.control.check(slot)
        return self.mirror[slot].rows

    def times(self, Py_ssize_t slot):
        """(started_ns, finished_ns) of the last run, as its worker stated them."""
        self.control.check(slot)
        cdef gw_slot *record = self.control.slot(slot)
        return gw_peek64(&record.started_ns), gw_peek64(&record.finished_ns)

    def collect(self):
        """Slots that workers reported since the last call, and the bell disarmed.

        A report is a hint: look at `phase` before believing it.
        """
        self.control.check(0)
        cdef list slots = []
        cdef Py_ssize_t i, slot
        cdef uint64_t bits
        gw_store32(&self.control.lane.armed, 0)
        for i in range((self.control.slot_count + 63) >> 6):
            if gw_peek64(&self.control.lane.done_bits[i]) == 0:
                continue
            bits = gw_swap64(&self.control.lane.done_bits[i], 0)
            while bits:
                slot = (i << 6) + gw_first_bit(bits)
                bits &= bits - 1
                if slot < self.control.slot_count:
                    slots.append(slot)
        return slots

    def arm(self):
        """Ask for the bell before going to sleep; False when there already is something to collect."""
        self.control.check(0)
        cdef Py_ssize_t i
        gw_store32(&self.control.lane.armed, 1)
        gw_fence()
        for i in range((self.control.slot_count + 63) >> 6):
            if gw_load64(&self.control.lane.done_bits[i]) != 0:
                gw_store32(&self.control.lane.armed, 0)
                return False
        return True

    def linger(self, uint64_t max_ns):
        """Look for reports for a short while, without a bell; whether there is something to collect.

        The bell is armed again afterwards unless there is: then `collect` and `arm` as after a bell. For
        a front end that has nothing else to do: a worker that is about to finish then need not ring, and
        nobody has to be woken.
        """
        self.control.check(0)
        cdef uint64_t end_ns = gw_now_ns() + max_ns
        cdef Py_ssize_t words = (self.control.slot_count + 63) >> 6
        cdef Py_ssize_t i
        cdef int turn
        gw_store32(&self.control.lane.armed, 0)
        while gw_now_ns() < end_ns:
            for turn in range(32):
                for i in range(words):
                    if gw_load64(&self.control.lane.done_bits[i]) != 0:
                        return True
                gw_pause()
        return not self.arm()

    cpdef bint wake(self) except -1:
        """Wake one waiting worker, if one waits; call after rows became sealable."""
        self.control.check(0)
        gw_fence()
        return bool(self.board.wake_one(-1))

    def best_rows(self):
        """Rows at which a slot is better closed, by what all its workers have learned; 0: unknown."""
        cdef uint32_t rows, most = 0
        cdef Py_ssize_t i
        self.control.check(0)
        for i in range(self.board.count):
            if self.board.seats[i].incarnation == 0:
                continue
            rows = gw_load32(&self.board.seats[i].best_rows)
            if rows == 0:
                return 0
            most = max(most, rows)
        return most

    def wake_all(self):
        """Wake every waiting worker: after a death, which may have swallowed a wake-up."""
        self.control.check(0)
        gw_fence()
        self.board.wake_all()


cdef struct Found:
    gw_slot *record
    Py_ssize_t slot
    uint64_t word
    uint64_t oldest_ns
    int rank  # 2: RETRY, 1: complete, 0: more may join


cdef bint look(_Control lane, Found *found) noexcept:
    """Whether `found.slot` can be sealed; fills in the rest."""
    cdef gw_slot *record = lane.slot(found.slot)
    cdef uint64_t word = gw_load64(&record.word)
    if GW_PHASE(word) == GW_RETRY:
        found.rank = 2
    elif GW_PHASE(word) == GW_OPEN:
        found.rank = (GW_ROWS(word) >= gw_peek64(&record.capacity)
                      or gw_load64(&record.complete) != 0)
    else:
        return False
    found.record = record
    found.word = word
    found.oldest_ns = gw_peek64(&record.oldest_ns)
    return True


cdef bint is_before(const Found *one, const Found *other) noexcept:
    """Whose turn is first. A full slot does not overtake an older row, or a busy front end would starve
    one with little to do."""
    if (one.rank == 2) != (other.rank == 2):
        return one.rank == 2
    return one.oldest_ns < other.oldest_ns


cdef tuple offered(key, Found *found):
    cdef gw_slot *record = found.record
    return (key, found.slot, found.word, GW_ROWS(found.word), gw_peek64(&record.capacity),
            found.oldest_ns, gw_peek64(&record.shape_id), found.rank > 0, gw_peek64(&record.due_ns))


cdef class Consumer:
    """A worker's side of all the lanes attached to it.

    `nudge` may be called from another thread; everything else belongs to the worker's own.

    Args:
        board: writable shared buffer with the seats of the version's workers.
        seat: this worker's index on it.
        incarnation: 1 to MAX_INCARNATION, unique among the lanes' live and unreclaimed owners.
    """

    cdef _Board board
    cdef gw_seat *seat
    cdef Py_ssize_t index
    cdef uint32_t incarnation
    cdef dict lanes
    cdef dict bells

    def __cinit__(self, board, Py_ssize_t seat, uint32_t incarnation):
        self.board = _Board(board)
        if not 0 <= seat < self.board.count:
            raise ValueError(f"no seat {seat} on a board of {self.board.count}")
        if not 1 <= incarnation <= 0xFFF:
            raise ValueError("an incarnation is 1 to 4095")
        self.seat = &self.board.seats[seat]
        self.index = seat
        self.incarnation = incarnation
        self.lanes = {}
        self.bells = {}
        gw_poke64(&self.seat.batches, 0)
        gw_poke64(&self.seat.busy_since_ns, 0)
        gw_store32(&self.seat.best_rows, 0)
        self.seat.incarnation = incarnation
        gw_store32(&self.seat.state, GW_RUNNING)

    def attach(self, key, control, Py_ssize_t slot_count, Py_ssize_t dims_per_slot, int bell_fd):
        """Serve a lane from now on. ValueError when its header is not this layout's."""
        cdef _Control lane = _Control(control, slot_count, dims_per_slot)
        if lane.lane.magic != GW_MAGIC or lane.lane.layout != GW_LAYOUT:
            raise ValueError("the lane has another layout")
        if lane.lane.slot_count != slot_count or lane.lane.dims_per_slot != dims_per_slot:
            raise ValueError("the lane has another geometry")
        self.lanes[key] = lane
        self.bells[key] = bell_fd

    def detach(self, key):
        """Stop serving a lane and let go of its control memory."""
        cdef _Control lane = self.lanes.pop(key)
        del self.bells[key]
        lane.close()

    def best(self):
        """The slot to run next: RETRY first, then the one with the oldest row.

        Returns (key, slot, word, rows, capacity, oldest_ns, shape_id, is_complete, due_ns) or None; a
        slot is complete when it is full, marked so, or a RETRY. Only `seal` with that word says whether
        it is still so.
        """
        cdef Found found
        key = self.find(&found)
        return None if found.record is NULL else offered(key, &found)

    def offers(self):
        """Every slot that could be run, as `best` gives them and in the order of its preference."""
        cdef Found found
        cdef _Control lane
        cdef Py_ssize_t i
        cdef uint64_t bits
        cdef list ranked = []
        for key, lane_ in self.lanes.items():
            lane = <_Control>lane_
            for i in range((lane.slot_count + 63) >> 6):
                bits = gw_load64(&lane.lane.open_bits[i])
                while bits:
                    found.slot = (i << 6) + gw_first_bit(bits)
                    bits &= bits - 1
                    if found.slot >= lane.slot_count:
                        break
                    if look(lane, &found):
                        ranked.append((found.rank != 2, found.oldest_ns, len(ranked),
                                       offered(key, &found)))
        ranked.sort()
        return [entry[3] for entry in ranked]

    def take(self, uint64_t now_ns, bint may_hold):
        """Seal the best slot, unless it is one that is worth a thought whether to hold it back.

        That is one to which more may be added and that has a due time, or any such where `may_hold`. A
        slot that has changed since the look is looked for again. Wakes another worker where there is
        more (`pass_on`).

        Returns what `best` does, and beside it whether it is sealed; None where there is no slot.
        """
        cdef Found found
        cdef _Control lane
        while True:
            key = self.find(&found)
            if found.record is NULL:
                return None
            if found.rank == 0 and (may_hold or gw_peek64(&found.record.due_ns) != 0):
                return offered(key, &found), False
            lane = <_Control>self.lanes[key]
            if self.take_word(lane, found.slot, found.word, now_ns):
                self.pass_on()
                return offered(key, &found), True

    cdef object find(self, Found *best):
        """The key of the best slot's lane; `best.record` is NULL where there is none."""
        cdef _Control lane
        cdef Found found
        cdef Py_ssize_t i
        cdef uint64_t bits
        best.record = NULL
        best_key = None
        for key, lane_ in self.lanes.items():
            lane = <_Control>lane_
            for i in range((lane.slot_count + 63) >> 6):
                bits = gw_load64(&lane.lane.open_bits[i])
                while bits:
                    found.slot = (i << 6) + gw_first_bit(bits)
                    bits &= bits - 1
                    if found.slot >= lane.slot_count:
                        break
                    if look(lane, &found) and (best.record is NULL or is_before(&found, best)):
                        best[0] = found
                        best_key = key
        return best_key

    def seal(self, key, Py_ssize_t slot, uint64_t word, uint64_t now_ns):
        """Take the slot as `best` saw it; False when it has changed since.

        True means that the rows' bytes are this worker's to read, until `publish`. It may hold other
        slots already: it is busy since the first of them.
        """
        cdef _Control lane = self.lanes[key]
        lane.check(slot)
        if GW_PHASE(word) != GW_OPEN and GW_PHASE(word) != GW_RETRY:
            raise ValueError("only an OPEN or RETRY slot is sealed")
        return self.take_word(lane, slot, word, now_ns)

    cdef bint take_word(self, _Control lane, Py_ssize_t slot, uint64_t word, uint64_t now_ns) noexcept:
        cdef uint64_t busy_since_ns = gw_peek64(&self.seat.busy_since_ns)
        cdef uint64_t sealed = GW_WORD(GW_SEALED, self.incarnation, GW_ROWS(word), GW_GENERATION(word))
        if busy_since_ns == 0:
            gw_poke64(&self.seat.busy_since_ns, now_ns)
        if not gw_cas64(&lane.slot(slot).word, word, sealed):
            gw_poke64(&self.seat.busy_since_ns, busy_since_ns)
            return False
        gw_clear_bits64(&lane.lane.open_bits[slot >> 6], <uint64_t>1 << (slot & 63))
        return True

    def dims(self, key, Py_ssize_t slot):
        """The dims recorded with a slot that this worker sealed."""
        cdef _Control lane = self.lanes[key]
        lane.check(slot)
        cdef Py_ssize_t i
        return tuple([lane.dims(slot)[i] for i in range(lane.dims_per_slot)])

    def publish(self, key, Py_ssize_t slot, uint64_t word, bint ok, uint64_t started_ns,
                uint64_t finished_ns, bint is_last=True):
        """SEALED to DONE (or FAILED), report it and ring the bell if the front end sleeps.

        Args:
            key: the lane.
            slot: sealed by this worker with `word`.
            word: what was passed to `seal`.
            ok: whether the outputs were written; otherwise an error text was.
            started_ns: monotonic begin of the run.
            finished_ns: monotonic end of the run.
            is_last: of the slots that were run together: with it the worker is no longer busy, and
                the run counts.

        Returns False when the slot is no longer this worker's.
        """
        cdef _Control lane = self.lanes[key]
        lane.check(slot)
        cdef gw_slot *record = lane.slot(slot)
        cdef unsigned rows = GW_ROWS(word)
        cdef uint32_t generation = GW_GENERATION(word)
        gw_poke64(&record.started_ns, started_ns)
        gw_poke64(&record.finished_ns, finished_ns)
        if is_last:
            gw_poke64(&self.seat.batches, gw_peek64(&self.seat.batches) + 1)
        cdef bint published = gw_cas64(
            &record.word,
            GW_WORD(GW_SEALED, self.incarnation, rows, generation),
            GW_WORD(GW_DONE if ok else GW_FAILED, self.incarnation, rows, generation))
        if published:
            gw_set_bits64(&lane.lane.done_bits[slot >> 6], <uint64_t>1 << (slot & 63))
            gw_fence()
            if gw_load32(&lane.lane.armed) and gw_swap32(&lane.lane.armed, 0):
                gw_ring_bell(self.bells[key])
        if is_last:
            gw_poke64(&self.seat.busy_since_ns, 0)
        return published

    def stay_busy(self, uint64_t since_ns):
        """After `publish` with `is_last`, where slots of another batch are held: busy since then."""
        gw_poke64(&self.seat.busy_since_ns, since_ns)

    def pass_on(self):
        """Wake another waiting worker if there is another slot to run.

        A front end wakes one worker per append; the one it woke may have found older work first.
        """
        cdef Found found
        if self.board.count > 1:
            self.find(&found)
            if found.record is not NULL:
                gw_fence()
                return bool(self.board.wake_one(self.index))
        return False

    def others_wait(self):
        """Whether another worker has nothing to do."""
        cdef Py_ssize_t i
        for i in range(self.board.count):
            if i != self.index and gw_load32(&self.board.seats[i].state) == GW_WAITING:
                return True
        return False

    def recommend(self, uint32_t rows):
        """Tell front ends at how many rows a batch is at its best; 0: unknown."""
        gw_store32(&self.seat.best_rows, rows)

    def announce(self):
        """Say that this worker is about to wait. Then look again (`best`, mail), then `sleep` or
        `retract`."""
        gw_store32(&self.seat.state, GW_WAITING)
        gw_fence()

    def retract(self):
        """Do not wait after all. Returns True when a wake-up had been sent meanwhile."""
        return gw_swap32(&self.seat.state, GW_RUNNING) == GW_RUNNING

    def sleep(self, uint64_t until_ns):
        """After `announce`: wait for a wake-up, or until a monotonic time (0: for ever).

        Releases the GIL. May return early; the caller looks again either way.
        """
        with nogil:
            gw_futex_wait(&self.seat.state, GW_WAITING, until_ns)
        gw_store32(&self.seat.state, GW_RUNNING)

    def nudge(self):
        """Wake this worker, from its helper thread."""
        gw_store32(&self.seat.state, GW_RUNNING)
        gw_fence()
        gw_futex_wake(&self.seat.state)


def seats(board):
    """[(incarnation, batches, busy_since_ns, is_waiting)] of a board, for watching over its workers."""
    cdef _Board b = _Board(board)
    cdef Py_ssize_t i
    try:
        return [
            (b.seats[i].incarnation, gw_peek64(&b.seats[i].batches),
             gw_peek64(&b.seats[i].busy_since_ns), gw_load32(&b.seats[i].state) == GW_WAITING)
            for i in range(b.count)
        ]
    finally:
        b.mapping.release()
