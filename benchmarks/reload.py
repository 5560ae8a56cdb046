"""Whether loading and unloading a large model again and again leaves anything behind.

    python benchmarks/reload.py

One model of 100 MB, a single product with a matrix, is loaded, asked a few times and unloaded, over and
over. Memory and descriptors of the supervisor and the front end are read after every unload, when neither
should hold anything of it; the worker is a process of its own and ends each time.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import Connection, Gateway, binary_request
from models import GraphWriter
from onnx import TensorProto
from report import Report, spread

CYCLES = 200
WARM_UP = 5
REQUESTS = 5
WIDTH = 5120
"""Rows and columns of the FP32 matrix: 105 MB."""

TARGET_MB = 5.0
MB = 1e6

os.environ["GATEWAY_MODEL_CONTROL"] = "true"  # of the gateways that this process starts


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    resident_mb: float
    descriptors: int
    mapped_memfds: int

    @classmethod
    def by(cls, pid: int) -> Held:
        """As of now."""
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return cls(
            pages * os.sysconf("SC_PAGESIZE") / MB,
            sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
            Path(f"/proc/{pid}/maps").read_text().count("memfd:gateway"),
        )


def write_model(repository: Path, width: int = WIDTH) -> float:
    """Write the model `big`, a product of so many squared; its size in MB."""
    g = GraphWriter("big")
    x = g.input("x", TensorProto.FLOAT, [width])
    g.node("MatMul", x, g.random(width, width), out="y")
    g.output("y", TensorProto.FLOAT, [width])
    path = repository / "big" / "1" / "model.onnx"
    g.write(path)
    (repository / "big" / "config.yaml").write_text("max_batch_size: 8\n")
    return path.stat().st_size / MB


def control(action: str) -> bytes:
    """A request to load or unload the model."""
    path = f"/v2/repository/models/big/{action}"
    return f"POST {path} HTTP/1.1\r\nHost: gateway\r\nContent-Length: 0\r\n\r\n".encode()


def cycle(connection: Connection) -> tuple[float, float]:
    """Load, ask, unload; seconds that the load and the unload took."""
    began = time.monotonic()
    connection.exchange(control("load"))
    loaded = time.monotonic()
    row = np.ones((1, WIDTH), np.float32)
    for _ in range(REQUESTS):
        connection.exchange(binary_request("big", "x", [1, WIDTH], row.tobytes()))
    asked = time.monotonic()
    connection.exchange(control("unload"))
    return loaded - began, time.monotonic() - asked


def main() -> int:
    """Measure and report; the exit status is 0 whatever the numbers are."""
    with tempfile.TemporaryDirectory() as folder:
        size_mb = write_model(Path(folder))
        with Gateway(Path(folder)) as gateway, Connection(gateway.host, gateway.port) as connection:
            roles = gateway.processes()
            pids = {name: roles[name][0] for name in ("supervisor", "front end")}
            connection.exchange(control("unload"))
            for _ in range(WARM_UP):
                cycle(connection)
            held = {name: [Held.by(pid)] for name, pid in pids.items()}
            times = []
            for _ in range(CYCLES):
                times.append(cycle(connection))
                for name, pid in pids.items():
                    held[name].append(Held.by(pid))
    publish(held, times, size_mb)
    return 0


def publish(held: dict[str, list[Held]], times: list[tuple[float, float]], size_mb: float) -> None:
    """Make the table from what each process held before the first cycle and after each."""
    report = Report(
        "reload",
        f"{CYCLES} loads and unloads of a model of {size_mb:.0f} MB",
        (
            "process", "MB before", "MB after", "most MB in between",
            "descriptors before", "after", "most in between", "memfds mapped after",
        ),
    )  # fmt: skip
    for name, each in held.items():
        first, last = each[0], each[-1]
        report.rows.append(
            (
                name,
                f"{first.resident_mb:.1f}",
                f"{last.resident_mb:.1f}",
                f"{max(h.resident_mb for h in each):.1f}",
                str(first.descriptors),
                str(last.descriptors),
                str(max(h.descriptors for h in each)),
                str(last.mapped_memfds),
            )
        )
    growths = [each[-1].resident_mb - each[0].resident_mb for each in held.values()]
    report.target(
        f"each within {TARGET_MB:g} MB of where it was", max(growths) < TARGET_MB,
        " and ".join(f"{growth:+.1f} MB" for growth in growths),
    )  # fmt: skip
    report.target(
        "as many descriptors as before",
        all(each[-1].descriptors == each[0].descriptors for each in held.values()),
        "see the table",
    )
    loads, unloads = zip(*times, strict=True)
    report.notes += [
        f"read after every unload; {WARM_UP} uncounted cycles first, {REQUESTS} requests in every cycle",
        f"seconds, median (min–max): load {spread(loads, 2)}, unload {spread(unloads, 3)}; a load starts "
        "the worker's process",
    ]
    report.publish()


if __name__ == "__main__":
    sys.exit(main())
