"""The loop of a worker on a GPU: the next batch is begun while one is computed.

When to take the next one? At once, and rows that come during the run are left out of it; at the end of the
run, and the GPU waits for the copy. So it is taken when it is full, or when the run is about to end as far
as is known (`Pipeline.due_ns`), and until then the worker sleeps as it does without work.
"""

from __future__ import annotations

from typing import Any, TypeAlias, cast

from gateway._kernels import ring
from gateway.clock import monotonic_ns
from gateway.errors import LoadError
from gateway.serving import descriptors
from gateway.serving.channel import Channel, Message
from gateway.serving.devicememory import Fragment
from gateway.serving.loader import Loaded
from gateway.serving.loop import FOR_EVER, Worker, public_text
from gateway.serving.pinning import Pins
from gateway.serving.pipeline import Batch, Pipeline
from gateway.serving.running import KnownShape, LaneKey
from gateway.serving.session import RunError

Sealed: TypeAlias = "list[tuple[ring.Offered, KnownShape]]"  # its name is there for types alone
"""The slots of a batch, the one that the worker took last."""


def pipeline_for(loaded: Loaded, *, with_graphs: bool) -> Pipeline | None:
    """What runs a model's batches on its GPU; None where it is served without.

    Raises:
        LoadError: CUDA graphs are asked for and cannot be captured.
    """
    session = loaded.session
    if session.gpu is None or not session.is_on_gpu:
        return None
    pipeline = Pipeline(session, session.gpu, loaded.signature)
    if with_graphs and not pipeline.capture_graphs():
        raise LoadError(
            "cuda_graphs is true, and its dims vary beyond its padding or its outputs are copied: "
            "pad every dim that varies, or leave cuda_graphs out"
        )
    return pipeline


class GpuWorker(Worker):
    """A worker whose batches overlap."""

    def __init__(self, *arguments: Any, pipeline: Pipeline, pins: Pins) -> None:
        super().__init__(*arguments)
        self._pipeline = pipeline
        self._pins = pins

    def run(self) -> None:
        """Serve until told to exit, or until supervisor and front ends are gone."""
        letters = self._mailbox.letters
        while True:
            if letters and not self._read_mail():
                self._finish_all()
                return
            if not self._lanes:
                self._mailbox.wait()
            elif self._pipeline.in_flight:
                self._go_on()
            else:
                self._begin_first()

    def _begin_first(self) -> None:
        """With nothing in flight: as on a CPU."""
        now_ns = monotonic_ns()
        taken = self._consumer.take(now_ns, self._max_queue_delay_ns > 0)
        if taken is None:
            self._rest([], FOR_EVER)
        elif taken[1]:
            self._run(taken[0], now_ns)
        else:
            self._weigh(now_ns)

    def _go_on(self) -> None:
        """With a batch in flight: begin another, finish the first, or sleep until one of them is right."""
        if self._pipeline.is_full:
            self._finish()
            return
        offers, now_ns, due_ns = self._consumer.offers(), monotonic_ns(), self._pipeline.due_ns()
        if now_ns < due_ns and not any(offered[7] for offered in offers):
            self._rest(offers, due_ns)
            return
        taken = self._consumer.take(now_ns, False)
        if taken is None:
            self._finish()
        elif taken[1] or self._consumer.seal(*taken[0][:3], now_ns):
            self._run(taken[0], now_ns)

    def _run(self, sealed: ring.Offered, started_ns: int) -> int:
        """Begin a sealed slot's batch, with others where that is better. Returns the time."""
        key, slot, _word, _rows, capacity, _oldest_ns, shape_id, *_ = sealed
        try:
            known = self._runner.known(key, shape_id)
            known = known or self._runner.learn(key, slot, shape_id, capacity)
        except RunError:
            return self._run_alone(sealed, started_ns)  # which fails in the same way, and says so
        if not self._pipeline.takes(known.shape):
            return self._run_alone(sealed, started_ns)
        mates = self._seal_mates(sealed, started_ns) if len(self._lanes) > 1 else []
        together = [(mate, self._runner.known(mate[0], mate[6]) or known) for mate in mates]
        together.append((sealed, known))
        parts = tuple(self._part(*one) for one in together)
        rows = self._runner.padded(sum(part.rows for part in parts))
        try:
            self._pipeline.begin(Batch(parts, rows, together))
        except RunError as error:
            self._fail(together, error, started_ns)
        return monotonic_ns()

    def _part(self, sealed: ring.Offered, known: KnownShape) -> Fragment:
        lane, slot = self._lanes[sealed[0]], sealed[1]
        return Fragment(
            known.shape,
            sealed[3],
            lane.inputs_at + slot * lane.spec.input_slot_bytes,
            lane.outputs_at + slot * lane.spec.output_slot_bytes,
        )

    def _finish(self) -> None:
        """Wait for the first batch in flight and publish its slots."""
        batch = self._pipeline.finish()
        together = cast(Sealed, batch.tag)
        finished_ns = monotonic_ns()
        if batch.error is not None:
            self._fail(together, batch.error, batch.began_ns)
            return
        self._count(sum(part.rows for part in batch.parts), batch.took_ns)
        for sealed, known in together:
            is_last = sealed is together[-1][0]
            self._consumer.publish(*sealed[:3], True, batch.began_ns, finished_ns, is_last)
            if sealed[8]:
                known.arrivals.took(sealed[3], sealed[5])
        self._stay_busy()
        if together[-1][1].cost.observe(batch.rows, batch.took_ns):
            self._consumer.recommend(self._runner.recommended_rows())

    def _fail(self, together: Sealed, error: RunError, started_ns: int) -> None:
        """Publish a slot as failed; of several one may be to blame, so each is run by itself."""
        for sealed, _known in together:
            is_last = sealed is together[-1][0]
            if len(together) > 1:
                self._run_alone(sealed, started_ns, is_last=is_last)
                continue
            key, slot, word, *_ = sealed
            with self._lanes[key].output_region(slot) as region:
                descriptors.write_error(region, public_text(error))
            self._consumer.publish(key, slot, word, False, started_ns, monotonic_ns(), True)
        self._stay_busy()

    def _stay_busy(self) -> None:
        """The last slot of a batch was published: what is in flight still counts as work."""
        if since_ns := self._pipeline.began_ns:
            self._consumer.stay_busy(since_ns)

    def _finish_all(self) -> None:
        while self._pipeline.in_flight:
            self._finish()

    def _attach(self, channel: Channel, message: Message, fds: list[int]) -> LaneKey:
        key = super()._attach(channel, message, fds)
        self._pins.pin(self._lanes[key])
        return key

    def _forget_frontend(self, channel: Channel) -> None:
        """Nothing may be on its way to or from memory that is unmapped."""
        self._finish_all()
        for key, lane in self._lanes.items():
            if key[0] == channel.fileno():
                self._pins.unpin(lane)
        super()._forget_frontend(channel)
