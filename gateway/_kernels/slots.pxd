"""What the fast lane uses of requests and slots without a Python call."""

from cpython.buffer cimport Py_buffer
from libc.stdint cimport uint64_t

from gateway._kernels.ring cimport Producer


cdef class Slot
cdef class SlotMemory


cdef class ShapeKey:
    cdef readonly Py_ssize_t id
    cdef readonly object shape
    cdef readonly Py_ssize_t capacity
    cdef public Py_ssize_t limit
    cdef readonly Py_ssize_t string_bytes
    cdef readonly Py_ssize_t lane
    cdef readonly bint takes_mates
    cdef readonly SlotMemory memory
    cdef readonly tuple dims
    cdef readonly bint is_bound
    cdef public Slot cursor


cdef class Slot:
    cdef readonly Py_ssize_t lane
    cdef readonly Py_ssize_t index
    cdef public list requests
    cdef public Py_ssize_t rows
    cdef public Py_ssize_t string_bytes
    cdef public ShapeKey key
    cdef public int deaths
    cdef public int last_owner
    cdef public bint awaits_judgement


cdef class Intake:
    cdef public Py_ssize_t in_flight
    cdef public Py_ssize_t receiving
    cdef public Py_ssize_t bound
    cdef public bint has_queue
    cdef public bint is_open


cdef class Request:
    cdef public ShapeKey key
    cdef public Slot slot
    cdef public Py_ssize_t rows
    cdef public Py_ssize_t start
    cdef public int level
    cdef public int blame
    cdef public bint solo
    cdef public uint64_t arrived_ns
    cdef public uint64_t deadline_ns
    cdef public uint64_t due_ns
    cdef int phase
    cdef int become(self, int phase) except -1
    cdef bint answer_from(self, const char *outputs, uint64_t started_ns, uint64_t finished_ns) except -1


cdef class SlotMemory:
    cdef readonly Producer producer
    cdef Py_buffer input_view
    cdef Py_buffer output_view
    cdef char *inputs
    cdef const char *outputs
    cdef Py_ssize_t input_slot_bytes
    cdef Py_ssize_t output_slot_bytes


cdef enum:
    NEW
    QUEUED
    PLACED
    ENDED


cdef void enter(Slot slot, Request request)
