"""``gateway demo``: serves the bundled digits, shows what the server does, and keeps it busy."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import aiohttp
import uvloop
from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gateway.cli.admin_client import DEFAULT_URL
from gateway.cli.digits import ABOUT, MODEL, Answer, DigitsClient, HeldOut, as_json, draw
from gateway.cli.server_process import ServerProcess
from gateway.errors import ConfigurationError, GatewayError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "digits"

CONNECTIONS = 32
PASSES = 8
"""How often the tour sends every image: long enough for requests a second to mean something."""

SHOWN_DIGITS = 6

ROLLOUT = "--steps 0,25,50 --mirror 100 --agreement 0.9 --metric errors=0.02"
"""First a step of copies alone: their answers must mostly be those of the version that answers now (good
versions agree on 96 % of the images, the broken one on 10 %), before anybody is answered by the new one.
The margin of errors is what the demo's traffic can show in half a minute."""

_OUTCOMES = {
    2: "it takes over within a minute",
    3: "it is found out before it answers anybody",
}

PLAIN_REPORT_S = 10.0
"""Time between two lines about the traffic where there is no terminal to rewrite one on."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """The command's options, as its help describes them."""

    examples: Path
    port: int
    metrics_port: int
    admin_port: int
    once: bool
    rate: float


def run_demo(options: DemoOptions) -> None:
    """Run until the tour is over (``once``) or until Ctrl-C, SIGTERM or SIGHUP.

    Raises:
        GatewayError: the examples are missing, the server did not start or ended, or the tour was
            interrupted although it was all that was asked for.
    """
    repository = options.examples / "models"
    if not (repository / MODEL).is_dir():
        raise ConfigurationError(
            f"no example models in {options.examples}: run the demo from a checkout of the "
            "repository, or name its folder with --examples DIR"
        )
    versions = sorted(int(path.parent.name) for path in repository.glob(f"{MODEL}/*/model.onnx"))
    held_out = HeldOut.load(options.examples / "held_out.npz")
    try:
        # A copy, since a server writes beside its models, and what it is told may remove them.
        with TemporaryDirectory(prefix="gateway-demo-") as folder:
            copied = Path(shutil.copytree(repository, Path(folder) / "models"))
            uvloop.run(_demo(options, copied, versions, held_out, Console(highlight=False)))
    except asyncio.CancelledError:
        if options.once:
            raise GatewayError("interrupted before the tour was over") from None


async def _demo(
    options: DemoOptions,
    repository: Path,
    versions: list[int],
    held_out: HeldOut,
    console: Console,
) -> None:
    _cancel_on_signals()
    server = ServerProcess(lambda line: console.print(Text(line, "yellow"), soft_wrap=True))
    try:
        with console.status(f"starting {len(versions)} model versions…"):
            started_s = time.monotonic()
            state = f"sqlite:///{repository.parent / 'state.db'}"
            ports = options.port, options.metrics_port, options.admin_port
            await server.start(repository, state, *ports)
            await server.wait_ready()
            took_s = time.monotonic() - started_s
        console.print(
            f"[bold]Serving {MODEL}[/], versions {', '.join(map(str, versions))}, "
            f"on {server.url} [dim](ready after {took_s:.1f} s)[/]"
        )
        async with _http_session() as http:
            client = DigitsClient(http, server.url)
            routed = await _tour(client, held_out, versions, console)
            _show_commands(server, held_out, routed, console)
            _show_rollouts(server, console)
            if not options.once:
                await _keep_busy(server, client, held_out, options.rate, console)
    finally:
        with console.status("ending the server…"):
            was_running = await server.stop()
        if was_running:
            console.print("The server has ended.")


def _cancel_on_signals() -> None:
    """Let the signals that end a program cancel the running task; a second one cancels its end."""
    task = asyncio.current_task()
    if task is not None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)


def _http_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONNECTIONS),
        timeout=aiohttp.ClientTimeout(total=60),
    )


async def _tour(
    client: DigitsClient, held_out: HeldOut, versions: list[int], console: Console
) -> int:
    """Send every image to the routed version, then to each; the version that is routed."""
    bodies = held_out.bodies()
    with _progress(console) as progress:
        bar = progress.add_task("sending images", total=len(bodies) * (PASSES + len(versions)))

        def advance() -> None:
            progress.advance(bar)

        images, batches = await client.executions()
        started_s = time.monotonic()
        answers = await client.classify_all(bodies * PASSES, CONNECTIONS, on_answer=advance)
        rate = len(answers) / (time.monotonic() - started_s)
        images_after, batches_after = await client.executions()
        answers = answers[: len(bodies)]
        correct = {
            version: held_out.correct(
                await client.classify_all(bodies, CONNECTIONS, version, advance)
            )
            for version in versions
        }
    routed, total = answers[0].version, len(bodies)
    right = held_out.correct(answers)
    _show_digits(held_out, answers, console)
    mean_batch = (images_after - images) / (batches_after - batches)
    console.print(
        f"\n[bold]{right / total:.2%}[/] of {total} held-out images read correctly by version "
        f"{routed}, the routed one.\n"
        f"[bold]{rate:,.0f}[/] requests a second over {CONNECTIONS} connections from one Python "
        f"client,\none image each, in batches of [bold]{mean_batch:.1f}[/] images on average."
    )
    _show_versions(correct, total, routed, console)
    return routed


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _show_digits(held_out: HeldOut, answers: list[Answer], console: Console) -> None:
    """A row of images, as many as fit, the last of them one that was read wrong."""
    width = 2 * held_out.images.shape[2]
    fitting = max(1, min(SHOWN_DIGITS, (console.width + 2) // (width + 2)))
    is_right = [a.digit == label for a, label in zip(answers, held_out.labels, strict=True)]
    wrong = [at for at, right in enumerate(is_right) if not right][:1]
    shown = [at for at, right in enumerate(is_right) if right][: fitting - len(wrong)] + wrong
    pictures = []
    for at in shown:
        answer, label = answers[at], held_out.labels[at]
        verdict = (
            Text(f"✓ label {label}", "green") if is_right[at] else Text(f"✗ label {label}", "red")
        )
        caption = Text(f"{answer.digit} at {answer.probability:.1%}")
        pictures.append(
            Text("\n").join([Text("\n".join(draw(held_out.images[at]))), caption, verdict])
        )
    console.print()
    console.print(Columns(pictures, width=width, padding=(0, 2)))


def _show_versions(correct: dict[int, int], total: int, routed: int, console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("version", justify="right")
    table.add_column("accuracy", justify="right")
    table.add_column("correct", justify="right")
    table.add_column("what it is")
    for version, right in correct.items():
        about = ABOUT.get(version, "")
        table.add_row(
            f"{version}",
            f"{right / total:.2%}",
            f"{right} of {total}",
            f"{about} [dim](routed)[/]" if version == routed else about,
        )
    console.print(table)


def _show_commands(server: ServerProcess, held_out: HeldOut, routed: int, console: Console) -> None:
    """What to try, to be pasted into another terminal."""
    image = as_json(held_out.images[0], indent="   ")
    commands = [
        f"curl {server.url}/v1/models/{MODEL}:predict -d '{{\"instances\": [\n  {image}]}}'",
        f"curl {server.url}/v2/models/{MODEL}",
        f"curl -s {server.metrics_url} | grep _total",
    ]
    console.print("[bold]Try it from another terminal:[/]\n")
    for command in commands:
        console.print(Text(command, "cyan"), soft_wrap=True)
    pid = server.worker(MODEL, routed)
    if pid is not None:
        console.print(f"\n[bold]Kill the worker of version {routed}; no request is lost:[/]\n")
        console.print(Text(f"kill -9 {pid}", "cyan"))
    console.print()


def _show_rollouts(server: ServerProcess, console: Console) -> None:
    """Two rollouts of one kind to be pasted: the good version gets through, the broken one does not."""
    called = sys.argv[0] if Path(sys.argv[0]).name == "gateway" else f"{sys.executable} -m gateway"
    address = "" if server.admin_url == DEFAULT_URL else f" --admin-url {server.admin_url}"
    for canary, outcome in _OUTCOMES.items():
        console.print(f"[bold]Roll out version {canary}, {ABOUT[canary]}; {outcome}:[/]\n")
        command = f"{called} rollout start {MODEL} --canary {canary} {ROLLOUT}{address} --watch"
        console.print(Text(f"{command}\n", "cyan"), soft_wrap=True)
    console.print(f"[bold]Watch it all in a browser:[/] {server.admin_url}/\n")


@dataclass(slots=True)
class Tally:
    """What became of the traffic so far; latencies of the last requests alone."""

    sent: int = 0
    errors: int = 0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=500))


async def _keep_busy(
    server: ServerProcess, client: DigitsClient, held_out: HeldOut, rate: float, console: Console
) -> None:
    """Send light traffic and report on it until cancelled. GatewayError if the server ends."""
    tally = Tally()
    tasks = [
        asyncio.create_task(_send(client, held_out.bodies(), rate, tally)),
        asyncio.create_task(_report(client, tally, console)),
        asyncio.create_task(server.ended()),
    ]
    console.print(f"Light traffic goes on, {rate:g} requests a second, until Ctrl-C.")
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        console.print(f"Sent {tally.sent:,} requests; {tally.errors} of them failed.")


async def _send(client: DigitsClient, bodies: list[bytes], rate: float, tally: Tally) -> None:
    """Start requests at an even pace; a server that falls behind is not sent ever more of them."""
    free = asyncio.Semaphore(CONNECTIONS)

    async def one(body: bytes) -> None:
        started_s = time.monotonic()
        try:
            await client.classify(body)
            tally.latencies_s.append(time.monotonic() - started_s)
        except GatewayError:
            tally.errors += 1
        finally:
            free.release()

    due_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        while True:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            await free.acquire()
            group.create_task(one(bodies[tally.sent % len(bodies)]))
            tally.sent += 1
            due_s = max(due_s + 1 / rate, time.monotonic() - 1.0)


async def _report(client: DigitsClient, tally: Tally, console: Console) -> None:
    """Keep one line about the traffic up to date, or write one now and then without a terminal."""
    pause_s = 1.0 if console.is_terminal else PLAIN_REPORT_S
    images, batches = await client.executions()
    sent, at_s = tally.sent, time.monotonic()
    with console.status("sending…") as status:
        while True:
            await asyncio.sleep(pause_s)
            with suppress(GatewayError):
                images_now, batches_now = await client.executions()
                now_s = time.monotonic()
                p50_ms = 1e3 * median(tally.latencies_s) if tally.latencies_s else float("nan")
                mean = (images_now - images) / max(1, batches_now - batches)
                line = (
                    f"{tally.sent:,} requests · {(tally.sent - sent) / (now_s - at_s):.1f}/s · "
                    f"p50 {p50_ms:.1f} ms · mean batch {mean:.1f} · {tally.errors} errors"
                )
                sent, at_s, images, batches = tally.sent, now_s, images_now, batches_now
                status.update(line) if console.is_terminal else console.print(line)
