"""From a validated request to a slot, and from a completed slot to its requests' answers.

One dispatcher per model version and front end. It decides where a request waits, when it is refused,
and what becomes of the requests in a slot whose run failed or whose worker died:

- a worker dies: its slots are run again elsewhere as they are; at the second death of the same batch
  each request gets a slot of its own;
- ``run`` raises, or the worker's answer contradicts the mirror: each request gets a slot of its own, and
  one that already was alone gets the error;
- a request alone in its slot when a second worker died of it waits for the supervisor's word on how that
  one ended: if both ended in a way that a request can cause, it is answered with an error.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Sequence
from mmap import mmap
from typing import NamedTuple

from gateway._kernels import ring
from gateway._kernels.ring import Producer
from gateway.clock import monotonic_ns
from gateway.errors import DeadlineExceeded, GatewayError, InferenceFailed, QueueFull
from gateway.protocols.call import InferCall
from gateway.serving.channel import Channel
from gateway.serving.deadlines import Deadlines, Scheduler
from gateway.serving.lane import Lane, Outputs
from gateway.serving.limits import Limits
from gateway.serving.placement import Placement
from gateway.serving.queue import RequestQueue
from gateway.serving.request import (
    CallRequest,
    Intake,
    OnAnswer,
    OnError,
    ShapeKey,
    Slot,
    State,
    Submission,
    Timing,
)
from gateway.serving.spill import Spills, viewed
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

_EXPIRED = "the request's time in the queue ran out before it was run"


class Fit(NamedTuple):
    """What requests that are like a call have in common.

    ``level`` is their place in the queue's order, ``timeout_ns`` their time in it, 0 for any; ``slo_ns`` is
    the latency that they aim at, 0 for any.
    """

    key: ShapeKey
    level: int
    timeout_ns: int
    slo_ns: int
    is_padded: bool


class Dispatcher:
    """Lanes, queue and workers of one version, in one front end. Belongs to the event loop.

    Args:
        signature: the model's.
        limits: bounds.
        board: mapping of the version's board.
        metrics: told about batches.
        loop: for deadlines.
        on_lane: called with each new lane, whose bell is then to be watched (`on_bell`).
        on_convicted: called when a request, and not the version, turned out to kill workers.
        wake: has a worker woken, now or soon, for rows that it could seal.
    """

    def __init__(
        self,
        signature: Signature,
        limits: Limits,
        board: mmap,
        metrics: VersionMetrics,
        loop: Scheduler,
        on_lane: Callable[[Lane], None],
        on_convicted: Callable[[], None],
        wake: Callable[[Producer], object] = Producer.wake,
    ) -> None:
        self.signature = signature
        self.metrics = metrics
        self._limits = limits
        self._loop = loop
        self._on_lane = on_lane
        self._on_convicted = on_convicted
        self._placement = Placement(signature, limits.lane_bytes, board, self._add_lane, wake)
        self._queue = RequestQueue(max(1, limits.priority_levels))
        self._spills = Spills()
        self.intake = Intake(limits.max_queue_size)
        self._deadlines = Deadlines(loop, self.expire)
        self._workers: dict[int, Channel] = {}  # by incarnation
        self._is_supervised = True
        self._is_closed = False

    @property
    def lanes(self) -> list[Lane]:
        """The lanes made so far."""
        return self._placement.lanes

    @property
    def has_workers(self) -> bool:
        """Whether anybody could run a batch now."""
        return bool(self._workers)

    # Requests

    def submit(
        self, call: InferCall, arrived_ns: int, on_answer: OnAnswer, on_error: OnError
    ) -> CallRequest:
        """Place a call in a slot, or queue it.

        Args:
            call: holds to the signature.
            arrived_ns: monotonic; its time in the queue counts from here.
            on_answer: called once with its outputs, unless `on_error` is, or it is cancelled.
            on_error: called once when it failed or expired.

        Raises:
            InvalidRequest: its data do not decode.
            TooLarge: its rows are larger than a lane.
            QueueFull: too many are waiting.
            Unavailable: there is no memory for its shape now.
        """
        self.check_room()
        key, lengths = self._placement.fit(call)
        deadline_ns = self._limits.deadline_ns(call.timeout_us, arrived_ns)
        due_ns = self._limits.due_ns(call.timeout_us, arrived_ns)
        level = self._limits.level(call.priority)
        request = CallRequest(
            call, key, lengths, level, arrived_ns, deadline_ns, on_answer, on_error, due_ns
        )
        self.admit(request)
        return request

    def check_room(self) -> None:
        """QueueFull when too many are waiting."""
        bound = self.intake.bound
        if self.intake.in_flight >= bound and self.waiting() >= bound:
            raise QueueFull(f"the queue is full: queue.max_size is {bound} requests")

    def admit(self, request: Submission) -> None:
        """Place a new request in a slot, or queue it.

        Raises:
            InvalidRequest: its data do not decode; nothing has happened to it.
        """
        if self._queue or not self._place(request):
            request.materialise()
            self._queue.put(request)
            self.intake.has_queue = True
            self.tell_depth()
        self.intake.in_flight += 1
        if request.deadline_ns:
            self._deadlines.add(request)

    def fit(self, call: InferCall) -> Fit:
        """What requests that are like this call have in common. TooLarge, Unavailable: see `submit`."""
        key, lengths = self._placement.fit(call)
        level = self._limits.level(call.priority)
        timeout_ns = self._limits.deadline_ns(call.timeout_us, 0)
        return Fit(key, level, timeout_ns, self._limits.due_ns(call.timeout_us, 0), bool(lengths))

    def cancel(self, request: Submission) -> None:
        """The client is gone: the request never runs unless a worker has it already."""
        if request.state is not State.ENDED and not self._is_closed:
            self._take_back(request)
            self._end(request)
            self._pump()

    def has_worker(self, request: Submission) -> bool:
        """Whether a worker has taken the request, so that it cannot be kept from running."""
        is_placed = request.state is State.PLACED and not self._is_closed
        return is_placed and not self._placement.is_unsealed(request)

    def expire(self, request: Submission) -> None:
        """Its time in the queue is over: answered now, unless a worker has it already."""
        if request.state is not State.ENDED and self._take_back(request):
            self._end(request, DeadlineExceeded(_EXPIRED))
            self._pump()

    def waiting(self) -> int:
        """Requests that no worker has taken yet."""
        return len(self._queue) + sum(len(slot.requests) for slot in self._placement.unsealed())

    def tell_depth(self) -> None:
        """Let whoever is scraped know what waits; without a queue that is next to nothing."""
        self.metrics.queue_depth(self.waiting() if self.intake.has_queue else 0)

    def fail_all(self, error: GatewayError) -> None:
        """End every request, and take no other: the version is gone."""
        self.intake.is_open = False
        placed = [r for lane in self.lanes for slot in lane.slots for r in slot.requests]
        for request in [*self._queue, *placed]:
            if request.state is not State.ENDED:
                self._end(request, error)

    # Workers

    def worker_up(self, incarnation: int, channel: Channel) -> None:
        """A worker is ready: give it every lane."""
        self._workers[incarnation] = channel
        for lane in self.lanes:
            self._offer(lane, channel)
        self._pump()

    def worker_died(self, incarnation: int) -> None:
        """A worker's death is confirmed: have what it held run elsewhere."""
        for lane in self.lanes:
            for slot, phase in list(lane.held_by(incarnation)):
                if phase == ring.SEALED:
                    self._rerun(slot, incarnation)
                else:
                    self._finish(lane, slot, phase)
            lane.producer.wake_all()
            self.on_bell(lane)  # it may have taken the arming and died before it rang
        channel = self._workers.pop(incarnation, None)
        if channel is not None:  # read to its end: spills of slots that it had completed
            channel.close()

    def worker_exited(self, incarnation: int, signal_number: int, timed_out: bool) -> None:
        """How a dead worker ended: judge the requests that were alone with it."""
        is_blaming = signal_number in BLAMING_SIGNALS or timed_out
        for lane in self.lanes:
            for slot in lane.slots:
                if slot.last_owner == incarnation and len(slot.requests) == 1:
                    slot.requests[0].blame += is_blaming
                    if slot.awaits_judgement:
                        self._judge(slot)
        self._pump()

    def orphaned(self) -> None:
        """The supervisor is gone: nobody will say how workers ended, so nothing waits for it."""
        self._is_supervised = False
        for lane in self.lanes:
            for slot in lane.slots:
                if slot.awaits_judgement:
                    self._judge(slot)

    def on_bell(self, lane: Lane) -> None:
        """A worker reported completions, and rang."""
        if self._is_closed:
            return  # called soon, and then the version went
        try:  # noqa: SIM105  (`suppress` costs a microsecond, once a batch)
            os.eventfd_read(lane.bell)
        except BlockingIOError:
            pass  # collected meanwhile
        self.on_report(lane)

    def on_report(self, lane: Lane) -> None:
        """A worker reported completions."""
        for slot, phase in lane.collect():
            self._finish(lane, slot, phase)
        self._pump()
        if not lane.producer.arm():
            self._loop.call_soon(self.on_bell, lane)  # there is more; others have their turn first

    def close(self) -> None:
        """Give back every lane; requests must have been failed before."""
        self._is_closed = True
        self.intake.is_open = False
        self._deadlines.close()
        self._placement.close()
        self._spills.close()
        for channel in self._workers.values():
            channel.close()
        self._workers.clear()

    # Placing

    def _place(self, request: Submission) -> bool:
        # What lies ready: a batch for each worker, and one more for whoever is first.
        return self._placement.place(request, max_complete=len(self._workers) + 1)

    def _add_lane(self, lane: Lane) -> None:
        self._on_lane(lane)
        for channel in self._workers.values():
            self._offer(lane, channel)

    def _offer(self, lane: Lane, channel: Channel) -> None:
        channel.send("lane", lane.fds, lane=lane.number, spec=lane.spec.to_wire())

    def _pump(self) -> None:
        """Move queued requests into slots for as long as there is room."""
        if not self.intake.has_queue:
            return
        while (request := self._queue.next()) is not None and self._place(request):
            self._queue.remove_next(request)
        self.intake.has_queue = request is not None
        self.tell_depth()

    def _take_back(self, request: Submission) -> bool:
        """Keep a request from running; False when a worker has it."""
        if request.state is State.QUEUED:
            return True  # the pump skips what has ended
        return self._placement.take_out(request)

    def _end(self, request: Submission, error: GatewayError | None = None) -> None:
        was_queued = request.state is State.QUEUED
        self.intake.in_flight -= 1
        request.move(State.ENDED)
        if was_queued:
            self._queue.ended(request)
        if error is not None:
            request.fail(error)

    # Finishing

    def _finish(self, lane: Lane, slot: Slot, phase: int) -> None:
        if phase == ring.DONE and self._answer(lane, slot):
            self._placement.release(slot)
        elif len(slot.requests) > 1:
            self._split(lane, slot)
        else:
            text = (
                lane.error(slot) if phase == ring.FAILED else "its worker's answer was inconsistent"
            )
            self._fail_alone(slot, f"the model failed on this request: {text}")

    def _answer(self, lane: Lane, slot: Slot) -> bool:
        """Answer a DONE slot's requests; False where its worker's description makes no sense."""
        if slot.key.is_bound:
            rest = lane.memory.answer(slot, *lane.producer.times(slot.index))
            return not rest or self._answer_each(lane, slot, lane.outputs(slot), rest)
        if not lane.is_spilled(slot):
            return self._answer_each(lane, slot, lane.outputs(slot), slot.requests)
        channel = self._workers.get(lane.producer.owner(slot.index))
        spill = self._spills.take(channel, lane.number, slot.index)
        if spill is None:
            return False
        with viewed(spill) as data:
            return self._answer_each(lane, slot, lane.outputs(slot, data), slot.requests)

    def _answer_each(
        self, lane: Lane, slot: Slot, outputs: Outputs | None, requests: Sequence[Submission]
    ) -> bool:
        if outputs is None:
            return False
        started_ns, finished_ns = lane.producer.times(slot.index)
        compute_ns = max(0, finished_ns - started_ns)
        for request in requests:
            if request.state is State.PLACED:  # not cancelled while it ran
                timing = Timing(max(0, started_ns - request.arrived_ns), compute_ns)
                self._tell(request, lane, outputs, timing)
        return True

    def _tell(self, request: Submission, lane: Lane, outputs: Outputs, timing: Timing) -> None:
        self._end(request)
        try:
            request.answer(lane.views(outputs, request), timing)
        except GatewayError as error:
            request.fail(error)
        except Exception:
            log.exception("an answer could not be encoded")
            request.fail(GatewayError("the answer could not be encoded"))

    def _fail_alone(self, slot: Slot, text: str) -> None:
        """End the one request of a slot that is done with."""
        request = slot.requests[0]
        self._placement.release(slot)
        if request.state is State.PLACED:
            self._end(request, InferenceFailed(text))

    # Deaths

    def _rerun(self, slot: Slot, incarnation: int) -> None:
        """A slot whose worker died: run it again as it is, or request by request."""
        slot.deaths += 1
        slot.last_owner = incarnation
        if self._drop_hopeless(slot):
            return
        is_alone = len(slot.requests) == 1
        if is_alone and slot.deaths >= DEATHS_OF_A_REQUEST and self._is_supervised:
            slot.awaits_judgement = True  # it stays SEALED by the dead: out of every worker's reach
        elif not is_alone and slot.deaths >= DEATHS_OF_A_BATCH:
            self._split(self.lanes[slot.lane], slot)
        else:
            self._placement.retry(slot)

    def _drop_hopeless(self, slot: Slot) -> bool:
        """End the requests that nobody waits for any more; True when no other was in the slot.

        They cannot be edited out of a SEALED slot: their rows run with the others', unheard.
        """
        now_ns = monotonic_ns()
        for request in slot.requests:
            if request.state is State.PLACED and 0 < request.deadline_ns <= now_ns:
                self._end(request, DeadlineExceeded(_EXPIRED))
        if any(request.state is State.PLACED for request in slot.requests):
            return False
        self._placement.release(slot)
        return True

    def _judge(self, slot: Slot) -> None:
        """A request alone whose second worker died: convict it, or let it run again."""
        slot.awaits_judgement = False
        if self._drop_hopeless(slot):
            return
        if slot.requests[0].blame < DEATHS_OF_A_REQUEST:
            self._placement.retry(slot)
            return
        self._on_convicted()
        self._fail_alone(slot, "workers died each time they ran this request alone")

    def _split(self, lane: Lane, slot: Slot) -> None:
        """Queue each live request of a slot anew, first in line and without mates."""
        if self._drop_hopeless(slot):
            return
        live = [request for request in slot.requests if request.state is State.PLACED]
        for request in live:
            lane.copy_out(slot, request)
            request.solo = True
        self._placement.release(slot)
        self._queue.put_first(live)
        self.intake.has_queue = True
        self._pump()
