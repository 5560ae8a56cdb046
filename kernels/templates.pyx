"""What the fast lane remembers: where the requests of a target go, and what those of a skeleton are made of.

Records that `frontend.learning` writes and the fast lane reads; nothing is decided here.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport uint64_t

from gateway._kernels.ledger cimport RequestCounters
from gateway._kernels.skeleton cimport SPAN_BIN, SPAN_ID, SPAN_NUMBERS
from gateway._kernels.slots cimport ShapeKey

NUMBERS = SPAN_NUMBERS
BIN = SPAN_BIN
ID = SPAN_ID
"""The kinds of a `Split`'s spans."""


cdef class Template:
    """What every request of one skeleton has in common.

    Args:
        key: the shape of its rows.
        rows: how many.
        level: its place in the queue's order.
        timeout_ns: its time in the queue, 0 for any.
        slo_ns: the latency that it aims at, 0 for any.
        tail_bytes: raw bytes behind the JSON text; -1: the whole body is text, or msgpack.
        span_count: spans that the splitter finds.
        sources: for each input (kind, span, at, nbytes, datatype, count, dims, offset, row_bytes), dims
            None where numbers may nest in any way.
        head: the answer's status line and headers, but those that follow from the body and the moment.
        json_bytes: of the answer's text before raw tensors, without id and texts of outputs; -1: no such
            header.
        pieces: of the answer's body: bytes, (offset, nbytes, row_bytes, writer) of an output in the slot, or
            None for the request's id. A writer makes text of an output's bytes; None: they go out as they
            are.
        encode: makes the body where it is not of pieces: called with the request's id (or None) and the
            address-free views of its outputs.
        outputs: for `encode`: (offset, row_bytes, nbytes) of each output.
    """

    def __cinit__(self):
        self.sources = NULL

    def __init__(
        self, ShapeKey key, Py_ssize_t rows, int level, uint64_t timeout_ns, uint64_t slo_ns,
        Py_ssize_t tail_bytes,
        int span_count, tuple sources, bytes head, Py_ssize_t json_bytes, tuple pieces, encode,
        tuple outputs,
    ):
        if span_count > KEPT_SPANS or len(pieces) > MAX_PIECES or self.sources is not NULL:
            raise ValueError("too many parts for a template")
        self.key, self.rows, self.level, self.timeout_ns = key, rows, level, timeout_ns
        self.slo_ns, self.tail_bytes, self.span_count = slo_ns, tail_bytes, span_count
        self.head, self.json_bytes, self.encode, self.outputs = head, json_bytes, encode, outputs
        self.source_count = len(sources)
        self.sources = <Source *>PyMem_Malloc(max(1, len(sources)) * sizeof(Source))
        if self.sources is NULL:
            raise MemoryError
        cdef Source *s
        cdef Piece *p
        cdef int i, j
        for i, (kind, span, at, nbytes, datatype, count, dims, offset, row_bytes) in enumerate(sources):
            s = &self.sources[i]
            s.kind, s.span, s.at, s.nbytes = kind, span, at, nbytes
            s.offset, s.row_bytes, s.datatype, s.count = offset, row_bytes, datatype, count
            s.raw_at = self.raw_bytes
            self.raw_bytes += nbytes
            s.rank = -1
            if dims is not None:
                s.rank = len(dims)
                for j in range(s.rank):
                    s.dims[j] = dims[j]
        self.kept = []
        self.writers = []
        for i, part in enumerate(pieces):
            p = &self.pieces[i]
            p.text, p.offset, p.row_bytes, p.nbytes = NULL, 0, 0, 0
            p.is_id = p.is_text = False
            writer = None
            if part is None:
                p.is_id = True
            elif isinstance(part, bytes):
                self.kept.append(part)
                p.text, p.nbytes = PyBytes_AS_STRING(part), PyBytes_GET_SIZE(part)
            else:
                p.offset, p.nbytes, p.row_bytes, writer = part
                p.is_text = writer is not None
            self.writers.append(writer)
            self.has_texts = self.has_texts or p.is_text
            if not p.is_text:
                self.body_bytes += p.nbytes
        self.piece_count = len(pieces)

    def __dealloc__(self):
        PyMem_Free(self.sources)


cdef class Route:
    """Where the requests of one target go, and what is known of their bodies.

    Args:
        version: the version that answers (`serving.routes.Version`).
        dispatcher: its dispatcher.
        exchange: how the general parsers are called, for `Door.serve`.
        counters: where answers are counted: the version's own, or its slice's.
        heads: heads of answers, by media type, for `Door.serve`.
        max_templates: skeletons that are remembered.
        shadow: who gets copies of these requests, so that `Door.serve` is to have all of them; None: nobody.
    """

    def __init__(
        self, version, dispatcher, exchange, RequestCounters counters not None, dict heads,
        Py_ssize_t max_templates, shadow=None,
    ):
        self.version = version
        self.dispatcher = dispatcher
        self.exchange = exchange
        self.intake = dispatcher.intake
        self.counters = counters
        self.heads = heads
        self.templates = {}
        self.max_templates = max_templates
        self.shadow = shadow

    def learn(self, bytes skeleton, Template template not None):
        """Remember what requests of a skeleton are."""
        if len(self.templates) >= self.max_templates:
            self.templates.clear()
        self.templates[skeleton] = template


cdef class Split:
    """A body as the splitter saw it, for whoever learns its skeleton.

    Attributes:
        skeleton: what to learn it by.
        spans: of the body, as (begin, end, count, kind).
    """

    def __init__(self, bytes skeleton, list spans):
        self.skeleton = skeleton
        self.spans = spans
