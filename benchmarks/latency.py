"""How long one small request takes on an idle gateway, and how much of that is the gateway's own.

    python benchmarks/latency.py

One blocking keep-alive connection sends prebuilt requests of one row to `mlp16`, one after the other.
Beside it: ONNX Runtime alone, two plain processes that play ping-pong over loopback, and ``GET /livez``,
which takes the same aiohttp path without an inference. `mlp16_held` is the same model with a
``max_queue_delay_us``: the latency that a timer would add, and that the default does not have.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from harness import (
    Connection,
    Gateway,
    Noise,
    binary_request,
    http_get,
    json_request,
    open_session,
    take_rounds,
    usage,
)
from models import write_repository
from report import Report, percentile, spread

ROUNDS = 5
REQUESTS = 3000
HELD_REQUESTS = 500
WARM_UP = 200
HELD_US = 2000
TARGET_US = 600

ECHO = """
import socket, sys
peer = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while data := peer.recv(4096):
    peer.sendall(data)
"""


@dataclass(frozen=True)
class Sample:
    """What one round of a case gave, µs; None where a column does not apply."""

    p50: float
    p90: float
    p99: float
    queue: float | None
    compute: float | None
    frontend_cpu: float | None
    worker_cpu: float | None


@dataclass(frozen=True)
class Case:
    """One row of the table: something to do many times; ``model`` names what it infers, if anything."""

    name: str
    do: Callable[[], object]
    times: int = REQUESTS
    model: str = ""
    is_http: bool = True

    def measure(self, gateway: Gateway) -> Sample:
        """One round."""
        do, clock, taken = self.do, time.perf_counter_ns, []
        for _ in range(WARM_UP):
            do()
        roles = gateway.processes()
        before = gateway.statistics(self.model) if self.model else {}
        frontend, workers = usage(roles["front end"]), usage(roles["workers"])
        for _ in range(self.times):
            began = clock()
            do()
            taken.append(clock() - began)
        frontend = usage(roles["front end"]).since(frontend)
        workers = usage(roles["workers"]).since(workers)
        after = gateway.statistics(self.model) if self.model else {}
        taken.sort()

        def mean(ns: int) -> float:
            return ns / self.times / 1e3

        return Sample(
            *(percentile(taken, percent) / 1e3 for percent in (50, 90, 99)),
            mean(after["queue_ns"] - before["queue_ns"]) if self.model else None,
            mean(after["compute_ns"] - before["compute_ns"]) if self.model else None,
            mean(frontend.cpu_ns) if self.is_http else None,
            mean(workers.cpu_ns) if self.model else None,
        )


def ping_pong() -> Callable[[], object]:
    """A round trip to a child that echoes: the floor of any server over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        subprocess.Popen([sys.executable, "-c", ECHO, str(listener.getsockname()[1])])
        ours, _ = listener.accept()
    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def exchange() -> None:
        ours.sendall(b"x" * 400)
        ours.recv(4096)

    return exchange


def cases(connection: Connection, model_path: Path) -> list[Case]:
    """The rows of the table."""
    row = np.arange(16, dtype=np.float32).reshape(1, 16) / 16
    session = open_session(model_path)
    document = {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, 16], "data": row.ravel().tolist()}
        ]
    }
    binary = partial(binary_request, name="x", shape=(1, 16), data=row.tobytes())
    send = connection.exchange
    return [
        Case("ONNX Runtime alone, 1 row", partial(session.run, None, {"x": row}), is_http=False),
        Case("ping-pong of 400 bytes", ping_pong(), is_http=False),
        Case("GET /livez", partial(send, http_get("/livez"))),
        Case("v2 binary", partial(send, binary("mlp16")), model="mlp16"),
        Case("v2 JSON", partial(send, json_request("mlp16", document)), model="mlp16"),
        Case(
            f"v2 binary, held {HELD_US} µs",
            partial(send, binary("mlp16_held")),
            HELD_REQUESTS,
            "mlp16_held",
        ),
    ]


def main() -> int:
    """Measure and report; the exit status is 0 whatever the numbers are."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        write_repository(repository, ["mlp16"])
        shutil.copytree(repository / "mlp16", repository / "mlp16_held")
        with (repository / "mlp16_held" / "config.yaml").open("a") as config:
            config.write(f"max_queue_delay_us: {HELD_US}\n")
        with Gateway(repository) as gateway, Connection(gateway.host, gateway.port) as connection:
            rows = cases(connection, repository / "mlp16" / "1" / "model.onnx")

            def turn(noise: Noise) -> list[Sample]:
                ours = [os.getpid(), *chain(*gateway.processes().values())]
                noise.begin(ours)
                samples = [case.measure(gateway) for case in rows]
                noise.end(ours)
                return samples

            rounds = take_rounds(turn, ROUNDS)
    report = Report(
        "latency",
        f"Latency of one connection, µs: median (min–max) of {len(rounds.counted)} rounds",
        ("", "p50", "p90", "p99", "queue", "compute", "front end CPU", "worker CPU"),
    )
    for case, samples in zip(rows, zip(*rounds.counted, strict=True), strict=True):
        columns = zip(*map(astuple, samples), strict=True)
        report.rows.append((case.name, *("" if None in c else spread(c) for c in columns)))
        if case.model == "mlp16":
            p50 = statistics.median(sample.p50 for sample in samples)
            text = f"{case.name} p50 under {TARGET_US} µs"
            report.target(text, p50 < TARGET_US, f"{p50:.0f} µs", rounds.quiet)
    report.notes += [
        f"rounds of {REQUESTS} requests ({HELD_REQUESTS} where they are held), the rows of the table "
        "taking turns",
        "queue: mean time from a request's arrival to the begin of its batch's run, and compute: mean "
        "time of that run, both from /v2/models/mlp16/stats; without a delay set no timer is in queue",
        "CPU: a request's share of the processes' run time, from /proc/PID/task/*/schedstat",
        rounds.note,
    ]
    report.publish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
