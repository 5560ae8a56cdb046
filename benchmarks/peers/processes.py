"""Servers as processes: all that belong to one, what they use, and their end."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

STOP_S = 8.0
"""What a server gets to end by itself after SIGTERM; then its processes are killed."""

LINGER_S = 2.0
"""What its other processes get after that."""

KILL_S = 5.0
"""What a killed process gets to be gone."""

REASON_CHARS = 300
"""The end of a server's last line that a failed start shows."""


class StartFailed(Exception):
    """A server did not come up; its text says why, in one line."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def family(root: int) -> set[int]:
    """Process ids of ``root``, of its descendants, and of all in the session that it leads."""
    parents: dict[int, int] = {}
    found = {root}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                # The name, in parentheses, may itself hold spaces and parentheses.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(fields[1])
            if int(fields[3]) == root:
                found.add(int(entry.name))
    more = True
    while more:
        members = {pid for pid, parent in parents.items() if parent in found} - found
        found |= members
        more = bool(members)
    return found & parents.keys()


def cpu_ns(pids: Iterable[int]) -> dict[int, int]:
    """Run time by process, all of its living threads; a process that has ended is left out."""
    used: dict[int, int] = {}
    for pid in pids:
        total = 0
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                total += int((task / "schedstat").read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            if not Path(f"/proc/{pid}").exists():
                continue
        used[pid] = total
    return used


def cpu_since(before: Mapping[int, int], root: int) -> int:
    """CPU time in ns of the server's processes since ``before``; new ones count from their start."""
    now = cpu_ns(family(root))
    return sum(max(0, used - before.get(pid, 0)) for pid, used in now.items())


def pss_bytes(pids: Iterable[int]) -> int:
    """Memory with shared pages divided among those who share them."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += int(text.partition("\nPss:")[2].split()[0]) * 1024
    return total


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Processes that ``command`` starts, in a session of their own; gives the first one.

    Whatever way the context is left, all of them have ended then.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the first process, then SIGKILL to what stays of its family."""
    members = started(family(process.pid))
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    members |= started(family(process.pid))
    others = members.keys() - {process.pid}
    trackers = {pid for pid in others if is_tracker(pid)}
    for group in (others - trackers, trackers):  # a tracker waits for the end of all the others
        until = time.monotonic() + LINGER_S
        for pid in group:
            see_off(pid, members[pid], until)


def is_tracker(pid: int) -> bool:
    """Whether it is Python's resource tracker, which removes what the others leave behind."""
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def see_off(pid: int, ticks: int, until: float) -> None:
    """Wait for the end of the process that started then; SIGKILL, once the clock shows ``until``.

    The id may be another's by now; that one is left alone.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if started([pid]) != {pid: ticks}:
            return
        ended, _, _ = select.select([fd], [], [], max(0.0, until - time.monotonic()))
        if not ended:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            select.select([fd], [], [], KILL_S)
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)


def started(pids: Iterable[int]) -> dict[int, int]:
    """When processes started, in clock ticks since boot; those that have ended are left out."""
    ticks: dict[int, int] = {}
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks[pid] = int(stat.rpartition(")")[2].split()[19])
    return ticks


def last_line(text: str) -> str:
    """The last line of what a program printed, its end if it is long."""
    lines = text.strip().splitlines() or ["nothing was printed"]
    return lines[-1].strip()[-REASON_CHARS:]


def idle_cores(root: int, enough: float, window_s: float, at_most_s: float) -> float:
    """How much of a core a server takes when nobody asks it.

    Looked at again and again, since a load leaves requests behind that are still computed: until it is
    not more than ``enough``, or the time is over.
    """
    until = time.monotonic() + at_most_s
    while True:
        before, began = cpu_ns(family(root)), time.monotonic()
        time.sleep(window_s)
        cores = cpu_since(before, root) / 1e9 / (time.monotonic() - began)
        if cores <= enough or time.monotonic() > until:
            return cores
