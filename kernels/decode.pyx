"""Writes the numbers of a parsed JSON or msgpack body into a tensor's bytes.

The values come from clients, so every element is checked; nearly all of them are exact floats or
ints of the right size, so `run` writes those in a tight loop and stops at the first one that is
anything else. What it stops at goes to `put`, the one place that knows every rule and message.

No Python code of a caller's runs while elements are written: lists and tuples must be exactly that,
and numbers are read from the object, never asked for. So no list can change under the loops (the
GIL is held), and the debug build, which checks each index, only confirms it.

Messages name positions, sizes and types, never a value.
"""

from cpython.bool cimport PyBool_Check
from cpython.buffer cimport (
    PyBUF_FULL_RO, PyBuffer_IsContiguous, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_Check, PyFloat_CheckExact
from cpython.list cimport PyList_CheckExact
from cpython.long cimport PyLong_Check, PyLong_CheckExact
from cpython.tuple cimport PyTuple_CheckExact
from libc.math cimport isinf
from libc.string cimport memcpy, strchr

cdef extern from "Python.h":
    # With NULL for the error a huge int is clipped, and a clipped one fails every range check here.
    Py_ssize_t PyNumber_AsSsize_t(object number, void* error) except? -1
    # Sets `overflow` to the sign of an int outside long long.
    long long PyLong_AsLongLongAndOverflow(object number, int* overflow) except? -1
    double PyLong_AsDouble(object number) except? -1.0
    const Py_ssize_t PY_SSIZE_T_MAX

cdef extern from *:
    """
    #if PY_BIG_ENDIAN
    #error "decode.pyx writes the host's byte order, which must be little-endian"
    #endif

    enum { GW_BINARY, GW_BOOL, GW_INTEGER, GW_FLOAT };
    typedef struct {
        const char *name;
        int kind;
        int itemsize;        /* bytes */
        long long low, high; /* of UINT64, `high` is what fits here: `put` takes the rest */
    } gw_datatype;

    /* In the order of DataType.index (gateway/tensors.py). */
    static const gw_datatype GW_DATATYPES[] = {
        {"BOOL", GW_BOOL, 1, 0, 1},
        {"UINT8", GW_INTEGER, 1, 0, UINT8_MAX},
        {"UINT16", GW_INTEGER, 2, 0, UINT16_MAX},
        {"UINT32", GW_INTEGER, 4, 0, UINT32_MAX},
        {"UINT64", GW_INTEGER, 8, 0, INT64_MAX},
        {"INT8", GW_INTEGER, 1, INT8_MIN, INT8_MAX},
        {"INT16", GW_INTEGER, 2, INT16_MIN, INT16_MAX},
        {"INT32", GW_INTEGER, 4, INT32_MIN, INT32_MAX},
        {"INT64", GW_INTEGER, 8, INT64_MIN, INT64_MAX},
        {"FP16", GW_BINARY, 2, 0, 0},
        {"FP32", GW_FLOAT, 4, 0, 0},
        {"FP64", GW_FLOAT, 8, 0, 0},
        {"BF16", GW_BINARY, 2, 0, 0},
        {"BYTES", GW_BINARY, 0, 0, 0},
    };
    """
    enum:
        GW_BINARY, GW_BOOL, GW_INTEGER, GW_FLOAT
    ctypedef struct gw_datatype:
        const char* name
        int kind
        int itemsize
        long long low
        long long high
    const gw_datatype[14] GW_DATATYPES

cdef enum:
    DATATYPES = 14
    UINT64 = 4
    MAX_RANK = 8  # as in gateway/tensors.py; bounds Sink and the depth of `match`
    MAX_DEPTH = 100  # levels of lists in free nesting; bounds the depth of `flatten`

cdef struct Sink:
    # One call of `fill`: what is wanted and how far it is.
    const gw_datatype* datatype
    char* next  # where the next element goes; needs no alignment
    Py_ssize_t done  # elements seen; past `total` they are only counted
    Py_ssize_t total
    int rank
    Py_ssize_t[MAX_RANK] dims
    Py_ssize_t[MAX_RANK] path  # strict: the index taken in each dim above the current one


def fill(dst, dst_offset, datatype_index, tuple shape not None, data, bint strict) -> int:
    """Writes the elements of parsed JSON or msgpack data, little-endian and row-major.

    Integer types take ints in range; BOOL takes bools and the ints 0 and 1; FP32 and FP64 take
    floats and ints, infinities and NaN among them, but no finite number that would become infinite.
    Nothing is rounded to an integer or read from a string.

    Args:
        dst: a writable C-contiguous buffer of any format. Borrowed for the call.
        dst_offset: where in `dst` to begin, in bytes; needs no alignment.
        datatype_index: `DataType.index` of the elements.
        shape: the tensor's dims, at most 8.
        data: nested lists or tuples of numbers; for shape () also a bare number. Only read.
        strict: whether the nesting must be that of `shape`. Otherwise any nesting of up to 100
            levels will do, if the number of elements is right.

    Returns:
        The bytes written: the elements of `shape` times the item size.

    Raises:
        ValueError: a wrong element, nesting or count (`dst` may be partly written); a tensor that
            does not fit in `dst` at `dst_offset`, a bad shape, or a datatype that has no form here:
            FP16, BF16 and BYTES (nothing has been written).
        TypeError: `dst` is no buffer, read-only, not C-contiguous or of Python objects; a dim is
            not an int. Nothing has been written.
    """
    cdef Py_buffer view
    cdef Sink sink
    cdef Py_ssize_t nbytes
    cdef Py_ssize_t begin = PyNumber_AsSsize_t(dst_offset, NULL)
    sink.datatype = find_datatype(PyNumber_AsSsize_t(datatype_index, NULL))
    read_shape(&sink, shape)
    nbytes = sink.total * sink.datatype.itemsize
    acquire(dst, &view)
    try:
        if begin < 0:
            raise ValueError("dst_offset: must not be negative")
        if nbytes > view.len - begin:
            raise ValueError(f"dst_offset: the range leaves the buffer of {view.len} bytes")
        sink.next = <char*>view.buf + begin
        if strict:
            match(&sink, data, 0)
        elif sink.rank > 0 and as_list(data) is None:
            raise ValueError(f"data: expected a list, got {kind_of(data)}")
        else:
            flatten(&sink, data, 0)
        if sink.done != sink.total:
            raise ValueError(
                f"expected {elements(sink.total)} (shape {brief(shape)}), got {sink.done}"
            )
    finally:
        PyBuffer_Release(&view)
    return nbytes


cdef const gw_datatype* find_datatype(Py_ssize_t index) except NULL:
    """The row of a datatype. ValueError if there is none or it has no form as numbers."""
    if index < 0 or index >= DATATYPES:
        raise ValueError(f"datatype_index: expected 0 to {DATATYPES - 1}")
    if GW_DATATYPES[index].kind == GW_BINARY:
        raise ValueError(f"{GW_DATATYPES[index].name.decode()} is taken as binary data only")
    return &GW_DATATYPES[index]


cdef int read_shape(Sink* sink, tuple shape) except -1:
    """Sets rank, dims and total; the tensor's bytes then fit in Py_ssize_t. Nothing is done yet."""
    cdef Py_ssize_t dim, i, rank = len(shape)
    cdef Py_ssize_t limit = PY_SSIZE_T_MAX // sink.datatype.itemsize
    cdef bint empty = False
    if rank > MAX_RANK:
        raise ValueError(f"shape: rank {rank} is over the limit of {MAX_RANK}")
    for i in range(rank):
        if not PyLong_Check(shape[i]):
            raise TypeError("shape: dims must be ints")
        dim = PyNumber_AsSsize_t(shape[i], NULL)
        if dim < 0:
            raise ValueError("shape: dims must not be negative")
        empty = empty or dim == 0
        sink.dims[i] = dim
    sink.rank = rank
    sink.done = 0
    sink.total = 0 if empty else 1
    for i in range(rank):
        if not empty and sink.dims[i] > limit // sink.total:
            raise ValueError("shape: more elements than memory can hold")
        sink.total *= sink.dims[i]
    return 0


cdef int acquire(owner, Py_buffer* view) except -1:
    """Takes the buffer of `owner`, which the caller must release, unless this raises.

    Asks the exporter for everything and checks here, because exporters differ in what they raise.
    """
    cdef str fault
    PyObject_GetBuffer(owner, view, PyBUF_FULL_RO)
    if view.suboffsets != NULL:
        fault = "an indirect buffer (one with suboffsets) cannot be filled"
    elif view.format != NULL and strchr(view.format, c"O") != NULL:
        fault = "a buffer of Python objects cannot be filled"
    elif view.readonly:
        fault = "expected a writable buffer, got a read-only one"
    elif not PyBuffer_IsContiguous(view, c"C"):
        fault = "expected a C-contiguous buffer"
    else:
        return 0
    PyBuffer_Release(view)
    raise TypeError(f"dst: {fault}")


cdef int match(Sink* sink, data, int depth) except -1:
    """Writes `data`, whose nesting must be that of the dims from `depth` on."""
    cdef list values
    cdef Py_ssize_t i = 0
    if depth == sink.rank:
        return put(sink, data)
    values = as_list(data)
    if values is None:
        raise ValueError(
            f"{place(sink, depth)}: expected a list of {sink.dims[depth]}, got {kind_of(data)}"
        )
    if len(values) != sink.dims[depth]:
        raise ValueError(
            f"{place(sink, depth)}: expected a list of {sink.dims[depth]},"
            f" got {elements(len(values))}"
        )
    while True:
        if depth == sink.rank - 1:
            i = run(sink, values, i)
        if i == len(values):
            return 0
        sink.path[depth] = i
        match(sink, values[i], depth + 1)
        i += 1


cdef int flatten(Sink* sink, data, int depth) except -1:
    """Writes every number in `data`, however nested; once `total` are written it only counts."""
    cdef list values = as_list(data)
    cdef Py_ssize_t i = 0
    if values is None:
        if sink.done < sink.total:
            return put(sink, data)
        sink.done += 1
        return 0
    if depth == MAX_DEPTH:
        raise ValueError(f"data: nested over the limit of {MAX_DEPTH} levels")
    while True:
        i = run(sink, values, i)
        if i == len(values):
            return 0
        flatten(sink, values[i], depth + 1)
        i += 1


cdef Py_ssize_t run(Sink* sink, list values, Py_ssize_t i) except -1:
    """Writes the plain numbers at the head of values[i:], while they and the tensor last.

    Returns the index of the first value it did not write; that one may be good or bad.
    """
    cdef const gw_datatype* datatype = sink.datatype
    cdef Py_ssize_t begin = i, end = min(len(values), i + (sink.total - sink.done))
    cdef char* at = sink.next
    cdef int overflow = 0
    cdef long long integer
    cdef object item
    while i < end:
        item = values[i]
        if datatype.kind == GW_FLOAT:
            if PyFloat_CheckExact(item):
                if not store_float(at, PyFloat_AS_DOUBLE(item), datatype.itemsize):
                    break
            elif PyLong_CheckExact(item):
                integer = PyLong_AsLongLongAndOverflow(item, &overflow)
                if overflow or not store_float(at, <double>integer, datatype.itemsize):
                    break
            else:
                break
        elif PyLong_CheckExact(item) or (datatype.kind == GW_BOOL and PyBool_Check(item)):
            integer = PyLong_AsLongLongAndOverflow(item, &overflow)
            if overflow or not datatype.low <= integer <= datatype.high:
                break
            store_integer(at, integer, datatype.itemsize)
        else:
            break
        at += datatype.itemsize
        i += 1
    sink.next = at
    sink.done += i - begin
    return i


cdef int put(Sink* sink, item) except -1:
    """Writes one element or raises ValueError; the caller has made sure that there is room."""
    cdef int kind = sink.datatype.kind
    cdef bint fits
    if kind == GW_FLOAT:
        if PyFloat_Check(item):
            fits = store_float(sink.next, PyFloat_AS_DOUBLE(item), sink.datatype.itemsize)
        elif PyLong_Check(item) and not PyBool_Check(item):
            fits = put_as_float(sink, item)
        else:
            raise ValueError(f"element {sink.done}: expected a number, got {kind_of(item)}")
    elif PyLong_Check(item) and (kind == GW_BOOL or not PyBool_Check(item)):
        fits = put_integer(sink, item)
    else:
        wanted = "a boolean" if kind == GW_BOOL else "an integer"
        raise ValueError(f"element {sink.done}: expected {wanted}, got {kind_of(item)}")
    if not fits:
        raise ValueError(f"element {sink.done}: out of range for {sink.datatype.name.decode()}")
    sink.next += sink.datatype.itemsize
    sink.done += 1
    return 0


cdef bint put_as_float(Sink* sink, item) except -1:
    """Stores an int as the nearest float; False if there is none."""
    try:
        return store_float(sink.next, PyLong_AsDouble(item), sink.datatype.itemsize)
    except OverflowError:
        return False


cdef bint put_integer(Sink* sink, item) except -1:
    """Stores an int; False if it is out of range."""
    cdef int overflow = 0
    cdef unsigned long long upper
    cdef long long integer = PyLong_AsLongLongAndOverflow(item, &overflow)
    if overflow > 0 and sink.datatype == &GW_DATATYPES[UINT64]:
        try:
            upper = item
        except OverflowError:
            return False
        memcpy(sink.next, &upper, sizeof(upper))
        return True
    if overflow or not sink.datatype.low <= integer <= sink.datatype.high:
        return False
    store_integer(sink.next, integer, sink.datatype.itemsize)
    return True


cdef inline bint store_float(char* at, double value, int itemsize) noexcept:
    """Stores a double, or the nearest float; False: finite, but too large for that."""
    cdef float narrow
    if itemsize == 8:
        memcpy(at, &value, 8)
        return True
    narrow = <float>value
    memcpy(at, &narrow, 4)
    return not (isinf(narrow) and not isinf(value))


cdef inline void store_integer(char* at, long long value, int itemsize) noexcept:
    """Stores the low bytes of an integer that is in range: on this host, its narrow form."""
    if itemsize == 8:
        memcpy(at, &value, 8)
    elif itemsize == 4:
        memcpy(at, &value, 4)
    elif itemsize == 2:
        memcpy(at, &value, 2)
    else:
        memcpy(at, &value, 1)


cdef inline list as_list(data):
    """`data` as a list, None if it is neither list nor tuple; tuples (msgpack's) are copied."""
    if PyList_CheckExact(data):
        return <list>data
    if PyTuple_CheckExact(data):
        return list(<tuple>data)
    return None


cdef str place(Sink* sink, int depth):
    """The path of strict nesting down to `depth`, for a message."""
    if depth == 0:
        return "data"
    return f"element {brief([sink.path[i] for i in range(depth)])}"


cdef str brief(numbers):
    """Ints as JSON without spaces."""
    return f"[{','.join([str(n) for n in numbers])}]"


cdef str elements(Py_ssize_t count):
    """A count with its noun."""
    return "1 element" if count == 1 else f"{count} elements"


cdef str kind_of(item):
    """What a client would call the type of a parsed value."""
    if as_list(item) is not None:
        return "a list"
    for types, words in (
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a float"),
        (str, "a string"),
        (type(None), "null"),
        (dict, "an object"),
        ((bytes, bytearray, memoryview), "binary data"),
    ):
        if issubclass(type(item), types):  # isinstance would ask the item for its __class__
            return words
    return "an unsupported value"
