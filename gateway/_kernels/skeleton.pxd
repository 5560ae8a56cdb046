"""The C side of kernels/skeleton.pyx, where the functions are described, for other kernels."""

cdef enum:
    MAX_SPANS = 16  # most spans of a body; a body with more goes the general way
    SPAN_NUMBERS = 1  # a JSON array of numbers, from its first bracket to its last
    SPAN_BIN = 2  # the payload of a msgpack bin, without its header
    SPAN_ID = 3  # the inside of the string that is the request's id

cdef struct gw_span:
    # A range of a body that its skeleton leaves out.
    Py_ssize_t begin
    Py_ssize_t end
    Py_ssize_t count  # of SPAN_NUMBERS: its commas and one; of the others 0
    int kind

cdef int split_json(
    const char* text, Py_ssize_t n, char* skeleton, Py_ssize_t room, Py_ssize_t* skeleton_len,
    gw_span* spans, int* span_count,
) noexcept nogil

cdef int split_msgpack(
    const char* text, Py_ssize_t n, char* skeleton, Py_ssize_t room, Py_ssize_t* skeleton_len,
    gw_span* spans, int* span_count,
) noexcept nogil

cdef int parse_numbers(
    const char* text, Py_ssize_t n, int datatype_index, char* dst, Py_ssize_t count,
    const Py_ssize_t* dims, int rank,
) noexcept nogil
