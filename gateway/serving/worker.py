"""A worker: one process that runs one instance of a model version.

A plain blocking loop - take a batch, run it, publish it - and one helper thread that reads the channels
and wakes the loop. Started as ``python -m gateway.serving.worker --channel FD``; everything else comes
over that channel in the first message, ``load``.

Messages in: ``load`` (path, device, threads, max_batch_size, …; fds: board) and ``frontend`` (fds: a channel
to a front end) from the supervisor, ``exit``; from a front end ``lane`` (fds: control, inputs, outputs,
bell). Messages out: ``warming``, ``loaded`` (signature), ``failed`` (reason).
"""

from __future__ import annotations

import argparse
import logging
import os
import selectors
import sys
import threading
from collections import deque
from functools import lru_cache
from mmap import mmap
from pathlib import Path
from typing import Any

from gateway._kernels import ring
from gateway.clock import NS_PER_US, monotonic_ns
from gateway.errors import LoadError
from gateway.serving import geometry, memory, policy
from gateway.serving.channel import Channel, Message, MessageTooLarge
from gateway.serving.session import Device, ModelSession, RunError
from gateway.telemetry import logs

log = logging.getLogger("gateway.worker")

MAX_BINDINGS = 2048
"""Cached bindings; bounds memory (a few kB each). Beyond it the least recently used is made again."""

FOR_EVER = 0
"""For `Consumer.sleep`: until woken."""

MAX_SHAPES = 4096
"""Shapes that are remembered of a lane; clients choose them."""

ORPHAN_BACKSTOP_S = 60.0
"""How long after the supervisor's end, on top of the grace, a worker stays for a front end that hangs."""


_TOO_SMALL = "the outputs of this request are larger than a slot of shared memory"

LaneKey = tuple[int, int]
"""A lane in this process: the descriptor of its front end's channel, and its number there."""


class AttachedLane:
    """One front end's lane, mapped into this process."""

    def __init__(self, spec: geometry.LaneSpec, fds: list[int]) -> None:
        control, inputs, outputs, self.bell = fds
        self.spec = spec
        self.control = memory.map_writable(
            control, ring.control_bytes(spec.slot_count, spec.dims_per_slot)
        )
        self.inputs = memory.map_read_only(inputs, spec.slot_count * spec.input_slot_bytes)
        self.outputs: mmap = memory.map_writable(outputs, spec.slot_count * spec.output_slot_bytes)
        self.inputs_at = memory.address(self.inputs)
        self.outputs_at = memory.address(self.outputs)
        self.shapes: dict[int, geometry.Shape] = {}
        for fd in (control, inputs, outputs):
            os.close(fd)

    def output_region(self, slot: int) -> memoryview:
        """The slot's output region, writable; release it before the lane is closed."""
        start = slot * self.spec.output_slot_bytes
        return memoryview(self.outputs)[start : start + self.spec.output_slot_bytes]

    def close(self) -> None:
        """Unmap; nothing may still point into the lane."""
        os.close(self.bell)
        for mapping in (self.control, self.inputs, self.outputs):
            mapping.close()


class Mailbox:
    """Reads the channels in a thread of its own, and wakes the worker for each message.

    Args:
        supervisor: the channel to the supervisor, whose end makes this process an orphan.
        grace_s: how long an orphan stays for its front ends.
    """

    def __init__(self, supervisor: Channel, consumer: ring.Consumer, grace_s: float) -> None:
        self.letters: deque[tuple[Channel, Message | None, list[int]]] = deque()
        self._consumer = consumer
        self._supervisor = supervisor
        self._orphan_s = grace_s + ORPHAN_BACKSTOP_S
        self._arrived = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._selector.register(supervisor, selectors.EVENT_READ, supervisor)
        self._orphaned = False

    def start(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._read, name="mailbox", daemon=True).start()

    def wait(self) -> None:
        """Until the next letter, out of sight of front ends: their wake-ups go to other workers."""
        self._arrived.wait()
        self._arrived.clear()

    def _read(self) -> None:
        try:
            self._read_for_ever()
        except Exception:
            log.exception("the mailbox failed; a worker that cannot hear is better replaced")
            os._exit(1)

    def _read_for_ever(self) -> None:
        while True:
            ready = self._selector.select(self._orphan_s if self._orphaned else None)
            if not ready:
                os._exit(
                    0
                )  # the supervisor is gone and a front end holds on to nothing we can serve
            for key, _events in ready:
                channel: Channel = key.data
                received = channel.receive()
                if received is None:
                    self._selector.unregister(channel)
                    self._orphaned |= channel is self._supervisor
                    self.letters.append((channel, None, []))
                else:
                    message, fds = received
                    if message["op"] == "frontend":
                        frontend = Channel.from_fd(fds[0])
                        self._selector.register(frontend, selectors.EVENT_READ, frontend)
                        self.letters.append((frontend, message, []))
                    else:
                        self.letters.append((channel, message, fds))
                self._arrived.set()
                self._consumer.nudge()


class Worker:
    """The loop and what it serves."""

    def __init__(
        self,
        session: ModelSession,
        consumer: ring.Consumer,
        mailbox: Mailbox,
        supervisor: Channel,
        max_queue_delay_us: int,
    ) -> None:
        self._session = session
        self._consumer = consumer
        self._mailbox = mailbox
        self._supervisor = supervisor
        self._max_queue_delay_ns = max_queue_delay_us * NS_PER_US
        self._lanes: dict[LaneKey, AttachedLane] = {}
        self._frontends: set[Channel] = set()
        self._orphan = False
        self._binding = lru_cache(maxsize=MAX_BINDINGS)(self._make_binding)

    def run(self) -> None:
        """Serve until told to exit, or until supervisor and front ends are gone."""
        consumer = self._consumer
        while True:
            if not self._read_mail():
                return
            if not self._lanes:
                self._mailbox.wait()
                continue
            best = consumer.best()
            until_ns = self._wait_until(best)
            if best is not None and until_ns is None:
                self._take(best)
                continue
            consumer.announce()
            # The second look: for what came before the announcement.
            if self._mailbox.letters or self._wait_until(consumer.best()) != until_ns:
                consumer.retract()
            else:
                consumer.sleep(until_ns or FOR_EVER)

    def _wait_until(self, best: ring.Offered | None) -> int | None:
        """Until when to wait with what there is to run, None to run it now."""
        if best is None:
            return FOR_EVER
        *_, oldest_ns, _shape_id, is_complete = best
        return policy.hold_until(
            policy.Offer(oldest_ns, is_complete), monotonic_ns(), self._max_queue_delay_ns
        )

    def _take(self, best: ring.Offered) -> None:
        """Seal a slot and run it, unless it has changed meanwhile."""
        key, slot, word, rows, capacity, _oldest_ns, shape_id, _is_complete = best
        if self._consumer.seal(key, slot, word, monotonic_ns()):
            self._consumer.pass_on()
            self._run_slot(key, slot, word, rows, capacity, shape_id)

    def _run_slot(
        self, key: LaneKey, slot: int, word: int, rows: int, capacity: int, shape_id: int
    ) -> None:
        lane = self._lanes[key]
        started_ns = monotonic_ns()
        try:
            shape = lane.shapes.get(shape_id) or self._learn_shape(key, slot, shape_id, capacity)
            if shape.outputs is None:
                binding = self._make_binding(key, slot, rows, shape_id)
                self._session.run(binding)
                self._copy_outputs(lane, slot, binding)
            else:
                self._session.run(self._binding(key, slot, rows, shape_id))
            ok = True
        except Exception as error:
            ok = False
            public = "the worker could not hand over the outputs"
            if isinstance(error, RunError):
                public = error.public
                log.debug("a run failed: %s", error)  # may quote clients' values
            else:
                log.exception("a run failed in a way of ours")
            with lane.output_region(slot) as region:
                geometry.write_error(region, public)
        self._consumer.publish(key, slot, word, ok, started_ns, monotonic_ns())

    def _learn_shape(self, key: LaneKey, slot: int, shape_id: int, capacity: int) -> geometry.Shape:
        """The layout behind a shape id that was not seen before."""
        lane, signature = self._lanes[key], self._session.signature
        if len(lane.shapes) >= MAX_SHAPES:
            lane.shapes.clear()  # ids are never used twice; what is still in use is learned again
            self._binding.cache_clear()
        dims = geometry.split_dims(signature, self._consumer.dims(key, slot))
        shape = geometry.shape_of(signature, dims, capacity)
        if (
            shape.input_bytes > lane.spec.input_slot_bytes
            or shape.output_bytes > lane.spec.output_slot_bytes
        ):
            raise RunError(_TOO_SMALL, _TOO_SMALL)
        lane.shapes[shape_id] = shape
        return shape

    def _make_binding(self, key: LaneKey, slot: int, rows: int, shape_id: int) -> Any:
        lane = self._lanes[key]
        return self._session.bind(
            lane.shapes[shape_id],
            rows,
            lane.inputs_at + slot * lane.spec.input_slot_bytes,
            lane.outputs_at + slot * lane.spec.output_slot_bytes,
        )

    def _copy_outputs(self, lane: AttachedLane, slot: int, binding: Any) -> None:
        """Copy outputs whose size was only known after the run into the slot, and describe them."""
        described = []
        with lane.output_region(slot) as region:
            offset = geometry.head_bytes(len(self._session.signature.outputs))
            for array in self._session.unbound_outputs(binding):
                end = offset + array.nbytes
                if end > len(region):
                    raise RunError(_TOO_SMALL, _TOO_SMALL)
                region[offset:end] = array.tobytes()
                described.append((array.shape, offset, array.nbytes))
                offset = geometry.align(end)
            geometry.write_descriptors(region, described)

    def _read_mail(self) -> bool:
        """Act on what arrived; False when it is time to exit."""
        while self._mailbox.letters:
            channel, message, fds = self._mailbox.letters.popleft()
            if message is None:
                if channel is self._supervisor:
                    self._orphan = True
                else:
                    self._forget_frontend(channel)
            elif message["op"] == "frontend":
                self._frontends.add(channel)
            elif message["op"] == "lane":
                self._attach(channel, message, fds)
            elif message["op"] == "exit":
                return False
        return not (self._orphan and not self._frontends)

    def _attach(self, channel: Channel, message: Message, fds: list[int]) -> None:
        key = (channel.fileno(), message["lane"])
        lane = AttachedLane(geometry.LaneSpec.from_wire(message["spec"]), fds)
        self._consumer.attach(
            key, lane.control, lane.spec.slot_count, lane.spec.dims_per_slot, lane.bell
        )
        self._lanes[key] = lane

    def _forget_frontend(self, channel: Channel) -> None:
        """Drop every lane of a front end that is gone: bindings first, then the mappings."""
        self._frontends.discard(channel)
        gone = [key for key in self._lanes if key[0] == channel.fileno()]
        self._binding.cache_clear()
        for key in gone:
            self._consumer.detach(key)
            self._lanes.pop(key).close()
        channel.close()


def main(argv: list[str] | None = None) -> int:
    """Entry of the process; the exit status is 0 unless loading failed."""
    parser = argparse.ArgumentParser(prog="gateway-worker")
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the channel")
    parser.add_argument("--name", default="", help="what `ps` shows; not used")
    arguments = parser.parse_args(argv)
    supervisor = Channel.from_fd(arguments.channel)
    received = supervisor.receive()
    if received is None:
        return 0
    load, (board_fd,) = received
    logs.configure(load["log_level"], load["log_format"])
    try:
        session = ModelSession(
            Path(load["path"]),
            Device.parse(load["device"]),
            load["threads"],
            load["max_batch_size"],
        )
        supervisor.send("warming")
        session.check_rows_are_independent()
        if load["warmup"] and not session.warm_up():
            log.info("%s: not warmed up, a variable dim leaves no shape to try", arguments.name)
    except LoadError as error:
        supervisor.send("failed", reason=error.message, detail=error.detail)
        return 1
    board = memory.map_writable(board_fd, ring.board_bytes(load["seats"]))
    os.close(board_fd)
    consumer = ring.Consumer(board, load["seat"], load["incarnation"])
    mailbox = Mailbox(supervisor, consumer, load["orphan_grace_s"])
    try:
        supervisor.send("loaded", signature=session.signature.to_wire())
    except MessageTooLarge as error:
        supervisor.send("failed", reason=f"its signature is too long: {error}", detail="")
        return 1
    mailbox.start()
    Worker(session, consumer, mailbox, supervisor, load["max_queue_delay_us"]).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
