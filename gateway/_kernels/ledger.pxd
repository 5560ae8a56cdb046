"""What other kernels may use of the ledger: counting a request without a Python call."""

from cpython.buffer cimport Py_buffer
from libc.stdint cimport uint32_t, uint64_t


cdef extern from "ledger_layout.h" nogil:
    ctypedef struct gw_requests:
        uint32_t magic, layout
        uint64_t waiting, last_inference_ms
        uint64_t codes[21]
        uint64_t rows, success_ns, fail_ns, queue_ns, compute_ns
        uint64_t compared, agreed, shadow_dropped, shadow_failed
        uint64_t request_buckets[17]
        uint64_t queue_buckets[17]
        uint64_t latency[832]


cdef class _Memory:
    cdef Py_buffer view
    cdef bint held
    cdef char *at(self, Py_ssize_t offset, Py_ssize_t size) except NULL


cdef class RequestCounters:
    cdef _Memory memory
    cdef gw_requests *section
    cdef void count_answer(self, uint64_t rows, uint64_t total_ns, uint64_t queue_ns,
                           uint64_t compute_ns) noexcept nogil
    cdef void count_failure(self, int code, uint64_t total_ns) noexcept nogil
    cdef void set_waiting(self, uint64_t requests) noexcept nogil
