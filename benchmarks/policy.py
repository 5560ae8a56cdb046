"""What holding a batch back does to the answers that come in time: four policies in simulated time.

    python benchmarks/policy.py

The code that decides is the worker's own (`gateway/serving/policy.py`, `costs.py`). Time is simulated, and
runs cost what ONNX Runtime took for them here, drawn from the fastest of the measured runs: the others show
what other processes did. One worker, batches of up to 32 rows, requests of one row that come whether or not
the former ones are answered. Compared are

- *slo*: `slo_ms` is set, rows are due that long after they came;
- *slo, timeout*: the same with `queue.timeout_ms` at half of it: rows that waited so long are refused;
- *none*: the default, an idle worker takes what there is;
- *window*: up to 2 ms for a full batch, as servers with a fixed delay do;
- *fitted*: BentoML's rule: looks every millisecond, and waits while rows x (time since the newest + tick +
  cost of a row) is at most 0.95 of the mean wait of the last 50 batches; rows that would be late are refused.
  It fits costs every 10 batches here; its own 5 s would be longer than a simulation of a fast model.

Goodput is the part of all rows that are answered within the SLO. The figure needs matplotlib in this Python,
or in the environment that `benchmarks/peers.py` makes: `python -m venv benchmarks/.peers/chart` and
`benchmarks/.peers/chart/bin/pip install matplotlib==3.11.2`.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import models
import numpy as np
import onnxruntime as ort
from report import RESULTS, ROOT, Report, percentile, spread

from gateway.clock import NS_PER_MS, NS_PER_S
from gateway.serving.costs import Arrivals, Cost
from gateway.serving.policy import Offer, hold_until

MAX_ROWS = 32
SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32)
"""Numbers of rows that are measured; the cost of those between them is interpolated."""

COST_ROUNDS = 25
FEWEST_ROUNDS = 9
COST_S = 30.0
KEPT = 5
"""Rounds in which every size is run, fewer where they take longer than that; of each size's runs the fastest
are kept: the others show what other processes did."""

LOADS = (0.30, 0.60, 0.80, 0.95)
"""Of the most rows a second that the model runs at any size."""

SEEDS = range(5)
ROWS = 6000
WARM_UP = 1000
"""Rows of a simulation, and those of them that do not count: costs are learned meanwhile."""

WINDOW_NS = 2 * NS_PER_MS
TICK_NS = NS_PER_MS
FIT_BATCHES = 10
BURST = 4.0
"""Arrivals of the bursty kind come at so many times the mean rate, in a quarter of the time."""

BURST_ROWS = 60
"""Mean rows of a burst."""

NOISE = 1.0
"""Points of goodput by which two policies may differ on the same arrivals and be the same: runs are drawn
anew, and a system beyond its capacity never forgets a slow one."""

CHART_PYTHON = ROOT / "benchmarks" / ".peers" / "chart" / "bin" / "python"


@dataclass(frozen=True)
class Model:
    """What runs of a model took.

    Attributes:
        name: in `models.py`.
        slos_ms: latency targets that are tried.
        runs_ns: by size, durations in ascending order.
    """

    name: str
    slos_ms: tuple[float, ...]
    runs_ns: dict[int, list[int]]

    @property
    def capacity(self) -> float:
        """Rows a second at the best size."""
        return max(n * NS_PER_S / statistics.median(runs) for n, runs in self.runs_ns.items())

    def draw_ns(self, rows: int, rng: random.Random) -> int:
        """How long a run of so many rows takes."""
        part = rng.random()

        def at(size: int) -> int:
            runs = self.runs_ns[size]
            return runs[int(part * len(runs))]

        if rows in self.runs_ns:
            return at(rows)
        low = max(n for n in SIZES if n < rows)
        high = min(n for n in SIZES if n > rows)
        return at(low) + (at(high) - at(low)) * (rows - low) // (high - low)


class NoHolding:
    """An idle worker takes what there is."""

    limit = MAX_ROWS
    wakes = True  # a row that comes is looked at at once

    def hold_until(self, waiting: Sequence[int], now_ns: int) -> int | None:
        """Until when to wait with these arrivals, None to run now."""
        return None

    def is_late(self, waiting: Sequence[int], now_ns: int) -> bool:
        """Whether the first row is refused."""
        return False

    def ran(self, waiting: Sequence[int], started_ns: int, duration_ns: int) -> None:
        """A batch with these arrivals was run."""


class Window(NoHolding):
    """A fixed delay."""

    def hold_until(self, waiting: Sequence[int], now_ns: int) -> int | None:
        """Until the first row has waited for the window, unless the batch is full."""
        return hold_until(
            Offer(len(waiting), waiting[0], waiting[-1], 0, len(waiting) >= MAX_ROWS),
            now_ns,
            WINDOW_NS,
        )


class Slo(NoHolding):
    """The worker's own, with `slo_ms`."""

    def __init__(self, slo_ns: int, timeout_ns: int | None = None) -> None:
        self._slo_ns, self._timeout_ns = slo_ns, timeout_ns
        self._cost, self._arrivals = Cost(), Arrivals()

    @property
    def limit(self) -> int:
        """Rows at which front ends close a slot."""
        return self._cost.best_rows or MAX_ROWS

    def hold_until(self, waiting: Sequence[int], now_ns: int) -> int | None:
        """As `Worker` asks."""
        rows = len(waiting)
        due_ns = waiting[0] + self._slo_ns
        offer = Offer(rows, waiting[0], waiting[-1], due_ns, rows >= self.limit, MAX_ROWS)
        return hold_until(offer, now_ns, 0, self._cost, self._arrivals.gap_ns)

    def is_late(self, waiting: Sequence[int], now_ns: int) -> bool:
        """Whether the first row's time in the queue is over."""
        return self._timeout_ns is not None and now_ns - waiting[0] >= self._timeout_ns

    def ran(self, waiting: Sequence[int], started_ns: int, duration_ns: int) -> None:
        """As `Worker` tells."""
        self._arrivals.took(len(waiting), waiting[0])
        self._cost.observe(len(waiting), duration_ns)


class Fitted(NoHolding):
    """BentoML's rule."""

    wakes = False

    def __init__(self, slo_ns: int) -> None:
        self._slo_ns = slo_ns
        self._a_ns, self._b_ns, self._wait_ns = slo_ns / 15, slo_ns / 30, 10.0 * NS_PER_MS
        self._last: deque[tuple[int, int, int]] = deque(maxlen=50)
        self._batches = 0

    def hold_until(self, waiting: Sequence[int], now_ns: int) -> int | None:
        """The next look, unless the rule says to run."""
        rows, newest_ns = len(waiting), now_ns - waiting[-1]
        worth = rows * (newest_ns + TICK_NS + self._a_ns)
        return now_ns + TICK_NS if rows < MAX_ROWS and worth <= self._wait_ns * 0.95 else None

    def is_late(self, waiting: Sequence[int], now_ns: int) -> bool:
        """Whether the first row would miss its target."""
        rows = len(waiting)
        run_ns = self._a_ns * rows + self._b_ns
        return rows > 1 and now_ns - waiting[0] + run_ns >= self._slo_ns

    def ran(self, waiting: Sequence[int], started_ns: int, duration_ns: int) -> None:
        """Fit anew, every so many batches."""
        self._last.append((len(waiting), duration_ns, started_ns - waiting[0]))
        self._batches += 1
        if self._batches % FIT_BATCHES:
            return
        x = [(n, 1) for n, _, _ in self._last]
        a, b = np.linalg.lstsq(x, [d for _, d, _ in self._last], rcond=None)[0]
        self._a_ns, self._b_ns = max(1000.0, float(a)), max(0.0, float(b))
        self._wait_ns = statistics.fmean(w for _, _, w in self._last)


POLICIES: dict[str, Callable[[int], NoHolding]] = {
    "slo": Slo,
    "slo, timeout": lambda slo_ns: Slo(slo_ns, slo_ns // 2),
    "none": lambda _slo_ns: NoHolding(),
    "window": lambda _slo_ns: Window(),
    "fitted": Fitted,
}


@dataclass(frozen=True)
class Outcome:
    """One simulation: part of the rows in time, latencies of the answered ones, rows of a batch."""

    goodput: float
    p50_ms: float
    p99_ms: float
    rows: float


def arrivals(kind: str, rate: float, rng: random.Random) -> Iterator[int]:
    """Times in ns at which rows come, at so many a second in the mean."""
    now_s = 0.0
    while True:
        if kind == "poisson":
            now_s += rng.expovariate(rate)
            yield int(now_s * NS_PER_S)
            continue
        # On and off by turns, each for an exponential time: a Poisson process of two rates.
        on_s = rng.expovariate(rate * BURST / BURST_ROWS)
        end_s = now_s + on_s
        while (now_s := now_s + rng.expovariate(rate * BURST)) < end_s:
            yield int(now_s * NS_PER_S)
        now_s = end_s + rng.expovariate(rate * BURST / BURST_ROWS / (BURST - 1))


def simulate(
    model: Model, policy: NoHolding, times: Sequence[int], slo_ns: int, seed: int
) -> Outcome:
    """Run every row that comes, as one worker would."""
    rng = random.Random(seed)
    coming = deque(times)
    waiting: deque[int] = deque()
    latencies: list[int] = []
    sizes: list[int] = []
    now_ns, refused, left = 0, 0, len(times)
    while left:
        if not waiting:
            now_ns = max(now_ns, coming[0])
        while coming and coming[0] <= now_ns:
            waiting.append(coming.popleft())
        batch = list(itertools.islice(waiting, policy.limit))
        if policy.is_late(batch, now_ns):
            waiting.popleft()
            left -= 1
            refused += left < len(times) - WARM_UP
            continue
        until_ns = policy.hold_until(batch, now_ns)
        if until_ns is not None:
            now_ns = min(until_ns, coming[0]) if policy.wakes and coming else until_ns
            continue
        duration_ns = model.draw_ns(len(batch), rng)
        policy.ran(batch, now_ns, duration_ns)
        now_ns += duration_ns
        for _ in batch:
            left -= 1
            arrived_ns = waiting.popleft()
            if left < len(times) - WARM_UP:
                latencies.append(now_ns - arrived_ns)
        sizes.append(len(batch))
    latencies.sort()
    in_time = sum(latency <= slo_ns for latency in latencies)
    return Outcome(
        in_time / (len(latencies) + refused),
        percentile(latencies, 50) / NS_PER_MS,
        percentile(latencies, 99) / NS_PER_MS,
        statistics.fmean(sizes),
    )


def measure(name: str, folder: Path) -> dict[int, list[int]]:
    """What runs of each size take in ONNX Runtime, with one thread."""
    path = folder / f"{name}.onnx"
    getattr(models, name)(path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    spec = session.get_inputs()[0]
    data = np.random.default_rng(1).random((MAX_ROWS, *spec.shape[1:]), np.float32)
    runs: dict[int, list[int]] = {rows: [] for rows in SIZES}
    begun = time.monotonic()
    for count in range(COST_ROUNDS):
        if count >= FEWEST_ROUNDS and time.monotonic() - begun > COST_S:
            break
        for rows in SIZES:
            feeds = {spec.name: data[:rows]}
            session.run(None, feeds)  # its memory is there, and its code and weights are in cache
            started_ns = time.perf_counter_ns()
            session.run(None, feeds)
            runs[rows].append(time.perf_counter_ns() - started_ns)
    return {rows: sorted(taken)[:KEPT] for rows, taken in runs.items()}


def measured(folder: Path) -> list[Model]:
    """The models: one whose cost bends, one that gains little from batches, one that costs nothing."""
    found = []
    for name in ("slow", "encoder", "mlp784"):
        runs = measure(name, folder)
        one, eight, full = (statistics.median(runs[n]) / NS_PER_MS for n in (1, 8, MAX_ROWS))
        # Tight: a row that just missed a batch of 8. Loose: the same with full ones, and a rest.
        slos = (round(1.25 * (one + eight), 1), round(2.5 * full, 1))
        found.append(Model(name, (1.0, 5.0) if name == "mlp784" else slos, runs))
    return found


def compare(model: Model, slo_ms: float, kind: str, load: float) -> dict[str, list[Outcome]]:
    """Every policy on the same arrivals, by seed."""
    slo_ns = int(slo_ms * NS_PER_MS)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in POLICIES}
    for seed in SEEDS:
        rng = random.Random(f"{model.name} {kind} {load} {seed}")
        times = list(itertools.islice(arrivals(kind, load * model.capacity, rng), ROWS))
        for name, make in POLICIES.items():
            outcomes[name].append(simulate(model, make(slo_ns), times, slo_ns, seed))
    return outcomes


def draw(panels: list[dict[str, Any]], figure: Path, script: str = "policy_chart.py") -> bool:
    """Have a script beside this one draw a figure, in a Python with matplotlib; False where there is none."""
    here = importlib.util.find_spec("matplotlib") is not None
    python = Path(sys.executable) if here else CHART_PYTHON
    if not python.exists():
        return False
    command = [python, Path(__file__).with_name(script), figure]
    subprocess.run(command, input=json.dumps(panels), text=True, check=True, cwd=ROOT)
    return True


def main() -> int:
    """Measure, simulate, publish; 1 where the worker's policy is worse than not holding."""
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder))
    figure = RESULTS / "policy.png"
    report = Report(
        "policy",
        "Policies of holding a batch back: simulated, with measured costs; median (range) of 5 seeds",
        ("model", "SLO ms", "arrivals", "load", "policy", "goodput %", "p50 ms", "p99 ms", "rows"),
        left=5,
    )
    panels: list[dict[str, object]] = []
    worst = (0.0, "")
    for model, kind in itertools.product(found, ("poisson", "bursty")):
        for slo_ms in model.slos_ms:
            title = f"{model.name}, {kind}, SLO {slo_ms:g} ms"
            panel = {"title": title, "loads": LOADS, "lines": {name: [] for name in POLICIES}}
            for load in LOADS:
                outcomes = compare(model, slo_ms, kind, load)
                for name, seeds in outcomes.items():
                    goodput = [100 * outcome.goodput for outcome in seeds]
                    panel["lines"][name].append(
                        [statistics.median(goodput), min(goodput), max(goodput)]
                    )
                    values = [asdict(outcome) for outcome in seeds]
                    report.rows.append((
                        model.name, f"{slo_ms:g}", kind, f"{load:.0%}", name, spread(goodput, 1),
                        *(spread([v[key] for v in values], 1) for key in ("p50_ms", "p99_ms", "rows")),
                    ))  # fmt: skip
                lost = statistics.median(
                    100 * (theirs.goodput - ours.goodput)
                    for ours, theirs in zip(outcomes["slo"], outcomes["none"], strict=True)
                )
                worst = max(worst, (lost, f"{title}, {load:.0%}"))
            panels.append(panel)
    for model in found:
        costs = ", ".join(
            f"{n}: {statistics.median(runs) / NS_PER_MS:.3g}" for n, runs in model.runs_ns.items()
        )
        report.notes.append(f"cost of `{model.name}` in ms by rows: {costs}")
    report.notes.append(
        "`fitted` is ahead where the load is too high because it refuses rows that would be late; "
        "*slo, timeout* does so by a fixed time"
    )
    is_kept = worst[0] <= NOISE
    report.target(
        f"holding for an SLO costs no goodput against not holding ({NOISE:g} point is noise)",
        is_kept,
        f"at worst {worst[0]:.2f} points{': ' + worst[1] if worst[1] else ''}",
    )
    if draw(panels, figure):
        report.figure = figure.name
    else:
        print("no figure: it needs matplotlib, see the head of benchmarks/policy.py")
    report.publish()
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
