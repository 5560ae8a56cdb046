"""``gateway bench URL``: the command and its options. What it does is in `bench_run`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Literal

import click

MAX_CONNECTIONS = 10_000
"""Most connections; their file descriptors are bounded anyway."""

_MADE: dict[str, Literal["zeros", "random"]] = {"zeros": "zeros", "random": "random"}
"""What --data may be besides a file."""

_TIMES = frozenset({"duration", "warmup", "timeout"})

_SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}

_KEYS = """\b
Keys of --json:
  ok              whether any request succeeded
  url, model, version (null: the routed one), protocol, rows, connections,
  rate (null: closed loop), request_bytes (mean)
  elapsed_s       time measured
  sent, succeeded, errors, unfinished, unsent
  statuses        a map of answers by status
  timeouts, lost, malformed, connect_failures, reconnects
  requests_per_s, rows_per_s            of those that succeeded
  sent_bytes_per_s, received_bytes_per_s
  latency_ms      mean, min, p50, p90, p99, p99.9, max; null: none succeeded
  histogram       a list of [ms, count]: latencies up to so many ms
  client_cpu      CPUs that the command itself kept busy; near 1 it is the bottleneck
  server          what the server counted meanwhile (null: nothing): mean_batch_rows,
                  queue_ms, compute_input_ms, compute_infer_ms, compute_output_ms,
                  total_ms (means of a request)
"""


def _in_seconds(
    _context: click.Context, _option: click.Parameter, value: str | None
) -> float | None:
    """A time such as ``10s``, ``500ms`` or ``2m``, in seconds; a bare number is seconds."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|)", value)
    if match is None:
        raise click.BadParameter("expected a time such as 10s, 500ms or 2m")
    return float(match[1]) * _SECONDS[match[2]]


def _named_shapes(
    _context: click.Context, _option: click.Parameter, values: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from ``NAME:1,3,224,224``; a name may itself hold colons."""
    shapes = {}
    for value in values:
        name, _, dims = value.rpartition(":")
        if not name or not re.fullmatch(r"[0-9]{1,12}(,[0-9]{1,12})*", dims):
            raise click.BadParameter("expected NAME:DIM,DIM,…, for example image:1,3,224,224")
        shapes[name] = tuple(map(int, dims.split(",")))
    return shapes


@click.command("bench", epilog=_KEYS)
@click.argument("url")
@click.option("--model", metavar="M", help="Which model [the only one].")
@click.option("--version", metavar="V", type=click.IntRange(1), help="Version [the routed one].")
@click.option(
    "--protocol",
    type=click.Choice(["v2-binary", "v2-json", "tfserving", "msgpack"]),
    default="v2-binary",
    help="How tensors travel [v2-binary].",
)
@click.option("--rows", metavar="N", type=click.IntRange(1), help="Rows of a request [1].")
@click.option(
    "--shape",
    "shapes",
    metavar="NAME:DIMS",
    callback=_named_shapes,
    multiple=True,
    help="Whole shape of an input whose dims vary; may be repeated.",
)
@click.option(
    "--data",
    metavar="FILE.npz|zeros|random",
    default="random",
    help="What the inputs hold [random]; a file has an array for each.",
)
@click.option(
    "--connections",
    metavar="N",
    type=click.IntRange(1, MAX_CONNECTIONS),
    default=32,
    help="Connections, each with one request at a time [32].",
)
@click.option(
    "--duration", metavar="T", callback=_in_seconds, help="Time measured, as 10s or 2m [10s]."
)
@click.option("--requests", metavar="N", type=click.IntRange(1), help="Measure N requests instead.")
@click.option(
    "--rate",
    metavar="R",
    type=click.FloatRange(0.001, 1_000_000),
    help="Open loop: R random arrivals a second [each answer brings the next].",
)
@click.option(
    "--warmup", metavar="T", callback=_in_seconds, default="1s", help="Before measuring [1s]."
)
@click.option(
    "--timeout", metavar="T", callback=_in_seconds, default="10s", help="Of a request [10s]."
)
@click.option("--json", "is_json", is_flag=True, help="One JSON object instead of a screen.")
def bench(data: str, is_json: bool, **options: Any) -> None:
    """Load the server at URL with inferences; show throughput, latencies and where the time goes.

    Any server of the Open Inference Protocol v2 will do. Ctrl-C ends early, with the results so far. The
    exit status is 1 where no request succeeded.
    """
    from gateway.cli import bench_run

    if options["duration"] is not None and options["requests"] is not None:
        raise click.UsageError("--duration and --requests exclude each other")
    if options["duration"] is None:
        options["duration"] = 10.0
    if not options["duration"] or not options["timeout"]:
        raise click.UsageError("--duration and --timeout must be longer than 0")
    made = _MADE.get(data)
    if options["shapes"] and made is None:
        raise click.UsageError("--shape and a file of --data exclude each other")
    named = {f"{key}_s" if key in _TIMES else key: value for key, value in options.items()}
    sys.exit(
        bench_run.run(bench_run.BenchOptions(data=made or Path(data), **named), is_json=is_json)
    )
