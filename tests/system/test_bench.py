"""``gateway bench`` against a gateway, and its load against servers that refuse, close, hang or babble."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from aiohttp import web

from gateway.client.load import Load, LoadPlan
from gateway.client.load_http import request_bytes
from gateway.client.load_tally import Tally
from tests.system.server import Server

DEADLINE_S = 60

FORCED = {"FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"}


def command(url: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "gateway", "bench", url, *flags]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in FORCED}
    return kept | {"PYTHONIOENCODING": "utf-8"}


def run(url: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(url, *flags), capture_output=True, text=True, timeout=DEADLINE_S, env=environment()
    )


def told(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.stderr == ""
    return json.loads(done.stdout)


# Against a gateway


@pytest.fixture(scope="module")
def server(make_repository):
    with Server(make_repository("echo", "multi")) as running:
        yield running


@pytest.fixture(scope="module")
def digits(digits_repository):
    with Server(digits_repository) as running:
        yield running


@pytest.mark.parametrize("protocol", ["v2-binary", "v2-json", "tfserving", "msgpack"])
def test_every_protocol_is_answered(server, protocol):
    flags = ("--model", "echo", "--rows", "3", "--requests", "200", "--warmup", "0")
    done = told(run(server.url, *flags, "--protocol", protocol, "--json"))
    assert done["statuses"] == {"200": 200}
    assert (done["sent"], done["errors"], done["rows"]) == (200, 0, 3)
    assert done["rows_per_s"] == pytest.approx(3 * done["requests_per_s"])
    latency = done["latency_ms"]
    assert 0 < latency["min"] <= latency["p50"] <= latency["p99.9"] <= latency["max"]
    assert sum(count for _ms, count in done["histogram"]) == 200


def test_what_the_server_counted_is_told(server):
    flags = ("--model", "echo", "--requests", "500", "--connections", "8", "--json")
    done = told(run(server.url, *flags, "--warmup", "100ms"))["server"]
    assert done["mean_batch_rows"] >= 1
    assert 0 < done["compute_infer_ms"] < done["total_ms"]


def test_the_only_model_needs_no_name_and_the_report_says_what_was_sent(digits):
    done = run(digits.url, "--duration", "300ms", "--warmup", "100ms", "--version", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"digits, version 2 at {digits.url}\nv2-binary, 1 row and ")
    assert "\x1b" not in done.stdout
    for line in (r"^succeeded +[\d,]+", r"^errors +0", r"p99\.9", r"^≤ .* 100\.00%$", "mean batch"):
        assert re.search(line, done.stdout, re.MULTILINE), f"{line} not in\n{done.stdout}"


def test_an_open_loop_sends_at_its_rate(server):
    flags = ("--model", "echo", "--rate", "400", "--duration", "1s", "--warmup", "100ms", "--json")
    done = told(run(server.url, *flags))
    assert done["rate"] == 400
    assert done["errors"] == 0
    assert 250 < done["sent"] + done["unsent"] < 550  # Poisson: 7 standard deviations


def test_data_of_a_file_is_sent(server, tmp_path):
    np.savez(tmp_path / "rows.npz", x=np.ones((10, 16)))
    flags = ("--model", "echo", "--data", str(tmp_path / "rows.npz"), "--rows", "5")
    done = told(run(server.url, *flags, "--requests", "10", "--warmup", "0", "--json"))
    assert (done["succeeded"], done["rows"]) == (10, 5)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], r"serves several models: choose with --model: echo, multi$"),
        (["--model", "nope"], "answers 404: unknown model 'nope'$"),
        (["--model", "echo", "--shape", "x:1,3"], r"does not fit the input 'x' FP32 \[-1, 16\]$"),
        (["--model", "multi", "--protocol", "v2-json"], "FP16 cannot be sent in JSON"),
    ],
)
def test_what_cannot_be_done_is_one_line(server, flags, problem):
    done = run(server.url, *flags)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("gateway: ")
    assert done.stderr.count("\n") == 1
    assert re.search(problem, done.stderr), done.stderr


def test_no_server_is_one_line(unused_tcp_port):
    done = run(f"http://127.0.0.1:{unused_tcp_port}")
    assert done.returncode == 1
    assert done.stderr == f"gateway: cannot connect to http://127.0.0.1:{unused_tcp_port}\n"


def test_an_interrupt_still_gives_the_report(server):
    flags = ("--model", "echo", "--duration", "1h", "--warmup", "0")
    with subprocess.Popen(
        command(server.url, *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment() | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        for line in process.stdout:
            if "connections, closed loop, 3600 s" in line:
                break
        wait_inferences(server, 100)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, rest
    assert re.search(r"^succeeded +[\d,]+", rest, re.MULTILINE), rest
    assert "Traceback" not in rest


def wait_inferences(server: Server, more: int) -> None:
    """Wait until a gateway has answered so many requests more to ``echo``."""

    def count() -> int:
        with urlopen(f"{server.url}/v2/models/echo/stats", timeout=DEADLINE_S) as answer:
            return json.load(answer)["model_stats"][0]["inference_stats"]["success"]["count"]

    goal = count() + more
    while count() < goal:
        pass


# Against another server of the protocol


@asynccontextmanager
async def other_server(statuses: list[int]) -> AsyncIterator[str]:
    """A server of v2 without statistics, whose n-th answer (the last: all others) has this status."""
    left = iter(statuses)

    async def index(_: web.Request) -> web.Response:
        return web.json_response([{"name": "m0", "version": "1", "state": "READY"}])

    async def metadata(_: web.Request) -> web.Response:
        return web.json_response({"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]})

    async def infer(_: web.Request) -> web.Response:
        return web.json_response({"error": "as told"}, status=next(left, statuses[-1]))

    app = web.Application()
    app.router.add_post("/base/v2/repository/index", index)
    app.router.add_get("/base/v2/models/m0", metadata)
    app.router.add_post("/base/v2/models/m0/infer", infer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/base"
    finally:
        await runner.cleanup()


async def run_beside(url: str, *flags: str) -> tuple[int, str, str]:
    """Run the command while this loop serves; its status and output."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command(url, *flags), stdout=pipe, stderr=pipe, env=environment()
    )
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_a_server_without_statistics_will_do():
    async with other_server([200]) as url:
        status, out, err = await run_beside(url, "--requests", "50", "--warmup", "0", "--json")
    assert (status, err) == (0, "")
    done = json.loads(out)
    assert (done["model"], done["succeeded"], done["server"]) == ("m0", 50, None)


async def test_a_refusal_of_the_first_request_is_all_that_is_said():
    async with other_server([503]) as url:
        done = await run_beside(url)
    assert done == (1, "", f"gateway: {url} answers 503: as told\n")


async def test_no_success_is_a_failure():
    async with other_server([200, 429]) as url:
        status, out, _ = await run_beside(url, "--requests", "20", "--warmup", "0")
    assert status == 1
    assert re.search(r"^ +20 +429 Too Many Requests: as told *$", out, re.MULTILINE)
    assert "Latency" not in out


# Against servers that misbehave

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Behaviour = Callable[[int, asyncio.StreamWriter], Awaitable[bool]]
"""Answers the n-th request, from 0; whether the connection is kept."""


@asynccontextmanager
async def serving(behave: Behaviour, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server that reads requests without a body and answers as told; its port."""
    requests = 0
    tasks = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        tasks.append(asyncio.current_task())
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                requests += 1
                if not await behave(requests - 1, writer):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls) as server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.gather(*tasks)  # the load has closed its connections


def always(answer: bytes, *, keep: bool = True) -> Behaviour:
    async def behave(_number: int, writer: asyncio.StreamWriter) -> bool:
        writer.write(answer)
        return keep

    return behave


def plan(port: int, **changes: object) -> LoadPlan:
    fields: dict = {
        "host": "127.0.0.1",
        "port": port,
        "tls": None,
        "requests": (request_bytes("GET", "test", "/"),),
        "connections": 4,
        "warmup_s": 0.0,
        "timeout_s": 30.0,
        "duration_s": 0.2,
        "limit": 40,
    }
    return LoadPlan(**(fields | changes))


async def load(behave: Behaviour, **changes: object) -> Tally:
    async with serving(behave) as port, asyncio.timeout(DEADLINE_S):
        return await Load(plan(port, **changes)).run()


async def test_requests_are_counted_to_the_last():
    tally = await load(always(OK))
    assert (tally.succeeded, tally.sent, tally.errors, tally.reconnects) == (40, 40, 0, 0)
    assert tally.received_bytes == 40 * len(OK)
    assert tally.latencies.min_ns > 0


async def test_a_duration_ends_when_the_last_are_answered():
    tally = await load(always(OK), limit=None)
    assert tally.succeeded == tally.sent > 0
    assert tally.unfinished == 0
    assert 0.2 <= tally.elapsed_s < DEADLINE_S


async def test_refusals_are_counted_by_status_with_the_first_text():
    text = b'{"error": "full"}'
    answer = b"HTTP/1.1 503 No\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)
    tally = await load(always(answer))
    assert tally.refused == {503: 40}
    assert tally.texts == {503: text}
    assert (tally.succeeded, tally.errors) == (0, 40)


async def test_a_connection_that_the_server_closes_after_an_answer_is_replaced():
    answer = OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    tally = await load(always(answer, keep=False))
    assert (tally.succeeded, tally.errors) == (40, 0)
    assert tally.reconnects > 0


async def test_an_answer_that_ends_with_the_connection_is_one():
    tally = await load(always(b"HTTP/1.1 200 OK\r\n\r\nall of it", keep=False))
    assert (tally.succeeded, tally.errors) == (40, 0)


async def test_a_connection_closed_without_an_answer_is_an_error():
    tally = await load(
        always(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", keep=False), limit=8
    )
    assert (tally.lost, tally.errors, tally.succeeded) == (8, 8, 0)


async def test_what_is_not_http_is_an_error():
    tally = await load(always(b"220 smtp ready\r\n\r\n"), limit=8)
    assert (tally.malformed, tally.errors) == (8, 8)


async def test_requests_that_hang_time_out():
    async def only_the_first(number: int, writer: asyncio.StreamWriter) -> bool:
        if not number:
            writer.write(OK)
        return True

    tally = await load(only_the_first, limit=6, timeout_s=0.1)
    assert (tally.succeeded, tally.timeouts, tally.sent) == (1, 5, 6)


async def test_a_server_that_goes_away_ends_a_limit_of_requests(unused_tcp_port):
    async with asyncio.timeout(DEADLINE_S):
        tally = await Load(plan(unused_tcp_port, timeout_s=0.3)).run()
    assert tally.sent == 0
    assert tally.connect_failures == tally.errors > 0
    assert tally.connect_problem


async def test_warming_up_does_not_count():
    measuring = asyncio.Event()
    seen: list[bool] = []

    async def behave(_number: int, writer: asyncio.StreamWriter) -> bool:
        seen.append(measuring.is_set())
        writer.write(OK)
        return True

    async with serving(behave) as port, asyncio.timeout(DEADLINE_S):
        tally = await Load(plan(port, warmup_s=0.1), measuring.set).run()
    assert tally.succeeded == 40
    assert not all(seen)
    assert len(seen) > 40


async def test_a_stopped_load_ends_at_once_and_tells_what_was_in_flight():
    async def hang(number: int, _writer: asyncio.StreamWriter) -> bool:
        if number == 3:
            running.stop()
        return True

    async with serving(hang) as port, asyncio.timeout(DEADLINE_S):
        running = Load(plan(port))
        tally = await running.run()
    assert (tally.unfinished, tally.sent, tally.errors) == (4, 4, 0)


async def stalled(rate: float | None) -> Tally:
    """A load over one connection to a server whose first answer takes 0.2 s."""

    async def behave(number: int, writer: asyncio.StreamWriter) -> bool:
        if number:
            writer.write(OK)
        else:
            asyncio.get_running_loop().call_later(0.2, writer.write, OK)
        return True

    return await load(behave, connections=1, limit=100, rate=rate)


async def test_an_open_loop_does_not_hide_who_had_to_wait():
    """Of 100 requests at 1,000/s nearly all are due while the first is answered; a closed loop waits."""
    waited = await stalled(rate=1000.0)
    assert waited.succeeded == 100
    assert waited.latencies.percentile_ns(50) > 50_000_000
    hidden = await stalled(rate=None)
    assert hidden.succeeded == 100
    assert hidden.latencies.percentile_ns(50) < waited.latencies.percentile_ns(50)


async def test_what_an_open_loop_could_not_send_is_told():
    async def hang(_number: int, _writer: asyncio.StreamWriter) -> bool:
        return True

    tally = await load(hang, limit=None, connections=1, rate=2000.0, timeout_s=1.0)
    assert (tally.sent, tally.timeouts) == (1, 1)
    assert tally.unsent > 100


@pytest.fixture
def certificate(tmp_path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that it signed itself, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed: apt install openssl")
    paths = tmp_path / "certificate.pem", tmp_path / "key.pem"
    key = ["-newkey", "rsa:2048", "-nodes", "-keyout", str(paths[1])]
    name = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = ["openssl", "req", "-x509", "-days", "2", *key, *name, "-out", str(paths[0])]
    subprocess.run(make, check=True, capture_output=True)
    return paths


async def test_a_load_goes_over_tls_to_whom_it_trusts(certificate):
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(*certificate)
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    async with serving(always(OK), server) as port, asyncio.timeout(DEADLINE_S):
        tally = await Load(plan(port, tls=trusting)).run()
        refused = await Load(plan(port, tls=ssl.create_default_context(), timeout_s=0.3)).run()
    assert (tally.succeeded, tally.errors) == (40, 0)
    assert refused.sent == 0
    assert "certificate" in refused.connect_problem.lower()
