"""The loop of a worker: take a batch, run it, publish it; and what it is told meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from gateway._kernels import ring
from gateway._kernels.ledger import BatchCounters
from gateway.clock import NS_PER_US, monotonic_ns
from gateway.serving import descriptors, geometry, policy
from gateway.serving.attached import AttachedLane
from gateway.serving.channel import Channel, Message
from gateway.serving.loader import Loaded
from gateway.serving.mailbox import Mailbox
from gateway.serving.running import LaneKey, Runner
from gateway.serving.session import RunError
from gateway.serving.staging import Piece

log = logging.getLogger("gateway.worker")

FOR_EVER = 0
"""For `Consumer.sleep`: until woken."""


class Worker:
    """The loop and what it serves."""

    def __init__(
        self,
        loaded: Loaded,
        consumer: ring.Consumer,
        counters: BatchCounters,
        mailbox: Mailbox,
        supervisor: Channel,
        max_queue_delay_us: int,
        max_answer_bytes: int,
    ) -> None:
        self._consumer = consumer
        self._counters = counters
        self._held_ns = 0  # since the last run
        self._mailbox = mailbox
        self._supervisor = supervisor
        self._max_queue_delay_ns = max_queue_delay_us * NS_PER_US
        self._lanes: dict[LaneKey, AttachedLane] = {}
        self._channels: dict[int, Channel] = {}  # to front ends, by descriptor
        self._runner = Runner(loaded, consumer, self._lanes, self._channels, max_answer_bytes)
        self._seen: dict[tuple[LaneKey, int], tuple[int, int]] = {}  # held slots: word, since when
        self._orphan = False

    def run(self) -> None:
        """Serve until told to exit, or until supervisor and front ends are gone."""
        take, letters = self._consumer.take, self._mailbox.letters
        may_hold = self._max_queue_delay_ns > 0
        now_ns = monotonic_ns()
        while True:
            if letters and not self._read_mail():
                return
            if not self._lanes:
                self._mailbox.wait()
                now_ns = monotonic_ns()
                continue
            taken = take(now_ns, may_hold)
            if taken is None:
                self._rest([], FOR_EVER)
                now_ns = monotonic_ns()
            elif taken[1]:
                now_ns = self._run(taken[0], now_ns)
            else:
                now_ns = self._weigh(monotonic_ns())

    def _weigh(self, now_ns: int) -> int:
        """Run the first slot that is not to be held back; wait where all are. Returns the time."""
        offers = self._consumer.offers()
        seen, self._seen = self._seen, {}
        until_ns = FOR_EVER
        for offered in offers:
            key, slot, word, *_ = offered
            since = seen.get((key, slot))
            if since is None or since[0] != word:
                since = word, now_ns
            self._seen[key, slot] = since
            held_ns = self._hold_until(offered, since[1], now_ns)
            if held_ns is None:
                if not self._consumer.seal(key, slot, word, now_ns):
                    return now_ns  # a row has joined it
                self._consumer.pass_on()
                return self._run(offered, now_ns)
            until_ns = min(until_ns or held_ns, held_ns)
        self._rest(offers, until_ns)
        rested_ns = monotonic_ns()
        if offers:
            self._held_ns += rested_ns - now_ns
        return rested_ns

    def _hold_until(self, offered: ring.Offered, latest_ns: int, now_ns: int) -> int | None:
        key, _slot, _word, rows, capacity, oldest_ns, shape_id, is_complete, due_ns = offered
        offer = policy.Offer(rows, oldest_ns, latest_ns, due_ns, is_complete, capacity)
        known = self._runner.known(key, shape_id)
        if known is None:
            return policy.hold_until(offer, now_ns, self._max_queue_delay_ns)
        return policy.hold_until(
            offer,
            now_ns,
            self._max_queue_delay_ns,
            known.cost,
            known.arrivals.gap_ns,
            self._consumer.others_wait(),
        )

    def _rest(self, offers: list[ring.Offered], until_ns: int) -> None:
        """Wait until there is something else to run than these, or mail, or until that time."""
        consumer = self._consumer
        consumer.announce()
        # The second look: for what came before the announcement.
        if self._mailbox.letters or consumer.offers() != offers:
            consumer.retract()
        else:
            consumer.sleep(until_ns)

    def _run(self, sealed: ring.Offered, started_ns: int) -> int:
        """Run a sealed slot, and others with it where that is better. Returns the time at its end."""
        if len(self._lanes) > 1 and (mates := self._seal_mates(sealed, started_ns)):
            together = [*mates, sealed]
            if (finished_ns := self._run_together(together, started_ns)) is not None:
                return finished_ns
            # One of them may be to blame: the others' front ends must not take them for it.
            for mate in mates:
                started_ns = self._run_alone(mate, started_ns, is_last=False)
        return self._run_alone(sealed, started_ns)

    def _run_alone(self, sealed: ring.Offered, started_ns: int, *, is_last: bool = True) -> int:
        key, slot, word, rows, capacity, oldest_ns, shape_id, _is_complete, due_ns = sealed
        runner, publish = self._runner, self._consumer.publish
        try:
            known = runner.known(key, shape_id) or runner.learn(key, slot, shape_id, capacity)
            ran_rows = runner.run(key, slot, rows, shape_id, known)
        except Exception as error:
            with self._lanes[key].output_region(slot) as region:
                descriptors.write_error(region, public_text(error))
            finished_ns = monotonic_ns()
            publish(key, slot, word, False, started_ns, finished_ns, is_last)
            return finished_ns
        finished_ns = monotonic_ns()
        self._count(rows, finished_ns - started_ns)
        publish(key, slot, word, True, started_ns, finished_ns, is_last)
        if due_ns:
            known.arrivals.took(rows, oldest_ns)
        if known.cost.observe(ran_rows, finished_ns - started_ns):
            self._consumer.recommend(runner.recommended_rows())
        return finished_ns

    def _run_together(self, sealed: Sequence[ring.Offered], started_ns: int) -> int | None:
        """Run slots of the same dims as one batch. Returns the time at its end; None: it failed."""
        runner = self._runner
        shapes = [runner.known(offered[0], offered[6]) for offered in sealed]
        pieces = [
            Piece(self._lanes[offered[0]], offered[1], offered[3], known.shape)
            for offered, known in zip(sealed, shapes, strict=True)
            if known is not None  # which `_seal_mates` saw to
        ]
        try:
            ran_rows, run_ns = runner.run_together(pieces)
        except Exception as error:
            public_text(error)
            return None
        finished_ns = monotonic_ns()
        rows = sum(piece.rows for piece in pieces)
        self._count(rows, finished_ns - started_ns, copied_rows=rows)
        for i, (offered, known) in enumerate(zip(sealed, shapes, strict=True), 1):
            is_last = i == len(sealed)
            self._consumer.publish(*offered[:3], True, started_ns, finished_ns, is_last)
            if known is not None and offered[8]:
                known.arrivals.took(offered[3], offered[5])
        if known is not None and known.cost.observe(ran_rows, run_ns):
            self._consumer.recommend(runner.recommended_rows())
        return finished_ns

    def _count(self, rows: int, run_ns: int, *, copied_rows: int = 0) -> None:
        """Count a run. Before it is published: who has its answer may ask for the numbers at once."""
        self._counters.batch(rows, run_ns, copied_rows, self._held_ns)
        self._held_ns = 0

    def _seal_mates(self, sealed: ring.Offered, now_ns: int) -> list[ring.Offered]:
        """Seal slots of the same dims that are better run together with this one.

        No retries: of a slot whose worker died nobody knows whether it would kill the others' as well.
        """
        key, _slot, word, rows, capacity, _oldest_ns, shape_id, *_ = sealed
        runner = self._runner
        known = runner.known(key, shape_id)
        if known is None or not known.row_bytes or known.cost.saves_ns < policy.COPY_NS:
            return []
        if rows >= capacity or _is_retry(word):
            return []
        others = []
        for offered in self._consumer.offers():
            other = runner.known(offered[0], offered[6])
            if other is None or not other.row_bytes or _is_retry(offered[2]):
                continue
            if other.shape.dims == known.shape.dims:
                others.append(offered)
        all_rows = [rows, *(offered[3] for offered in others)]
        count = policy.together(known.cost, all_rows, known.row_bytes, capacity)
        seal = self._consumer.seal
        return [offered for offered in others[:count] if seal(*offered[:3], now_ns)]

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

    def _attach(self, channel: Channel, message: Message, fds: list[int]) -> LaneKey:
        key = (channel.fileno(), message["lane"])
        lane = AttachedLane(geometry.LaneSpec.from_wire(message["spec"]), fds)
        self._consumer.attach(
            key, lane.control, lane.spec.slot_count, lane.spec.dims_per_slot, lane.bell
        )
        self._lanes[key] = lane
        return key

    def _forget_frontend(self, channel: Channel) -> None:
        """Drop every lane of a front end that is gone: bindings first, then the mappings."""
        self._channels.pop(channel.fileno(), None)
        gone = [key for key in self._lanes if key[0] == channel.fileno()]
        for key in gone:
            self._runner.forget(key)
            self._consumer.detach(key)
            self._lanes.pop(key).close()
        channel.close()


def public_text(error: Exception) -> str:
    """What clients may be told of a run that failed; operators find more in the log."""
    if isinstance(error, RunError):
        log.debug("a run failed: %s", error)  # may quote clients' values
        return error.public
    log.error("a run failed in a way of ours", exc_info=error)
    return "the worker could not run the batch"


def _is_retry(word: int) -> bool:
    return word >> 60 == ring.RETRY
