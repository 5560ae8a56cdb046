"""What the fast lane uses of a burst without a Python call."""

from libc.stdint cimport int64_t, uint64_t

from gateway._kernels.ring cimport Producer


cdef enum:
    DATE_CHARS = 29  # as in http_answer.h


cdef class Burst:
    cdef object call_soon
    cdef dict listeners
    cdef int credit
    cdef bint may_linger
    cdef bint is_alone
    cdef object end_method
    cdef list producers
    cdef uint64_t now_ns
    cdef bint is_open
    cdef Py_ssize_t written
    cdef char[DATE_CHARS] date
    cdef int64_t date_s
    cdef uint64_t now(self) except? 0
    cdef int touch(self, Producer producer, Py_ssize_t nbytes) except -1
    cdef int linger(self, Producer producer) except -1
