"""A worker: one process that runs one instance of a model version.

A plain blocking loop - take a batch, run it, publish it: `loop` - and one helper thread that reads the
channels and wakes it: `mailbox`. Started as ``python -m gateway.serving.worker --channel FD``; everything
else comes over that channel in the first message, ``load``.

Messages in: ``load`` (plan, options; fds: board) and ``frontend`` (fds: a channel
to a front end) from the supervisor, ``exit``; from a front end ``lane`` (fds: control, inputs, outputs,
bell). Messages out: ``warming``, ``loaded`` (signature, understanding), ``failed`` (reason); to a front end
``spill`` (fds: outputs that did not fit a slot).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from functools import partial

from gateway._kernels import ring
from gateway.errors import LoadError
from gateway.serving import cpus, loader, memory, niceness
from gateway.serving.channel import Channel, MessageTooLarge
from gateway.serving.gpuworker import GpuWorker, pipeline_for
from gateway.serving.loop import Worker
from gateway.serving.mailbox import Mailbox
from gateway.serving.options import WorkerOptions
from gateway.serving.pinning import Pins
from gateway.serving.plan import LoadPlan
from gateway.telemetry import logs
from gateway.telemetry.ledger import Ledger

MAX_REASON = 1000
"""Characters of why a load failed, which clients are told: with `MAX_DETAIL` they fit a message."""

MAX_DETAIL = 4000
"""Characters of the same for operators; texts of ONNX Runtime's repeat names of any length."""

_PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that this process gets when its parent ends."""


def _stay_on(text: str) -> None:
    """Run on these CPUs only. LoadError: none of them is there."""
    try:
        os.sched_setaffinity(0, cpus.parse_cpus(text))
    except OSError as error:
        raise LoadError(f"instances: cpus: {text} cannot be used: {error.strerror}") from None


def _end_with_supervisor(is_wanted: bool) -> None:
    """Whether the kernel kills this process with the supervisor.

    While it loads, nothing here would notice that it is an orphan, and a warm-up may never end. Once it has
    loaded, the mailbox notices, and front ends may still be served.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if is_wanted else 0)


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
    _end_with_supervisor(True)
    try:
        if options.cpus is not None:
            _stay_on(options.cpus)
        loaded = niceness.load_nicely(
            lambda: loader.load(plan, partial(supervisor.send, "warming")),
            makes_threads=plan.execution.makes_threads,
        )
        pipeline = pipeline_for(loaded, with_graphs=plan.execution.cuda_graphs)
    except LoadError as error:
        _send_failed(supervisor, error.message, error.detail)
        return 1
    board = memory.map_writable(board_fd, ring.board_bytes(options.seats))
    counters = Ledger.mapped(board_fd, options.seats).batches(options.seat)
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
    _end_with_supervisor(False)
    shared = (
        *(loaded, consumer, counters, mailbox, supervisor),
        *(options.max_queue_delay_us, plan.max_answer_bytes),
    )
    if pipeline is None:
        Worker(*shared).run()
    else:
        GpuWorker(*shared, pipeline=pipeline, pins=Pins(pipeline.gpu)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
