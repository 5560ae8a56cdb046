"""How much of a bare ONNX Runtime loop's throughput is left behind HTTP, with one worker saturated.

    python benchmarks/saturation.py

`encoder` (a transformer of six layers, 49 kB a request) with 64 connections, against a loop that does
nothing but ``session.run`` at its best batch size, with the same options, also in a process of its own.
The two take turns in the same run, each alone; the gateway stays up, idle, while the bare loop runs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from bare import BareLoop
from harness import (
    WAIT_S,
    Gateway,
    Noise,
    Rounds,
    binary_request,
    take_rounds,
    usage,
    wait_for_quiet,
)
from models import ENCODER_LENGTH, ENCODER_WIDTH, write_repository
from report import Report, spread

ROUNDS = 5
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
SEARCH_ROUNDS = 3
SEARCH_S = 2.0
ROUND_S = 8.0
WARM_UP_S = 2.0
CONNECTIONS = 64
TARGET_PERCENT = 95


@dataclass(frozen=True)
class Turn:
    """One turn of each.

    Attributes:
        bare, gateway: rows a second.
        bare_cpu, worker_cpu: rows a second of CPU time, of the loop and of the worker.
        busy: share of the time that the worker spent in ``run``.
        frontend: share of a core that the front end took.
        batch_rows: mean rows of the gateway's batches.
        p50_ms: latency.
    """

    bare: float
    gateway: float
    bare_cpu: float
    worker_cpu: float
    busy: float
    frontend: float
    batch_rows: float
    p50_ms: float

    def columns(self) -> tuple[float, ...]:
        """The numbers of its row in the table."""
        return (
            self.bare, self.gateway, 100 * self.gateway / self.bare, self.bare_cpu, self.worker_cpu,
            100 * self.worker_cpu / self.bare_cpu, 100 * self.busy, 100 * self.frontend,
        )  # fmt: skip


def search(bare: BareLoop) -> dict[int, list[float]]:
    """Rows a CPU second of the bare loop, by batch size."""
    rates: dict[int, list[float]] = {size: [] for size in BATCH_SIZES}
    for _ in range(SEARCH_ROUNDS):
        for size, values in rates.items():
            values.append(bare.rates(size, SEARCH_S)[1])
    return rates


def measure(gateway: Gateway, bare: BareLoop, request: Path, rows: int, noise: Noise) -> Turn:
    """One turn of each, each alone, with batches of ``rows`` rows."""
    noise.begin([bare.pid])
    bare_rate, bare_cpu = bare.rates(rows, ROUND_S)
    noise.end([bare.pid])

    roles = gateway.processes()
    loader = subprocess.Popen(
        [
            sys.executable, str(Path(__file__).with_name("loader.py")), gateway.host,
            str(gateway.port), str(request), str(CONNECTIONS), str(WARM_UP_S), str(ROUND_S),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    ours = [loader.pid, *roles["front end"], *roles["workers"]]
    time.sleep(WARM_UP_S)
    noise.begin(ours)
    began, before = time.monotonic(), gateway.statistics("encoder")
    worker, frontend = usage(roles["workers"]), usage(roles["front end"])
    time.sleep(ROUND_S - 1)
    after, seconds = gateway.statistics("encoder"), time.monotonic() - began
    worker, frontend = (
        usage(roles["workers"]).since(worker),
        usage(roles["front end"]).since(frontend),
    )
    noise.end(ours)
    load = json.loads(loader.communicate()[0])
    gained = {name: after[name] - before[name] for name in after}
    batch_rows = gained["rows"] / gained["batches"]
    return Turn(
        bare=bare_rate,
        gateway=load["rate"],
        bare_cpu=bare_cpu,
        worker_cpu=gained["rows"] / (worker.cpu_ns / 1e9),
        # compute_ns counts a batch's run once for every request in it, and every request is one row.
        busy=gained["compute_ns"] / 1e9 / batch_rows / seconds,
        frontend=frontend.cpu_ns / 1e9 / seconds,
        batch_rows=batch_rows,
        p50_ms=load["p50_ms"],
    )


COLUMNS = {
    "bare rows/s": "{:.1f}",
    "gateway rows/s": "{:.1f}",
    "gateway / bare": "{:.1f} %",
    "bare rows/CPU s": "{:.1f}",
    "worker rows/CPU s": "{:.1f}",
    "worker / bare": "{:.1f} %",
    "worker in run": "{:.1f} %",
    "front end CPU": "{:.1f} %",
}


def publish(rates: dict[int, list[float]], batch_size: int, rounds: Rounds[Turn]) -> None:
    """Table and notes."""
    report = Report(
        "saturation",
        f"Saturated throughput of `encoder`: 1 thread, {CONNECTIONS} connections, "
        f"batches of {batch_size}",
        ("round", *COLUMNS, "others' cores"),
    )

    def add(name: str, values: Iterable[float], others: str) -> None:
        cells = (form.format(v) for form, v in zip(COLUMNS.values(), values, strict=True))
        report.rows.append((name, *cells, others))

    for i, taken in enumerate(rounds.taken, start=1):
        add(str(i), taken.result.columns(), f"{taken.others:.2f}")
    by_column = list(zip(*(turn.columns() for turn in rounds.counted), strict=True))
    for summary in (statistics.median, min, max):
        add(summary.__name__, map(summary, by_column), "")
    median = statistics.median(by_column[2])
    text = f"at least {TARGET_PERCENT} % of the bare loop"
    report.target(text, median >= TARGET_PERCENT, f"{median:.1f} %", rounds.quiet)
    report.notes += [
        rounds.note,
        "bare loop by batch size, rows/CPU s: "
        + ", ".join(f"{size}: {spread(values, 1)}" for size, values in rates.items()),
        f"the gateway's max_batch_size is the best of them, {batch_size}; it ran batches of "
        f"{spread([turn.batch_rows for turn in rounds.counted], 1)} rows",
        f"request latency p50, ms: {spread([turn.p50_ms for turn in rounds.counted])}",
        f"a round: {ROUND_S:g} s of each, alternating, {CONNECTIONS} connections sending 49 kB "
        "requests in the binary tensor extension; the load is generated on the same machine",
        "rows/CPU s: over the CPU time of the loop or the worker, which other work on the machine "
        "disturbs less; worker in run: share of the time inside ONNX Runtime; others' cores: used by "
        "processes outside the benchmark",
    ]
    report.publish()


def main() -> int:
    """Measure and report; the exit status is 0 whatever the numbers are."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        write_repository(repository, ["encoder"])
        bare = BareLoop(repository / "encoder" / "1" / "model.onnx")
        wait_for_quiet(WAIT_S)
        rates = search(bare)
        batch_size = max(rates, key=lambda size: statistics.median(rates[size]))
        (repository / "encoder" / "config.yaml").write_text(f"max_batch_size: {batch_size}\n")
        shape = (1, ENCODER_LENGTH, ENCODER_WIDTH)
        row = np.random.default_rng(0).standard_normal(shape, np.float32)
        request = Path(folder) / "request"
        request.write_bytes(binary_request("encoder", "tokens_embedding", shape, row.tobytes()))
        with Gateway(repository) as gateway:
            rounds = take_rounds(partial(measure, gateway, bare, request, batch_size), ROUNDS)
        bare.close()
    publish(rates, batch_size, rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
