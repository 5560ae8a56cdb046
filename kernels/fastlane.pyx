"""The fast lane: from the bytes of a plain inference request to a slot, and from a slot to the bytes of its answer.

One `Connection` per client is what uvloop calls. A plain request (`http_head.h` says which are) is parsed
here, looked up by its *skeleton* - everything in its body but tensor data - and, when a request with that
skeleton was understood before, written straight into the open slot that its rows belong to. No aiohttp
object, task or future is made, and nothing is parsed twice but numbers. Its answer is written from the
slot's memory to the socket when the worker has completed it.

Where a model's requests are shared out among versions, a target has no route but a *fork*, which Python is
asked for each request's route; a connection then tells of the head that it is reading.

What is not for this file goes elsewhere, and says why it is right: a body with a new skeleton to the
general parsers (`frontend.frontdoor`), which also teach the skeleton; a request that is unusual in any way to
aiohttp (`frontend.aside`), on the same connection and in its turn; a full slot, a queue, a deadline to
the dispatcher. The lane is correct by being narrow.

One request of a connection is in flight at a time: what a client sends behind it waits here, so answers are
in order without a queue of them. Reading fills one buffer for all connections, or, once a head announced
more than came with it, that request's own: a body is received where it stays until it is copied into the
slot. Answers go to the socket from slot memory; what it does not take is copied before the slot is freed.

Rejected: parsing with llhttp (callbacks cost more than the whole head here); `transport.write` for every
answer (it keeps a view of the slot past the callback, or needs a copy); several requests of one connection
in flight (nobody pipelines, and every connection would carry the queue).
"""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize, PyByteArray_GET_SIZE
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItem
from cpython.object cimport PyObject
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

from gateway._kernels.burst cimport Burst
from gateway._kernels.skeleton cimport (
    MAX_SPANS, SPAN_ID, gw_span, parse_numbers, split_json, split_msgpack,
)
from gateway._kernels.slots cimport (
    ENDED, Intake, Request, ShapeKey, Slot, SlotMemory, enter,
)
from gateway._kernels.templates cimport (
    FROM_BIN, FROM_TAIL, KEPT_SPANS, MAX_PIECES, Piece, Route, Source, Split, Template,
)

cdef extern from "http_head.h" nogil:
    int GW_HEAD_MORE, GW_HEAD_PLAIN
    enum:
        GW_HEAD_MAX_ID, GW_MEDIA_MSGPACK, GW_MEDIA_VND_MSGPACK, GW_MEDIA_OTHER
    ctypedef struct gw_head:
        int32_t head_bytes, target, target_len
        int64_t content_length, json_bytes
        int32_t media, request_id, request_id_len
    int gw_parse_head(const char *data, size_t n, gw_head *head)

cdef extern from "ring_layout.h" nogil:
    enum:
        GW_OPEN

cdef extern from "http_answer.h" nogil:
    enum:
        GW_REQUEST_ID_CHARS, GW_DATE_CHARS
    size_t gw_put_uint(char *out, uint64_t value)
    void gw_request_id(char *out, uint64_t *state)

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        void *msg_name
        int msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    enum:
        MSG_DONTWAIT, MSG_NOSIGNAL
    ssize_t send(int fd, const void *data, size_t n, int flags)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)

cdef enum:
    SCRATCH_BYTES = 1 << 15  # of one read; what a larger body has beyond it goes to a buffer of its own
    TURN_REQUESTS = 16  # that one connection may have answered at once in a turn of the event loop
    HELD_BYTES = 1 << 16  # of requests behind the one in flight; beyond it the socket is not read
    WHOLE_BYTES = 1 << 14  # an answer up to this is gathered and sent in one piece
    KEY_HEAD_BYTES = 1 + 8 * KEPT_SPANS  # of a key: the body's form, and the count of each span
    MAX_KEY_BYTES = 1 << 13  # of a skeleton with its prefix; longer ones are parsed anew each time
    POOL_BYTES = 1 << 25  # of receive buffers that are kept for the next large body
    POOL_STEP = 1 << 16  # their sizes are multiples of this

cdef enum Mode:
    IDLE  # nothing in flight; perhaps part of a head
    BODY  # a head is here, and its body is arriving
    RUNNING  # a request of the fast lane is in flight
    ASIDE  # aiohttp has the connection
    CLOSED

cdef enum Form:
    JSON_TEXT = 1
    BINARY = 2
    RAW = 3
    PACKED = 4  # plus the media type's number


cdef class FastRequest(Request):
    """A request of a known skeleton: bytes in, bytes out."""

    cdef Connection connection
    cdef Template template
    cdef Route route
    cdef const char *body  # borrowed during the submission, then of `owner`
    cdef Py_ssize_t tail  # where raw tensors begin in the body
    cdef gw_span[KEPT_SPANS] spans
    cdef object owner  # what keeps `body` or `raw` alive
    cdef const char *raw  # the inputs, decoded, one after the other; NULL: they are in the body
    cdef bytes id

    @property
    def lengths(self):
        """Nothing is padded."""
        return {}

    @property
    def string_bytes(self):
        """It holds no strings."""
        return 0

    cdef int fill(self, char *inputs, Py_ssize_t row) noexcept nogil:
        """Write its rows into a slot's inputs from this row on; -1: its numbers do not decode."""
        cdef int i
        for i in range(self.template.source_count):
            if self.put(&self.template.sources[i], inputs + self.template.sources[i].offset
                        + row * self.template.sources[i].row_bytes) < 0:
                return -1
        return 0

    cdef int put(self, Source *s, char *to) noexcept nogil:
        if self.raw is not NULL:
            memcpy(to, self.raw + s.raw_at, s.nbytes)
        elif s.kind == FROM_TAIL:
            memcpy(to, self.body + self.tail + s.at, s.nbytes)
        elif s.kind == FROM_BIN:
            memcpy(to, self.body + self.spans[s.span].begin, s.nbytes)
        else:
            return parse_numbers(
                self.body + self.spans[s.span].begin, self.spans[s.span].end - self.spans[s.span].begin,
                s.datatype, to, s.count, s.dims, s.rank)
        return 0

    def write(self, lane, Slot slot not None):
        """Write its rows behind those of the slot. Unreadable: its numbers do not decode."""
        cdef SlotMemory memory = lane.memory
        if self.fill(memory.inputs + slot.index * memory.input_slot_bytes, slot.rows) < 0:
            raise Unreadable

    def materialise(self):
        """Own its data, decoded: it has to wait. Unreadable: its numbers do not decode."""
        if self.raw is not NULL:
            return
        cdef bytes raw = PyBytes_FromStringAndSize(NULL, self.template.raw_bytes)
        cdef char *to = PyBytes_AS_STRING(raw)
        cdef int i
        for i in range(self.template.source_count):
            if self.put(&self.template.sources[i], to + self.template.sources[i].raw_at) < 0:
                raise Unreadable
        self.keep(raw)

    cdef void keep(self, bytes raw):
        self.owner = raw
        self.raw = PyBytes_AS_STRING(raw)

    def take_back(self, copies):
        """Own these as its data: its slot is given up."""
        self.keep(b"".join([tensor.data for tensor in copies]))

    def drop_data(self):
        """It will not be written again."""
        self.owner = None

    def fail(self, error):
        """Answer it with an error."""
        if self.connection is not None:
            self.connection.door.refuse(self.connection, self.route, error, self.arrived_ns)

    cdef bint answer_from(
        self, const char *outputs, uint64_t started_ns, uint64_t finished_ns
    ) except -1:
        cdef Connection connection = self.connection
        self.phase = ENDED
        self.route.intake.in_flight -= 1
        if connection is None:
            return True
        try:
            self.reply(outputs, started_ns, finished_ns)
        except Exception as error:  # whatever it is, it is this client's alone
            connection.door.broken(connection, error)
        return True

    cdef int reply(
        self, const char *outputs, uint64_t started_ns, uint64_t finished_ns
    ) except -1:
        cdef Connection connection = self.connection
        cdef uint64_t now_ns
        try:
            if self.template.encode is None:
                connection.send_pieces(self, outputs)
            else:
                self.encode(outputs)
        except Exception as error:
            connection.door.refuse(connection, self.route, error, self.arrived_ns)
            return 0
        now_ns = connection.door.burst.now()
        self.route.counters.count_answer(
            self.rows, now_ns - self.arrived_ns if now_ns > self.arrived_ns else 0,
            started_ns - self.arrived_ns if started_ns > self.arrived_ns else 0,
            finished_ns - started_ns if finished_ns > started_ns else 0)
        connection.finish()
        return 0

    cdef int encode(self, const char *outputs) except -1:
        cdef Template t = self.template
        cdef list views = []
        cdef Py_ssize_t offset, row_bytes, nbytes
        for offset, row_bytes, nbytes in t.outputs:
            views.append(memoryview(PyBytes_FromStringAndSize(
                outputs + offset + self.start * row_bytes, nbytes)))
        body, _media_type, json_bytes = t.encode(self.id, views)
        self.connection.respond(t.head, body, -1 if json_bytes is None else json_bytes)
        return 0


class Unreadable(Exception):
    """A request's numbers do not decode: the general parsers say why."""


cdef class Door:
    """What the connections of one front end share. Python's side of it is a subclass.

    Args:
        loop: the event loop.
        max_request_bytes: longest body.
        max_head_bytes: longest head; aiohttp refuses longer ones.
        seed: 16 random bytes, for request ids.
        may_linger: there is a core to spare for waiting (`Burst`).

    ``is_open`` is whether requests take the fast lane at all; otherwise all go to aiohttp. ``is_guarded`` is
    whether ``may`` is asked before a request is taken; what may not goes to aiohttp, which refuses it.

    Subclasses have ``resolve(target) -> Route | Fork | None``, ``may(connection, route) -> bool``,
    ``serve(connection, route, body, json_bytes, media, split)``, ``refuse(connection, route, error,
    arrived_ns)``, ``step_aside(connection) -> Aside``, ``opened(connection)``, ``closed(connection)``,
    ``broken(connection, error)`` and ``abandoned(route, arrived_ns)``. A fork is any object with
    ``choose(connection) -> Route | None``, which is asked for each request of its target; during that call,
    and during ``may``, the connection tells of the request's head.
    """

    cdef readonly Burst burst
    cdef public bint is_open
    cdef public bint is_guarded
    cdef dict routes
    cdef uint64_t epoch  # of the routes
    cdef Py_ssize_t max_request_bytes
    cdef Py_ssize_t max_head_bytes
    cdef uint64_t[2] id_state
    cdef object scratch
    cdef object scratch_view
    cdef char *data
    cdef char[WHOLE_BYTES] out
    cdef dict pool
    cdef Py_ssize_t pooled

    def __init__(
        self, loop, Py_ssize_t max_request_bytes, Py_ssize_t max_head_bytes, bytes seed,
        bint may_linger=False,
    ):
        self.burst = Burst(loop.call_soon, may_linger)
        self.routes = {}
        self.max_request_bytes = max_request_bytes
        self.max_head_bytes = max_head_bytes
        self.is_open = True
        memcpy(self.id_state, PyBytes_AS_STRING(seed), min(16, len(seed)))
        self.scratch = bytearray(SCRATCH_BYTES)
        self.scratch_view = memoryview(self.scratch)
        self.data = PyByteArray_AS_STRING(self.scratch)
        self.pool = {}

    @property
    def route_count(self):
        """Targets that are remembered."""
        return len(self.routes)

    def forget_routes(self):
        """Versions or routes have changed: each target is resolved anew."""
        self.routes.clear()
        self.epoch += 1

    cdef object route(self, const char *target, Py_ssize_t n):
        """The route of a target, its fork, or None."""
        cdef bytes name = PyBytes_FromStringAndSize(target, n)
        cdef PyObject *found = PyDict_GetItem(self.routes, name)
        if found is not NULL:
            return <object>found
        route = self.resolve(name)
        if route is not None:
            self.routes[name] = route
        return route

    cdef bytearray take_buffer(self, Py_ssize_t nbytes):
        """A buffer for a body of so many bytes."""
        cdef Py_ssize_t size = (nbytes + POOL_STEP - 1) // POOL_STEP * POOL_STEP
        cdef list free = self.pool.get(size)
        if free:
            self.pooled -= size
            return free.pop()
        return PyByteArray_FromStringAndSize(NULL, size)

    cdef void give_buffer(self, bytearray buffer):
        cdef Py_ssize_t size = PyByteArray_GET_SIZE(buffer)
        if self.pooled + size <= POOL_BYTES:
            self.pooled += size
            self.pool.setdefault(size, []).append(buffer)


cdef inline bint is_lower(const char *text, const char *lower, Py_ssize_t n) noexcept nogil:
    """Whether a text is the other one but for the case of its letters."""
    cdef Py_ssize_t i
    cdef char c
    for i in range(n):
        c = text[i]
        if c"A" <= c <= c"Z":
            c += 32
        if c != lower[i]:
            return False
    return True


cdef class Connection:
    """One client's connection: what uvloop calls, as an `asyncio.BufferedProtocol`.

    Attributes:
        active_ns: monotonic time of the last request's begin or end, 0 before the first byte.
    """

    cdef readonly Door door
    cdef readonly object transport
    cdef object is_closing
    cdef object buffered
    cdef int fd
    cdef Mode mode
    cdef bytes held  # what came behind the request in flight, or part of a head
    cdef bint is_paused
    cdef bint is_reading
    cdef bint is_clogged  # it does not read its answers
    cdef bint is_waiting  # for its next turn
    cdef bint has_backlog  # the transport may have bytes that the socket did not take
    cdef bint is_half_closed
    cdef bytearray body
    cdef Py_ssize_t body_bytes
    cdef Py_ssize_t filled
    cdef gw_head head
    cdef const char *head_data  # where `head` was parsed, while Python may ask about it; else NULL
    cdef Route route
    cdef object request  # in flight, of any kind
    cdef readonly object aside
    cdef bytes last_target  # of the request before, whose route and template the next one nearly always has
    cdef bytes last_text
    cdef object last_fork  # of the target, where it has one
    cdef Route last_route
    cdef Template last_template
    cdef uint64_t last_epoch
    cdef char[GW_HEAD_MAX_ID] request_id
    cdef int request_id_len
    cdef readonly uint64_t active_ns

    def __init__(self, Door door not None):
        self.door = door
        self.mode = IDLE

    # What the event loop calls

    def connection_made(self, transport):
        """A client is here."""
        self.transport = transport
        self.is_closing = transport.is_closing
        self.buffered = transport.get_write_buffer_size
        self.fd = transport.get_extra_info("socket").fileno()
        self.active_ns = self.door.burst.now()
        self.door.opened(self)

    def connection_lost(self, exc):
        """It is gone: its request is cancelled."""
        cdef Mode mode = self.mode
        self.mode = CLOSED
        self.door.closed(self)
        if mode == BODY:
            self.route.intake.receiving -= 1
        elif mode == RUNNING:
            self.abandon()
        self.body = None
        self.held = None
        if self.aside is not None:
            self.aside.handler.connection_lost(exc)
            self.aside = None
        self.transport = self.is_closing = self.buffered = None

    def eof_received(self):
        """The client sends nothing more, because it is gone or because it was all.

        Nobody can tell which. What a worker has is answered; what waits does not run for nobody.
        """
        self.is_half_closed = True
        if self.mode == ASIDE:
            return self.aside.handler.eof_received()
        return self.mode == RUNNING and self.route.dispatcher.has_worker(self.request)

    def pause_writing(self):
        """The client reads slowly: what it has asked for is answered, and nothing more taken."""
        self.is_clogged = True
        if self.aside is not None:
            self.aside.handler.pause_writing()

    def resume_writing(self):
        """It has caught up."""
        self.is_clogged = False
        if self.aside is not None:
            self.aside.handler.resume_writing()
        self.read_held()

    def get_buffer(self, Py_ssize_t sizehint):
        """Where the next bytes go."""
        if self.mode == BODY:
            return memoryview(self.body)[self.filled : self.body_bytes]
        return self.door.scratch_view

    def buffer_updated(self, Py_ssize_t nbytes):
        """They are there."""
        cdef bytes data
        if self.mode == IDLE and (self.is_clogged or self.is_waiting):
            self.hold(PyBytes_FromStringAndSize(self.door.data, nbytes))
        elif self.mode == IDLE:
            if self.held is None:
                self.is_reading = True
                try:
                    self.read(self.door.data, nbytes)
                finally:
                    self.is_reading = False
                if self.held is None:
                    return
            else:
                self.held += PyBytes_FromStringAndSize(self.door.data, nbytes)
            self.read_held()
        elif self.mode == BODY:
            self.filled += nbytes
            if self.filled == self.body_bytes:
                self.take_body()
        elif self.mode == ASIDE:
            self.feed_aside(PyBytes_FromStringAndSize(self.door.data, nbytes))
        elif self.mode == RUNNING:
            self.hold(PyBytes_FromStringAndSize(self.door.data, nbytes))

    # Reading

    cdef bint read(self, const char *data, Py_ssize_t n) except -1:
        """Take one request from the begin of the data and hold what is behind it.

        Returns False when it is incomplete: what there is of its head is held.
        """
        cdef gw_head *head = &self.head
        cdef Py_ssize_t end
        cdef int verdict = gw_parse_head(data, n, head)
        if verdict == GW_HEAD_MORE and self.door.is_open:
            self.held = PyBytes_FromStringAndSize(data, n)
            return False
        if (verdict == GW_HEAD_PLAIN and self.door.is_open
                and head.head_bytes <= self.door.max_head_bytes):
            self.route = self.find_route(data)
            if (self.route is not None and head.media != GW_MEDIA_OTHER
                    and head.content_length <= self.door.max_request_bytes
                    and (not self.door.is_guarded or self.may(data))):
                self.request_id_len = 0
                if head.request_id >= 0:
                    self.request_id_len = head.request_id_len
                    memcpy(self.request_id, data + head.request_id, head.request_id_len)
                end = head.head_bytes + head.content_length
                if n < end:
                    self.await_body(data + head.head_bytes, n - head.head_bytes)
                    return True
                if n > end:
                    self.held = PyBytes_FromStringAndSize(data + end, n - end)
                self.submit(data + head.head_bytes, head.content_length)
                return True
        self.begin_aside(PyBytes_FromStringAndSize(data, n))
        return True

    cdef Route find_route(self, const char *data):
        """The route of the request whose head is at `data`: the last one's, or one that is looked up."""
        cdef const char *target = data + self.head.target
        cdef Py_ssize_t n = self.head.target_len
        if not (self.last_epoch == self.door.epoch and self.last_target is not None
                and PyBytes_GET_SIZE(self.last_target) == n
                and memcmp(PyBytes_AS_STRING(self.last_target), target, n) == 0):
            found = self.door.route(target, n)
            self.last_target = PyBytes_FromStringAndSize(target, n)
            self.last_epoch = self.door.epoch
            self.last_fork = None
            if found is None or isinstance(found, Route):
                self.enter_route(found)
            else:
                self.last_fork = found
        if self.last_fork is not None:
            self.choose(data)
        return self.last_route

    cdef int choose(self, const char *data) except -1:
        """Have the target's fork choose the route of this request."""
        self.head_data = data
        try:
            found = self.last_fork.choose(self)
        finally:
            self.head_data = NULL
        if found is not self.last_route:
            self.enter_route(found)
        return 0

    cdef int enter_route(self, Route route) except -1:
        self.last_route = route
        self.last_text = self.last_template = None  # another route's template writes to other slots
        return 0

    cdef bint may(self, const char *data) except -1:
        """Whether the request whose head is at `data` may be answered."""
        self.head_data = data
        try:
            return self.door.may(self, self.route)
        finally:
            self.head_data = NULL

    def header(self, str name not None):
        """The first value of a header of the request whose head is being read; None where it has none.

        None at any other time, too: the bytes are gone then.

        Args:
            name: in lower case.
        """
        cdef bytes wanted = name.encode()
        cdef Py_ssize_t n = PyBytes_GET_SIZE(wanted)
        cdef const char *at
        cdef const char *line_end
        cdef const char *end
        if self.head_data is NULL:
            return None
        at = self.head_data + self.head.target + self.head.target_len + len(b" HTTP/1.1\r\n")
        end = self.head_data + self.head.head_bytes - len(b"\r\n")
        while at < end:
            line_end = <const char *>memchr(at, c"\r", end - at)  # the only ones are at the ends of lines
            if line_end - at > n and at[n] == c":" and is_lower(at, PyBytes_AS_STRING(wanted), n):
                # What is plain is ASCII: there is nothing else to decode.
                return (at + n + 1)[:line_end - at - n - 1].decode("ascii").strip(" \t")
            at = line_end + len(b"\r\n")
        return None

    def address(self):
        """Of the client, as the transport has it; empty where it has none."""
        peer = self.transport.get_extra_info("peername")
        if isinstance(peer, (tuple, list)):
            return str(peer[0])
        return "" if peer is None else str(peer)

    cdef int read_held(self) except -1:
        """Go on with what is held, for as long as nothing is in flight.

        Raises nothing: whoever answered the last request has others to answer.
        """
        if self.is_reading or self.is_waiting:  # an answer made at once: whoever reads goes on
            return 0
        try:
            return self.take_held()
        except Exception as error:
            self.door.broken(self, error)
            return 0

    cdef int take_held(self) except -1:
        cdef bytes data
        cdef int left = TURN_REQUESTS
        self.is_reading = True
        try:
            while self.mode == IDLE and self.held is not None and not self.is_clogged:
                if left == 0:
                    self.is_waiting = True
                    self.door.burst.call_soon(self.take_turn)
                    return 0
                left -= 1
                data = self.held
                self.held = None
                if not self.read(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data)):
                    break
        finally:
            self.is_reading = False
        if self.is_paused and not self.is_clogged and self.mode != RUNNING and self.mode != CLOSED:
            self.is_paused = False
            self.transport.resume_reading()
        return 0

    def take_turn(self):
        """The others have had theirs."""
        self.is_waiting = False
        if self.mode != CLOSED:
            self.read_held()

    cdef int hold(self, bytes data) except -1:
        """Keep what came too early."""
        self.held = data if self.held is None else self.held + data
        if len(self.held) > HELD_BYTES:  # also when it was paused: aiohttp may have resumed
            self.is_paused = True
            self.transport.pause_reading()
        return 0

    cdef int await_body(self, const char *data, Py_ssize_t n) except -1:
        self.mode = BODY
        self.route.intake.receiving += 1
        self.body_bytes = self.head.content_length
        self.body = self.door.take_buffer(self.body_bytes)
        memcpy(PyByteArray_AS_STRING(self.body), data, n)
        self.filled = n
        self.active_ns = self.door.burst.now()
        return 0

    cdef int take_body(self) except -1:
        cdef bytearray body = self.body
        self.body = None
        self.route.intake.receiving -= 1
        self.submit(PyByteArray_AS_STRING(body), self.body_bytes)
        self.door.give_buffer(body)
        return 0

    # Submitting

    cdef int submit(self, const char *body, Py_ssize_t n) except -1:
        """Hand a whole request on: to a slot when its skeleton is known, else to the general parsers."""
        cdef char[MAX_KEY_BYTES] key
        cdef gw_span[MAX_SPANS] spans
        cdef int span_count = 0
        cdef Py_ssize_t key_bytes
        cdef bytes skeleton = None
        cdef PyObject *found
        cdef int64_t text_bytes = self.head.json_bytes
        self.mode = RUNNING
        self.active_ns = self.door.burst.now()
        if (self.last_text is not None and text_bytes == PyBytes_GET_SIZE(self.last_text)
                and text_bytes <= n and not self.is_msgpack()
                and memcmp(PyBytes_AS_STRING(self.last_text), body, text_bytes) == 0):
            if self.place(self.last_template, body, n, spans):
                return 0
        if self.route.shadow is not None:  # its inputs are to be kept, and its outputs
            key_bytes = -1
        else:
            key_bytes = self.skeleton(body, n, key, spans, &span_count)
        if key_bytes >= 0:
            skeleton = PyBytes_FromStringAndSize(key, key_bytes)
            found = PyDict_GetItem(self.route.templates, skeleton)
            if found is not NULL:
                if span_count == 0 and 0 < text_bytes <= n and not self.is_msgpack():
                    self.last_text = PyBytes_FromStringAndSize(body, text_bytes)
                    self.last_template = <Template>found
                if self.place(<Template>found, body, n, spans):
                    return 0
                skeleton = None
        cdef Split split = None
        cdef int i
        if skeleton is not None:
            split = Split(skeleton, [
                (spans[i].begin, spans[i].end, spans[i].count, spans[i].kind)
                for i in range(span_count)])
        self.door.serve(
            self, self.route, PyBytes_FromStringAndSize(body, n), self.head.json_bytes, self.head.media,
            split)
        return 0

    cdef inline bint is_msgpack(self) noexcept nogil:
        return GW_MEDIA_MSGPACK <= self.head.media <= GW_MEDIA_VND_MSGPACK

    cdef Py_ssize_t skeleton(
        self, const char *body, Py_ssize_t n, char *key, gw_span *spans, int *span_count
    ) noexcept nogil:
        """What to look a body up by: its form, the numbers of each span, its text without them.

        Returns the key's bytes; -1 where the general parsers are to read it.
        """
        cdef Py_ssize_t text = n, length = 0, at, i
        cdef int form = JSON_TEXT
        if self.is_msgpack():
            form = PACKED + self.head.media
            if split_msgpack(body, n, key + KEY_HEAD_BYTES, MAX_KEY_BYTES - KEY_HEAD_BYTES,
                             &length, spans, span_count) < 0:
                return -1
        elif self.head.json_bytes == 0:
            form = RAW
        else:
            if self.head.json_bytes > 0:
                form = BINARY
                text = self.head.json_bytes
                if text > n:
                    return -1
            if split_json(body, text, key + KEY_HEAD_BYTES, MAX_KEY_BYTES - KEY_HEAD_BYTES,
                          &length, spans, span_count) < 0:
                return -1
        if span_count[0] > KEPT_SPANS:
            return -1
        key[0] = form
        for i in range(KEPT_SPANS):
            at = spans[i].count if i < span_count[0] else 0
            if i < span_count[0] and spans[i].kind == SPAN_ID:
                at = 0
            memcpy(key + 1 + 8 * i, &at, 8)
        if form == RAW:
            memcpy(key + 1, &n, 8)
        return KEY_HEAD_BYTES + length

    cdef bint place(self, Template template, const char *body, Py_ssize_t n, gw_span *spans) except -1:
        """Submit a request of a known skeleton; False: the general parsers are to say what is wrong."""
        cdef Route route = self.route
        cdef Intake intake = route.intake
        cdef ShapeKey key = template.key
        cdef FastRequest request
        cdef int i
        if not intake.is_open:
            return False
        request = FastRequest.__new__(FastRequest)
        request.tail = 0
        if self.head.json_bytes > 0:
            request.tail = self.head.json_bytes
        if n - request.tail != template.tail_bytes and template.tail_bytes >= 0:
            return False
        request.key, request.rows, request.level = key, template.rows, template.level
        request.solo = not key.takes_mates
        request.arrived_ns = self.active_ns
        request.template, request.route, request.body = template, route, body
        for i in range(template.span_count):
            request.spans[i] = spans[i]
            if spans[i].kind == SPAN_ID:
                request.id = PyBytes_FromStringAndSize(
                    body + spans[i].begin, spans[i].end - spans[i].begin)
        if template.slo_ns:
            request.due_ns = request.arrived_ns + template.slo_ns
        if template.timeout_ns:
            request.deadline_ns = request.arrived_ns + template.timeout_ns
        elif not intake.has_queue and intake.in_flight < intake.bound:
            i = self.append(request, key)
            if i < 0:
                return False
            if i > 0:
                self.door.burst.is_alone = False
                intake.in_flight += 1
                request.connection = self
                self.request = request
                return True
        self.door.burst.is_alone = intake.in_flight == 0
        try:
            route.dispatcher.check_room()
            route.dispatcher.admit(request)
        except Unreadable:
            return False
        except Exception as error:
            self.door.refuse(self, route, error, request.arrived_ns)
            return True
        request.connection = self
        self.request = request
        return True

    cdef int append(self, FastRequest request, ShapeKey key) except -2:
        """Put a request behind the rows of the open slot of its shape.

        Returns 1; 0 where that slot has no room or a worker has taken it; -1 where its numbers do not decode.
        """
        cdef Slot slot = key.cursor
        cdef SlotMemory memory
        if slot is None or request.solo or slot.rows + request.rows > key.limit:
            return 0
        memory = key.memory
        if memory.producer.phase(slot.index) != GW_OPEN:
            return 0
        if request.fill(memory.inputs + slot.index * memory.input_slot_bytes, slot.rows) < 0:
            return -1
        if not memory.producer.append(slot.index, request.rows, request.due_ns):
            return 0
        enter(slot, request)
        self.door.burst.touch(memory.producer, request.template.raw_bytes)
        return 1

    # Answering

    def began(self, request):
        """A request of the general parsers is in flight."""
        self.request = request

    def respond(self, bytes head not None, body not None, Py_ssize_t json_bytes=-1):
        """Send an answer; `finish` follows when the request is done with.

        Args:
            head: the status line and the headers that do not follow from the body and the moment.
            body: bytes.
            json_bytes: of the text before raw tensors; -1: no such header.
        """
        if self.mode == CLOSED:
            return
        cdef iovec[2] parts
        cdef const unsigned char[::1] view = body
        parts[0].iov_base = self.door.out
        parts[0].iov_len = self.put_head(head, view.shape[0], json_bytes)
        parts[1].iov_base = <void *>&view[0] if view.shape[0] else NULL
        parts[1].iov_len = view.shape[0]
        self.send(parts, 2)

    def finish(self):
        """The request in flight has been answered: the next one's turn."""
        cdef FastRequest request
        if isinstance(self.request, FastRequest):
            request = <FastRequest>self.request
            request.connection = None
        self.request = None
        if self.mode != RUNNING:
            return
        self.route = None
        self.mode = IDLE
        self.active_ns = self.door.burst.now()
        if not self.door.is_open:
            self.transport.close()  # as its answer said
            return
        if self.held is not None or self.is_paused:
            self.read_held()
        if self.is_half_closed and not self.is_reading and self.mode != RUNNING:
            if not (self.is_clogged and self.held is not None):
                self.transport.close()  # what is left of its last request will never come

    cdef Py_ssize_t put_head(self, bytes head, Py_ssize_t body_bytes, Py_ssize_t json_bytes) except -1:
        """Write an answer's head to the door's buffer; its bytes."""
        cdef char *out = self.door.out
        cdef char *to = out
        cdef Py_ssize_t n = PyBytes_GET_SIZE(head)
        if n > WHOLE_BYTES // 2:
            raise ValueError("an answer's head is too long")
        memcpy(to, PyBytes_AS_STRING(head), n)
        to += n
        memcpy(to, b"Content-Length: ", 16)
        to += 16
        to += gw_put_uint(to, body_bytes)
        if json_bytes >= 0:
            memcpy(to, b"\r\nInference-Header-Content-Length: ", 35)
            to += 35
            to += gw_put_uint(to, json_bytes)
        if not self.door.is_open:
            memcpy(to, b"\r\nConnection: close", 19)
            to += 19
        memcpy(to, b"\r\nDate: ", 8)
        to += 8
        self.door.burst.now()
        memcpy(to, self.door.burst.date, GW_DATE_CHARS)
        to += GW_DATE_CHARS
        memcpy(to, b"\r\nx-request-id: ", 16)
        to += 16
        if self.request_id_len:
            memcpy(to, self.request_id, self.request_id_len)
            to += self.request_id_len
        else:
            gw_request_id(to, self.door.id_state)
            to += GW_REQUEST_ID_CHARS
        memcpy(to, b"\r\n\r\n", 4)
        return to + 4 - out

    cdef int send_pieces(self, FastRequest request, const char *outputs) except -1:
        """Send an answer whose body is of pieces, from the slot's memory."""
        cdef iovec[MAX_PIECES + 1] parts
        cdef Template t = request.template
        cdef Py_ssize_t id_bytes = 0 if request.id is None else PyBytes_GET_SIZE(request.id)
        cdef Py_ssize_t json_bytes = t.json_bytes
        cdef Py_ssize_t text_bytes = 0
        cdef list texts = None
        cdef Piece *p
        cdef int i
        if self.mode == CLOSED:
            return 0
        if t.has_texts:
            texts = []
            for i in range(t.piece_count):
                p = &t.pieces[i]
                texts.append(None)
                if p.is_text:
                    texts[i] = t.writers[i](PyBytes_FromStringAndSize(
                        outputs + p.offset + request.start * p.row_bytes, p.nbytes))
                    text_bytes += len(<bytes?>texts[i])
        if json_bytes >= 0:
            json_bytes += id_bytes + text_bytes
        parts[0].iov_base = self.door.out
        parts[0].iov_len = self.put_head(t.head, t.body_bytes + text_bytes + id_bytes, json_bytes)
        for i in range(t.piece_count):
            p = &t.pieces[i]
            parts[i + 1].iov_len = p.nbytes
            if p.text is not NULL:
                parts[i + 1].iov_base = <void *>p.text
            elif p.is_id:
                parts[i + 1].iov_base = <void *>PyBytes_AS_STRING(request.id)
                parts[i + 1].iov_len = id_bytes
            elif p.is_text:
                parts[i + 1].iov_base = <void *>PyBytes_AS_STRING(<bytes>texts[i])
                parts[i + 1].iov_len = PyBytes_GET_SIZE(<bytes>texts[i])
            else:
                parts[i + 1].iov_base = <void *>(outputs + p.offset + request.start * p.row_bytes)
        return self.send(parts, t.piece_count + 1)

    cdef int send(self, iovec *parts, int count) except -1:
        """Send what the socket takes and give the transport a copy of the rest.

        The first part lies at the begin of the door's buffer. No view of any part outlives the call.
        """
        cdef Py_ssize_t total = 0, sent = 0, taken
        cdef msghdr message
        cdef char *to
        cdef int i
        cdef bytes rest
        if self.is_closing():  # its descriptor may be another connection's by now
            return 0
        for i in range(count):
            total += parts[i].iov_len
        if total <= WHOLE_BYTES:
            to = self.door.out + parts[0].iov_len
            for i in range(1, count):
                memcpy(to, parts[i].iov_base, parts[i].iov_len)
                to += parts[i].iov_len
            parts[0].iov_len = total
            count = 1
        if self.has_backlog:
            self.has_backlog = self.buffered() != 0
        if not self.has_backlog:
            message.msg_name = message.msg_control = NULL
            message.msg_namelen = message.msg_controllen = message.msg_flags = 0
            message.msg_iov = parts
            message.msg_iovlen = count
            if count == 1:
                sent = send(self.fd, parts[0].iov_base, total, MSG_DONTWAIT | MSG_NOSIGNAL)
            else:
                sent = sendmsg(self.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent == total:
                return 0
            if sent < 0:
                if errno != EAGAIN and errno != EINTR:
                    self.transport.abort()
                    return 0
                sent = 0
        rest = PyBytes_FromStringAndSize(NULL, total - sent)
        to = PyBytes_AS_STRING(rest)
        for i in range(count):
            taken = min(sent, <Py_ssize_t>parts[i].iov_len)
            sent -= taken
            memcpy(to, <char *>parts[i].iov_base + taken, parts[i].iov_len - taken)
            to += parts[i].iov_len - taken
        self.transport.write(rest)
        self.has_backlog = True
        return 0

    cdef int abandon(self) except -1:
        """The client is gone: what it asked for need not run."""
        cdef FastRequest request
        if isinstance(self.request, FastRequest):
            request = <FastRequest>self.request
            request.connection = None
        if self.request is not None:
            self.route.dispatcher.cancel(self.request)
            self.request = None
        self.door.abandoned(self.route, self.active_ns)
        return 0

    # Stepping aside

    cdef int begin_aside(self, bytes data) except -1:
        self.mode = ASIDE
        self.active_ns = self.door.burst.now()
        self.has_backlog = True
        if self.aside is None:
            self.aside = self.door.step_aside(self)
        self.aside.begin()
        self.feed_aside(data)
        return 0

    cdef int feed_aside(self, bytes data) except -1:
        rest = self.aside.feed(data)
        if rest:
            self.hold(rest)
        return 0

    def resume(self):
        """aiohttp has answered, and read its request to the end: the next one's turn."""
        if self.mode == ASIDE:
            self.mode = IDLE
            self.active_ns = self.door.burst.now()
            self.read_held()

    @property
    def is_busy(self):
        """A request of the fast lane is arriving or in flight."""
        return self.mode == BODY or self.mode == RUNNING

    @property
    def is_sending(self):
        """An answer has not been taken by the socket whole."""
        return self.has_backlog and self.transport is not None and self.buffered() != 0

    @property
    def is_aside(self):
        """aiohttp has the connection."""
        return self.mode == ASIDE
