"""What a gateway without traffic costs: CPU time and wake-ups of each of its processes.

    python benchmarks/idle.py

Serves the bundled digits (three versions, so three workers), answers a few requests, and is then left
alone for ten seconds, several times. Every wake-up of a sleeping thread is a voluntary context switch.
"""

from __future__ import annotations

import statistics
import sys
import time

from harness import Connection, Gateway, Usage, json_request, usage
from report import ROOT, Report, spread

ROUNDS = 3
ROUND_S = 10.0
SETTLE_S = 2.0
REQUESTS = 20
TARGET_PERCENT = 0.5


def send_requests(gateway: Gateway) -> None:
    """Have every process do its work once: an idle server is one that has served before."""
    document = {
        "inputs": [
            {"name": "image", "datatype": "FP32", "shape": [1, 8, 8], "data": [0.5] * 64},
        ]
    }
    with Connection(gateway.host, gateway.port) as connection:
        for _ in range(REQUESTS):
            for version in (1, 2, 3):
                connection.exchange(json_request(f"digits/versions/{version}", document))


def main() -> int:
    """Measure and report; the exit status is 0 whatever the numbers are."""
    report = Report(
        "idle",
        f"An idle gateway with three workers over {ROUND_S:g} s: median (min–max) of {ROUNDS} rounds",
        ("process", "CPU ms", "% of one core", "voluntary switches", "involuntary switches"),
    )
    rounds: dict[str, list[Usage]] = {}
    with Gateway(ROOT / "examples" / "digits" / "models") as gateway:
        roles = gateway.processes()
        groups = {"supervisor": roles["supervisor"], "front end": roles["front end"]}
        groups |= {f"worker {i}": [pid] for i, pid in enumerate(roles["workers"], start=1)}
        groups["all"] = [pid for pids in roles.values() for pid in pids]
        for _ in range(ROUNDS):
            send_requests(gateway)
            time.sleep(SETTLE_S)
            before = {name: usage(pids) for name, pids in groups.items()}
            time.sleep(ROUND_S)
            for name, pids in groups.items():
                rounds.setdefault(name, []).append(usage(pids).since(before[name]))
    percents: list[float] = []
    for name, used in rounds.items():
        percents = [u.cpu_ns / ROUND_S / 1e7 for u in used]
        report.rows.append(
            (
                name,
                spread([u.cpu_ns / 1e6 for u in used], 2),
                spread(percents, 3),
                spread([u.voluntary for u in used]),
                spread([u.involuntary for u in used]),
            )
        )
    median = statistics.median(percents)
    report.target(
        f"under {TARGET_PERCENT} % of one core together",
        median < TARGET_PERCENT,
        f"{median:.3f} %",
    )
    report.notes += [
        f"a round: {3 * REQUESTS} requests, {SETTLE_S:g} s to settle, then {ROUND_S:g} s without traffic",
        "CPU: run time of all threads from /proc/PID/task/*/schedstat, to the nanosecond",
    ]
    report.publish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
