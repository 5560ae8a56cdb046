"""From a validated request to a slot, and from a completed slot to its requests' answers.

One dispatcher per model version and front end. It decides where a request waits, when it is refused,
and what becomes of the requests in a slot whose run failed or whose worker died:

- a worker dies: its slots are run again elsewhere as they are; at the second death of the same batch
  each request gets a slot of its own;
- ``run`` raises, or the worker's answer contradicts the mirror: each request gets a slot of its own, and
  one that already was alone gets the error;
- a request alone in its slot whose workers died twice in a way that blames it gets an error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap

from gateway._kernels import ring
from gateway.clock import NS_PER_S, NS_PER_US, monotonic_ns
from gateway.errors import DeadlineExceeded, GatewayError, InferenceFailed, QueueFull
from gateway.serving import geometry
from gateway.serving.channel import Channel
from gateway.serving.lane import Lane, materialise
from gateway.serving.request import Request, ShapeKey, Slot, State, Timer, Timing
from gateway.telemetry.metrics import VersionMetrics
from gateway.tensors import Signature

log = logging.getLogger("gateway.dispatcher")

BLAMING_SIGNALS = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
)
"""Deaths that a request can cause. SIGKILL comes from outside (an operator, the OOM killer)."""

DEATHS_OF_A_BATCH = 2
"""Workers that may die holding a batch before its requests are run one by one."""

DEATHS_OF_A_REQUEST = 2
"""Workers that may die of a request alone before it is answered with an error."""

MAX_SHAPES = 4096
"""Shapes a lane numbers before it begins anew; bounds the memory of a model with variable dims."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a dispatcher.

    Attributes:
        max_queue_size: requests waiting for a worker.
        queue_timeout_ns: default time in the queue; 0 for none.
        lane_bytes: budget of a lane's input memory.
    """

    max_queue_size: int
    queue_timeout_ns: int
    lane_bytes: int


class Dispatcher:
    """Lanes, queue and workers of one version, in one front end. Belongs to the event loop.

    Args:
        signature: the model's.
        limits: bounds.
        board: mapping of the version's board.
        metrics: told about batches.
        call_later: the event loop's, for deadlines.
        on_lane: called with each new lane, whose bell is then to be watched (`on_bell`).
        on_convicted: called when a request, and not the version, turned out to kill workers.
    """

    def __init__(
        self,
        signature: Signature,
        limits: Limits,
        board: mmap,
        metrics: VersionMetrics,
        call_later: Callable[[float, Callable[[Request], None], Request], Timer],
        on_lane: Callable[[Lane], None],
        on_convicted: Callable[[], None],
    ) -> None:
        self.signature = signature
        self.metrics = metrics
        self.limits = limits
        self._board = board
        self._call_later = call_later
        self._on_lane = on_lane
        self._on_convicted = on_convicted
        self.lanes: list[Lane] = []  # by number
        self._shapes: dict[geometry.Dims, tuple[ShapeKey, Lane]] = {}
        self._next_shape_id = 0
        self._queue: deque[Request] = deque()
        self._cursors: dict[int, Slot] = {}  # by shape id: the open slot to append to
        self._closed: set[Slot] = set()  # unsealed as far as known, and nothing more is appended
        self._in_flight = 0
        self._workers: dict[int, Channel] = {}  # by incarnation

    @property
    def has_workers(self) -> bool:
        """Whether anybody could run a batch now."""
        return bool(self._workers)

    # Requests

    def submit(self, request: Request) -> None:
        """Place the request in a slot, or queue it.

        Raises:
            InvalidRequest: its data do not decode.
            QueueFull: too many are waiting.
        """
        bound = self.limits.max_queue_size
        if self._in_flight >= bound and self.waiting() >= bound:
            raise QueueFull(f"the queue is full: queue.max_size is {bound} requests")
        if self._queue or not self._place(request):
            materialise(request.call)
            request.move(State.QUEUED)
            self._queue.append(request)
        self._in_flight += 1
        if request.deadline_ns:
            delay_s = max(0, request.deadline_ns - monotonic_ns()) / NS_PER_S
            request.timer = self._call_later(delay_s, self.expire, request)

    def cancel(self, request: Request) -> None:
        """The client is gone: the request never runs unless a worker has it already."""
        if request.state is not State.ENDED:
            self._take_back(request)
            request.end()
            self._in_flight -= 1
            self._pump()

    def expire(self, request: Request) -> None:
        """Its time in the queue is over: answered now, unless a worker has it already."""
        if request.state is State.ENDED or not self._take_back(request):
            return
        self._in_flight -= 1
        request.fail(DeadlineExceeded("the request's time in the queue ran out before it was run"))
        self._pump()

    def waiting(self) -> int:
        """Requests that no worker has taken yet."""
        queued = sum(request.state is State.QUEUED for request in self._queue)
        return queued + sum(len(slot.requests) for slot in self._unsealed())

    def fail_all(self, error: GatewayError) -> None:
        """End every request: the version is gone."""
        placed = [r for lane in self.lanes for slot in lane.slots for r in slot.requests]
        for request in [*self._queue, *placed]:
            if request.state is not State.ENDED:
                request.fail(error)
        self._queue.clear()
        self._in_flight = 0

    # Workers

    def worker_up(self, incarnation: int, channel: Channel) -> None:
        """A worker is ready: give it every lane."""
        self._workers[incarnation] = channel
        for lane in self.lanes:
            self._offer(lane, channel)
        self._pump()

    def worker_died(self, incarnation: int) -> None:
        """A worker's death is confirmed: have what it held run elsewhere."""
        channel = self._workers.pop(incarnation, None)
        if channel is not None:
            channel.close()
        for lane in self.lanes:
            for slot, phase in list(lane.held_by(incarnation)):
                if phase == ring.SEALED:
                    self._rerun(lane, slot, incarnation)
                else:
                    self._finish(lane, slot, phase)
            lane.producer.wake_all()
        self._pump()

    def worker_exited(self, incarnation: int, signal_number: int, timed_out: bool) -> None:
        """How a dead worker ended: judge the requests that were alone with it."""
        if signal_number not in BLAMING_SIGNALS and not timed_out:
            return
        for lane in self.lanes:
            for slot in lane.slots:
                if slot.last_owner != incarnation or len(slot.requests) != 1:
                    continue
                request = slot.requests[0]
                request.blame += 1
                if request.blame < DEATHS_OF_A_REQUEST or request.state is State.ENDED:
                    continue
                if self._take_back(request):
                    self._in_flight -= 1
                    self._on_convicted()
                    request.fail(
                        InferenceFailed("workers died each time they ran this request alone")
                    )
        self._pump()

    def on_bell(self, lane: Lane) -> None:
        """A worker reported completions."""
        with contextlib.suppress(BlockingIOError):  # collected meanwhile
            os.eventfd_read(lane.bell)
        while True:
            for slot, phase in lane.collect():
                self._finish(lane, slot, phase)
            self._pump()
            if lane.producer.arm():
                return

    def close(self) -> None:
        """Give back every lane; requests must have been failed before."""
        for lane in self.lanes:
            lane.close()
        for channel in self._workers.values():
            channel.close()
        self.lanes.clear()
        self._workers.clear()

    # Placing

    def _place(self, request: Request) -> bool:
        key, lane = self._shapes.get(request.dims) or self._learn_shape(request.dims)
        cursor = self._cursors.get(key.id)
        if cursor is not None and not request.solo:
            fits = cursor.rows + request.rows <= key.shape.capacity
            if fits and lane.append(cursor, request):
                lane.producer.wake()
                return True
            del self._cursors[key.id]
            if not fits:
                self._closed.add(cursor)
        if len(self._closed) > len(self._workers):
            self._unsealed()
            if len(self._closed) > len(self._workers):
                return False
        if not lane.has_free_slot():
            return False
        slot = lane.open(request, key)
        if request.solo or slot.rows == key.shape.capacity:
            self._closed.add(slot)
        else:
            self._cursors[key.id] = slot
        lane.producer.wake()
        return True

    def _learn_shape(self, dims: geometry.Dims) -> tuple[ShapeKey, Lane]:
        """Number a shape that was not seen before, and find or make its lane."""
        if len(self._shapes) >= MAX_SHAPES:
            self._shapes.clear()  # ids go on: a worker never sees one with two meanings
        capacity = geometry.capacity_of(self.signature, dims, self.limits.lane_bytes)
        shape = geometry.shape_of(self.signature, dims, capacity)
        spec = geometry.lane_spec(self.signature, shape, self.limits.lane_bytes)
        lane = next((lane for lane in self.lanes if lane.spec == spec), None)
        if lane is None:
            lane = Lane(len(self.lanes), spec, self.signature, self._board)
            self.lanes.append(lane)
            lane.producer.arm()
            self._on_lane(lane)
            for channel in self._workers.values():
                self._offer(lane, channel)
        learned = self._shapes[dims] = ShapeKey(self._next_shape_id, shape), lane
        self._next_shape_id += 1
        return learned

    def _offer(self, lane: Lane, channel: Channel) -> None:
        channel.send("lane", lane.fds, lane=lane.number, spec=lane.spec.to_wire())

    def _unsealed(self) -> list[Slot]:
        """Slots that no worker has taken, after a look; forgets the others."""
        self._closed = {s for s in self._closed if self.lanes[s.lane].is_unsealed(s)}
        self._cursors = {
            shape_id: s
            for shape_id, s in self._cursors.items()
            if self.lanes[s.lane].is_unsealed(s)
        }
        return [*self._closed, *self._cursors.values()]

    def _pump(self) -> None:
        """Move queued requests into slots for as long as there is room."""
        while self._queue:
            request = self._queue[0]
            if request.state is State.QUEUED and not self._place(request):
                return
            self._queue.popleft()

    def _take_back(self, request: Request) -> bool:
        """Keep a request from running; False when a worker has it."""
        if request.state is State.QUEUED:
            return True  # the pump skips what has ended
        slot = request.slot
        if slot is None or not self.lanes[slot.lane].drop(slot, request):
            return False
        if slot.rows == 0:
            self._forget(slot)
        else:
            self.lanes[slot.lane].producer.wake()
        return True

    def _forget(self, slot: Slot) -> None:
        self._closed.discard(slot)
        if self._cursors.get(slot.key.id) is slot:
            del self._cursors[slot.key.id]

    def _release(self, lane: Lane, slot: Slot) -> None:
        self._forget(slot)
        lane.release(slot)

    # Finishing

    def _finish(self, lane: Lane, slot: Slot, phase: int) -> None:
        placements = lane.outputs(slot) if phase == ring.DONE else None
        if placements is not None:
            self._answer(lane, slot, placements)
            self._release(lane, slot)
            return
        text = (
            lane.error(slot) if phase == ring.FAILED else "a worker's answer did not hold together"
        )
        if len(slot.requests) > 1:
            self._split(lane, slot)
            return
        request = slot.requests[0]
        self._release(lane, slot)
        if request.state is State.PLACED:
            self._in_flight -= 1
            request.fail(InferenceFailed(f"the model failed on this request: {text}"))

    def _answer(self, lane: Lane, slot: Slot, placements: list[geometry.Placement]) -> None:
        started_ns, finished_ns = lane.producer.times(slot.index)
        compute_ns = max(0, finished_ns - started_ns)
        self.metrics.batch(slot.rows, compute_ns)
        for request in slot.requests:
            if request.state is not State.PLACED:
                continue  # cancelled while it ran
            self._in_flight -= 1
            request.end()
            timing = Timing(max(0, started_ns - request.arrived_ns), compute_ns, slot.rows)
            try:
                request.on_answer(lane.views(slot, placements, request), timing)
            except GatewayError as error:
                request.on_error(error)
            except Exception:
                log.exception("an answer could not be encoded")
                request.on_error(GatewayError("the answer could not be encoded"))

    def _rerun(self, lane: Lane, slot: Slot, incarnation: int) -> None:
        """A slot whose worker died: run it again as it is, or request by request."""
        slot.deaths += 1
        slot.last_owner = incarnation
        if len(slot.requests) > 1 and slot.deaths >= DEATHS_OF_A_BATCH:
            self._split(lane, slot)
        elif all(request.state is State.ENDED for request in slot.requests):
            self._release(lane, slot)
        else:
            self._forget(slot)
            lane.producer.retry(slot.index)
            lane.producer.wake()

    def _split(self, lane: Lane, slot: Slot) -> None:
        """Queue each live request of a slot anew, first in line and without mates."""
        live = [request for request in slot.requests if request.state is State.PLACED]
        for request in live:
            lane.copy_out(slot, request)
            request.solo = True
            request.move(State.QUEUED)
        self._release(lane, slot)
        self._queue.extendleft(reversed(live))
        self._pump()


def deadline_ns(call_timeout_us: int | None, limits: Limits, arrived_ns: int) -> int:
    """When a request's time in the queue ends; the shorter of its own and the model's, 0 for none."""
    candidates = [limits.queue_timeout_ns, (call_timeout_us or 0) * NS_PER_US]
    timeouts = [timeout for timeout in candidates if timeout > 0]
    return arrived_ns + min(timeouts) if timeouts else 0
