"""What other kernels may use of the ring: the front end's side, without a Python call."""

from cpython.buffer cimport Py_buffer
from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef extern from "ring_layout.h" nogil:
    ctypedef struct gw_lane:
        uint32_t magic, layout, slot_count, dims_per_slot
        uint32_t armed
        uint64_t open_bits[8]
        uint64_t done_bits[8]
    ctypedef struct gw_slot:
        uint64_t word, oldest_ns, shape_id, capacity, complete, due_ns, started_ns, finished_ns
    ctypedef struct gw_seat:
        uint32_t state, incarnation
        uint64_t batches, busy_since_ns
        uint32_t best_rows


cdef class _Mapping:
    cdef Py_buffer view
    cdef bint held
    cdef void release(self)


cdef class _Control:
    cdef _Mapping mapping
    cdef gw_lane *lane
    cdef char *records
    cdef Py_ssize_t stride
    cdef readonly Py_ssize_t slot_count
    cdef readonly Py_ssize_t dims_per_slot
    cdef gw_slot *slot(self, Py_ssize_t index) noexcept nogil
    cdef int64_t *dims(self, Py_ssize_t index) noexcept nogil
    cdef int check(self, Py_ssize_t index) except -1
    cdef void close(self)


cdef class _Board:
    cdef _Mapping mapping
    cdef gw_seat *seats
    cdef Py_ssize_t count
    cdef bint wake_one(self, Py_ssize_t but) noexcept nogil
    cdef void wake_all(self) noexcept nogil


cdef struct Mirror:
    uint32_t generation
    uint32_t rows
    uint32_t capacity
    uint32_t phase   # FREE, OPEN, EDIT or RETRY as the front end last wrote it; later phases are read
    uint32_t resume  # the phase that an edit goes back to


cdef class Producer:
    cdef _Control control
    cdef _Board board
    cdef Mirror *mirror
    cdef uint64_t expected(self, Py_ssize_t slot) noexcept
    cdef int require(self, Py_ssize_t slot, unsigned phase, str verb) except -1
    cdef void publish(self, Py_ssize_t slot, unsigned phase, unsigned rows) noexcept
    cpdef bint append(self, Py_ssize_t slot, unsigned rows, uint64_t due_ns=*) except -1
    cpdef unsigned phase(self, Py_ssize_t slot) except? 99
    cpdef bint wake(self) except -1
