"""Copies between flat bytes and tensors of any strides.

A slot of the batch ring is flat bytes; a tensor is whatever its owner made it: a transposed view, a
broadcast row, a reversed one. Both copies walk the tensor in C order and the flat side in steps of
one item, so only the tensor's strides need describing. `plan` first folds that description:
trailing dims that are contiguous become one larger item (all of them: a single memmove), and outer
dims that step evenly become one.

Rejected: NumPy's C API, which would tie the wheels to a NumPy version and spare nothing, and typed
memoryviews, which are bound to one dtype and one rank each.

Trusted: that an exporter describes its own memory truthfully (PEP 3118). Checked, in release builds
too: everything that a caller passes.
"""

from cpython.buffer cimport (
    PyBUF_FULL_RO, PyBuffer_IsContiguous, PyBuffer_Release, PyObject_GetBuffer,
)
from libc.string cimport memmove, strchr

cdef extern from "Python.h":
    # With NULL for the error a huge int is clipped, and a clipped one fails every range check here.
    Py_ssize_t PyNumber_AsSsize_t(object number, void* error) except? -1

cdef enum:
    MAX_RANK = 8  # as in gateway/tensors.py; bounds Walk and the depth of copy_dim
    NOGIL_BYTES = 1 << 20  # from here on a copy takes longer than handing the GIL over


cdef struct Walk:
    # How to visit a tensor in C order: dims innermost first, each item contiguous.
    Py_ssize_t item  # bytes
    int rank  # 0: the whole tensor is one item
    Py_ssize_t[MAX_RANK] extent
    Py_ssize_t[MAX_RANK] stride  # bytes


def copy_in(dst, dst_offset, src) -> int:
    """Copies the elements of a tensor, in C order, into flat bytes.

    Args:
        dst: a writable C-contiguous buffer of any format. Borrowed for the call.
        dst_offset: where in `dst` to begin, in bytes; needs no alignment.
        src: a buffer of rank 0 to 8, any strides, any fixed-size items; may be read-only. Borrowed
            for the call. Where it overlaps `dst`, the bytes written are unspecified.

    Returns:
        The bytes written: the elements of `src` times its item size.

    Raises:
        ValueError: the elements do not fit in `dst` at `dst_offset`, or the rank is over 8. Nothing
            has been written.
        TypeError: not a buffer, or one that cannot be copied as bytes (Python objects, indirect),
            or a `dst` that is read-only or not C-contiguous. Nothing has been written.
    """
    return transfer(dst, "dst", dst_offset, src, "src", True)


def copy_out(src, src_offset, dst) -> int:
    """Copies flat bytes into the elements of a tensor, in C order: the inverse of `copy_in`.

    Args:
        src: a C-contiguous buffer of any format; may be read-only. Borrowed for the call.
        src_offset: where in `src` to begin, in bytes; needs no alignment.
        dst: a writable buffer of rank 0 to 8, any strides, any fixed-size items. Borrowed for the
            call. Where its elements share memory, the last in C order stays. Where it overlaps
            `src`, the bytes written are unspecified.

    Returns:
        The bytes read: the elements of `dst` times its item size.

    Raises:
        ValueError: `src` holds fewer bytes from `src_offset` on, or the rank is over 8. Nothing has
            been written.
        TypeError: not a buffer, or one that cannot be copied as bytes (Python objects, indirect),
            or a `src` that is not C-contiguous, or a `dst` that is read-only. Nothing has been
            written.
    """
    return transfer(src, "src", src_offset, dst, "dst", False)


def move(buffer, dst_offset, src_offset, nbytes) -> None:
    """Moves bytes inside one buffer; the two ranges may overlap.

    Args:
        buffer: a writable C-contiguous buffer of any format. Borrowed for the call.
        dst_offset: where the bytes go, in bytes.
        src_offset: where they are, in bytes.
        nbytes: how many.

    Raises:
        ValueError: a range leaves the buffer or a number is negative. Nothing has been written.
        TypeError: not a buffer, or one that is read-only, not C-contiguous or of Python objects.
    """
    cdef Py_buffer view
    cdef Py_ssize_t to = PyNumber_AsSsize_t(dst_offset, NULL)
    cdef Py_ssize_t start = PyNumber_AsSsize_t(src_offset, NULL)
    cdef Py_ssize_t size = PyNumber_AsSsize_t(nbytes, NULL)
    acquire(buffer, &view, "buffer", True, True)
    try:
        check_range("dst", to, size, view.len)
        check_range("src", start, size, view.len)
        if size >= NOGIL_BYTES:
            with nogil:
                memmove(<char*>view.buf + to, <char*>view.buf + start, size)
        else:
            memmove(<char*>view.buf + to, <char*>view.buf + start, size)
    finally:
        PyBuffer_Release(&view)


cdef Py_ssize_t transfer(
    flat, str flat_role, offset, tensor, str tensor_role, bint inward
) except -1:
    """Copies `tensor` into `flat` at byte `offset` (inward) or back; returns the bytes copied."""
    cdef Py_buffer bytes_view, tensor_view
    cdef Walk walk
    cdef char* start
    cdef Py_ssize_t begin = PyNumber_AsSsize_t(offset, NULL)
    acquire(flat, &bytes_view, flat_role, inward, True)
    try:
        acquire(tensor, &tensor_view, tensor_role, not inward, False)
        try:
            check_range(flat_role, begin, tensor_view.len, bytes_view.len)
            plan(&tensor_view, tensor_role, &walk)
            start = <char*>bytes_view.buf + begin
            if tensor_view.len == 0:
                pass  # the dims beside the empty one may be huge
            elif tensor_view.len >= NOGIL_BYTES:
                with nogil:
                    copy_all(&walk, start, <char*>tensor_view.buf, inward)
            else:
                copy_all(&walk, start, <char*>tensor_view.buf, inward)
            return tensor_view.len
        finally:
            PyBuffer_Release(&tensor_view)
    finally:
        PyBuffer_Release(&bytes_view)


cdef int acquire(owner, Py_buffer* view, str role, bint writable, bint contiguous) except -1:
    """Takes the buffer of `owner`, which the caller must release, unless this raises.

    Asks the exporter for everything and checks here, because exporters differ in what they raise.
    """
    cdef str fault
    PyObject_GetBuffer(owner, view, PyBUF_FULL_RO)
    if view.suboffsets != NULL:
        fault = "an indirect buffer (one with suboffsets) cannot be copied"
    elif view.format != NULL and strchr(view.format, c"O") != NULL:
        fault = "a buffer of Python objects cannot be copied"
    elif writable and view.readonly:
        fault = "expected a writable buffer, got a read-only one"
    elif contiguous and not PyBuffer_IsContiguous(view, c"C"):
        fault = "expected a C-contiguous buffer"
    else:
        return 0
    PyBuffer_Release(view)
    raise TypeError(f"{role}: {fault}")


cdef int check_range(str role, Py_ssize_t offset, Py_ssize_t nbytes, Py_ssize_t size) except -1:
    """Raises ValueError unless `nbytes` from `offset` on lie in `size` bytes; cannot overflow."""
    if nbytes < 0:
        raise ValueError("nbytes: must not be negative")
    if offset < 0:
        raise ValueError(f"{role}_offset: must not be negative")
    if nbytes > size - offset:
        raise ValueError(f"{role}_offset: the range leaves the buffer of {size} bytes")
    return 0


cdef int plan(const Py_buffer* view, str role, Walk* walk) except -1:
    """Describes the tensor in as few dims as it takes. ValueError if its rank is over MAX_RANK."""
    cdef int dim, top
    cdef Py_ssize_t extent, stride
    if view.ndim > MAX_RANK:
        raise ValueError(f"{role}: rank {view.ndim} is over the limit of {MAX_RANK}")
    walk.rank = 0
    if view.strides == NULL:  # C-contiguous; some exporters (ctypes) leave it at that
        walk.item = view.len
        return 0
    walk.item = view.itemsize
    for dim in range(view.ndim - 1, -1, -1):
        extent = view.shape[dim]
        stride = view.strides[dim]
        if extent == 1:
            continue
        top = walk.rank - 1
        if top < 0 and stride == walk.item:
            walk.item *= extent
        elif top >= 0 and stride == walk.stride[top] * walk.extent[top]:
            walk.extent[top] *= extent
        else:
            walk.extent[walk.rank] = extent
            walk.stride[walk.rank] = stride
            walk.rank += 1
    return 0


cdef void copy_all(const Walk* walk, char* flat, char* tensor, bint inward) noexcept nogil:
    """Copies the whole walk; `tensor` is its first element."""
    if walk.rank > 0:
        copy_dim(walk, walk.rank - 1, flat, tensor, inward)
    elif inward:
        memmove(flat, tensor, walk.item)
    else:
        memmove(tensor, flat, walk.item)


cdef char* copy_dim(
    const Walk* walk, int dim, char* flat, char* tensor, bint inward
) noexcept nogil:
    """Copies `dim` and all dims inside it; returns where the flat side goes on."""
    cdef Py_ssize_t i
    if dim > 0:
        for i in range(walk.extent[dim]):
            flat = copy_dim(walk, dim - 1, flat, tensor + i * walk.stride[dim], inward)
        return flat
    if inward:
        copy_items(flat, walk.item, tensor, walk.stride[0], walk.extent[0], walk.item)
    else:
        copy_items(tensor, walk.stride[0], flat, walk.item, walk.extent[0], walk.item)
    return flat + walk.extent[0] * walk.item


cdef void copy_items(
    char* dst, Py_ssize_t dst_step,
    const char* src, Py_ssize_t src_step,
    Py_ssize_t count, size_t item,
) noexcept nogil:
    """Copies `count` items, one after the other, each side at its own step."""
    # A constant size makes the memmove in `copy_run` one load and one store, at any alignment.
    if item == 4:
        copy_run(dst, dst_step, src, src_step, count, 4)
    elif item == 8:
        copy_run(dst, dst_step, src, src_step, count, 8)
    elif item == 2:
        copy_run(dst, dst_step, src, src_step, count, 2)
    elif item == 1:
        copy_run(dst, dst_step, src, src_step, count, 1)
    else:
        copy_run(dst, dst_step, src, src_step, count, item)


cdef inline void copy_run(
    char* dst, Py_ssize_t dst_step,
    const char* src, Py_ssize_t src_step,
    Py_ssize_t count, size_t item,
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(count):
        memmove(dst + i * dst_step, src + i * src_step, item)
