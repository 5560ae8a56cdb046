"""What ``gateway bench`` does: finds the model, tries one request, loads the server, reports."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
import uvloop
from rich.console import Console

from gateway.cli.bench_report import BenchResult, LiveView, as_json, show, show_plan
from gateway.cli.bench_server import BenchedServer, Counters, model_path, times_between
from gateway.client.failover import Request
from gateway.client.load import Load, LoadPlan
from gateway.client.load_http import request_bytes
from gateway.client.load_inputs import (
    Protocol,
    concrete_shapes,
    encode_request,
    load_inputs,
    make_inputs,
    rows_of,
)

PLAIN_COLUMNS = 100
"""Width of the report where there is no terminal that has one."""

SEED = 0
"""Of random inputs: two runs send the same."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """The command's options, as its help describes them; None: not given."""

    url: str
    model: str | None
    version: int | None
    protocol: Protocol
    rows: int | None
    shapes: dict[str, tuple[int, ...]]
    data: Path | Literal["zeros", "random"]
    connections: int
    duration_s: float
    requests: int | None
    rate: float | None
    warmup_s: float
    timeout_s: float


@dataclass(frozen=True, slots=True)
class _Inference:
    """What is sent: ready requests, all of ``rows`` rows, to a model."""

    model: str
    model_path: str
    rows: int
    requests: tuple[Request, ...]


def run(options: BenchOptions, *, is_json: bool) -> int:
    """Bench and print; the exit status: 1 where no request succeeded, else 0.

    Raises:
        GatewayError: the options do not fit the server, or it refuses the first request.
    """
    console = Console(highlight=False, quiet=is_json)
    if not console.is_terminal:
        console = Console(highlight=False, quiet=is_json, width=PLAIN_COLUMNS)
    result = uvloop.run(_bench(options, console))
    if is_json:
        print(json.dumps(as_json(result), indent=2))  # noqa: T201
    else:
        show(result, console)
    return int(not result.tally.succeeded)


async def _bench(options: BenchOptions, console: Console) -> BenchResult:
    server = BenchedServer(options.url)
    try:
        inference = await _prepare(options, server)
        # One answer first: a mistake in the request shows as the server's own words, once.
        await server.ask(inference.requests[0], options.timeout_s)
        return await _load(options, server, inference, console)
    finally:
        await server.close()


async def _prepare(options: BenchOptions, server: BenchedServer) -> _Inference:
    model = options.model if options.model is not None else await server.choose_model()
    path = model_path(model, options.version)
    specs = await server.inputs(path)
    if isinstance(options.data, Path):
        inputs = load_inputs(options.data, specs, options.rows)
    else:
        shapes = concrete_shapes(specs, options.shapes, options.rows)
        source = np.random.default_rng(SEED)
        inputs = make_inputs(specs, shapes, options.data, source)
    rows = rows_of(specs, {name: array.shape for name, array in inputs[0].items()})
    encoded = [encode_request(options.protocol, path, specs, one) for one in inputs]
    return _Inference(model, path, rows, tuple(Request("POST", *one) for one in encoded))


async def _load(
    options: BenchOptions, server: BenchedServer, inference: _Inference, console: Console
) -> BenchResult:
    plan = _plan(options, server.url, inference)
    result = BenchResult(
        server.url, inference.model, options.version, options.protocol, inference.rows, plan
    )
    show_plan(result, console)
    asked: list[asyncio.Task[Counters | None]] = []

    def ask_counters() -> None:
        asked.append(asyncio.create_task(server.counters(inference.model_path)))

    load = Load(plan, on_measuring=ask_counters)
    with _stopped_by_signals(load), LiveView(load, console):
        result.tally = await load.run()
    if asked:
        before, after = await asked[0], await server.counters(inference.model_path)
        result.times = times_between(before, after)
    return result


def _plan(options: BenchOptions, url: str, inference: _Inference) -> LoadPlan:
    parts = urlsplit(url)
    authority = parts.netloc.rpartition("@")[2]
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    return LoadPlan(
        host=parts.hostname or "",
        port=parts.port or (443 if tls else 80),
        tls=tls,
        requests=tuple(
            request_bytes(r.method, authority, parts.path + r.path, r.body or b"", r.headers)
            for r in inference.requests
        ),
        connections=options.connections,
        warmup_s=options.warmup_s,
        timeout_s=options.timeout_s,
        duration_s=options.duration_s,
        limit=options.requests,
        rate=options.rate,
    )


@contextmanager
def _stopped_by_signals(load: Load) -> Iterator[None]:
    """Let the signals that end a program end the load early; its results are still reported."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, load.stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
