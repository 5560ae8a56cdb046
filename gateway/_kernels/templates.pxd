"""What the fast lane uses of routes and templates without a Python call."""

from libc.stdint cimport uint64_t

from gateway._kernels.ledger cimport RequestCounters
from gateway._kernels.slots cimport Intake, ShapeKey


cpdef enum:
    MAX_PIECES = 32  # of an answer
    KEPT_SPANS = 4  # of a request of a known skeleton; bounds FastRequest

cpdef enum:
    FROM_TAIL = 0  # raw bytes behind the JSON text
    FROM_BIN = 1  # raw bytes within the body, at a span
    FROM_NUMBERS = 2  # the text of an array of numbers, at a span


cdef struct Source:
    # Where one input of a template's requests comes from, and where it goes.
    int kind
    int span  # which span, for FROM_BIN and FROM_NUMBERS
    Py_ssize_t at  # in the tail, for FROM_TAIL
    Py_ssize_t nbytes  # of the whole tensor
    Py_ssize_t raw_at  # where it lies in the request's private copy
    Py_ssize_t offset  # of its first row in a slot
    Py_ssize_t row_bytes
    int datatype
    Py_ssize_t count
    int rank  # of `dims`; below 0: the numbers may nest in any way
    Py_ssize_t[8] dims

cdef struct Piece:
    # A part of an answer's body: constant bytes, an output's rows, or the request's id.
    const char *text  # NULL: an output, or the id
    Py_ssize_t nbytes  # of the text, or of the output's rows
    Py_ssize_t offset  # of an output's first row in a slot
    Py_ssize_t row_bytes  # 0 for what has no rows
    bint is_id
    bint is_text  # an output as text, which `Template.writers` makes of its bytes


cdef class Template:
    cdef readonly ShapeKey key
    cdef Py_ssize_t rows
    cdef int level
    cdef uint64_t timeout_ns
    cdef uint64_t slo_ns
    cdef Py_ssize_t tail_bytes
    cdef int span_count
    cdef int source_count
    cdef Source *sources
    cdef Py_ssize_t raw_bytes
    cdef bytes head
    cdef Py_ssize_t json_bytes
    cdef list kept
    cdef Piece[MAX_PIECES] pieces
    cdef int piece_count
    cdef Py_ssize_t body_bytes  # without texts and the id
    cdef list writers  # by piece
    cdef bint has_texts
    cdef object encode
    cdef tuple outputs


cdef class Route:
    cdef readonly object version
    cdef readonly object dispatcher
    cdef readonly object exchange
    cdef readonly dict heads
    cdef readonly object shadow
    cdef readonly RequestCounters counters
    cdef Intake intake
    cdef dict templates
    cdef Py_ssize_t max_templates


cdef class Split:
    cdef readonly bytes skeleton
    cdef readonly list spans
