"""A worker: one process that runs one instance of a model version.

A plain blocking loop - take a batch, run it, publish it - and one helper thread that reads the channels
and wakes the loop. Started as ``python -m gateway.serving.worker --channel FD``; everything else comes
over that channel in the first message, ``load``.

Messages in: ``load`` (plan, options; fds: board) and ``frontend`` (fds: a channel
to a front end) from the supervisor, ``exit``; from a front end ``lane`` (fds: control, inputs, outputs,
bell). Messages out: ``warming``, ``loaded`` (signature, understanding), ``failed`` (reason); to a front end
``spill`` (fds: outputs that did not fit a slot).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from gateway import bytestrings
from gateway._kernels import ring
from gateway.clock import NS_PER_US, monotonic_ns
from gateway.errors import LoadError
from gateway.serving import cpus, descriptors, geometry, loader, memory, policy, spill
from gateway.serving.attached import AttachedLane
from gateway.serving.channel import Channel, Message, MessageTooLarge
from gateway.serving.loader import Loaded
from gateway.serving.mailbox import Mailbox
from gateway.serving.options import WorkerOptions
from gateway.serving.plan import LoadPlan
from gateway.serving.session import Array, RunError
from gateway.telemetry import logs
from gateway.tensors import MAX_RANK

log = logging.getLogger("gateway.worker")

MAX_BINDINGS = 2048
"""Cached bindings; bounds memory (a few kB each). Beyond it the least recently used is made again."""

FOR_EVER = 0
"""For `Consumer.sleep`: until woken."""

MAX_SHAPES = 4096
"""Shapes that are remembered of a lane; clients choose them."""

MAX_REASON = 1000
"""Characters of why a load failed, which clients are told: with `MAX_DETAIL` they fit a message."""

MAX_DETAIL = 4000
"""Characters of the same for operators; texts of ONNX Runtime's repeat names of any length."""

_TOO_SMALL = "this request's shape does not fit its slot of shared memory"

LaneKey = tuple[int, int]
"""A lane in this process: the descriptor of its front end's channel, and its number there."""


class Worker:
    """The loop and what it serves."""

    def __init__(
        self,
        loaded: Loaded,
        consumer: ring.Consumer,
        mailbox: Mailbox,
        supervisor: Channel,
        max_queue_delay_us: int,
        max_answer_bytes: int,
    ) -> None:
        self._session = loaded.session
        self._signature = loaded.signature
        self._has_strings = any(s.datatype.numpy is None for s in loaded.signature.inputs)
        self._consumer = consumer
        self._mailbox = mailbox
        self._supervisor = supervisor
        self._max_queue_delay_ns = max_queue_delay_us * NS_PER_US
        self._max_answer_bytes = max_answer_bytes
        self._lanes: dict[LaneKey, AttachedLane] = {}
        self._channels: dict[int, Channel] = {}  # to front ends, by descriptor
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
            self._run_batch(key, slot, rows, shape_id, shape)
            ok = True
        except Exception as error:
            ok = False
            public = "the worker could not run the batch"
            if isinstance(error, RunError):
                public = error.public
                log.debug("a run failed: %s", error)  # may quote clients' values
            else:
                log.exception("a run failed in a way of ours")
            with lane.output_region(slot) as region:
                descriptors.write_error(region, public)
        self._consumer.publish(key, slot, word, ok, started_ns, monotonic_ns())

    def _run_batch(
        self, key: LaneKey, slot: int, rows: int, shape_id: int, shape: geometry.SlotShape
    ) -> None:
        """Run a sealed slot's rows and leave the outputs where its front end looks for them."""
        lane = self._lanes[key]
        padded_rows = next((n for n in self._signature.allowed_batch_sizes if n >= rows), rows)
        if self._has_strings:
            arrays = lane.read_arrays(slot, shape, rows, padded_rows)
            outputs = self._session.run_arrays(arrays)
        else:
            is_staged = padded_rows > rows
            if is_staged:
                lane.stage(slot, shape, rows, padded_rows)
            if shape.outputs is not None:
                binding = self._binding(key, slot, padded_rows, shape_id, is_staged)
                self._session.run(binding)
                return
            binding = self._make_binding(key, slot, padded_rows, shape_id, is_staged)
            self._session.run(binding)
            outputs = self._session.unbound_outputs(binding)
        if padded_rows > rows:
            outputs = [array[:rows] for array in outputs]
        self._hand_over(key, slot, outputs)

    def _learn_shape(
        self, key: LaneKey, slot: int, shape_id: int, capacity: int
    ) -> geometry.SlotShape:
        """The layout behind a shape id that was not seen before."""
        lane, signature = self._lanes[key], self._signature
        if len(lane.shapes) >= MAX_SHAPES:
            lane.shapes.clear()  # ids are never used twice; what is still in use is learned again
            self._binding.cache_clear()
        flat = self._consumer.dims(key, slot)
        is_described, dims = geometry.unflatten(signature, flat)
        shape = geometry.shape_of(signature, dims, capacity, is_described=is_described)
        if (
            shape.input_bytes > lane.spec.input_slot_bytes
            or shape.output_bytes > lane.spec.output_slot_bytes
        ):
            raise RunError(_TOO_SMALL)
        lane.shapes[shape_id] = shape
        return shape

    def _make_binding(
        self, key: LaneKey, slot: int, rows: int, shape_id: int, is_staged: bool
    ) -> Any:
        lane = self._lanes[key]
        return self._session.bind(
            lane.shapes[shape_id],
            rows,
            lane.staging_at if is_staged else lane.inputs_at + slot * lane.spec.input_slot_bytes,
            lane.outputs_at + slot * lane.spec.output_slot_bytes,
        )

    def _hand_over(self, key: LaneKey, slot: int, outputs: Sequence[Array]) -> None:
        """Copy outputs whose size was only known after the run into the slot, or a spill."""
        lane, count = self._lanes[key], len(self._signature.outputs)
        raw = [_raw(array) for array in outputs]
        described, end = [], geometry.head_bytes(count)
        for array, data in zip(outputs, raw, strict=True):
            if array.ndim > MAX_RANK:
                raise RunError(f"an output has {array.ndim} dims, of {MAX_RANK} at most")
            described.append((array.shape, end, len(data)))
            end = geometry.align(end + len(data))
        if end > max(self._max_answer_bytes, lane.spec.output_slot_bytes):
            raise RunError(
                f"the outputs take {end} bytes, max_answer_bytes is {self._max_answer_bytes}"
            )
        with lane.output_region(slot) as region:
            is_spilled = end > len(region)
            descriptors.write_descriptors(region, described, is_spilled=is_spilled)
            if not is_spilled:
                _lay_out(region, described, raw)
                return
        fd = memory.create("spill", end)
        try:
            with memory.map_writable(fd, end) as mapping, memoryview(mapping) as region:
                _lay_out(region, described, raw)
            spill.send(self._channels[key[0]], key[1], slot, fd)
        finally:
            os.close(fd)

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
                self._channels[channel.fileno()] = channel
            elif message["op"] == "lane":
                self._attach(channel, message, fds)
            elif message["op"] == "exit":
                return False
        return not (self._orphan and not self._channels)

    def _attach(self, channel: Channel, message: Message, fds: list[int]) -> None:
        key = (channel.fileno(), message["lane"])
        lane = AttachedLane(geometry.LaneSpec.from_wire(message["spec"]), fds)
        self._consumer.attach(
            key, lane.control, lane.spec.slot_count, lane.spec.dims_per_slot, lane.bell
        )
        self._lanes[key] = lane

    def _forget_frontend(self, channel: Channel) -> None:
        """Drop every lane of a front end that is gone: bindings first, then the mappings."""
        self._channels.pop(channel.fileno(), None)
        gone = [key for key in self._lanes if key[0] == channel.fileno()]
        self._binding.cache_clear()
        for key in gone:
            self._consumer.detach(key)
            self._lanes.pop(key).close()
        channel.close()


def _raw(array: Array) -> bytes | memoryview:
    """An output's bytes in the order of its elements."""
    if array.dtype == object:
        return bytestrings.serialise(array.reshape(-1))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _lay_out(
    region: memoryview,
    described: Sequence[tuple[tuple[int, ...], int, int]],
    raw: Sequence[bytes | memoryview],
) -> None:
    for (_dims, offset, nbytes), data in zip(described, raw, strict=True):
        region[offset : offset + nbytes] = data


def _stay_on(text: str) -> None:
    """Run on these CPUs only. LoadError: none of them is there."""
    try:
        os.sched_setaffinity(0, cpus.parse_cpus(text))
    except OSError as error:
        raise LoadError(f"instances: cpus: {text} cannot be used: {error.strerror}") from None


def _send_failed(supervisor: Channel, reason: str, detail: str = "") -> None:
    """Say why loading failed, as far as it fits. What cannot be encoded, as of a path, is shown as ``?``."""
    reason, detail = (
        text[:limit].encode(errors="replace").decode()
        for text, limit in ((reason, MAX_REASON), (detail, MAX_DETAIL))
    )
    supervisor.send("failed", reason=reason, detail=detail)


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
    options, plan = WorkerOptions.from_wire(load["options"]), LoadPlan.from_wire(load["plan"])
    logs.configure(options.log_level, options.log_format)
    try:
        if options.cpus is not None:
            _stay_on(options.cpus)
        loaded = loader.load(plan, partial(supervisor.send, "warming"))
    except LoadError as error:
        _send_failed(supervisor, error.message, error.detail)
        return 1
    board = memory.map_writable(board_fd, ring.board_bytes(options.seats))
    os.close(board_fd)
    consumer = ring.Consumer(board, options.seat, options.incarnation)
    mailbox = Mailbox(supervisor, consumer, options.orphan_grace_s)
    try:
        supervisor.send(
            "loaded",
            signature=loaded.signature.to_wire(),
            understanding=loaded.understanding.to_wire(),
        )
    except MessageTooLarge as error:
        _send_failed(supervisor, f"its signature is too long: {error}")
        return 1
    mailbox.start()
    Worker(
        loaded, consumer, mailbox, supervisor, options.max_queue_delay_us, plan.max_answer_bytes
    ).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
