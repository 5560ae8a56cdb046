"""Looks at a model repository the way a start of the server would, one model after the other.

Each model is loaded for real, in a worker process of its own that is ended at once: what a file does to
its reader, and how long that takes, is only known by doing it. Nothing is written to the repository: the
optimised graphs that the server keeps there are neither used nor made.
"""

from __future__ import annotations

import os
import select
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from gateway.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from gateway.control.planning import MemoryBudget, load_plan, worker_options
from gateway.control.process import start_process
from gateway.control.repository import ModelEntry, VersionEntry, choose, scan_model
from gateway.control.seat import describe_exit
from gateway.errors import GatewayError, NotFound
from gateway.serving import memory
from gateway.serving.channel import Channel, Message, MessageTooLarge
from gateway.serving.plan import LoadPlan, Understanding
from gateway.settings import Instance, ServerSettings
from gateway.tensors import Signature

LAST_WORDS_BYTES = 4096
"""What is read of the end of a worker's output, for the reason of its death."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What a repository holds.

    Attributes:
        models: those whose settings can be read.
        chosen: the versions that their policies choose.
        errors: what ends the start of a server, one line each.
        ignored: the files and folders that are passed over, and why.
    """

    models: tuple[ModelEntry, ...]
    chosen: tuple[tuple[ModelEntry, VersionEntry], ...]
    errors: tuple[str, ...]
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """How the load of one version by a worker of one kind went.

    Attributes:
        entry: the model.
        version: its version.
        instance: the kind of worker; one of its `Instance.count` was tried.
        threads: ONNX Runtime's, in each worker.
        seconds: from the start of the process until the model was warm, or had failed.
        signature: what it takes and gives; None where it failed.
        understanding: how it will be served; None where it failed.
        reason: why it failed; empty where it did not.
        detail: more about that, for operators alone.
    """

    entry: ModelEntry
    version: int
    instance: Instance
    threads: int
    seconds: float
    signature: Signature | None = None
    understanding: Understanding | None = None
    reason: str = ""
    detail: str = ""


def survey(repository: Path) -> Survey:
    """Read names and settings of a whole repository; a wrong model does not hide the next one."""
    models, chosen = list[ModelEntry](), list[tuple[ModelEntry, VersionEntry]]()
    errors, ignored = list[str](), list[str]()
    try:
        root = repository.resolve(strict=True)
        paths = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a valid path"
        return Survey((), (), (f"the model repository cannot be read: {reason}",), ())
    for path in paths:
        if path.is_file():
            continue  # a README beside the models
        if not _is_folder_in(path, root):
            ignored.append(f"{path.name!a}: not a folder in the model repository")
            continue
        try:
            entry = scan_model(root, path.name)
            models.append(entry)
            ignored += [f"model {entry.name!a}: {reason}" for reason in entry.ignored]
            chosen += [(entry, version) for version in choose(entry)]
        except NotFound:
            ignored.append(f"{path.name!a}: not a model name")
        except GatewayError as error:
            errors.append(error.message)
    return Survey(tuple(models), tuple(chosen), tuple(errors), tuple(ignored))


def _is_folder_in(path: Path, root: Path) -> bool:
    try:
        target = path.resolve(strict=True)
        return target.is_relative_to(root) and target.is_dir()
    except (OSError, RuntimeError):
        return False


def load(
    entry: ModelEntry, version: VersionEntry, instance: Instance, server: ServerSettings
) -> Load:
    """Load a version in a worker process, and end that. Takes ``load_timeout_s`` at most.

    The version gets the server's whole memory budget: what the other models leave is not looked at.
    """
    budget = MemoryBudget(server.memory_bytes).left_bytes()
    plan = load_plan(version.path, entry.settings, server, instance, budget)
    plan = replace(plan, execution=replace(plan.execution, cache_folder=None))
    began_ns = monotonic_ns()
    tried = Load(entry, version.version, instance, plan.execution.threads, 0.0)
    try:
        answer = _ask_worker(tried, plan, server)
        loaded = replace(
            tried,
            signature=Signature.from_wire(answer["signature"]),
            understanding=Understanding.from_wire(answer["understanding"]),
        )
    except _LoadFailed as error:
        loaded = replace(tried, reason=error.reason, detail=error.detail)
    return replace(loaded, seconds=(monotonic_ns() - began_ns) / NS_PER_S)


class _LoadFailed(Exception):
    """Why a version did not load, in words."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def _ask_worker(tried: Load, plan: LoadPlan, server: ServerSettings) -> Message:
    """The message ``loaded`` of a worker that is no more when this returns. _LoadFailed without it."""
    # Here and not above: where the kernels do not load, everything else can still be looked at.
    from gateway.telemetry.ledger import board_bytes

    deadline_ns = monotonic_ns() + round(server.load_timeout_s * NS_PER_S)
    name = f"{tried.entry.name}/{tried.version}#doctor"
    quiet = server.model_copy(
        update={"orphan_grace_s": 0.0, "log_level": "error", "log_format": "text"}
    )
    with ExitStack() as stack:
        try:
            output = stack.enter_context(tempfile.TemporaryFile())
            ours, theirs = Channel.pair()
            stack.callback(ours.close)
            with closing(theirs):
                process = start_process(
                    "gateway.serving.worker", theirs.fileno(), ["--name", name], output
                )
            stack.callback(process.wait)
            stack.callback(process.kill)
            board = memory.create("board", board_bytes(1, 1))
            stack.callback(os.close, board)
            ours.send(
                "load",
                (board,),
                plan=plan.to_wire(),
                options=worker_options(
                    tried.entry.settings, quiet, tried.instance, seats=1, seat=0, incarnation=1
                ).to_wire(),
            )
        except OSError as error:
            raise _LoadFailed(f"its worker cannot be started: {error.strerror}") from None
        except MessageTooLarge as error:
            raise _LoadFailed(f"its settings are too long: {error}") from None
        return _await_answer(ours, process, output, deadline_ns, server.load_timeout_s)


def _await_answer(
    channel: Channel,
    process: subprocess.Popen[bytes],
    output: BinaryIO,
    deadline_ns: int,
    timeout_s: float,
) -> Message:
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    while poll.poll(max(0, deadline_ns - monotonic_ns()) / NS_PER_MS):
        received = channel.receive()
        if received is None:
            try:
                status = process.wait(max(0, deadline_ns - monotonic_ns()) / NS_PER_S)
            except subprocess.TimeoutExpired:  # stuck at its end
                break
            reason = f"the worker {describe_exit(status)} while loading it"
            raise _LoadFailed(reason, _last_line(output))
        message, fds = received
        _close_all(fds)
        if message["op"] == "loaded":
            return message
        if message["op"] == "failed":
            detail = message["detail"]
            raise _LoadFailed(message["reason"], "" if detail == message["reason"] else str(detail))
    reason = f"it did not load within load_timeout_s ({timeout_s:g} s)"
    raise _LoadFailed(reason, _last_line(output))


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _last_line(output: BinaryIO) -> str:
    """What a process wrote last; empty where it wrote nothing."""
    output.seek(max(0, output.seek(0, os.SEEK_END) - LAST_WORDS_BYTES))
    lines = output.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
