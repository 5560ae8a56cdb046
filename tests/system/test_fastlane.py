"""Connections of the fast lane: segments, order, ends of every kind, bodies and answers of any size.

What its answers say is for `test_lanes` and the conformance cases, which both lanes pass.
"""

from __future__ import annotations

import email.utils
import gzip
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import onnx
import onnx.parser
import pytest
import requests

from tests.conftest import ROOT, load_script
from tests.system import clients
from tests.system.clients import Wire, chunked, message, until_queued
from tests.system.server import Server
from tests.system.test_frontends import open_files
from tests.system.test_queue import RUN_STEPS

INFER = "/v2/models/echo/infer"
SLOW = "/v2/models/slow/infer"
BIG = "/v2/models/big/infer"

GRAPHS = {
    "big": "(uint8[size] x) => (uint8[size] y) { y = Identity (x) }",
    "wide": "(float[n,1] x) => (float[n,1048576] y) "
    "{ s = Constant <value = int64[2] {1,1048576}> () y = Expand (x, s) }",
}

LIVE = message("GET", "/v2/health/live")


def save_models(repository: Path) -> None:
    """Add the models of `GRAPHS`, and make one run of the model slow last a while."""
    for name, graph in GRAPHS.items():
        file = repository / name / "1" / "model.onnx"
        file.parent.mkdir(parents=True)
        header = '<ir_version: 9, opset_import: ["" : 17]>'
        onnx.save(onnx.parser.parse_model(f"{header} {name} {graph}"), file)
    (repository / "big" / "config.yaml").write_text("max_batch_size: 0\n")
    models = load_script(ROOT / "benchmarks" / "models.py")
    models.slow(repository / "slow" / "1" / "model.onnx", RUN_STEPS)
    (repository / "slow" / "config.yaml").write_text("max_batch_size: 1\nwarmup: false\n")


@pytest.fixture(scope="module")
def server(make_repository) -> Iterator[Server]:
    repository = make_repository("echo", "slow")
    save_models(repository)
    with Server(repository) as running:
        yield running


@pytest.fixture
def wire(server) -> Iterator[Wire]:
    """A connection on which the requests of `plain` are known by their skeleton."""
    with Wire(server.port) as one:
        for number in range(clients.ASKED):
            assert_right(one.ask(plain(number)), number)
        yield one


def body_of(number: int, width: int = 16, **fields: object) -> bytes:
    x = number + np.arange(width, dtype=np.float32).reshape(1, width)
    return json.dumps(clients.v2_document({"x": x}, **fields)).encode()


def plain(number: int, **headers: str) -> bytes:
    """A request that takes the fast lane."""
    return message("POST", INFER, body_of(number), **headers)


def slow(number: int) -> bytes:
    """One whose run lasts a while."""
    return message("POST", SLOW, body_of(number, 4))


def raw(number: int) -> bytes:
    """The same as `plain`, as a raw tensor; the answer is raw, too."""
    x = number + np.arange(16, dtype=np.float32)
    return message("POST", INFER, x.tobytes(), inference_header_content_length="0")


def assert_right(answer: clients.Answer, number: int) -> None:
    """The answer is that of `plain`."""
    status, _headers, body = answer
    assert status == 200, body
    y = json.loads(body)["outputs"][0]["data"]
    assert y == [2.0 * (number + i) + 1 for i in range(16)]


def assert_slow(answer: clients.Answer, number: int) -> None:
    """The answer is that of `slow`."""
    assert answer[0] == 200, answer[2]
    assert json.loads(answer[2])["outputs"][0]["data"] == [number + i + 1.0 for i in range(4)]


def status_of(server: Server, path: str) -> int:
    """The status of a GET on a connection of its own."""
    return requests.get(server.url + path, timeout=clients.DEADLINE_S).status_code


def settle(server: Server) -> None:
    """Return when the front end has read whatever was sent before."""
    assert clients.exchange(server.port, "GET", "/livez")[0] == 200


def descriptors(server: Server) -> int:
    """Open connections of the front end, once those that were closed are gone."""
    settle(server)
    (pid,) = server.frontends()
    return sum(name.startswith("socket:") for name in open_files(pid))


def until_descriptors(server: Server, wanted: int) -> None:
    """Wait until so many sockets are open."""
    deadline = time.monotonic() + clients.DEADLINE_S
    while (found := descriptors(server)) != wanted:
        assert time.monotonic() < deadline, f"{found} sockets are open instead of {wanted}"


def reset(wire: Wire) -> None:
    """Close with a reset instead of a FIN."""
    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.close()


def memory_bytes(server: Server) -> int:
    """What the front end has in memory."""
    (pid,) = server.frontends()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# Headers


def test_a_plain_request_takes_the_fast_lane(wire):
    """Its answers have their headers in another order than aiohttp's: what follows is about it."""
    for request in (plain(1), raw(1)):
        assert next(iter(wire.ask(request)[1])) == "server"
    assert next(iter(wire.ask(plain(1, max_forwards="1"))[1])) != "server"


def test_request_ids_are_echoed_or_unique(wire):
    given = "0af7651916cd43dd8448eb211c80319c:1/a=b@c"
    assert wire.ask(plain(1, x_request_id=given))[1]["x-request-id"] == given
    assert wire.ask(plain(1, x_request_id="x" * 128))[1]["x-request-id"] == "x" * 128
    made = [wire.ask(plain(number))[1]["x-request-id"] for number in range(300)]
    assert len(set(made)) == 300
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in made)


def test_answers_name_the_version_and_the_time(wire):
    before = int(time.time())
    _, headers, _ = wire.ask(plain(1))
    assert headers["x-model-version"] == "1"
    sent = email.utils.parsedate_to_datetime(headers["date"])
    assert before <= sent.timestamp() <= time.time()
    assert headers["date"].endswith(" GMT")


# Segments and order


@pytest.mark.parametrize("request_of", [plain, raw])
def test_a_request_may_be_cut_in_two_at_every_byte(server, wire, request_of):
    wanted = clients.comparable(wire.ask(request_of(7)))
    sent = request_of(7)
    for cut in range(1, len(sent)):
        wire.send(sent[:cut])
        settle(server)
        assert clients.comparable(wire.ask(sent[cut:])) == wanted, cut


def test_a_request_may_come_byte_by_byte(server, wire):
    for byte in (sent := plain(5)):
        wire.send(bytes([byte]))
        settle(server)
    assert_right(wire.receive(), 5)
    assert sent == plain(5)


@pytest.mark.parametrize("count", [2, 200])
def test_pipelined_requests_are_answered_in_their_order(wire, count):
    wire.send(b"".join(plain(number, x_request_id=f"n{number}") for number in range(count)))
    for number in range(count):
        answer = wire.receive()
        assert_right(answer, number)
        assert answer[1]["x-request-id"] == f"n{number}"


OTHERS = {
    "GET": (200, LIVE),
    "HEAD": (405, message("HEAD", "/v2/models/echo/stats")),
    "PUT with a body": (405, message("PUT", INFER, b"body")),
    "chunked": (200, message("POST", INFER, chunked(body_of(8)), transfer_encoding="chunked")),
    "gzip": (200, message("POST", INFER, gzip.compress(body_of(8)), content_encoding="gzip")),
    "unknown path": (404, message("POST", "/v2/nothing", b"body")),
    "unknown model": (404, message("POST", "/v2/models/nobody/infer", body_of(8))),
    "refused by us": (400, message("POST", INFER, b"{}")),
    "refused by its type": (415, message("POST", INFER, b"<a/>", content_type="application/xml")),
    "refused by its length": (400, raw(0).replace(b"-length: 0", b"-length: x")),
    "corrupt": (400, message("POST", INFER, b"not gzip", content_encoding="gzip")),
    "msgpack": (400, message("POST", INFER, b"{}", content_type="application/msgpack")),
}
"""Requests that are not plain, or not answered as such, and the status of their answers."""


@pytest.mark.parametrize("name", OTHERS)
def test_other_requests_have_their_turn_among_plain_ones(wire, name):
    status, other = OTHERS[name]
    if name == "HEAD":
        other = other.replace(b"HEAD", b"POST")  # an answer without a body is not for this reader
    wire.send(b"".join(plain(n) + other for n in range(3)) + other + plain(3) + plain(4))
    for number in range(3):
        assert_right(wire.receive(), number)
        assert wire.receive()[0] == status
    assert wire.receive()[0] == status
    assert_right(wire.receive(), 3)
    assert_right(wire.receive(), 4)


@pytest.mark.parametrize(
    "bad",
    [
        b"NONSENSE\r\n\r\n",
        plain(1).replace(b"Host: test", b"Host test"),
        plain(1).replace(b"HTTP/1.1", b"HTTP/9.1"),
        plain(1).replace(b"Content-Length", b"Content-Length: 1\r\nContent-Length"),
        plain(1).replace(b"Content-Length: ", b"Content-Length: -"),
        plain(1).replace(b"Content-Length: ", b"Content-Length: 1\r\n "),
    ],
    ids=["no request", "no colon", "version", "two lengths", "negative length", "folded"],
)
def test_a_bad_request_is_answered_in_its_turn_and_ends_the_connection(wire, bad):
    wire.send(plain(1) + LIVE + plain(2) + bad + plain(3))
    assert_right(wire.receive(), 1)
    assert wire.receive()[0] == 200
    assert_right(wire.receive(), 2)
    assert wire.receive()[0] == 400
    assert wire.is_at_end()


def test_what_makes_aiohttps_parser_raise_ends_its_connection_alone(server, wire):
    for _ in range(3):
        with Wire(server.port) as other:
            other.send(plain(1) + b"GET http://[::1]@/ HTTP/1.1\r\nHost: a\r\n\r\n")
            assert_right(other.receive(), 1)
            assert other.is_at_end()
    assert_right(wire.ask(plain(2)), 2)


def test_closing_is_the_clients_to_ask_for(wire):
    wire.send(plain(1) + plain(2, connection="close") + plain(3))
    assert_right(wire.receive(), 1)
    assert_right(wire.receive(), 2)
    assert wire.is_at_end()


# Ends


async def test_a_client_that_sends_nothing_more_gets_what_a_worker_has(server, wire):
    pid = clients.worker_of(server, "slow")
    async with clients.many_connections() as session:
        with clients.stopped(pid):
            wire.send(slow(3))
            await until_queued(session, server.url, "slow", 1)
            os.kill(pid, signal.SIGCONT)
            await until_queued(session, server.url, "slow", 0)
            os.kill(pid, signal.SIGSTOP)
            wire.socket.shutdown(socket.SHUT_WR)
            settle(server)
    assert_slow(wire.receive(), 3)
    assert wire.is_at_end()


@pytest.mark.parametrize("behind", [plain(1)[:-5], plain(1)[:20], OTHERS["chunked"][1][:-5], b""])
async def test_a_request_that_never_ends_does_not_keep_a_half_closed_connection(
    server, wire, behind
):
    pid = clients.worker_of(server, "slow")
    async with clients.many_connections() as session:
        with clients.stopped(pid):
            wire.send(slow(3))
            await until_queued(session, server.url, "slow", 1)
            os.kill(pid, signal.SIGCONT)
            await until_queued(session, server.url, "slow", 0)
            os.kill(pid, signal.SIGSTOP)
            wire.send(behind)
            wire.socket.shutdown(socket.SHUT_WR)
            settle(server)
    assert_slow(wire.receive(), 3)
    assert wire.is_at_end()


def leave_by_fin(wire: Wire) -> None:
    wire.close()


def leave_by_half(wire: Wire) -> None:
    wire.socket.shutdown(socket.SHUT_WR)
    assert wire.is_at_end()
    wire.close()


@pytest.mark.parametrize("leave", [leave_by_fin, leave_by_half, reset])
async def test_a_client_that_is_gone_before_a_worker_took_its_request_never_runs(server, leave):
    async with clients.many_connections() as session:
        before = await clients.statistics(session, server.url, "slow")
        with clients.stopped(clients.worker_of(server, "slow")):
            wires = [Wire(server.port) for _ in range(3)]
            for number, each in enumerate(wires):
                each.send(slow(number))
                await until_queued(session, server.url, "slow", number + 1)
            leave(wires.pop(1))
            await until_queued(session, server.url, "slow", 2)
        for number, each in zip((0, 2), wires, strict=True):
            assert_slow(each.receive(), number)
            each.close()
        after = await clients.statistics(session, server.url, "slow")
    assert after["inference_count"] == before["inference_count"] + 2
    assert after["execution_count"] == before["execution_count"] + 2
    assert (
        after["inference_stats"]["fail"]["count"] == before["inference_stats"]["fail"]["count"] + 1
    )


def test_resets_within_bodies_leave_nothing(server):
    before = descriptors(server)
    wires = [Wire(server.port) for _ in range(20)]
    for number, each in enumerate(wires):
        sent = plain(number) if number % 2 else message("POST", BIG, bytes(1 << 20))
        each.send(sent[: len(sent) - 1 - number])
    settle(server)
    for each in wires:
        reset(each)
    until_descriptors(server, before)


def test_resets_within_answers_leave_nothing(server):
    before = descriptors(server)
    for _ in range(5):
        each = Wire(server.port)
        each.send(message("POST", BIG, bytes(20 << 20), inference_header_content_length="0"))
        assert each.socket.recv(1000).startswith(b"HTTP/1.1 200")
        reset(each)
    until_descriptors(server, before)
    with Wire(server.port) as wire:  # every slot is free again: there are 8 at least
        for number in range(10):
            answer = wire.ask(
                message("POST", BIG, b"%d" % number, inference_header_content_length="0")
            )
            assert answer[2].endswith(b"%d" % number)


def test_hundreds_of_connections_leave_nothing(server):
    before = descriptors(server)
    for number in range(300):
        with Wire(server.port) as each:
            match number % 4:
                case 0:
                    assert_right(each.ask(plain(number)), number)
                case 1:
                    each.send(plain(number)[:-7])
                case 2:
                    each.send(plain(number)[:7])
                case 3:
                    assert each.ask(LIVE)[0] == 200
                    each.send(plain(number))
    until_descriptors(server, before)


# Sizes


def large(nbytes: int) -> bytes:
    """Bytes of which no two neighbouring KiB are equal."""
    return np.arange(nbytes // 4, dtype=np.uint32).tobytes()


def test_a_body_and_an_answer_of_60_mb(server, wire):
    data = large(60 << 20)
    sent = message("POST", BIG, data, inference_header_content_length="0")
    for _ in range(clients.ASKED):
        status, headers, body = wire.ask(sent)
        assert status == 200, body[:300]
        assert body[int(headers["inference-header-content-length"]) :] == data


def test_others_are_served_while_one_reads_slowly(server, wire):
    data = large(20 << 20)
    with Wire(server.port) as reader:
        sent = message("POST", BIG, data, inference_header_content_length="0")
        for _ in range(clients.ASKED):
            reader.send(sent)
            for number in range(100):
                assert_right(wire.ask(plain(number)), number)
                if number % 10 == 0:
                    answer = wire.ask(
                        message("POST", BIG, b"%d" % number, inference_header_content_length="0")
                    )
                    assert answer[2].endswith(b"%d" % number)
            status, headers, body = reader.receive()
            assert status == 200
            assert body[int(headers["inference-header-content-length"]) :] == data


def wide(number: int) -> bytes:
    """A small request whose answer has 4 MiB."""
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": np.float32(number).tobytes()}
    return message(
        "POST", "/v2/models/wide/infer", msgpack.packb({"inputs": [entry]}),
        content_type="application/msgpack",
    )  # fmt: skip


def test_answers_that_are_not_read_do_not_pile_up(server, wire):
    count = 60
    assert wire.ask(wide(0))[0] == 200
    before = memory_bytes(server)
    wire.send(b"".join(wide(number) for number in range(count)))
    for number in range(count):
        settle(server)
        assert memory_bytes(server) - before < 64 << 20
        status, _, body = wire.receive()
        assert status == 200
        (output,) = msgpack.unpackb(body)["outputs"]
        assert np.frombuffer(output["data"], np.float32).min() == number
    assert_right(wire.ask(plain(1)), 1)


@pytest.mark.parametrize("length", [10 << 10, 100 << 10, 300 << 10, 2 << 20])
@pytest.mark.parametrize("is_plain", [True, False])
async def test_a_large_body_behind_a_request_in_flight(server, wire, length, is_plain):
    headers = {} if is_plain else {"max_forwards": "1"}
    behind = message("POST", INFER, body_of(2) + b" " * length, **headers)
    pid = clients.worker_of(server, "slow")
    async with clients.many_connections() as session:
        with clients.stopped(pid):
            sender = threading.Thread(target=wire.send, args=(slow(3) + behind + plain(5),))
            sender.start()
            await until_queued(session, server.url, "slow", 1)
    assert_slow(wire.receive(), 3)
    assert_right(wire.receive(), 2)
    assert_right(wire.receive(), 5)
    sender.join()


def test_a_length_beyond_the_limit_is_refused_from_the_head(wire):
    wire.send(plain(0).partition(b"Content-Length")[0] + b"Content-Length: 67108865\r\n\r\n")
    status, headers, body = wire.receive()
    assert status == 413
    assert headers["x-error-code"]
    assert b"max_request_bytes" in body


# Time


def test_idle_connections_are_closed_and_busy_ones_are_not(make_repository):
    with Server(make_repository("echo"), GATEWAY_KEEPALIVE_TIMEOUT_S="1") as server:
        idle = [Wire(server.port) for _ in range(4)]
        idle[1].send(plain(1)[:10])
        assert idle[2].ask(LIVE)[0] == 200
        assert_right(idle[3].ask(plain(1)), 1)
        with Wire(server.port) as busy:
            assert busy.ask(LIVE)[0] == 200  # by aiohttp, whose timer is not for what follows
            waiting = {each.socket: each for each in idle}
            number = 0
            deadline = time.monotonic() + clients.DEADLINE_S
            while waiting:
                assert time.monotonic() < deadline
                assert_right(busy.ask(plain(number)), number)
                number += 1
                for ended in select.select(list(waiting), [], [], 0)[0]:
                    assert waiting.pop(ended).is_at_end()
            assert_right(busy.ask(plain(number)), number)
        for each in idle:
            each.close()


async def test_a_draining_server_answers_and_says_that_it_closes(make_repository):
    with Server(make_repository("echo"), GATEWAY_DRAIN_PAUSE_S="3") as server:
        async with clients.many_connections() as session:
            with Wire(server.port) as wire, Wire(server.port) as idle:
                assert_right(wire.ask(plain(0)), 0)
                assert_right(idle.ask(plain(0)), 0)
                with clients.stopped(clients.worker_of(server, "echo")):
                    wire.send(plain(1))
                    await until_queued(session, server.url, "echo", 1)
                    server.process.send_signal(signal.SIGTERM)
                    while status_of(server, "/readyz") == 200:
                        pass
                for number, answer in enumerate([wire.receive(), idle.ask(plain(2))], 1):
                    assert_right(answer, number)
                    assert answer[1]["connection"].lower() == "close"
                assert wire.is_at_end()
                assert idle.is_at_end()
        assert server.process.wait(60) == 0


# Versions that come and go


@pytest.fixture
def controlled(make_repository) -> Iterator[Server]:
    with Server(make_repository("echo", "slow"), "--model-control") as running:
        yield running


def control(server: Server, what: str, model: str = "echo") -> int:
    url = f"{server.url}/v2/repository/models/{model}/{what}"
    return requests.post(url, timeout=clients.DEADLINE_S).status_code


def test_no_request_fails_while_the_route_moves(controlled):
    ended = threading.Event()
    versions: list[list[str]] = [[] for _ in range(3)]

    def load(heard: list[str]) -> None:
        with Wire(controlled.port) as wire:
            number = 0
            while not ended.is_set():
                answer = wire.ask(plain(number))
                assert_right(answer, number)
                heard.append(answer[1]["x-model-version"])
                number += 1
            heard.append("done")

    threads = [threading.Thread(target=load, args=(heard,)) for heard in versions]
    for thread in threads:
        thread.start()
    folder = controlled.repository / "echo"
    for version in range(2, 5):
        shutil.copytree(folder / "1", folder / str(version))
        assert control(controlled, "load") == 200
    with Wire(controlled.port) as wire:
        assert wire.ask(plain(1))[1]["x-model-version"] == "4"
    ended.set()
    for thread, heard in zip(threads, versions, strict=True):
        thread.join(clients.DEADLINE_S)
        assert heard.pop() == "done"  # no assertion failed over there
        assert heard == sorted(heard)
        assert heard[0] == "1"


async def test_an_unload_waits_for_what_is_in_flight(controlled):
    pid = clients.worker_of(controlled, "slow")
    async with clients.many_connections() as session:
        with Wire(controlled.port) as wire, Wire(controlled.port) as upload:
            for number in range(clients.ASKED):
                assert_slow(wire.ask(slow(number)), number)
            upload.send(slow(9)[:-3])
            done: list[int] = []
            unloading = threading.Thread(
                target=lambda: done.append(control(controlled, "unload", "slow"))
            )
            with clients.stopped(pid):
                wire.send(slow(7))
                await until_queued(session, controlled.url, "slow", 1)
                unloading.start()
                while status_of(controlled, "/v2/models/slow/ready") == 200:
                    pass
            assert_slow(wire.receive(), 7)
            assert_slow(upload.ask(slow(9)[-3:]), 9)
            unloading.join(clients.DEADLINE_S)
            assert done == [200]
            assert wire.ask(slow(8))[0] == 503
            assert control(controlled, "load", "slow") == 200
            assert_slow(wire.ask(slow(8)), 8)


def test_a_reset_upload_does_not_hold_up_an_unload(controlled):
    upload = Wire(controlled.port)
    upload.send(plain(9)[:-3])
    settle(controlled)
    reset(upload)
    begun = time.monotonic()
    assert control(controlled, "unload") == 200
    assert time.monotonic() - begun < 10  # of drain_timeout_s, 30


def test_nothing_of_this_was_an_error_of_ours(server):
    assert not [
        line for line in server.lines if "ERROR gateway" in line
    ]  # aiohttp logs bad requests
