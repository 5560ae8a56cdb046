"""What threads of a running server wait for, as its system calls say. Needs strace (apt install strace).

A turn of an event loop lasts from one return of ``epoll_pwait`` to the next call of it. A wait for a lock is
a ``futex`` wait, but for those at the address that a worker's thread waits at for work, its doorbell.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_CALL = re.compile(
    r"(?P<at>\d+\.\d+) (?P<call>futex|epoll_p?wait)\((?P<first>\w+), (?P<second>[\w|]*)"
    r".* <(?P<took>\d+\.\d+)>$"
)

Span = tuple[float, float]
"""When something began, by the monotonic clock, and how long it took, in seconds."""


@dataclass
class Trace:
    """What one thread did.

    Attributes:
        turns: of its event loop, if it has one.
        waits: for locks.
    """

    turns: list[Span] = field(default_factory=list)
    waits: list[Span] = field(default_factory=list)


def can_trace() -> bool:
    """Whether strace is there."""
    return shutil.which("strace") is not None


@contextmanager
def traced(pids: Sequence[int]) -> Iterator[list[Trace]]:
    """The main threads of processes, traced within the context; the list is filled at its end, in order."""
    found: list[Trace] = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "trace"
        process = subprocess.Popen(
            ["strace", "-ff", "-ttt", "-T", "-o", base, "-e", "trace=futex,epoll_wait,epoll_pwait"]
            + [word for pid in pids for word in ("-p", str(pid))],
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in pids:
            if "attached" not in (line := process.stderr.readline()):
                raise RuntimeError(f"strace: {line.strip()}")
        clock = time.time() - time.monotonic()
        try:
            yield found
        finally:
            process.terminate()
            process.communicate()
            found += [_read(base.with_suffix(f".{pid}"), clock) for pid in pids]


def _read(file: Path, clock: float) -> Trace:
    """What the lines of a thread say; `clock` is wall time less monotonic time."""
    trace, waited, returned = Trace(), [], None
    for line in file.read_text().splitlines():
        if not (match := _CALL.match(line)):
            continue
        at, took = float(match["at"]) - clock, float(match["took"])
        if match["call"] != "futex":
            if returned is not None:
                trace.turns.append((returned, at - returned))
            returned = at + took
        elif "FUTEX_WAIT" in match["second"]:
            waited.append((match["first"], (at, took)))
    if returned is None and waited:
        ((doorbell, _),) = Counter(address for address, _ in waited).most_common(1)
        waited = [(address, span) for address, span in waited if address != doorbell]
    trace.waits = [span for _, span in waited]
    return trace
