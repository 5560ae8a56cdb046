"""Requests and slots as a front end mirrors them: what the fast lane reads and writes a dozen times a request.

Plain records, compiled so that a kernel reaches a field without a dictionary or a Python call. Nothing is
decided here: `serving.placement` and `serving.dispatcher` own these objects and every rule about them; the
fast lane only appends to a slot that they opened, and answers from one that a worker completed.
"""

import enum

from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer,
)


class State(enum.Enum):
    """Where a request is. `ENDED` is final: answered, failed, expired or cancelled."""

    NEW = 0
    QUEUED = 1  # in the dispatcher's queue, its data private
    PLACED = 2  # its rows are in a slot
    ENDED = 3


cdef tuple STATES = tuple(State)

# The states that each one may become, as bits: back to QUEUED when a slot is split.
cdef int[4] MOVES = [
    (1 << QUEUED) | (1 << PLACED) | (1 << ENDED),
    (1 << PLACED) | (1 << ENDED),
    (1 << QUEUED) | (1 << ENDED),
    0,
]


cdef class ShapeKey:
    """What requests that may share a slot have in common.

    Args:
        number: by which workers cache.
        shape: the layout of the slot (`serving.geometry.SlotShape`).
        string_bytes: heap for strings behind the inputs, in each slot.
        lane: number of the lane for it.
        takes_mates: several requests may share a slot.
        memory: that lane's.
        dims: what is recorded with a slot of this shape.

    Attributes:
        is_bound: workers write outputs where the shape says, and describe nothing.
        capacity: rows that a slot holds.
        limit: rows at which a slot is closed: fewer, where a run of more would cost more a row.
        cursor: the open slot that rows of this shape are appended to; None: there is none.
    """

    def __init__(
        self, number, shape, string_bytes, lane, takes_mates, SlotMemory memory=None, tuple dims=(),
    ):
        self.id = number
        self.shape = shape
        self.capacity = self.limit = shape.capacity
        self.string_bytes = string_bytes
        self.lane = lane
        self.takes_mates = takes_mates
        self.memory = memory
        self.dims = dims
        self.is_bound = shape.outputs is not None
        self.cursor = None


cdef class Slot:
    """The requests that a slot's rows belong to, in their order.

    Attributes:
        lane, index: the number of its lane, and its place there.
        rows: in it.
        string_bytes: of its heap that are taken, by requests that left as well.
        key: the shape of its rows; None until it is opened first.
        deaths, last_owner: workers that died holding these rows, and the last of them.
        awaits_judgement: of how that one died.
    """

    def __init__(self, Py_ssize_t lane, Py_ssize_t index):
        self.lane = lane
        self.index = index
        self.key = None
        self.clear()

    def clear(self):
        """Forget the requests."""
        self.requests = []
        self.rows = self.string_bytes = 0
        self.deaths = self.last_owner = 0
        self.awaits_judgement = False


cdef class Intake:
    """What has to be known of a dispatcher to hand it a request.

    Attributes:
        in_flight: requests that it has and that have not ended.
        receiving: requests for it whose body is still arriving.
        bound: requests in flight from which on it has to be asked whether its queue is full.
        has_queue: requests wait in it, so that no other may be placed before them.
        is_open: whether it takes requests at all.
    """

    def __init__(self, Py_ssize_t bound):
        self.bound = bound
        self.is_open = True


cdef class Request:
    """One inference request: its place, and its state. What it holds and who is told is its subclass's.

    Subclasses in Python (`serving.request.CallRequest`) are answered through their methods; those that
    are compiled may answer from a slot's memory at once (`answer_from`).

    Attributes:
        key: the shape of its rows.
        rows: how many.
        slot, start: the slot that they are in and the first of them there.
        level: its place in the queue's order, 0 the highest.
        arrived_ns: monotonic.
        deadline_ns: monotonic end of its time in the queue, 0 for none.
        due_ns: monotonic time by which its answer is wanted, 0 for none.
        solo: it must not share a slot, also once it was in a batch that failed.
        blame: workers that died of running it alone.
    """

    def __init__(
        self, ShapeKey key, Py_ssize_t rows, int level, uint64_t arrived_ns, uint64_t deadline_ns,
        uint64_t due_ns=0,
    ):
        self.key = key
        self.rows = rows
        self.level = level
        self.arrived_ns = arrived_ns
        self.deadline_ns = deadline_ns
        self.due_ns = due_ns
        self.solo = not key.takes_mates

    @property
    def state(self):
        """Its `State`."""
        return STATES[self.phase]

    def move(self, state):
        """Change the state. RuntimeError on an illegal move; kernels that know the move is legal just make it."""
        self.become(state.value)

    cdef int become(self, int phase) except -1:
        if not MOVES[self.phase] >> phase & 1:
            raise RuntimeError(
                f"a request cannot go from {STATES[self.phase].name} to {STATES[phase].name}"
            )
        self.phase = phase
        return 0

    cdef bint answer_from(
        self, const char *outputs, uint64_t started_ns, uint64_t finished_ns
    ) except -1:
        """Answer from a slot's output region and end; False when that is not for this class to do."""
        return False


cdef class SlotMemory:
    """A lane's rows, for kernels: where they lie, and the producer that publishes them.

    Args:
        producer: the lane's.
        inputs: its writable mapping; held until `close`.
        outputs: its read-only mapping; held until `close`.
        input_slot_bytes, output_slot_bytes: of one slot in each.
    """

    def __cinit__(
        self, Producer producer, inputs, outputs,
        Py_ssize_t input_slot_bytes, Py_ssize_t output_slot_bytes,
    ):
        self.producer = producer
        PyObject_GetBuffer(inputs, &self.input_view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        PyObject_GetBuffer(outputs, &self.output_view, PyBUF_SIMPLE)
        self.inputs = <char *>self.input_view.buf
        self.outputs = <const char *>self.output_view.buf
        self.input_slot_bytes = input_slot_bytes
        self.output_slot_bytes = output_slot_bytes

    def close(self):
        """Let go of the mappings; nothing may be written or answered afterwards."""
        self.inputs = NULL
        self.outputs = NULL
        PyBuffer_Release(&self.input_view)
        PyBuffer_Release(&self.output_view)

    def __dealloc__(self):
        PyBuffer_Release(&self.input_view)
        PyBuffer_Release(&self.output_view)

    def answer(self, Slot slot, uint64_t started_ns, uint64_t finished_ns):
        """Let a completed slot's requests answer from its memory.

        Args:
            slot: DONE, its outputs where its shape says.
            started_ns, finished_ns: monotonic times of its run.

        Returns:
            The requests that are still to be answered, through their methods; usually none.
        """
        cdef const char *outputs = self.outputs + slot.index * self.output_slot_bytes
        cdef Request request
        cdef list rest = None
        for request in slot.requests:
            if request.phase == PLACED:
                if not request.answer_from(outputs, started_ns, finished_ns):
                    if rest is None:
                        rest = []
                    rest.append(request)
        return () if rest is None else rest


cdef void enter(Slot slot, Request request):
    """Record that a request's rows are in a slot, behind those that were there."""
    request.slot = slot
    request.start = slot.rows
    request.phase = PLACED
    slot.requests.append(request)
    slot.rows += request.rows
