"""A CUDA runtime without a GPU: its memory is this process's own, its streams are lists of things to do.

With ``is_late`` nothing on a stream happens before something waits for it, as on a GPU that is far behind;
otherwise everything happens at once. What is right under both does not depend on timing.
"""

from __future__ import annotations

import ctypes
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from gateway.serving.cuda import Gpu
from gateway.serving.devicememory import Workspace
from gateway.serving.session import ModelSession, RunError

NO_MEMORY = 2
LOST = 700  # cudaErrorIllegalAddress
FAILED = 719  # cudaErrorLaunchFailure
UNUSED = 0xEE


class Function:
    """What ctypes has for a function: callable, and with attributes that may be set."""

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call

    def __call__(self, *arguments: object) -> object:
        return self._call(*arguments)


@dataclass(eq=False)
class Mark:
    """One recording of an event."""

    stream: int
    has_happened: bool = False


@dataclass(eq=False)
class FakeCudart:
    """Stands for the library.

    Attributes:
        is_late: whether streams wait to be waited for.
        fails: status by function's name, given once; "always:NAME" every time.
        calls: names and arguments, in their order.
        attributes: of the device, by number.
        registered: flags by address.
    """

    is_late: bool = True
    fails: dict[str, int] = field(default_factory=dict)
    calls: list[tuple[object, ...]] = field(default_factory=list)
    attributes: dict[int, int] = field(default_factory=dict)
    registered: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._memory: list[np.ndarray] = []
        self._streams: dict[int, deque[Callable[[], None]]] = {}
        self._marks: dict[int, Mark] = {}
        self._functions: dict[str, Function] = {}
        self._handles = 0
        self._failed = 0

    def __getattr__(self, name: str) -> Function:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        if name not in self._functions:
            body = type(self).__dict__["_" + name]

            def call(*arguments: object) -> object:
                self.calls.append((name, *arguments))
                status = self.fails.pop(name, 0) or self.fails.get("always:" + name, 0)
                return status or body(self, *arguments) or 0

            self._functions[name] = Function(call)
        return self._functions[name]

    def count(self) -> Counter[object]:
        """How often each function was called."""
        return Counter(name for name, *_ in self.calls)

    # The runtime's functions; what gives nothing succeeds.

    def _cudaSetDevice(self, ordinal):  # noqa: N802
        return 101 if ordinal else 0

    def _cudaDeviceGetAttribute(self, value, number, _ordinal):  # noqa: N802
        value._obj.value = self.attributes.get(number, 0)

    def _cudaDeviceSynchronize(self):  # noqa: N802
        for stream in self._streams:
            self.run_until(stream)

    def _cudaGetLastError(self):  # noqa: N802
        return 0

    def _cudaGetErrorString(self, status):  # noqa: N802
        return f"error {status}".encode()

    def _cudaMalloc(self, at, nbytes):  # noqa: N802
        room = np.full(nbytes + 256, UNUSED, np.uint8)
        self._memory.append(room)
        at._obj.value = room.ctypes.data + -room.ctypes.data % 256

    def _cudaMemcpyAsync(self, to, source, nbytes, _kind, stream):  # noqa: N802
        self.enqueue(stream, lambda: ctypes.memmove(to, source, nbytes) and None)

    def _cudaMemsetAsync(self, at, value, nbytes, stream):  # noqa: N802
        self.enqueue(stream, lambda: ctypes.memset(at, value, nbytes) and None)

    def _cudaStreamCreateWithFlags(self, stream, _flags):  # noqa: N802
        stream._obj.value = self._handle()
        self._streams[stream._obj.value] = deque()

    def _cudaStreamSynchronize(self, stream):  # noqa: N802
        self.run_until(stream)
        return self._status()

    def _cudaStreamWaitEvent(self, stream, event, _flags):  # noqa: N802
        mark = self._marks[event]
        self.enqueue(stream, lambda: self.run_until(mark.stream, mark))

    def _cudaEventCreateWithFlags(self, event, _flags):  # noqa: N802
        event._obj.value = self._handle()

    def _cudaEventRecord(self, event, stream):  # noqa: N802
        mark = self._marks[event] = Mark(stream)
        self.enqueue(stream, lambda: setattr(mark, "has_happened", True))

    def _cudaEventSynchronize(self, event):  # noqa: N802
        mark = self._marks[event]
        self.run_until(mark.stream, mark)
        return self._status()

    def _cudaHostRegister(self, at, _nbytes, flags):  # noqa: N802
        self.registered[at] = flags

    def _cudaHostUnregister(self, at):  # noqa: N802
        del self.registered[at]

    def _handle(self) -> int:
        self._handles += 1
        return self._handles

    def _status(self) -> int:
        """The status of what has failed since it was last asked for."""
        status, self._failed = self._failed, 0
        return status

    def fail(self) -> None:
        """What is being done fails as a kernel does: whoever waits next is told."""
        self._failed = FAILED

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        """Put work on a stream."""
        self._streams[stream].append(work)
        if not self.is_late:
            self.run_until(stream)

    def run_until(self, stream: int, mark: Mark | None = None) -> None:
        """Do what is on a stream, all of it or until an event has happened."""
        while self._streams[stream] and not (mark and mark.has_happened):
            self._streams[stream].popleft()()


class FakeGpuSession(ModelSession):
    """A session of the CPU that computes on a fake GPU's stream, in its memory.

    Attributes:
        graphs: the number of each run, in their order.
        fails_next: raised by the next run.
    """

    def __init__(self, path, facts, execution, cudart: FakeCudart) -> None:
        super().__init__(path, facts, execution)
        self.gpu = Gpu(cudart, 0)
        self._scratch = Workspace(self.gpu)
        self.is_on_gpu = True
        self.cudart = cudart
        self.graphs: list[int] = []
        self.fails_next: Exception | None = None

    def _bind(self, device, *arguments):
        return super()._bind("cpu", *arguments)

    def _run(self, binding, options):
        if self.fails_next is not None:
            error, self.fails_next = self.fails_next, None
            raise error
        self.graphs.append(int(options.get_run_config_entry("gpu_graph_id")))
        run = super()._run
        if not _is_queued(options):
            self.cudart.run_until(self.gpu.compute_stream)
            run(binding, options)
            return

        def work() -> None:
            try:
                run(binding, options)
            except RunError:
                self.cudart.fail()

        self.cudart.enqueue(self.gpu.compute_stream, work)


def _is_queued(options) -> bool:
    try:
        return options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
    except RuntimeError:  # it is not set
        return False
