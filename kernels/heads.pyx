"""The Python face of http_head.h and http_answer.h.

The fast lane uses the two headers themselves; this is for their tests and for the few that want what
they do in Python. It adds no rule of its own.
"""

from collections import namedtuple
from enum import Enum

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.string cimport memcpy

cdef extern from "http_head.h" nogil:
    enum:
        GW_HEAD_ASIDE, GW_HEAD_MORE, GW_HEAD_PLAIN
    ctypedef struct gw_head:
        int32_t head_bytes, target, target_len
        int64_t content_length, json_bytes
        int32_t media, request_id, request_id_len, traceparent, traceparent_len
    int gw_parse_head(const char *data, size_t n, gw_head *head)

cdef extern from "http_answer.h" nogil:
    enum:
        GW_UINT_MAX_CHARS, GW_REQUEST_ID_CHARS, GW_DATE_CHARS
    size_t gw_put_uint(char *out, uint64_t value)
    void gw_request_id(char *out, uint64_t *state)
    void gw_put_date(char *out, int64_t unix_s)


class Aside(Enum):
    """The type of `ASIDE`."""

    ASIDE = "aside"


ASIDE = Aside.ASIDE
"""What `parse` says of a request that is not for the fast lane, whatever may follow."""

Head = namedtuple(
    "Head",
    ("head_bytes", "target", "content_length", "json_bytes", "media", "request_id", "traceparent"),
)


cdef text_at(const char *data, int32_t offset, int32_t length):
    return None if offset < 0 else data[offset : offset + length].decode("ascii")


def parse(data, Py_ssize_t start=0):
    """Reads the head of a request.

    Args:
        data: a C-contiguous buffer. Borrowed for the call.
        start: where in it the request begins, in bytes.

    Returns:
        The head if the request is plain, None while bytes are missing, ASIDE if it is not plain. What
        is plain, and the numbers of `media`: see http_head.h.

    Raises:
        ValueError: `start` is not within the data.
        TypeError: not a buffer.
    """
    cdef Py_buffer view
    cdef gw_head head
    cdef const char *at
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if not 0 <= start <= view.len:
            raise ValueError(f"start: must be within the buffer of {view.len} bytes")
        at = <const char *>view.buf + start
        verdict = gw_parse_head(at, <size_t>(view.len - start), &head)
        if verdict != GW_HEAD_PLAIN:
            return None if verdict == GW_HEAD_MORE else ASIDE
        return Head(
            head.head_bytes,
            text_at(at, head.target, head.target_len),
            head.content_length,
            None if head.json_bytes < 0 else head.json_bytes,
            head.media,
            text_at(at, head.request_id, head.request_id_len),
            text_at(at, head.traceparent, head.traceparent_len),
        )
    finally:
        PyBuffer_Release(&view)


def uint_text(uint64_t value) -> bytes:
    """A number from 0 to 2^64 - 1 in decimal; OverflowError for any other."""
    cdef char[GW_UINT_MAX_CHARS] out
    return PyBytes_FromStringAndSize(out, <Py_ssize_t>gw_put_uint(out, value))


def date_text(int64_t unix_s) -> bytes:
    """A time as HTTP writes it; before 1970 or after the year 9999, the nearest that is not."""
    cdef char[GW_DATE_CHARS] out
    gw_put_date(out, unix_s)
    return PyBytes_FromStringAndSize(out, GW_DATE_CHARS)


cdef class RequestIds:
    """Makes the ids of requests that bring none: unique, not secret.

    Args:
        seed: 16 random bytes, of this process alone: two that share them make the same ids.
    """

    cdef uint64_t[2] state

    def __init__(self, bytes seed not None):
        if len(seed) != sizeof(self.state):
            raise ValueError(f"seed: expected {sizeof(self.state)} bytes, got {len(seed)}")
        memcpy(self.state, <const char *>seed, sizeof(self.state))

    def take(self) -> bytes:
        """A new id: 32 lower-case hex digits."""
        cdef char[GW_REQUEST_ID_CHARS] out
        gw_request_id(out, self.state)
        return PyBytes_FromStringAndSize(out, GW_REQUEST_ID_CHARS)
