"""Table, targets and picture of what was measured."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from report import RESULTS, Report, spread

from peers.environments import Environment, Missing
from peers.results import BARE, Case, Key, Results, Sample, counted
from peers.stage import BURSTS_S
from peers.targets import OURS, TARGETS

NAME = "peers"
CHART = Path(__file__).resolve().with_name("chart.py")
CHART_ENVIRONMENT = Environment("chart", ("matplotlib==3.11.2",))

DRAW_S = 120
"""What drawing may take."""

COLUMNS = ("case", "server", "CPU µs", "requests/s", "p50 ms", "p99 ms", "PSS MB", "errors")

METHOD = (
    "median (min–max) of the rounds that count: the quiet ones where there are enough, else all",
    "CPU µs: CPU time of all the server's processes over the requests that it answered well (run time "
    "from /proc/PID/task/*/schedstat); as a number it is also CPU milliseconds a 1,000 requests",
    "requests/s, p50, p99: as wrk sees them, with one thread on the same machine; for the encoder, "
    "which answers a few large batches a second, as benchmarks/loader.py does, between ends of batches, "
    f"and in turns of at least {BURSTS_S} s",
    "PSS: of all the server's processes at the end of a turn; errors: other statuses, broken "
    "connections and answers that came too late, of all rounds",
    "everyone: one worker, one ONNX Runtime thread, batches of at most 32 rows; a window of 2 ms where "
    "there is such a setting, but none for inference-gateway unless its title says so",
    "ONNX Runtime alone: a loop of session.run with as many rows as are best for its CPU time, which "
    "takes turns with the servers; a request is a row, and p50 is that of a whole run",
    "before its load each server was sent 64 requests, 32 at a time, each with a row of its own, and the "
    "answers were compared with ONNX Runtime's: all were right where the lines below say nothing",
    "binary: the binary tensor extension (inference-gateway, PyTriton), base64 in JSON (MLServer, which "
    "takes no binary), the tensor as the body (others)",
)


def publish(results: Results, rounds: int, seconds: int) -> None:
    """Write ``benchmarks/results/peers.md`` and ``peers.png``."""
    report = Report(
        NAME,
        f"Other servers, the same models: turns of {seconds} s in {rounds} rounds",
        COLUMNS,
        left=2,
    )
    report.rows += [row(results, key) for keys in by_case(results.samples).values() for key in keys]
    for target in TARGETS:
        judgement = target.judge(results)
        if judgement.met is None:
            report.notes.append(f"target: {judgement.text}: {judgement.measured}")
        else:
            report.target(judgement.text, judgement.met, judgement.measured, judgement.quiet)
    report.notes += METHOD
    report.notes.append(
        f"others on the machine used {results.busiest():.2f} cores (median of all turns)"
    )
    report.notes += [f"{about}: {'; '.join(texts)}" for about, texts in results.notes.items()]
    try:
        draw(picture(results), RESULTS / f"{NAME}.png")
        report.figure = f"{NAME}.png"
    except Missing as missing:
        print(f"no picture: {missing}", file=sys.stderr)
    report.publish()


def by_case(keys: Iterable[Key]) -> dict[Case, list[Key]]:
    """Keys by their case, in their order."""
    cases: dict[Case, list[Key]] = {}
    for key in keys:
        cases.setdefault(key.case, []).append(key)
    return cases


def row(results: Results, key: Key) -> tuple[str, ...]:
    """A line of the table."""
    taken = [sample for (sample,) in counted(results.together([key]))[0]]
    errors = sum(sample.errors for sample in results.samples[key].values())

    def cell(value: Callable[[Sample], float | None], digits: int) -> str:
        values = [each for each in map(value, taken) if each is not None]
        return spread(values, digits) if values else ""

    return (
        results.titles[key.case],
        results.titles[key.subject],
        cell(lambda s: s.cpu_us, 1),
        cell(lambda s: s.rate, 0),
        cell(lambda s: s.p50_ms, 2),
        cell(lambda s: s.p99_ms, 2),
        cell(lambda s: s.pss_mb, 0),
        str(errors) if key.subject != BARE else "",
    )


def picture(results: Results) -> dict[str, object]:
    """What ``chart.py`` draws: of each case its bars, each with median, least and most."""
    cases = []
    for case, keys in by_case(results.samples).items():
        bars = []
        for key in (key for key in keys if key.subject != BARE):
            taken = [sample for (sample,) in counted(results.together([key]))[0]]
            bars.append(
                {
                    "title": results.titles[key.subject],
                    "ours": key.subject.startswith(OURS),
                    "cpu": middle_and_ends([sample.cpu_us for sample in taken]),
                    "rate": middle_and_ends([sample.rate for sample in taken]),
                }
            )
        if bars:
            cases.append({"title": results.titles[case], "bars": bars})
    return {"cases": cases}


def middle_and_ends(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least, most."""
    return statistics.median(values), min(values), max(values)


def draw(what: dict[str, object], path: Path) -> None:
    """Have it drawn in matplotlib's environment. Missing, with the reason, when that fails."""
    CHART_ENVIRONMENT.make()
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [str(CHART_ENVIRONMENT.bin / "python"), str(CHART), str(path)]
    try:
        done = subprocess.run(
            command, input=json.dumps(what), capture_output=True, text=True, timeout=DRAW_S
        )
    except subprocess.TimeoutExpired:
        raise Missing(f"drawing took more than {DRAW_S} s") from None
    if done.returncode:
        raise Missing((done.stderr.strip().splitlines() or ["no reason given"])[-1])
