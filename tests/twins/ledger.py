"""The ledger in plain Python: the same bytes as kernels/ledger.pyx, laid out anew."""

from __future__ import annotations

import operator
import time
from bisect import bisect_left, bisect_right
from typing import Any

MAGIC, VERSION = int.from_bytes(b"LGDR", "little"), 2
CODES = (
    *(200, 400, 401, 403, 404, 405, 408, 409, 412, 413, 415, 428, 429, 431, 499),
    *(500, 501, 503, 504, 507, 0),
)
DURATION_BOUNDS_NS = (*(int(f * 10**n) for n in range(5, 10) for f in (1, 2.5, 5)), 10**10)
ROW_BOUNDS = tuple(2**n for n in range(10))
EXACT_ROWS = 1024
SKETCH_BOUNDS_NS = tuple(2**n + 2**n // 32 * step for n in range(10, 36) for step in range(1, 33))
ROW_CLASSES = (1, 2, 4, 8, 16, 32, 64, 128, 0)
MAX_SECTIONS = 65536

# By name: the first 64-bit word and how many there are. The word before all is magic and version.
REQUESTS = {
    "waiting": (1, 1),
    "last_inference_ms": (2, 1),
    "codes": (3, 21),
    "rows": (24, 1),
    "success_ns": (25, 1),
    "fail_ns": (26, 1),
    "queue_ns": (27, 1),
    "compute_ns": (28, 1),
    "compared": (29, 1),
    "agreed": (30, 1),
    "shadow_dropped": (31, 1),
    "shadow_failed": (32, 1),
    "request_buckets": (33, 17),
    "queue_buckets": (50, 17),
}
FIRST_COUNTER, LATENCY, REQUEST_WORDS = 3, 67, 904
BATCHES = {
    "starts": (1, 1),
    "rows": (3, 1),
    "run_ns": (4, 1),
    "copied_rows": (5, 1),
    "held_ns": (6, 1),
    "row_buckets": (7, 11),
    "run_buckets": (18, 17),
}
MOST_ROWS, BY_ROWS, COMPUTE, BATCH_WORDS = 2, 35, 2087, 9576
SKETCH = 832

LAYOUT = {
    "magic": MAGIC,
    "layout": VERSION,
    "requests": REQUEST_WORDS * 8,
    "batches": BATCH_WORDS * 8,
}

MASK = 2**64 - 1


def unsigned(value: int) -> int:
    value = operator.index(value)
    if not 0 <= value <= MASK:
        raise OverflowError(f"{value} is not an unsigned integer of 64 bits")
    return value


def check_number(number: int, least: int) -> None:
    if not least <= number <= MAX_SECTIONS:
        raise ValueError(number)


def sketch_bucket(ns: int) -> int:
    return min(bisect_right(SKETCH_BOUNDS_NS, unsigned(ns)), SKETCH - 1)


def class_of(rows: int) -> int:
    return sum(rows > most for most in ROW_CLASSES[:-1])


def ledger_bytes(frontends: int, workers: int) -> int:
    check_number(frontends, 1)
    check_number(workers, 1)
    return workers * LAYOUT["batches"] + 2 * frontends * LAYOUT["requests"]


def section(board: Any, offset: int, words: int, *, writable: bool) -> memoryview:
    view = memoryview(board).cast("B")
    if writable and view.readonly:
        raise BufferError("not writable")
    if offset < 0 or offset + words * 8 > view.nbytes or offset % 8:
        raise ValueError(offset)
    return view[offset : offset + words * 8].cast("Q")


class Section:
    def __init__(self, board: Any, offset: int, words: int):
        self.words = section(board, offset, words, writable=True)
        head = VERSION << 32 | MAGIC
        if self.words[0] not in (0, head):
            for i in range(words):
                self.words[i] = 0
        self.words[0] = head

    def add(self, place: int, more: int) -> None:
        self.words[place] = self.words[place] + more & MASK


def gauge(name: str) -> property:
    place = REQUESTS[name][0]

    def put(self: Section, value: int) -> None:
        self.words[place] = unsigned(value)

    return property(lambda self: self.words[place], put)


class RequestCounters(Section):
    def __init__(self, board: Any, offset: int, workers: int, index: int):
        check_number(workers, 1)
        check_number(index, 0)
        offset += workers * LAYOUT["batches"] + index * LAYOUT["requests"]
        super().__init__(board, offset, REQUEST_WORDS)
        self.waiting = 0

    def answered(self, rows: int, total_ns: int, queue_ns: int, compute_ns: int) -> None:
        numbers = [unsigned(n) for n in (rows, total_ns, queue_ns, compute_ns)]
        self.words[REQUESTS["last_inference_ms"][0]] = time.time_ns() // 10**6
        self.add(REQUESTS["codes"][0], 1)
        for name, more in zip(
            ("rows", "success_ns", "queue_ns", "compute_ns"), numbers, strict=True
        ):
            self.add(REQUESTS[name][0], more)
        self.add(REQUESTS["request_buckets"][0] + bisect_left(DURATION_BOUNDS_NS, total_ns), 1)
        self.add(REQUESTS["queue_buckets"][0] + bisect_left(DURATION_BOUNDS_NS, queue_ns), 1)
        self.add(LATENCY + sketch_bucket(total_ns), 1)

    def failed(self, code: int, total_ns: int) -> None:
        unsigned(total_ns)
        place = CODES.index(code) if code in CODES else len(CODES) - 1
        self.add(REQUESTS["codes"][0] + place, 1)
        self.add(REQUESTS["fail_ns"][0], total_ns)
        self.add(REQUESTS["request_buckets"][0] + bisect_left(DURATION_BOUNDS_NS, total_ns), 1)

    def compared(self, agrees: bool) -> None:
        self.add(REQUESTS["compared"][0], 1)
        self.add(REQUESTS["agreed"][0], bool(agrees))

    def shadow_dropped(self) -> None:
        self.add(REQUESTS["shadow_dropped"][0], 1)

    def shadow_failed(self) -> None:
        self.add(REQUESTS["shadow_failed"][0], 1)

    def absorb(self, other: RequestCounters) -> None:
        for i in range(FIRST_COUNTER, REQUEST_WORDS):
            self.add(i, other.words[i])

    waiting = gauge("waiting")

    @property
    def last_inference_ms(self) -> int:
        return self.words[REQUESTS["last_inference_ms"][0]]


class BatchCounters(Section):
    def __init__(self, board: Any, offset: int, seat: int):
        check_number(seat, 0)
        super().__init__(board, offset + seat * LAYOUT["batches"], BATCH_WORDS)
        self.add(BATCHES["starts"][0], 1)

    def batch(self, rows: int, run_ns: int, copied_rows: int = 0, held_ns: int = 0) -> None:
        numbers = [unsigned(n) for n in (rows, run_ns, copied_rows, held_ns)]
        place = min(rows, EXACT_ROWS + 1)
        self.words[MOST_ROWS] = max(self.words[MOST_ROWS], place)
        for name, more in zip(("rows", "run_ns", "copied_rows", "held_ns"), numbers, strict=True):
            self.add(BATCHES[name][0], more)
        self.add(BATCHES["row_buckets"][0] + bisect_left(ROW_BOUNDS, rows), 1)
        self.add(BATCHES["run_buckets"][0] + bisect_left(DURATION_BOUNDS_NS, run_ns), 1)
        self.add(BY_ROWS + 2 * place, 1)
        self.add(BY_ROWS + 2 * place + 1, run_ns)
        self.add(COMPUTE + SKETCH * class_of(rows) + sketch_bucket(run_ns), 1)


def named(words: memoryview, places: dict[str, tuple[int, int]]) -> dict[str, Any]:
    return {
        name: words[first] if count == 1 else tuple(words[first : first + count])
        for name, (first, count) in places.items()
    }


def read_batches(words: memoryview) -> dict[str, Any]:
    most = min(words[MOST_ROWS], EXACT_ROWS + 1)
    runs = {n: tuple(words[BY_ROWS + 2 * n : BY_ROWS + 2 * n + 2]) for n in range(most + 1)}
    by_rows = {n: run for n, run in runs.items() if run[0]}
    return {**named(words, BATCHES), "by_rows": by_rows}


def read(
    board: Any, offset: int, frontends: int, workers: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    nbytes = ledger_bytes(frontends, workers)
    words = section(board, offset, nbytes // 8, writable=False)
    behind = words[workers * BATCH_WORDS :]
    return (
        [named(behind[i * REQUEST_WORDS :], REQUESTS) for i in range(2 * frontends)],
        [read_batches(words[i * BATCH_WORDS :]) for i in range(workers)],
    )


def sketches(
    board: Any, offset: int, frontends: int, workers: int
) -> tuple[dict[int, int], dict[int, int], dict[int, dict[int, int]]]:
    words = section(board, offset, ledger_bytes(frontends, workers) // 8, writable=False)
    batches = [words[i * BATCH_WORDS :][:BATCH_WORDS] for i in range(workers)]
    behind = words[workers * BATCH_WORDS :]
    requests = [behind[i * REQUEST_WORDS :][:REQUEST_WORDS] for i in range(2 * frontends)]
    classes = ((most, sketch_of_runs(batches, place)) for place, most in enumerate(ROW_CLASSES))
    return (
        sketch_of_requests(requests),
        sketch_of_requests(requests[frontends:]),
        {most: found for most, found in classes if found},
    )


def sketch_of_requests(sections: list[memoryview]) -> dict[int, int]:
    """Of those that say that anything was answered."""
    return total([s[LATENCY:] for s in sections if s[REQUESTS["codes"][0]]])


def sketch_of_runs(sections: list[memoryview], place: int) -> dict[int, int]:
    """Of those that say that anything of the class was run."""
    first, count = BATCHES["row_buckets"]
    cells = [first + i for i in range(count) if min(i, len(ROW_CLASSES) - 1) == place]
    sketches = [s[COMPUTE + SKETCH * place :] for s in sections if any(s[i] for i in cells)]
    return total(sketches)


def total(sketches: list[memoryview]) -> dict[int, int]:
    sums = (sum(sketch[i] for sketch in sketches) & MASK for i in range(SKETCH))
    return {i: number for i, number in enumerate(sums) if number}
