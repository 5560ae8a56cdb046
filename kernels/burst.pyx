"""One turn of a front end's event loop: what is done once for all that it brings.

A clock read, the date of answers, and waking workers: what came together is to run together, and a futex
call a request would cost more than placing it.
"""

from libc.stdint cimport int64_t, uint64_t
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

from gateway._kernels.ring cimport Producer

cdef extern from "atomics.h" nogil:
    uint64_t gw_now_ns()

cdef extern from "http_answer.h" nogil:
    void gw_put_date(char *out, int64_t unix_s)

cdef enum:
    LINGER_NS = 60_000  # that a lone request's answer is looked for before the event loop sleeps
    LINGER_CREDIT = 8  # lone requests whose answers came in that time, of which one miss costs all
    LINGER_PAUSE = 256  # lone requests after a miss that are not waited for
    WAKE_BYTES = 1 << 18  # written into slots since workers were woken: they need not wait for the rest


cdef class Burst:
    """What is done once for all that one turn of the event loop brings: a clock read, waking workers.

    A request that came alone, to a front end that has no other, is waited for: looking at shared memory
    for a moment costs less than being woken, twice over, where the model is fast. Where it was not fast
    enough, or there is but one core, nobody waits.

    Args:
        call_soon: the event loop's.
        may_linger: there is a core to spare.
    """

    def __init__(self, call_soon, bint may_linger=False):
        self.call_soon = call_soon
        self.may_linger = may_linger
        self.listeners = {}
        self.credit = LINGER_CREDIT
        self.end_method = self.end
        self.producers = []

    cdef uint64_t now(self) except? 0:
        """The monotonic time, read once a burst."""
        cdef timespec wall
        if not self.is_open:
            self.is_open = True
            self.now_ns = gw_now_ns()
            clock_gettime(CLOCK_REALTIME, &wall)
            if wall.tv_sec != self.date_s:
                self.date_s = wall.tv_sec
                gw_put_date(self.date, wall.tv_sec)
            self.call_soon(self.end_method)
        return self.now_ns

    def listen(self, Producer producer not None, on_report):
        """Have a function called for reports that are seen without a bell; None: it is not there any more."""
        if on_report is None:
            self.listeners.pop(producer, None)
        else:
            self.listeners[producer] = on_report

    def wake(self, Producer producer not None):
        """Wake a worker for what the producer published, when the burst ends."""
        self.touch(producer, 0)

    cdef int touch(self, Producer producer, Py_ssize_t nbytes) except -1:
        self.now()
        self.written += nbytes
        if self.written >= WAKE_BYTES:
            self.written = 0
            producer.wake()
        elif producer not in self.producers:
            self.producers.append(producer)
        return 0

    def end(self):
        """The burst is over."""
        cdef Producer producer
        cdef bint is_alone = self.is_alone
        self.is_open = self.is_alone = False
        self.written = 0
        if self.producers:
            producers, self.producers = self.producers, []
            for producer in producers:
                if producer.control.lane is not NULL:  # its version may have gone meanwhile
                    producer.wake()
                    if is_alone and self.may_linger:
                        self.linger(producer)

    cdef int linger(self, Producer producer) except -1:
        """Wait a moment for the answer of the one request there is."""
        if self.credit <= 0:
            self.credit += 1
            return 0
        if producer.linger(LINGER_NS):
            self.credit = min(self.credit + 1, LINGER_CREDIT)
            self.listeners[producer]()
        else:
            self.credit = -LINGER_PAUSE
        return 0
