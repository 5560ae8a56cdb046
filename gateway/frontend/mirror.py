"""Copies of requests for a version that is only watched: made once the client has its answer.

A copy's outputs are compared with what the client got, and the version's ledger counts how it went. A copy
never delays or fails a request: it begins in a later turn of the event loop, has the lowest priority of the
version that gets it, and is dropped where it would cost too much. It has no client, so it is no request in
that version's metrics.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from gateway._kernels.ledger import RequestCounters
from gateway.clock import monotonic_ns
from gateway.errors import DeadlineExceeded, GatewayError, QueueFull, Unavailable
from gateway.frontend.agreement import agrees
from gateway.protocols.call import InferCall, InputTensor, OutputTensor, check_call
from gateway.serving.dispatcher import Dispatcher
from gateway.serving.request import CallRequest, Timing
from gateway.serving.routes import Target, Version
from gateway.tensors import element_count

log = logging.getLogger("gateway.frontend")

MAX_SHADOWS = 64
"""Copies that a front end has under way, from the client's answer to the comparison."""

MAX_SHADOW_BYTES = 64 << 20
"""Inputs and outputs that a front end holds for copies, those of requests that are not answered yet too."""

LISTED_BYTES = 40
"""What a number takes in a list, its place there included."""

TIMEOUT_S = 5.0
"""Time of a copy in the queue; what waits for longer is dropped."""

LOWEST = 1 << 30
"""Priority of copies: beyond every model's lowest level, which is what it is taken for."""

QUEUE_PART = 2
"""Copies are sent while less than one part in so many of the version's queue is taken."""

INLINE_BYTES = 1 << 16
"""Outputs up to this are compared on the event loop; larger ones in a thread, as that takes its time."""

_NOT_ITS_FAULT = (QueueFull, Unavailable, DeadlineExceeded)
"""What says nothing of the version: it had no room or no time for copies, or went."""


class Copy:
    """One request's data, from its begin to the comparison. Whoever lets go of it gives the bytes back.

    Attributes:
        target: the version that gets it.
        inputs: as the client sent them.
        expected: the outputs that the client got.
        dispatcher: that has it, from when it is sent.
        request: the dispatcher's, while it is there.
        timer: of its time in the queue.
    """

    __slots__ = (
        "_mirror",
        "_nbytes",
        "dispatcher",
        "expected",
        "inputs",
        "request",
        "target",
        "timer",
    )

    def __init__(self, mirror: Mirror, target: Target, call: InferCall) -> None:
        self._mirror, self._nbytes = mirror, 0
        self.target = target
        # The call's own tensors change while it waits.
        self.inputs = [replace(tensor) for tensor in call.inputs]
        self.expected: list[OutputTensor] = []
        self.dispatcher: Dispatcher | None = None
        self.request: CallRequest | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.holds(sum(map(_held_bytes, self.inputs)))

    @property
    def counters(self) -> RequestCounters:
        """The watched version's."""
        return self.target.version.metrics.counters

    def holds(self, nbytes: int) -> None:
        """So many bytes more are kept for it."""
        self._nbytes += nbytes
        self._mirror.held_bytes += nbytes

    def __del__(self) -> None:
        self._mirror.held_bytes -= self._nbytes


class Mirror:
    """Sends copies. Belongs to the event loop.

    Args:
        max_request_bytes: bounds what a copy's inputs expand to.

    Attributes:
        held_bytes: of copies' data.
    """

    def __init__(self, max_request_bytes: int) -> None:
        self.held_bytes = 0
        self._max_request_bytes = max_request_bytes
        self._loop = asyncio.get_running_loop()
        self._under_way: set[Copy] = set()
        self._is_closed = False

    def keep(self, target: Target | None, call: InferCall) -> Copy | None:
        """Keep a request's inputs, before it is submitted, until `answered`.

        Args:
            target: who gets a copy; None: nobody.
            call: the request, checked.

        Returns:
            None: there is none to be sent, or no room for it.
        """
        if target is None or self._is_closed:
            return None
        copy = Copy(self, target, call)
        if self.held_bytes > MAX_SHADOW_BYTES:
            copy.counters.shadow_dropped()
            return None
        return copy

    def answered(self, copy: Copy | None, outputs: Sequence[OutputTensor]) -> None:
        """A request that was kept has its answer: its copy follows. It is too late to raise anything.

        Args:
            copy: what `keep` returned.
            outputs: of all the version's outputs, what the client got; valid only during the call.
        """
        if copy is None or self._is_closed:
            return
        try:
            self._follow(copy, outputs)
        except Exception:
            log.exception("an answer could not be kept for its copy")
            self._drop(copy)

    def _follow(self, copy: Copy, outputs: Sequence[OutputTensor]) -> None:
        nbytes = sum(tensor.data.nbytes for tensor in outputs)
        if len(self._under_way) >= MAX_SHADOWS or self.held_bytes + nbytes > MAX_SHADOW_BYTES:
            copy.counters.shadow_dropped()
            return
        copy.holds(nbytes)
        copy.expected = _owned(outputs)
        self._under_way.add(copy)
        self._loop.call_soon(self._submit, copy)

    def drop(self, version: Version) -> None:
        """The version is unloaded: its copies are not waited for."""
        for copy in [copy for copy in self._under_way if copy.target.version is version]:
            self._drop(copy)

    def close(self) -> None:
        """The front end ends: no copy is waited for, and no other sent."""
        self._is_closed = True
        for copy in list(self._under_way):
            self._drop(copy)

    def _drop(self, copy: Copy) -> None:
        if copy.dispatcher is not None and copy.request is not None:
            copy.dispatcher.cancel(copy.request)
        self._end(copy)
        copy.counters.shadow_dropped()

    def _end(self, copy: Copy) -> None:
        """It is not under way any more."""
        self._under_way.discard(copy)
        copy.request = None  # which refers to it
        if copy.timer is not None:
            copy.timer.cancel()
            copy.timer = None  # likewise

    def _submit(self, copy: Copy) -> None:
        """The client's answer is written: now the copy."""
        if copy not in self._under_way:
            return  # dropped meanwhile
        try:
            signature = copy.target.version.ready()
            dispatcher = copy.dispatcher = copy.target.version.dispatcher
            if dispatcher is None:
                raise copy.target.version.refusal()
            if dispatcher.intake.in_flight >= dispatcher.intake.bound // QUEUE_PART:
                raise QueueFull("copies leave the rest of the queue to clients")
            # Without a time-out of its own: a worker might hold a batch back for as long.
            call = InferCall(copy.inputs, priority=LOWEST)
            check_call(call, signature, self._max_request_bytes)
            copy.request = dispatcher.submit(
                call, monotonic_ns(), partial(self._on_answer, copy), partial(self._fail, copy)
            )
            copy.timer = self._loop.call_later(TIMEOUT_S, dispatcher.expire, copy.request)
        except GatewayError as error:
            self._fail(copy, error)
        except Exception:
            log.exception("a copy of a request could not be sent")
            self._fail(copy, GatewayError("internal error"))

    def _fail(self, copy: Copy, error: GatewayError) -> None:
        """The version did not answer the copy. What fails on a copy does not agree with it."""
        if copy not in self._under_way:
            return
        self._end(copy)
        if isinstance(error, _NOT_ITS_FAULT):
            copy.counters.shadow_dropped()
        else:
            copy.counters.shadow_failed()
            copy.counters.compared(False)

    def _on_answer(self, copy: Copy, outputs: list[OutputTensor], _timing: Timing) -> None:
        """The version answered the copy."""
        nbytes = sum(tensor.data.nbytes for tensor in outputs)
        signature = copy.target.version.signature
        is_batched = signature is not None and signature.is_batched
        compare = partial(agrees, copy.target.rule, copy.expected, is_batched=is_batched)
        if nbytes <= INLINE_BYTES:
            self._compared(copy, compare(outputs))
            return
        copy.holds(nbytes)
        compared = self._loop.run_in_executor(None, compare, _owned(outputs))
        compared.add_done_callback(partial(self._compared_aside, copy))

    def _compared_aside(self, copy: Copy, done: asyncio.Future[bool]) -> None:
        error = done.exception()
        if error is None:
            self._compared(copy, done.result())
        else:
            log.error("outputs could not be compared", exc_info=error)
            self._fail(copy, GatewayError("internal error"))

    def _compared(self, copy: Copy, is_equal: bool) -> None:
        if copy in self._under_way:
            self._end(copy)
            copy.counters.compared(is_equal)


def _held_bytes(tensor: InputTensor) -> int:
    """What a tensor's data takes."""
    if isinstance(tensor.data, memoryview):
        return tensor.data.nbytes
    return LISTED_BYTES * element_count(tensor.shape)


def _owned(outputs: Sequence[OutputTensor]) -> list[OutputTensor]:
    """Copies of outputs, whose memory is another request's soon."""
    return [replace(tensor, data=memoryview(bytes(tensor.data))) for tensor in outputs]
