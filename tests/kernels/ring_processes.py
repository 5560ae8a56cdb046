"""The processes of the ring's stress test: a front end or a worker, run as a script.

A front end owns one lane, feeds it rows, cancels some of them and checks every answer. A worker serves all
lanes as the real one does: look, announce, look again, sleep for ever. The script knows only the ring and
the standard library, so that a worker that was killed is replaced within milliseconds. What each process
gets is one JSON object, its arguments; ring_fleet.py makes it and starts them.

Rows are numbers. A worker answers a row with `answer` of it and counts in a memory of its own, `runs`, how
often each row was run: that is what tells a row that ran twice from one that was answered twice.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import sys
import threading
import time
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace
from typing import Any

POISON = 2**64 - 1
"""What the front end leaves where no row is: a worker that runs it has read beyond its batch."""
HOLD = 2**63
"""Rows from here on are held by their worker until every worker has one: a muster."""


def answer(lane: int, row: int) -> int:
    return (row * 0x9E3779B97F4A7C15 + lane + 1) % 2**64


def load_ring(path: str) -> Any:
    spec = spec_from_file_location("ring", path, loader=ExtensionFileLoader("ring", path))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def map_words(fd: int, access: int = mmap.ACCESS_DEFAULT) -> memoryview:
    return memoryview(mmap.mmap(fd, 0, access=access)).cast("Q")


def wait_readable(fds: list[int], patience_s: float, what: Callable[[], str]) -> set[int]:
    """The readable ones of the descriptors; fails when nothing comes: a wake-up was lost."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    ready = {fd for fd, _ in poll.poll(patience_s * 1000)}
    if not ready:
        raise TimeoutError(f"nothing happened for {patience_s} s: {what()}")
    return ready


class FrontEnd:
    """One lane: its producer, its rows, and what became of each of them.

    It says "ready", "enough" (rows were sent), "reclaimed", "done {counts}" and "mustered" on its standard
    output, and hears "dead INCARNATION", "drain" and "muster WORKERS" on its standard input.
    """

    def __init__(self, ring: Any, plan: SimpleNamespace):
        self.ring = ring
        self.plan = plan
        self.lane: int = plan.lane
        files = plan.lanes[plan.lane]
        self.bell: int = files["bell"]
        self.inputs = map_words(files["inputs"])
        self.outputs = map_words(files["outputs"], mmap.ACCESS_READ)
        self.runs = map_words(files["runs"], mmap.ACCESS_READ)
        self.board = mmap.mmap(plan.board, 0)
        control = mmap.mmap(files["control"], 0)
        self.producer = ring.Producer(control, plan.slots, 1, self.board)
        self.random = random.Random(plan.seed)

        self.batches: dict[int, list[int]] = {}
        self.open_slots: set[int] = set()  # as far as is known here: a worker may have sealed them
        self.retries: set[int] = set()
        self.dead = {0}  # what a seat shows before its first worker
        self.free = list(range(self.plan.slots))
        self.next_row = 0
        self.answered: dict[int, int] = {}
        self.cancelled: dict[int, int] = {}  # row: how often it had run by then
        self.retried: dict[int, int] = {}
        self.lost_appends = self.lost_edits = self.edited_retries = self.completed = 0
        self.was_enough = self.draining = False
        self.heard = b""
        for at in range(len(self.inputs)):
            self.inputs[at] = POISON

    # The life of the process.

    def serve(self) -> None:
        self.say("ready")
        self.work()
        self.verify()
        counts = {
            "rows": self.next_row,
            "answered": len(self.answered),
            "cancelled": len(self.cancelled),
            "retried": len(self.retried),
            "batches": self.completed,
            "lost_appends": self.lost_appends,
            "lost_edits": self.lost_edits,
            "edited_retries": self.edited_retries,
        }
        self.say(f"done {json.dumps(counts)}")
        while self.hear():
            pass

    def work(self) -> None:
        """Send rows until told to drain, then see the last of them answered."""
        while self.batches or not self.draining:
            outstanding = sum(map(len, self.batches.values()))
            full = outstanding >= self.plan.window or not (self.free or self.open_slots)
            if not (self.draining or full or self.is_short_of_workers()):
                self.submit()
            else:
                self.wait()
            if self.batches and self.random.random() < self.plan.cancel_chance:
                self.cancel(self.random.choice(list(self.batches)))
            for slot in self.producer.collect():
                self.finish(slot)

    def is_short_of_workers(self) -> bool:
        """Whether a dead worker's seat is still empty, where the scenario waits for the next one."""
        return self.plan.full_house and any(
            seat[0] in self.dead for seat in self.ring.seats(self.board)
        )

    def say(self, line: str) -> None:
        os.write(1, line.encode() + b"\n")

    def hear(self) -> bool:
        """Obey what came on the standard input; False at its end."""
        came = os.read(0, 4096)
        *lines, self.heard = (self.heard + came).split(b"\n")
        for line in lines:
            verb, *operands = line.decode().split()
            if verb == "dead":
                self.reclaim(int(operands[0]))
            elif verb == "drain":
                self.draining = True
            elif verb == "muster":
                self.muster(int(operands[0]))
        return bool(came)

    def wait(self) -> None:
        """Sleep until a worker reports or a message comes."""
        if not self.producer.arm():
            return
        ready = wait_readable([self.bell, 0], self.plan.patience_s, self.describe)
        if self.bell in ready:
            os.eventfd_read(self.bell)
        if 0 in ready and not self.hear():
            raise EOFError("the fleet is gone")

    def describe(self) -> str:
        slots = {slot: (self.producer.phase(slot), rows) for slot, rows in self.batches.items()}
        return f"lane {self.lane} {slots=} seats={self.ring.seats(self.board)}"

    # Rows.

    def submit(self) -> None:
        """A burst of rows, with a wake-up for each addition or one for all."""
        each = self.random.random() < self.plan.wake_each_chance
        for _ in range(self.random.randint(*self.plan.burst)):
            if not self.add(self.random.randint(1, min(3, self.plan.capacity))):
                break
            if each:
                self.producer.wake()
        if not each:
            self.producer.wake()
        if self.next_row >= self.plan.rows and not self.was_enough:
            self.was_enough = True
            self.say("enough")

    def add(self, count: int) -> bool:
        """Add rows to a slot thought open, if there is one with room, or to a free one."""
        rows = range(self.next_row, self.next_row + count)
        roomy = [n for n in self.open_slots if len(self.batches[n]) + count <= self.plan.capacity]
        if roomy and self.random.random() < 0.8:
            slot = self.random.choice(roomy)
            batch = self.batches[slot]
            self.write(slot, len(batch), rows)
            if self.producer.append(slot, count):
                batch.extend(rows)
                self.next_row += count
                return True
            self.lost_appends += 1
            self.open_slots.remove(slot)
        if not self.free:
            return False
        self.open(rows)
        self.next_row += count
        return True

    def open(self, rows: range) -> None:
        slot = self.free.pop(self.random.randrange(len(self.free)))
        self.write(slot, 0, rows)
        self.batches[slot] = list(rows)
        stamp = rows[0] % 2**62
        self.producer.open(slot, len(rows), stamp, stamp + 1, self.plan.capacity, (stamp + 2,))
        self.open_slots.add(slot)

    def write(self, slot: int, at: int, rows: Any) -> None:
        for i, row in enumerate(rows, slot * self.plan.capacity + at):
            self.inputs[i] = row

    def cancel(self, slot: int) -> None:
        """Drop some rows of a slot, if no worker has taken it."""
        if not self.producer.edit(slot):
            self.lost_edits += 1
            return
        self.edited_retries += slot in self.retries
        batch = self.batches[slot]
        kept = [row for row in batch if self.random.random() < 0.5]
        for row in set(batch) - set(kept):
            self.cancelled[row] = self.runs[row]
        self.write(slot, 0, kept + [POISON] * (len(batch) - len(kept)))
        self.producer.edited(slot, len(kept))
        self.producer.wake()
        if kept:
            self.batches[slot] = kept
        else:
            self.forget(slot)

    def forget(self, slot: int) -> None:
        del self.batches[slot]
        self.free.append(slot)
        self.open_slots.discard(slot)
        self.retries.discard(slot)

    def finish(self, slot: int) -> None:
        """Answer a slot that was reported, unless the report was of an earlier batch."""
        if slot not in self.batches:
            return
        phase, batch = self.producer.phase(slot), self.batches[slot]
        if phase in (self.ring.CORRUPT, self.ring.FAILED):
            raise AssertionError(f"slot {slot} is in phase {phase}: {self.describe()}")
        if phase != self.ring.DONE:
            return
        assert self.producer.rows(slot) == len(batch)
        begin = slot * self.plan.capacity
        given = self.outputs[begin : begin + len(batch)].tolist()
        assert given == [answer(self.lane, row) for row in batch], f"wrong answers in slot {slot}"
        started_ns, finished_ns = self.producer.times(slot)
        assert 0 < started_ns <= finished_ns
        for row in batch:
            self.answered[row] = self.answered.get(row, 0) + 1
        self.completed += 1
        self.write(slot, 0, [POISON] * self.plan.capacity)
        self.producer.free(slot)
        self.forget(slot)

    def reclaim(self, incarnation: int) -> None:
        """What a front end does after a worker's confirmed death, in its own lane."""
        self.dead.add(incarnation)
        for slot in list(self.batches):
            phase = self.producer.phase(slot)
            if phase == self.ring.SEALED and self.producer.owner(slot) == incarnation:
                self.producer.retry(slot)
                for row in self.batches[slot]:
                    self.retried[row] = self.retried.get(row, 0) + 1
                self.open_slots.discard(slot)
                self.retries.add(slot)
                if self.random.random() < self.plan.cancel_chance:
                    self.cancel(slot)
            else:
                self.finish(slot)  # DONE, perhaps, with a bell that never rang
        self.producer.wake_all()
        self.say("reclaimed")

    def muster(self, workers: int) -> None:
        """Have every worker hold a slot at once: one that sleeps past its wake-up is missed.

        One of them is woken here, and that one or the next has to pass it on.
        """
        for n in range(workers):
            self.open(range(HOLD + n, HOLD + n + 1))
        self.producer.wake()
        came = 0
        while came < workers:  # too few: the seats tell who is missing
            wait_readable([self.plan.arrivals], self.plan.patience_s, self.describe)
            came += os.eventfd_read(self.plan.arrivals)
        os.eventfd_write(self.plan.release, workers)
        while self.batches:
            self.wait()
            for slot in self.producer.collect():
                self.finish(slot)
        self.say("mustered")

    def verify(self) -> None:
        """Every row is answered once or cancelled, and ran no more often than it had to."""
        for row in range(self.next_row):
            ran = self.runs[row]
            if row in self.cancelled:
                assert row not in self.answered, f"row {row} was cancelled and answered"
                assert ran == self.cancelled[row], f"row {row} ran after it was cancelled"
            else:
                assert self.answered.get(row) == 1, f"row {row}: {self.answered.get(row)} answers"
                most = 1 + self.retried.get(row, 0)
                assert 1 <= ran <= most, f"row {row} ran {ran} times, not 1 to {most}"
        assert set(self.free) == set(range(self.plan.slots))
        assert len(self.free) == self.plan.slots


class Worker:
    """One incarnation on a seat, serving all lanes until its standard input ends."""

    def __init__(self, ring: Any, plan: SimpleNamespace):
        self.plan = plan
        self.stopping = False
        self.consumer = ring.Consumer(mmap.mmap(plan.board, 0), plan.seat, plan.incarnation)
        self.lanes = []
        for key, files in enumerate(plan.lanes):
            control = mmap.mmap(files["control"], 0)
            self.consumer.attach(key, control, plan.slots, 1, files["bell"])
            inputs = map_words(files["inputs"], mmap.ACCESS_READ)
            self.lanes.append((inputs, map_words(files["outputs"]), map_words(files["runs"])))

    def serve(self) -> None:
        for files in self.plan.lanes:
            os.eventfd_write(
                files["bell"], 1
            )  # for a front end that waits until every seat is taken
        threading.Thread(target=self.listen, daemon=True).start()
        consumer = self.consumer
        while True:
            taken = consumer.take(time.monotonic_ns(), False)
            if taken is None:
                consumer.announce()
                found = consumer.best()
                if found is None and not self.stopping:
                    consumer.sleep(0)
                    continue
                consumer.retract()
                if found is None:
                    return
                continue
            # As for a run of several slots: it may die with any of them sealed or published.
            mates = [] if self.holds(*taken[0][:2]) else consumer.offers()
            mates = [o for o in mates if not self.holds(*o[:2])]
            mates = [o for o in mates if consumer.seal(*o[:3], time.monotonic_ns())]
            sealed = [*mates[: self.plan.seat], taken[0], *mates[self.plan.seat :]]
            started_ns = time.monotonic_ns()
            for key, slot, _word, rows, capacity, oldest_ns, shape_id, *_ in sealed:
                stated = (capacity, shape_id, consumer.dims(key, slot))
                assert stated == (self.plan.capacity, oldest_ns + 1, (oldest_ns + 2,))
                self.run(key, slot, rows)
            finished_ns = time.monotonic_ns()
            for key, slot, word, *_ in sealed:
                is_last = slot == sealed[-1][1] and key == sealed[-1][0]
                assert consumer.publish(key, slot, word, True, started_ns, finished_ns, is_last)

    def holds(self, lane: int, slot: int) -> bool:
        """Whether the slot is one that keeps a worker to itself until every seat is taken."""
        return self.lanes[lane][0][slot * self.plan.capacity] >= HOLD

    def run(self, lane: int, slot: int, rows: int) -> None:
        inputs, outputs, runs = self.lanes[lane]
        for at in range(slot * self.plan.capacity, slot * self.plan.capacity + rows):
            row = inputs[at]
            assert row != POISON, f"slot {slot} of lane {lane} was sealed with rows that are none"
            if row >= HOLD:
                os.eventfd_write(self.plan.arrivals, 1)
                wait_readable([self.plan.release], 2 * self.plan.patience_s, lambda: "the muster")
                os.eventfd_read(self.plan.release)
            else:
                runs[row] += 1
            outputs[at] = answer(lane, row)

    def listen(self) -> None:
        """The helper thread: control messages reach a sleeping worker by its own seat."""
        while os.read(0, 4096):
            pass
        self.stopping = True
        self.consumer.nudge()


def main() -> None:
    plan = SimpleNamespace(**json.loads(sys.argv[1]))
    ring = load_ring(plan.ring)
    ring.set_steps(plan.seed, plan.deaths)
    role = FrontEnd if plan.role == "front end" else Worker
    role(ring, plan).serve()


if __name__ == "__main__":
    main()
