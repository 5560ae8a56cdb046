"""What padding to a few lengths does to the throughput of models that take sequences of any length.

    python benchmarks/padding.py

`labeller` (a convolution and a CRF, whose steps go from character to character), `tagger` (one layer of a
transformer) and `sentence` (a mean of embeddings) are each served twice by one gateway: padded to the
buckets of its traffic, and exact, where only requests of one length share a batch. 64 connections send
sequences of a model's own traffic, most of them short, to one model at a time; all take turns. Answers of
the padded ones are compared with direct runs of ONNX Runtime without padding. Only `labeller` has a target
for the rate: its runs cost by the step, which is what sharing them saves. The target also depends on its
lengths: `NOTES.md` says what other lengths gave.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path

import msgpack
import numpy as np
from harness import (
    WAIT_S,
    Gateway,
    Noise,
    Rounds,
    open_session,
    take_rounds,
    usage,
    wait_for_quiet,
)
from loader import Client, drive, summary
from report import Report, spread
from token_models import MODELS, Inputs, Traffic

from gateway.client import AsyncClient
from gateway.client.encoding import encode_infer

ROUNDS = 5
ROUND_S = 5.0
WARM_UP_S = 1.5
CONNECTIONS = 64
REQUESTS = 2000
"""Different ones; every connection goes through all of them in an order of its own."""

BATCH_SIZE = 32
COMPARED = 500
COST_RUNS = 20
COST_BATCH = 8
"""Near what the padded models' batches have."""

TARGET_RATIO = 2
TARGET_DIFFERENCE = 1e-5

REASONS = {
    "tagger": "it costs by the token, and padding adds tokens",
    "sentence": "it costs next to nothing, and requests wait for the front end",
}
"""Why padding is not for these models, which have no target for the rate."""

EXACT, PADDED = "exact", "padded"
CONFIGS = (EXACT, PADDED)


@dataclass(frozen=True)
class Case:
    """What one turn of one model showed.

    Attributes:
        rate: rows a second.
        batch_rows: mean rows of its batches.
        p50_ms: latency.
        worker_us, frontend_us, loader_us: CPU time a row.
        worker_cores, frontend_cores: CPU time a second.
    """

    rate: float
    batch_rows: float
    p50_ms: float
    worker_us: float
    frontend_us: float
    loader_us: float
    worker_cores: float
    frontend_cores: float


Turn = dict[tuple[str, str], Case]
"""By model and config; the served model's name is both."""


@dataclass(frozen=True)
class Checks:
    """What is found out about a model beside the turns.

    Attributes:
        difference: the largest between padded answers and direct runs.
        alone_us, alone_padded_us, batched_us: CPU time a row of ONNX Runtime alone: one row at its own
            length, one padded row, and a padded batch of `COST_BATCH` rows.
    """

    difference: float
    alone_us: float
    alone_padded_us: float
    batched_us: float


def config_of(config: str, traffic: Traffic) -> str:
    """A served model's `config.yaml`."""
    common = f"max_batch_size: {BATCH_SIZE}\ninstances: [{{threads: 1}}]\n"
    if config == EXACT:
        return common
    return common + f"padding: {{seq: {{buckets: {list(traffic.buckets)}}}}}\n"


def http_request(model: str, inputs: Inputs) -> bytes:
    """A whole request in the binary tensor extension."""
    body, headers = encode_infer("binary", inputs)
    fields = {"Host": "gateway", **headers, "Content-Length": str(len(body))}
    lines = [f"POST /v2/models/{model}/infer HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def length_of(row: Inputs) -> int:
    """Its tokens."""
    return int(row["input_ids"].shape[1])


# The load, in a process of its own


class MixedClient(Client):
    """A connection that sends another request each time."""

    def __init__(self, host: str, port: int, requests: list[bytes], seed: int) -> None:
        super().__init__(host, port, max(requests, key=len))
        self._requests = itertools.cycle(random.Random(seed).sample(requests, len(requests)))

    def send(self) -> None:
        """Send the next request."""
        self._request = next(self._requests)
        super().send()


def load(host: str, port: str, file: str) -> int:
    """Send the file's requests for a turn; prints a `Load` and the CPU seconds it took."""
    requests = msgpack.unpackb(Path(file).read_bytes())
    clients = [MixedClient(host, int(port), requests, seed) for seed in range(CONNECTIONS)]
    begin = time.process_time()
    times, latency = drive(clients, WARM_UP_S, ROUND_S)
    share = (time.process_time() - begin) / (WARM_UP_S + ROUND_S)
    print(json.dumps({**asdict(summary(times, latency)), "cores": share}))
    return 0


# Turns


def measure(
    gateway: Gateway, files: dict[str, Path], workers: dict[str, int], noise: Noise
) -> Turn:
    """One turn of each model, each alone."""
    return {
        (model, config): measure_one(gateway, name, files[name], workers[name], noise)
        for model in MODELS
        for config in CONFIGS
        for name in [f"{model}_{config}"]
    }


def measure_one(gateway: Gateway, model: str, file: Path, worker: int, noise: Noise) -> Case:
    """One turn of a model."""
    frontends = gateway.processes()["front end"]
    loader = subprocess.Popen(
        [sys.executable, __file__, "load", gateway.host, str(gateway.port), str(file)],
        stdout=subprocess.PIPE,
        text=True,
    )
    ours = [loader.pid, worker, *frontends]
    time.sleep(WARM_UP_S)
    noise.begin(ours)
    began, before = time.monotonic(), gateway.statistics(model)
    worker_before, frontend_before = usage([worker]), usage(frontends)
    time.sleep(ROUND_S - 1)
    after, seconds = gateway.statistics(model), time.monotonic() - began
    worker_s = usage([worker]).since(worker_before).cpu_ns / 1e9
    frontend_s = usage(frontends).since(frontend_before).cpu_ns / 1e9
    noise.end(ours)
    seen = json.loads(loader.communicate()[0])
    rows = after["rows"] - before["rows"]
    return Case(
        rate=seen["rate"],
        batch_rows=rows / (after["batches"] - before["batches"]),
        p50_ms=seen["p50_ms"],
        worker_us=1e6 * worker_s / rows,
        frontend_us=1e6 * frontend_s / rows,
        loader_us=1e6 * seen["cores"] / seen["rate"],
        worker_cores=worker_s / seconds,
        frontend_cores=frontend_s / seconds,
    )


def workers_of(gateway: Gateway) -> dict[str, int]:
    """The one worker of each served model."""
    found = {}
    for pid in gateway.processes()["workers"]:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        found[words[words.index("--name") + 1].partition("/")[0]] = pid
    return found


# Beside the turns


async def largest_difference(
    gateway: Gateway, model: str, rows: list[Inputs], expected: list[np.ndarray]
) -> float:
    """Between the padded model's answers to rows that are asked at the same time, and others."""
    name = f"{model}_{PADDED}"
    async with AsyncClient(f"{gateway.host}:{gateway.port}", connections=CONNECTIONS) as client:
        answers = await asyncio.gather(*(client.infer(name, row) for row in rows))
    differences = []
    for answer, logits in zip(answers, expected, strict=True):
        if answer.outputs["logits"].shape != logits.shape:
            raise RuntimeError("an answer has not the length of its request")
        differences.append(np.abs(answer.outputs["logits"] - logits).max())
    return float(np.max(differences))  # NaN where there is one


def cost_us(session: object, batch: int, traffic: Traffic, by_length: list[int]) -> float:
    """CPU time a row of ONNX Runtime alone, over rows of these lengths."""
    rng = np.random.default_rng(1)
    taken = {}
    for length in set(by_length):
        row = traffic.row(length, rng)
        feed = {k: np.repeat(v, batch, axis=0) for k, v in row.items()}
        times = []
        for _ in range(COST_RUNS):
            began = time.thread_time_ns()
            session.run(None, feed)
            times.append(time.thread_time_ns() - began)
        taken[length] = statistics.median(times[1:]) / batch / 1e3
    return statistics.fmean(taken[length] for length in by_length)


def check(gateway: Gateway, repository: Path, model: str, rows: list[Inputs]) -> Checks:
    """Compare answers, and find out what the model itself costs."""
    session = open_session(repository / f"{model}_{EXACT}" / "1" / "model.onnx")
    expected = [session.run(None, row)[0] for row in rows[:COMPARED]]
    difference = asyncio.run(largest_difference(gateway, model, rows[:COMPARED], expected))
    own = [length_of(row) for row in rows]
    traffic = MODELS[model][1]
    padded = [traffic.bucket_of(length) for length in own]
    return Checks(
        difference,
        cost_us(session, 1, traffic, own),
        cost_us(session, 1, traffic, padded),
        cost_us(session, COST_BATCH, traffic, padded),
    )


# The table


COLUMNS = {
    "rows/s": ("rate", "{:.0f}"),
    "rows a batch": ("batch_rows", "{:.1f}"),
    "p50 ms": ("p50_ms", "{:.1f}"),
    "worker µs/row": ("worker_us", "{:.0f}"),
    "front end µs/row": ("frontend_us", "{:.0f}"),
    "load µs/row": ("loader_us", "{:.0f}"),
    "worker cores": ("worker_cores", "{:.2f}"),
    "front end cores": ("frontend_cores", "{:.2f}"),
}


def publish(rounds: Rounds[Turn], rows: dict[str, list[Inputs]], checks: dict[str, Checks]) -> None:
    """Table and notes."""
    report = Report(
        "padding",
        f"Padding sequences to a few lengths, against exact lengths: {CONNECTIONS} connections, "
        f"1 thread, up to {BATCH_SIZE} rows",
        ("round", "model", "lengths", *COLUMNS, "padded / exact", "others' cores"),
    )

    def add(name: str, turn: Turn, others: str) -> None:
        for (model, config), case in turn.items():
            cells = [form.format(getattr(case, attribute)) for attribute, form in COLUMNS.values()]
            ratio = f"{ratio_of(turn, model, 'rate'):.2f}" if config == PADDED else ""
            report.rows.append((name, model, config, *cells, ratio, others))

    for i, taken in enumerate(rounds.taken, start=1):
        add(str(i), taken.result, f"{taken.others:.2f}")
    by_case = {key: [turn[key] for turn in rounds.counted] for key in rounds.counted[0]}
    medians = {key: median_of(cases) for key, cases in by_case.items()}
    add("median", medians, "")
    report.notes.append(rounds.note)
    for model, found in checks.items():
        report.notes.append(traffic_note(model, rows[model]))
        note_rate(report, rounds, model, medians[model, EXACT])
        note_checks(report, model, found)
    report.notes.append(
        f"a round: {ROUND_S:g} s of each, in turns, binary tensor extension; the load is generated on "
        "the same machine; µs/row: CPU time; others' cores: used by processes outside the benchmark"
    )
    report.publish()


def traffic_note(model: str, rows: list[Inputs]) -> str:
    """The lengths of a model's requests, and what padding adds to them."""
    traffic = MODELS[model][1]
    own = [length_of(row) for row in rows]
    padded = [traffic.bucket_of(length) for length in own]
    return (
        f"`{model}` reads {traffic.unit}: lengths log-normal, 1 to {traffic.longest}, median "
        f"{np.median(own):.0f}, mean {np.mean(own):.0f}, 90 % up to {np.percentile(own, 90):.0f}; "
        f"padding to {', '.join(map(str, traffic.buckets))} makes {sum(padded) / sum(own):.2f} "
        "tokens of one"
    )


def note_rate(report: Report, rounds: Rounds[Turn], model: str, exact: Case) -> None:
    """Note what padding does to the rows a second: a target, or a fact and the reason."""
    ratios = [ratio_of(turn, model, "rate") for turn in rounds.counted]
    if model in REASONS:
        report.notes.append(
            f"`{model}`: {spread(ratios, 2)} times the rows a second with padding, no target: "
            f"{REASONS[model]}; without padding the worker uses {exact.worker_cores:.2f} cores, the "
            f"front end {exact.frontend_cores:.2f}"
        )
    else:
        text = f"`{model}`: at least {TARGET_RATIO} times the rows a second with padding"
        is_met = statistics.median(ratios) >= TARGET_RATIO
        report.target(text, is_met, spread(ratios, 2), rounds.quiet)
    saved = [1 / ratio_of(turn, model, "worker_us") for turn in rounds.counted]
    report.notes.append(
        f"`{model}`: the worker's rows a CPU second, padded / exact: {spread(saved, 2)}"
    )


def note_checks(report: Report, model: str, found: Checks) -> None:
    """Note how close its padded answers are, and what it costs alone."""
    text = f"`{model}`: padded answers within {TARGET_DIFFERENCE:g} of direct runs"
    is_met = found.difference <= TARGET_DIFFERENCE
    report.target(text, is_met, f"{found.difference:.1g}, the largest of {COMPARED} answers")
    report.notes.append(
        f"`{model}`: ONNX Runtime alone takes {found.alone_us:.0f} µs of CPU a row one by one, "
        f"{found.alone_padded_us:.0f} padded one by one, {found.batched_us:.0f} padded in "
        f"batches of {COST_BATCH}"
    )


def ratio_of(turn: Turn, model: str, attribute: str) -> float:
    """A number of the padded model over that of the exact one."""
    return getattr(turn[model, PADDED], attribute) / getattr(turn[model, EXACT], attribute)


def median_of(cases: list[Case]) -> Case:
    """The median of each number."""
    return Case(*map(statistics.median, zip(*map(astuple, cases), strict=True)))


def main() -> int:
    """Measure and report; the exit status is 0 whatever the numbers are."""
    rng = np.random.default_rng(0)
    rows = {
        model: [traffic.row(length, rng) for length in traffic.lengths(REQUESTS, rng)]
        for model, (_, traffic) in MODELS.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        repository, files = Path(folder) / "repository", {}
        for model, config in itertools.product(MODELS, CONFIGS):
            name, (write, traffic) = f"{model}_{config}", MODELS[model]
            write(repository / name / "1" / "model.onnx")
            (repository / name / "config.yaml").write_text(config_of(config, traffic))
            files[name] = Path(folder) / name
            requests = [http_request(name, row) for row in rows[model]]
            files[name].write_bytes(msgpack.packb(requests))
        wait_for_quiet(WAIT_S)
        with Gateway(repository) as gateway:
            checks = {model: check(gateway, repository, model, rows[model]) for model in MODELS}
            turn = partial(measure, gateway, files, workers_of(gateway))
            rounds = take_rounds(turn, ROUNDS)
    publish(rounds, rows, checks)
    return 0


if __name__ == "__main__":
    sys.exit(load(*sys.argv[2:]) if sys.argv[1:2] == ["load"] else main())
