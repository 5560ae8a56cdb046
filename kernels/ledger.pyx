"""The ledger: counters and histograms in shared memory, which any process reads without asking another.

It lies behind the seats of a version's board (ledger_layout.h): a section for each worker and two for
each front end, with one writer at a time. So a counter takes a load, an addition and a store, none of them
locked; what is written outlives its writer, whose successor in the seat counts on from there.

A reader may come between two stores of one request, and sees every number grow, but not all at once. Any
worker can scribble on all of it: a number that was read is a number, and nothing more is believed of it.

Rejected: one shared counter with atomic additions, 20 cycles each and a line that moves between cores;
counters in each process that are asked for at a scrape, a message to every process and nothing of a dead
one.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.time cimport clock_gettime, timespec

cimport cython

cdef extern from "<time.h>" nogil:
    int CLOCK_REALTIME_COARSE

cdef extern from "atomics.h" nogil:
    uint64_t gw_peek64(const uint64_t *p)
    void gw_poke64(uint64_t *p, uint64_t v)

cdef extern from "ledger_layout.h" nogil:
    enum:
        GW_LEDGER_MAGIC, GW_LEDGER_LAYOUT, GW_DURATION_BOUNDS, GW_ROW_BOUNDS, GW_CODES, GW_EXACT_ROWS
        GW_FIRST_COUNTER, GW_SKETCH, GW_SKETCH_FIRST_BIT, GW_SKETCH_OCTAVES, GW_SKETCH_STEP_BITS
        GW_ROW_CLASSES
    const uint64_t gw_duration_bounds_ns[16]
    const uint64_t gw_row_bounds[10]
    const int gw_codes[21]
    ctypedef struct gw_runs:
        uint64_t count, ns
    ctypedef struct gw_batches:
        uint32_t magic, layout
        uint64_t starts, most_rows
        uint64_t rows, run_ns, copied_rows, held_ns
        uint64_t row_buckets[11]
        uint64_t run_buckets[17]
        gw_runs by_rows[1026]
        uint64_t compute[9][832]

cdef extern from * nogil:
    int __builtin_clzll(unsigned long long value)

cdef enum:
    PLACE_200 = 0  # in gw_codes
    MORE_ROWS = GW_EXACT_ROWS + 1
    MAX_SECTIONS = 65536  # of a kind: keeps sizes far from overflow

CODES = tuple([gw_codes[i] for i in range(GW_CODES)])
"""The HTTP status of each cell of ``codes``; 0: any other."""

DURATION_BOUNDS_NS = tuple([gw_duration_bounds_ns[i] for i in range(GW_DURATION_BOUNDS)])
ROW_BOUNDS = tuple([gw_row_bounds[i] for i in range(GW_ROW_BOUNDS)])

EXACT_ROWS = GW_EXACT_ROWS
"""In ``by_rows`` the number after this one stands for all larger ones."""

SKETCH_BOUNDS_NS = tuple([
    (steps + 1) << (octave + GW_SKETCH_FIRST_BIT - GW_SKETCH_STEP_BITS)
    for octave in range(GW_SKETCH_OCTAVES)
    for steps in range(1 << GW_SKETCH_STEP_BITS, 2 << GW_SKETCH_STEP_BITS)
])
"""Where each bucket of a sketch ends and the next begins; the last one has no end."""

ROW_CLASSES = (*ROW_BOUNDS[:GW_ROW_CLASSES - 1], 0)
"""The most rows of each class that runs are sketched by; 0: no end."""

LAYOUT = {
    "magic": GW_LEDGER_MAGIC,
    "layout": GW_LEDGER_LAYOUT,
    "requests": sizeof(gw_requests),
    "batches": sizeof(gw_batches),
}
"""Sizes in bytes, for whoever lays out a board, and the test that holds the twin's layout to this one."""


# Finding a bucket

cdef struct Buckets:
    uint64_t bounds[17]  # the last: no bound
    uint8_t first[65]    # by the bits of a value, the first bound that is not below all such values

cdef Buckets duration_buckets
cdef Buckets row_buckets


cdef void fill(Buckets *buckets, const uint64_t *bounds, Py_ssize_t count) noexcept:
    cdef Py_ssize_t i, bits
    for i in range(17):
        buckets.bounds[i] = bounds[i] if i < count else <uint64_t>-1
    for bits in range(65):
        i = 0
        while i < count and bits > 0 and bounds[i] < <uint64_t>1 << (bits - 1):
            i += 1
        buckets.first[bits] = i


fill(&duration_buckets, gw_duration_bounds_ns, GW_DURATION_BOUNDS)
fill(&row_buckets, gw_row_bounds, GW_ROW_BOUNDS)


cdef inline Py_ssize_t bucket(const Buckets *buckets, uint64_t value) noexcept nogil:
    """Where a value belongs: numbers of equal length in bits have at most one bound among them."""
    cdef Py_ssize_t i = buckets.first[64 - __builtin_clzll(value) if value else 0]
    return i + (value > buckets.bounds[i])


cdef inline Py_ssize_t sketch_cell(uint64_t ns) noexcept nogil:
    """See `sketch_bucket`."""
    cdef int octave
    if ns < <uint64_t>1 << GW_SKETCH_FIRST_BIT:
        return 0
    octave = 63 - __builtin_clzll(ns) - GW_SKETCH_FIRST_BIT
    if octave >= GW_SKETCH_OCTAVES:
        return GW_SKETCH - 1
    # What is left of ns begins with its highest bit, which stands for the octave before.
    return ((octave - 1) << GW_SKETCH_STEP_BITS) + <Py_ssize_t>(
        ns >> (octave + GW_SKETCH_FIRST_BIT - GW_SKETCH_STEP_BITS))


def sketch_bucket(uint64_t ns):
    """The bucket of a sketch that a duration falls into."""
    return sketch_cell(ns)


# Memory

cdef inline void add(uint64_t *cell, uint64_t more) noexcept nogil:
    """No locked addition: the section's one writer is the caller."""
    gw_poke64(cell, gw_peek64(cell) + more)


cdef class _Memory:
    """A board's bytes, held for as long as a section points into them."""

    def __cinit__(self, board, int flags):
        PyObject_GetBuffer(board, &self.view, flags)
        self.held = True

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)

    cdef char *at(self, Py_ssize_t offset, Py_ssize_t size) except NULL:
        if offset < 0 or offset > self.view.len - size:
            raise ValueError(f"the board has {self.view.len} bytes, {offset + size} are needed")
        cdef char *found = <char *>self.view.buf + offset
        if <size_t>found % 8 != 0:
            raise ValueError("a section begins at a multiple of 8 bytes")
        return found


cdef int check_number(str what, Py_ssize_t number, Py_ssize_t least) except -1:
    if not least <= number <= MAX_SECTIONS:
        raise ValueError(f"{what}: expected {least} to {MAX_SECTIONS}, not {number}")
    return 0


cdef inline void take_over(uint32_t *head, size_t size) noexcept:
    """Make a section this layout's. What a predecessor counted stays; what is no section begins at 0.

    Fresh memory is 0 already, and pages of it that nobody touches cost nothing.
    """
    if head[0] == GW_LEDGER_MAGIC and head[1] == GW_LEDGER_LAYOUT:
        return
    if head[0] != 0 or head[1] != 0:
        memset(head, 0, size)
    head[1] = GW_LEDGER_LAYOUT
    head[0] = GW_LEDGER_MAGIC


def ledger_bytes(Py_ssize_t frontends, Py_ssize_t workers):
    """Bytes of the ledger of a version. ValueError unless there is at least one of each."""
    check_number("front ends", frontends, 1)
    check_number("workers", workers, 1)
    return workers * <Py_ssize_t>sizeof(gw_batches) + 2 * frontends * <Py_ssize_t>sizeof(gw_requests)


# Writers

@cython.final
cdef class RequestCounters:
    """A section of a front end's. A successor takes it over: counters go on, gauges begin at 0.

    Not thread-safe: it belongs to the front end's event loop.

    Args:
        board: writable buffer; held for as long as this lives.
        offset: where the ledger begins in it, in bytes.
        workers: sections of workers, which come first.
        index: of the section, from 0: the front end's own, or with the number of front ends added its
            slice's. ValueError where the board has no room for it.
    """

    def __cinit__(self, board, Py_ssize_t offset, Py_ssize_t workers, Py_ssize_t index):
        check_number("workers", workers, 1)
        check_number("the section's index", index, 0)
        self.memory = _Memory(board, PyBUF_SIMPLE | PyBUF_WRITABLE)
        offset += workers * <Py_ssize_t>sizeof(gw_batches) + index * <Py_ssize_t>sizeof(gw_requests)
        self.section = <gw_requests *>self.memory.at(offset, sizeof(gw_requests))
        take_over(&self.section.magic, sizeof(gw_requests))
        self.set_waiting(0)

    cdef void count_answer(self, uint64_t rows, uint64_t total_ns, uint64_t queue_ns,
                           uint64_t compute_ns) noexcept nogil:
        """See `answered`."""
        cdef gw_requests *s = self.section
        cdef timespec now
        clock_gettime(CLOCK_REALTIME_COARSE, &now)  # to 4 ms or so, at a fifth of the fine one's price
        gw_poke64(&s.last_inference_ms, <uint64_t>now.tv_sec * 1000 + <uint64_t>now.tv_nsec // 1000000)
        add(&s.codes[PLACE_200], 1)
        add(&s.rows, rows)
        add(&s.success_ns, total_ns)
        add(&s.queue_ns, queue_ns)
        add(&s.compute_ns, compute_ns)
        add(&s.request_buckets[bucket(&duration_buckets, total_ns)], 1)
        add(&s.queue_buckets[bucket(&duration_buckets, queue_ns)], 1)
        add(&s.latency[sketch_cell(total_ns)], 1)

    cdef void count_failure(self, int code, uint64_t total_ns) noexcept nogil:
        """See `failed`."""
        cdef gw_requests *s = self.section
        cdef Py_ssize_t i = 0
        while i < GW_CODES - 1 and gw_codes[i] != code:
            i += 1
        add(&s.codes[i], 1)
        add(&s.fail_ns, total_ns)
        add(&s.request_buckets[bucket(&duration_buckets, total_ns)], 1)

    cdef void set_waiting(self, uint64_t requests) noexcept nogil:
        gw_poke64(&self.section.waiting, requests)

    def answered(self, uint64_t rows, uint64_t total_ns, uint64_t queue_ns, uint64_t compute_ns):
        """Count a request that was answered with its outputs.

        Args:
            rows: of the request.
            total_ns: from its head being read to its answer being encoded.
            queue_ns: from its arrival to the begin of its batch's run.
            compute_ns: of its batch's run.
        """
        self.count_answer(rows, total_ns, queue_ns, compute_ns)

    def failed(self, int code, uint64_t total_ns):
        """Count a request that ended with an HTTP status other than 200."""
        self.count_failure(code, total_ns)

    def compared(self, bint agrees):
        """Count a copy whose outputs were compared with those of the request that it is a copy of."""
        add(&self.section.compared, 1)
        add(&self.section.agreed, agrees)

    def shadow_dropped(self):
        """Count a copy that was not sent, as too many were on their way."""
        add(&self.section.shadow_dropped, 1)

    def shadow_failed(self):
        """Count a copy that ended with an error."""
        add(&self.section.shadow_failed, 1)

    def absorb(self, RequestCounters other not None):
        """Add what another section has counted, which is then not to be read any more."""
        cdef uint64_t *mine = <uint64_t *>self.section
        cdef uint64_t *theirs = <uint64_t *>other.section
        cdef uint64_t more
        cdef size_t i
        for i in range(GW_FIRST_COUNTER, sizeof(gw_requests) // 8):
            more = gw_peek64(&theirs[i])
            if more:  # a page where nothing was counted stays untouched
                add(&mine[i], more)

    @property
    def waiting(self):
        """Gauge: requests that no worker has taken yet."""
        return gw_peek64(&self.section.waiting)

    @waiting.setter
    def waiting(self, uint64_t requests):
        self.set_waiting(requests)

    @property
    def last_inference_ms(self):
        """Milliseconds since the epoch when a request was last answered; 0: never."""
        return gw_peek64(&self.section.last_inference_ms)


@cython.final
cdef class BatchCounters:
    """One worker's section; making one counts a start. A successor in the seat counts on.

    Not thread-safe: it belongs to the worker's loop.

    Args:
        board: writable buffer; held for as long as this lives.
        offset: where the ledger begins in it, in bytes.
        seat: the worker's own, from 0. ValueError where the board has no room for it.
    """

    cdef _Memory memory
    cdef gw_batches *section

    def __cinit__(self, board, Py_ssize_t offset, Py_ssize_t seat):
        check_number("the seat", seat, 0)
        self.memory = _Memory(board, PyBUF_SIMPLE | PyBUF_WRITABLE)
        offset += seat * <Py_ssize_t>sizeof(gw_batches)
        self.section = <gw_batches *>self.memory.at(offset, sizeof(gw_batches))
        take_over(&self.section.magic, sizeof(gw_batches))
        add(&self.section.starts, 1)

    def batch(self, uint64_t rows, uint64_t run_ns, uint64_t copied_rows=0, uint64_t held_ns=0):
        """Count a run; before it is published, as its clients may ask for the numbers at once.

        Args:
            rows: of the batch.
            run_ns: the run.
            copied_rows: rows of it that were copied together from several slots.
            held_ns: how long an idle worker held it back for more rows.
        """
        cdef gw_batches *s = self.section
        cdef uint64_t place = rows if rows <= GW_EXACT_ROWS else MORE_ROWS
        cdef Py_ssize_t row_bucket = bucket(&row_buckets, rows)
        if place > gw_peek64(&s.most_rows):
            gw_poke64(&s.most_rows, place)
        add(&s.rows, rows)
        add(&s.run_ns, run_ns)
        add(&s.copied_rows, copied_rows)
        add(&s.held_ns, held_ns)
        add(&s.row_buckets[row_bucket], 1)
        add(&s.run_buckets[bucket(&duration_buckets, run_ns)], 1)
        add(&s.by_rows[place].count, 1)
        add(&s.by_rows[place].ns, run_ns)
        add(&s.compute[min(row_bucket, GW_ROW_CLASSES - 1)][sketch_cell(run_ns)], 1)


# The reader

cdef tuple numbers(const uint64_t *cells, Py_ssize_t count):
    cdef Py_ssize_t i
    return tuple([gw_peek64(&cells[i]) for i in range(count)])


cdef dict read_requests(const gw_requests *s):
    return {
        "waiting": gw_peek64(&s.waiting),
        "last_inference_ms": gw_peek64(&s.last_inference_ms),
        "codes": numbers(s.codes, GW_CODES),
        "rows": gw_peek64(&s.rows),
        "success_ns": gw_peek64(&s.success_ns),
        "fail_ns": gw_peek64(&s.fail_ns),
        "queue_ns": gw_peek64(&s.queue_ns),
        "compute_ns": gw_peek64(&s.compute_ns),
        "compared": gw_peek64(&s.compared),
        "agreed": gw_peek64(&s.agreed),
        "shadow_dropped": gw_peek64(&s.shadow_dropped),
        "shadow_failed": gw_peek64(&s.shadow_failed),
        "request_buckets": numbers(s.request_buckets, GW_DURATION_BOUNDS + 1),
        "queue_buckets": numbers(s.queue_buckets, GW_DURATION_BOUNDS + 1),
    }


cdef dict read_batches(const gw_batches *s):
    cdef uint64_t i, count, most = min(gw_peek64(&s.most_rows), <uint64_t>MORE_ROWS)
    cdef dict by_rows = {}
    for i in range(most + 1):
        count = gw_peek64(&s.by_rows[i].count)
        if count:
            by_rows[i] = count, gw_peek64(&s.by_rows[i].ns)
    return {
        "starts": gw_peek64(&s.starts),
        "rows": gw_peek64(&s.rows),
        "run_ns": gw_peek64(&s.run_ns),
        "copied_rows": gw_peek64(&s.copied_rows),
        "held_ns": gw_peek64(&s.held_ns),
        "row_buckets": numbers(s.row_buckets, GW_ROW_BOUNDS + 1),
        "run_buckets": numbers(s.run_buckets, GW_DURATION_BOUNDS + 1),
        "by_rows": by_rows,
    }


def read(board, Py_ssize_t offset, Py_ssize_t frontends, Py_ssize_t workers):
    """What has been counted, whatever is written meanwhile or was scribbled.

    Args:
        board: readable buffer.
        offset: where the ledger begins in it, in bytes.
        frontends: how many there are, with two sections each.
        workers: sections of workers.

    Returns:
        (of each front end a dict, then of each one's slice; of each worker a dict), their keys the names in
        ledger_layout.h, their values unsigned numbers of 64 bits or tuples of them; ``by_rows`` maps rows
        to (count, ns). Sketches are left out.
    """
    cdef _Memory memory = _Memory(board, PyBUF_SIMPLE)
    cdef char *base = memory.at(offset, ledger_bytes(frontends, workers))
    cdef gw_batches *batches = <gw_batches *>base
    cdef gw_requests *requests = <gw_requests *>(base + workers * <Py_ssize_t>sizeof(gw_batches))
    cdef Py_ssize_t i
    return ([read_requests(&requests[i]) for i in range(2 * frontends)],
            [read_batches(&batches[i]) for i in range(workers)])


cdef void add_sketch(uint64_t *sums, const uint64_t *cells) noexcept:
    cdef Py_ssize_t i
    for i in range(GW_SKETCH):
        sums[i] += gw_peek64(&cells[i])


cdef void add_latency(uint64_t *sums, const gw_requests *s) noexcept:
    if gw_peek64(&s.codes[PLACE_200]):  # else its pages need not be looked at
        add_sketch(sums, s.latency)


cdef dict sparse(const uint64_t *sums):
    cdef Py_ssize_t i
    return {i: sums[i] for i in range(GW_SKETCH) if sums[i]}


cdef bint has_runs(const gw_batches *s, Py_ssize_t row_class) noexcept:
    """Whether a worker ran a batch of this class; else its pages need not be looked at."""
    cdef Py_ssize_t i, end = GW_ROW_BOUNDS + 1 if row_class == GW_ROW_CLASSES - 1 else row_class + 1
    for i in range(row_class, end):
        if gw_peek64(&s.row_buckets[i]):
            return True
    return False


def sketches(board, Py_ssize_t offset, Py_ssize_t frontends, Py_ssize_t workers):
    """The sums of sketches, whatever is written meanwhile or was scribbled. Arguments as for `read`.

    Returns:
        (latency of all requests, latency of slices' requests, duration of runs by `ROW_CLASSES`): counts by
        bucket, without those that are 0, and without classes that have none.
    """
    cdef _Memory memory = _Memory(board, PyBUF_SIMPLE)
    cdef char *base = memory.at(offset, ledger_bytes(frontends, workers))
    cdef gw_batches *batches = <gw_batches *>base
    cdef gw_requests *requests = <gw_requests *>(base + workers * <Py_ssize_t>sizeof(gw_batches))
    cdef uint64_t sums[832]
    cdef Py_ssize_t i, row_class
    cdef dict slices, latency, found, compute = {}
    memset(sums, 0, sizeof(sums))
    for i in range(frontends, 2 * frontends):
        add_latency(sums, &requests[i])
    slices = sparse(sums)
    for i in range(frontends):
        add_latency(sums, &requests[i])
    latency = sparse(sums)
    for row_class in range(GW_ROW_CLASSES):
        memset(sums, 0, sizeof(sums))
        for i in range(workers):
            if has_runs(&batches[i], row_class):
                add_sketch(sums, batches[i].compute[row_class])
        found = sparse(sums)
        if found:
            compute[ROW_CLASSES[row_class]] = found
    return latency, slices, compute
