"""Batches on a GPU, two at a time: while one is computed the next is copied in and the last one out.

Copies in, computing and copies out each have a stream, on which work is done in order; events join them:

    copy in    | k |   | k+1 |     | k+2 |
    compute        | k       | k+1       | k+2
    copy out                 | k |       | k+1 |

A batch's tensors are in a `Workspace` that is its own until it is finished, so that batches cannot mix.
ONNX Runtime only queues its kernels; what it frees at the end of a run is used again by later work of the
same stream. Batches are finished in the order in which they were begun.

Rejected: a session for each batch in flight, which would hold the weights twice; a thread that waits for
the GPU, whose hand-over costs more than the wait that it would save.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gateway.clock import monotonic_ns
from gateway.errors import LoadError
from gateway.serving import cuda, geometry
from gateway.serving.devicememory import Fragment, Workspace
from gateway.serving.geometry import Dims, SlotShape
from gateway.serving.session import GPU_FAILED, NO_GRAPH, ModelSession, RunError
from gateway.tensors import Signature

log = logging.getLogger("gateway.worker")

DEPTH = 2
"""Batches in flight: a third would only wait longer, in the queue of a stream."""

MAX_BOUND = 2048
"""Bindings that are kept; bounds memory (a few kB each). Beyond it the least recently used is made again."""

MAX_GRAPHS = 256
"""CUDA graphs that are captured; each takes some 100 kB of the GPU's memory, and time at load."""

RECENT_RUNS = 4
"""Runs of a size of which the shortest says how long the next one takes at least: who waits that long
for more rows must not keep an answer that is there already. First runs take long, and are among them."""

_SMOOTHING = 8
"""One part in so many is what a new measurement counts in the estimate of how long `begin` takes."""


@dataclass(slots=True)
class Batch:
    """Rows that are run together.

    Attributes:
        parts: one for each sealed slot, in the order of the rows.
        rows: what the batch is padded to.
        tag: the caller's; nothing is done with it.
        error: why it failed, once it is finished; None: it did not.
        began_ns: when it began to be copied, set by `Pipeline.begin`.
        took_ns: from there, or from the end of the batch before it, to its own.
    """

    parts: tuple[Fragment, ...]
    rows: int
    tag: object = None
    error: RunError | None = None
    began_ns: int = 0
    took_ns: int = 0


@dataclass(slots=True)
class _Bound:
    """How batches of given dims and rows are run in a workspace."""

    layout: SlotShape
    binding: object
    graph: int
    took_ns: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT_RUNS))


@dataclass(slots=True)
class _Running:
    batch: Batch
    workspace: Workspace
    bound: _Bound


def _die() -> None:
    """End as a crash does, so that the request to blame is found as it is for crashes."""
    os.abort()


class Pipeline:
    """The batches of one session on its GPU. For one thread.

    Args:
        session: a session that `is_on_gpu`.
        gpu: its GPU.
        signature: the model's, as it is served.
        on_lost: called when the GPU will do nothing more for this process; not to return.

    Attributes:
        gpu: the same.
    """

    def __init__(
        self,
        session: ModelSession,
        gpu: cuda.Gpu,
        signature: Signature,
        on_lost: Callable[[], object] = _die,
    ) -> None:
        self._session = session
        self.gpu = gpu
        self._signature = signature
        self._on_lost = on_lost
        self._idle = deque(Workspace(gpu) for _ in range(DEPTH))
        self._running: deque[_Running] = deque()
        self._graphs: dict[tuple[Workspace, Dims, int], int] = {}
        self._bound = functools.lru_cache(maxsize=MAX_BOUND)(self._bind)
        self._finished_ns = 0
        self._begin_ns = 0  # estimate of the time that `begin` takes

    @property
    def in_flight(self) -> int:
        """Batches that were begun and not finished."""
        return len(self._running)

    @property
    def began_ns(self) -> int:
        """When the first of those began; 0: there are none."""
        return self._running[0].batch.began_ns if self._running else 0

    @property
    def is_full(self) -> bool:
        """Whether one must be finished before another is begun."""
        return not self._idle

    def takes(self, shape: SlotShape) -> bool:
        """Whether batches of slots of this shape can be run here."""
        return self._session.runs_on_gpu(shape)

    def begin(self, batch: Batch) -> None:
        """Queue a batch: its way to the GPU, its run and its way back. Not to be called when full.

        Until it is finished its slots are read and written. When this raises, nothing is queued.

        Raises:
            RunError: it cannot be run.
        """
        batch.began_ns = monotonic_ns()
        workspace = self._idle[0]
        try:
            bound = self._bound(workspace, batch.parts[0].shape.dims, batch.rows)
            workspace.copy_in(bound.layout, batch.parts, batch.rows)
            self._launch(workspace, bound)
            workspace.copy_out(bound.layout, batch.parts)
        except (cuda.CudaError, RunError) as error:
            self._settle()
            raise _as_run_error(error) from None
        self._idle.popleft()
        self._running.append(_Running(batch, workspace, bound))
        self._begin_ns = _smoothed(self._begin_ns, monotonic_ns() - batch.began_ns)

    def due_ns(self) -> int:
        """When to begin the next batch, for the GPU not to wait and no row to be left out before that.

        0 where nothing is in flight, or nothing is known of how long it takes: now.
        """
        if not self._running:
            return 0
        running = self._running[-1]
        if len(running.bound.took_ns) < RECENT_RUNS:
            return 0
        start_ns = max(running.batch.began_ns, self._finished_ns)
        return start_ns + min(running.bound.took_ns) - self._begin_ns

    def finish(self) -> Batch:
        """Wait for the batch that was begun first; its outputs are in its slots then, or its error is set."""
        running = self._running.popleft()
        batch, bound = running.batch, running.bound
        try:
            self.gpu.wait_for(running.workspace.copied_out)
        except cuda.CudaError as error:
            self._settle()
            batch.error = _as_run_error(error)
        self._idle.append(running.workspace)
        now_ns = monotonic_ns()
        batch.took_ns = now_ns - max(batch.began_ns, self._finished_ns)
        bound.took_ns.append(batch.took_ns)
        self._finished_ns = now_ns
        return batch

    def _launch(self, workspace: Workspace, bound: _Bound) -> None:
        stream = self.gpu.compute_stream
        self.gpu.wait_in(stream, workspace.copied_in)
        self._session.launch(bound.binding, bound.graph)
        self.gpu.record(workspace.computed, stream)

    def _settle(self) -> None:
        """Wait until nothing is queued, so that no slot is touched any more; find out if the GPU is lost."""
        try:
            self.gpu.drain()
        except cuda.CudaError as error:
            log.warning("the GPU: %s", error)
        if self.gpu.is_lost():
            log.critical("the GPU does no more for this worker, which ends")
            self._on_lost()

    def _bind(self, workspace: Workspace, dims: Dims, rows: int) -> _Bound:
        layout = geometry.shape_of(self._signature, dims, rows)
        binding = self._session.bind_on_gpu(layout, rows, *workspace.place(layout))
        return _Bound(layout, binding, self._graphs.get((workspace, dims, rows), NO_GRAPH))

    # CUDA graphs

    def capture_graphs(self) -> int:
        """Capture a graph of every allowed batch size and bucket, in each workspace; how many.

        What is met later is run without one: capturing takes several runs. Models whose dims vary
        beyond their padding have none.

        Raises:
            LoadError: the model cannot be run so.
        """
        keys = [
            (workspace, dims, rows)
            for dims in _dims_to_expect(self._signature)
            for rows in self._signature.allowed_batch_sizes
            for workspace in self._idle
            if self.takes(geometry.shape_of(self._signature, dims, rows))
        ][:MAX_GRAPHS]
        self._graphs = {key: number for number, key in enumerate(keys, 1)}
        try:
            for workspace, dims, rows in reversed(keys):  # the largest first: one area holds all
                self._capture(workspace, dims, rows)
        except (cuda.CudaError, RunError) as error:
            raise LoadError("its CUDA graphs cannot be captured", str(error)) from None
        return len(keys)

    def _capture(self, workspace: Workspace, dims: Dims, rows: int) -> None:
        bound = self._bound(workspace, dims, rows)
        inputs_at, _ = workspace.place(bound.layout)
        self.gpu.clear(inputs_at, bound.layout.input_bytes, self.gpu.copy_in_stream)
        self.gpu.record(workspace.copied_in, self.gpu.copy_in_stream)
        self._launch(workspace, bound)
        self.gpu.drain()


def _dims_to_expect(signature: Signature) -> Iterator[Dims]:
    """The dims of a row of each input at every combination of buckets; none where others may come."""
    buckets = {padding.dim: padding.buckets for padding in signature.padding}
    for lengths in itertools.product(*buckets.values()):
        padded: dict[int | str | None, int] = dict(zip(buckets, lengths, strict=True))
        dims: list[tuple[int, ...] | None] = []
        for spec in signature.inputs:
            inner: list[int] = []
            for declared in geometry.inner_of(signature, spec):
                dim = padded.get(declared, declared)
                if isinstance(dim, int):
                    inner.append(dim)
            if not spec.optional and (
                spec.shape is None or len(inner) < len(geometry.inner_of(signature, spec))
            ):
                return
            dims.append(None if spec.optional else tuple(inner))
        yield tuple(dims)


def _as_run_error(error: cuda.CudaError | RunError) -> RunError:
    return error if isinstance(error, RunError) else RunError(str(error), GPU_FAILED)


def _smoothed(former_ns: int, new_ns: int) -> int:
    """An estimate that follows what is measured; the first measurement is taken as it is."""
    return former_ns + (new_ns - former_ns) // _SMOOTHING if former_ns else new_ns
