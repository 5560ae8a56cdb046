"""How long a gateway takes from its start to a readiness probe that says 200.

    python benchmarks/startup.py

Serves the bundled digits: a supervisor, a front end and three workers are started. Files are in the page
cache after the first, uncounted start, as on any machine that has started the gateway before.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from itertools import chain

from harness import Connection, Noise, http_get, processes, take_rounds, usage
from report import ROOT, Report, spread

ROUNDS = 7
POLL_S = 0.005
TARGET_S = 3.0
REPOSITORY = ROOT / "examples" / "digits" / "models"


def free_port() -> int:
    """A port that nobody listens on: the probe must know it before the gateway has said anything."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def is_ready(port: int) -> bool:
    """Whether the readiness probe says 200; waits while the server has bound but not begun."""
    with suppress(OSError, RuntimeError), Connection("127.0.0.1", port) as connection:
        connection.exchange(http_get("/readyz"))
        return True
    return False


def listens(port: int) -> bool:
    """Whether connections are accepted."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def start(noise: Noise) -> dict[str, float]:
    """Start and end a gateway; the rows of the table, in seconds."""
    port = free_port()
    noise.begin()
    began = time.monotonic()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "gateway", "serve", "--model-repository", str(REPOSITORY),
            "--port", str(port), "--metrics-port", "0", "--admin-port", "0",
        ],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not listens(port):
            time.sleep(POLL_S)
        bound = time.monotonic() - began
        with Connection("127.0.0.1", port) as connection:
            connection.exchange(http_get("/livez"))
        live = time.monotonic() - began
        while not is_ready(port):
            time.sleep(POLL_S)
        ready = time.monotonic() - began
        roles = processes(process.pid)
        cpu = {role: usage(pids).cpu_ns / 1e9 for role, pids in roles.items()}
        noise.end(chain(*roles.values()))
    finally:
        process.terminate()
        process.wait()
    return {
        "data port bound: supervisor imported, settings and repository read": bound,
        "GET /livez says 200: front end imported and serving": live,
        "GET /readyz says 200: workers imported, models loaded and warm": ready,
        "CPU until then: supervisor": cpu["supervisor"],
        "CPU until then: front end": cpu["front end"],
        f"CPU until then: {len(roles['workers'])} workers": cpu["workers"],
    }


def main() -> int:
    """Measure and report; the exit status is 0 whatever the numbers are."""
    start(Noise())
    rounds = take_rounds(start, ROUNDS)
    times = rounds.counted
    report = Report(
        "startup",
        f"Start of a gateway with three model versions: median (min–max) of {len(times)} rounds",
        ("", "seconds"),
        [(name, spread([taken[name] for taken in times], 2)) for name in times[0]],
    )
    ready = statistics.median(list(taken.values())[2] for taken in times)
    report.target(
        f"ready in under {TARGET_S:g} s", ready < TARGET_S, f"{ready:.2f} s", rounds.quiet
    )
    report.notes += [
        "the first three rows count from the start of the command; the files are in the page cache, and "
        "the probe is polled every 5 ms",
        rounds.note,
    ]
    report.publish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
