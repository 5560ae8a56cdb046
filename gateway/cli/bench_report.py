"""How ``gateway bench`` shows a load: a live view while it runs, then a report or a JSON object."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gateway import clock
from gateway.cli.bench_server import ServerTimes, printable
from gateway.client.encoding import load_json
from gateway.client.load import Load, LoadPlan, Phase
from gateway.client.load_histogram import Histogram
from gateway.client.load_tally import Tally
from gateway.clock import NS_PER_MS, NS_PER_S

PERCENTILES = (50.0, 90.0, 99.0, 99.9)

REFRESH_S = 0.25
"""Between two frames of the live view."""

SPARK_SECONDS = 60
"""How many of the last seconds the live view draws."""

BAR_COLUMNS = 40
"""Width of the longest bar of the histogram."""

MAX_ROWS = 24
"""Most rows of the histogram; it uses coarser steps beyond."""

BUSY_CPU = 0.9
"""From so many CPUs on that this process used, it may be what limits the load: it has one thread."""

_SPARKS = "▁▂▃▄▅▆▇█"
_STEPS = (
    (10, 12, 15, 18, 22, 27, 33, 39, 47, 56, 68, 82),
    (10, 15, 22, 33, 47, 68),
    (10, 20, 50),
    (10,),
)
"""Bounds of the histogram's rows within a decade, finest first: series of preferred numbers."""


@dataclass(slots=True)
class BenchResult:
    """What was sent, and what came of it. ``version`` None: the routed one."""

    url: str
    model: str
    version: int | None
    protocol: str
    rows: int
    plan: LoadPlan
    tally: Tally = field(default_factory=Tally)
    times: ServerTimes | None = None

    @property
    def request_bytes(self) -> float:
        """Mean length of a request, its head included."""
        return sum(map(len, self.plan.requests)) / len(self.plan.requests)

    @property
    def client_cpu(self) -> float:
        """CPUs that this process kept busy while it measured."""
        return self.tally.per_second(self.tally.cpu_ns) / NS_PER_S


class LiveView:
    """Shows a load while it runs, on a terminal; nothing where there is none.

    A context manager, used inside of a running event loop.
    """

    def __init__(self, load: Load, console: Console) -> None:
        self._load = load
        self._started_ns = clock.monotonic_ns()
        self._marks: list[tuple[int, int]] = []  # moment, answers until then: one for each second
        self._is_shown = console.is_terminal and not console.quiet
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveView:
        if self._is_shown:
            self._live.start()
            self._task = asyncio.create_task(self._refresh())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_shown:
            self._task.cancel()
            self._live.stop()

    async def _refresh(self) -> None:
        while True:
            self._live.update(self.frame(clock.monotonic_ns()), refresh=True)
            await asyncio.sleep(REFRESH_S)

    def frame(self, now_ns: int) -> Text:
        """The view at a moment."""
        plan, tally, phase = self._load.plan, self._load.tally, self._load.phase
        if phase is Phase.WARMING:
            passed_s = (now_ns - self._started_ns) / NS_PER_S
            return Text(f"warming up, {passed_s:.0f} of {plan.warmup_s:g} s", "dim")
        answered = sum(tally.statuses.values())
        if not self._marks:
            self._marks.append((tally.begun_ns, 0))
        if now_ns - self._marks[-1][0] >= NS_PER_S:
            self._marks = [*self._marks[-SPARK_SECONDS:], (now_ns, answered)]
        rates = [
            (count - before) * NS_PER_S / (at_ns - before_ns)
            for (before_ns, before), (at_ns, count) in zip(
                self._marks, self._marks[1:], strict=False
            )
        ]
        passed_s = (now_ns - tally.begun_ns) / NS_PER_S
        goal = f"{plan.duration_s:g} s" if plan.limit is None else f"{plan.limit:,} requests"
        doing = "last answers" if phase is Phase.ENDING else f"{passed_s:.0f} s of {goal}"
        latencies = tally.latencies
        line = Text(doing, "dim")
        line.append(f"  {rates[-1] if rates else 0:,.0f}/s", "not dim bold")
        line.append(f"  {answered:,} answers", "not dim")
        line.append(f"  {tally.errors:,} errors", "not dim red" if tally.errors else "not dim")
        p50, p99 = (in_time(latencies.percentile_ns(percent)) for percent in (50, 99))
        line.append(f"  p50 {p50}  p99 {p99}", "not dim")
        return line.append(f"\n{sparkline(rates)}", "not dim cyan")


def sparkline(values: Sequence[float]) -> str:
    """One character for each value, as high as it is large beside the largest."""
    top = max(values, default=0.0)
    if top <= 0:
        return _SPARKS[0] * len(values)
    return "".join(_SPARKS[round(value / top * (len(_SPARKS) - 1))] for value in values)


def in_time(value_ns: float) -> str:
    """A time with three digits and the unit that fits."""
    for unit, size_ns in (("s", NS_PER_S), ("ms", NS_PER_MS)):
        if value_ns >= size_ns:
            return f"{_digits(value_ns / size_ns)} {unit}"
    return f"{value_ns / 1000:.0f} µs"


def _digits(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def histogram_bounds(histogram: Histogram) -> list[int]:
    """Round numbers of nanoseconds that cut all latencies into `MAX_ROWS` rows at most.

    The first is at least the shortest latency and the last at least the longest; empty where there is none.
    """
    if not histogram.count:
        return []
    for steps in _STEPS:
        series = [step * 10**power for power in range(16) for step in steps]
        first = next(at for at, bound in enumerate(series) if bound >= histogram.min_ns)
        last = next(at for at, bound in enumerate(series) if bound >= histogram.max_ns)
        if last - first < MAX_ROWS:
            break
    return series[first : last + 1]


def show_plan(result: BenchResult, console: Console) -> None:
    """Print what will be done."""
    plan = result.plan
    version = "the routed version" if result.version is None else f"version {result.version}"
    rows = "1 row" if result.rows == 1 else f"{result.rows} rows"
    loop = "closed loop" if plan.rate is None else f"open loop, {plan.rate:g} requests/s"
    goal = f"{plan.duration_s:g} s" if plan.limit is None else f"{plan.limit:,} requests"
    title = Text(f"{printable(result.model)}, {version}", "bold").append(
        f" at {result.url}\n", "not bold"
    )
    title.append(
        f"{result.protocol}, {rows} and {in_bytes(result.request_bytes)} a request, "
        f"{plan.connections} connections, {loop}, {goal} after {plan.warmup_s:g} s of warm-up",
        "not bold dim",
    )
    console.print(title)


def show(result: BenchResult, console: Console) -> None:
    """Print the report."""
    tally = result.tally
    if not tally.begun_ns:
        console.print("Stopped during the warm-up: nothing was measured.")
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column()
    table.add_row("succeeded", f"{tally.succeeded:,}", f"in {tally.elapsed_s:.2f} s")
    table.add_row("requests", f"{tally.per_second(tally.succeeded):,.1f}", "a second")
    table.add_row("rows", f"{tally.per_second(tally.succeeded * result.rows):,.1f}", "a second")
    table.add_row("sent", in_bytes(tally.per_second(tally.sent_bytes)), "a second")
    table.add_row("received", in_bytes(tally.per_second(tally.received_bytes)), "a second")
    table.add_row("errors", f"{tally.errors:,}", "")
    for count, what in _troubles(tally):
        table.add_row("", Text(f"{count:,}", "red"), Text(what))
    console.print()
    console.print(table)
    _show_latencies(tally.latencies, console)
    _show_times(result, console)
    for note in _notes(result):
        console.print(Text(note, "yellow"))


def _troubles(tally: Tally) -> list[tuple[int, str]]:
    """What went wrong, and how often."""
    rows = [(count, _status_text(tally, status)) for status, count in tally.refused.items()]
    rows += [
        (tally.timeouts, "not answered in time"),
        (tally.lost, "connection closed before the answer"),
        (tally.malformed, "answer is not HTTP/1.x"),
        (tally.connect_failures, f"connection failed: {printable(tally.connect_problem)}"),
    ]
    return [row for row in rows if row[0]]


def _status_text(tally: Tally, status: int) -> str:
    """A status, its name and what the server said with the first of them."""
    name = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
    try:
        said = load_json(tally.texts[status])["error"]
    except (ValueError, LookupError, TypeError):
        said = ""
    return f"{status} {name}" + (f": {printable(str(said))}" if said else "")


def _show_latencies(latencies: Histogram, console: Console) -> None:
    if not latencies.count:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    values = {"mean": latencies.mean_ns, **_percentiles(latencies)}
    for name in values:
        table.add_column(name, justify="right")
    table.add_row(*map(in_time, values.values()))
    console.print(Text("\nLatency", "bold"))
    console.print(table)
    console.print()
    bounds = histogram_bounds(latencies)
    counts = latencies.rows(bounds)
    seen = 0
    for bound_ns, count in zip(bounds, counts, strict=False):
        seen += count
        bar = "█" * round(count / max(counts) * BAR_COLUMNS) or "▏" * bool(count)
        line = Text(f"≤ {in_time(bound_ns):>7}  ").append(f"{bar:<{BAR_COLUMNS}}", "cyan")
        console.print(line.append(f" {count:>10,} {seen / latencies.count:>8.2%}"))


def _percentiles(latencies: Histogram) -> dict[str, float]:
    return {
        "min": latencies.min_ns,
        **{f"p{percent:g}": latencies.percentile_ns(percent) for percent in PERCENTILES},
        "max": latencies.max_ns,
    }


def _show_times(result: BenchResult, console: Console) -> None:
    """Where the mean request's time went: the server's parts, and what is left of the client's whole."""
    times = result.times
    if times is None:
        return
    parts = [
        ("waiting for a worker", times.queue_ms),
        ("model", times.compute_input_ms + times.compute_infer_ms + times.compute_output_ms),
    ]
    parts.append(("rest of the server", times.total_ms - sum(ms for _what, ms in parts)))
    outside_ms = result.tally.latencies.mean_ns / NS_PER_MS - times.total_ms
    parts.append(("outside: HTTP, network, this client", outside_ms))
    console.print(Text("\nWhere a request's time goes, on average", "bold"))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(style="dim")
    table.add_column(justify="right")
    for what, ms in parts:
        table.add_row(what, in_time(max(0.0, ms) * NS_PER_MS))
    if times.mean_batch_rows is not None:
        table.add_row("mean batch", f"{times.mean_batch_rows:.1f} rows")
    console.print(table)


def _notes(result: BenchResult) -> list[str]:
    """What whoever reads the numbers should know."""
    tally, notes = result.tally, []
    if tally.unsent:
        notes.append(
            f"{tally.unsent:,} requests were due and never sent: the server (or {result.plan.connections} "
            f"connections) cannot keep up with {result.plan.rate:g} requests/s."
        )
    if tally.unfinished:
        notes.append(f"Stopped early: {tally.unfinished:,} requests were still in flight.")
    if result.client_cpu >= BUSY_CPU:
        notes.append(
            f"This client kept {result.client_cpu:.2f} CPUs busy, and it has one thread: "
            "it may be what limits the rate."
        )
    return notes


def in_bytes(count: float) -> str:
    """A number of bytes with the decimal unit that fits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{_digits(count / size)} {unit}"
    return f"{count:.0f} B"


def as_json(result: BenchResult) -> dict[str, Any]:
    """Plain values, by the keys that the command's help describes."""
    tally, plan, latencies = result.tally, result.plan, result.tally.latencies
    measured = {"mean": latencies.mean_ns, **_percentiles(latencies)}
    return {
        "ok": tally.succeeded > 0,
        "url": result.url,
        "model": result.model,
        "version": result.version,
        "protocol": result.protocol,
        "rows": result.rows,
        "connections": plan.connections,
        "rate": plan.rate,
        "request_bytes": result.request_bytes,
        "elapsed_s": tally.elapsed_s,
        "sent": tally.sent,
        "succeeded": tally.succeeded,
        "errors": tally.errors,
        "unfinished": tally.unfinished,
        "unsent": tally.unsent,
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
        "timeouts": tally.timeouts,
        "lost": tally.lost,
        "malformed": tally.malformed,
        "connect_failures": tally.connect_failures,
        "reconnects": tally.reconnects,
        "requests_per_s": tally.per_second(tally.succeeded),
        "rows_per_s": tally.per_second(tally.succeeded * result.rows),
        "sent_bytes_per_s": tally.per_second(tally.sent_bytes),
        "received_bytes_per_s": tally.per_second(tally.received_bytes),
        "latency_ms": {name: ns / NS_PER_MS for name, ns in measured.items()}
        if latencies.count
        else None,
        "histogram": [[ns / NS_PER_MS, count] for ns, count in latencies.buckets()],
        "client_cpu": result.client_cpu,
        "server": None if result.times is None else asdict(result.times),
    }
