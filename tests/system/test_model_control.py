"""Models loaded and unloaded at run time: what clients see meanwhile, and what is left behind (nothing)."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import numpy as np
import onnx
import pytest
import requests
import tritonclient.http
from onnx import TensorProto
from tritonclient.utils import InferenceServerException

from tests.system import clients
from tests.system.clients import DEADLINE_S, error_of, exchange, stopped
from tests.system.server import POLL_S, Server, wait_gone

X = np.array([[1, 2, 3, 4]], np.float32)
CONTROL = {"GATEWAY_MODEL_CONTROL": "true"}
MODELS = ("m", "other")


@pytest.fixture(scope="module")
def write_version(benchmark_models):
    """Writes a version whose answer is its number times the input, so that each answer names it."""

    def write(folder: Path, version: int, factor: int | None = None) -> Path:
        g = benchmark_models.GraphWriter("numbered")
        x = g.input("x", TensorProto.FLOAT, [4])
        g.node("Mul", x, g.constant(factor or version), out="y")
        g.output("y", TensorProto.FLOAT, [4])
        g.write(folder / str(version) / "model.onnx")
        return folder / str(version) / "model.onnx"

    return write


@pytest.fixture
def fresh_repository(tmp_path, write_version) -> Path:
    """Two models of one version each, named m and other."""
    write_models(tmp_path, write_version)
    return tmp_path


@pytest.fixture
def fresh_server(fresh_repository):
    with Server(fresh_repository, **CONTROL) as running:
        yield running


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory, write_version):
    repository = tmp_path_factory.mktemp("shared") / "repository"
    write_models(repository, write_version)
    with Server(repository, **CONTROL) as running:
        yield running


@pytest.fixture
def server(shared_server, write_version):
    """A server that has just loaded m and other, and knows of nothing else.

    Others have had it before: a model without files is forgotten when it is unloaded.
    """
    known = [entry["name"] for entry in index(shared_server)]
    for folder in shared_server.repository.glob("[!.]*"):
        shutil.rmtree(folder)
    for model in known:
        must(shared_server, "unload", model)
    assert index(shared_server) == []
    write_models(shared_server.repository, write_version)
    for model in MODELS:
        must(shared_server, "load", model)
    shared_server.lines.clear()
    return shared_server


@pytest.fixture
def repository(server) -> Path:
    return server.repository


def write_models(repository: Path, write_version: Callable[[Path, int], Path]) -> None:
    for model in MODELS:
        write_version(repository / model, 1)
        configure(repository, model)


def index(server: Server) -> list[dict[str, str]]:
    """The repository's index, which has what is in it and what was loaded from it."""
    return requests.post(f"{server.url}/v2/repository/index", timeout=DEADLINE_S).json()


def configure(repository: Path, model: str, text: str = "") -> None:
    (repository / model / "config.yaml").write_text(f"max_batch_size: 8\n{text}")


def control(server: Server, action: str, model: str = "m") -> requests.Response:
    url = f"{server.url}/v2/repository/models/{model}/{action}"
    return requests.post(url, timeout=DEADLINE_S)


def must(server: Server, action: str, model: str = "m") -> None:
    answer = control(server, action, model)
    assert (answer.status_code, answer.content) == (200, b"")


def refusal(answer: requests.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def infer(server: Server, version: int | None = None, model: str = "m") -> requests.Response:
    url = f"{server.url}{clients.v2_path(model, version)}/infer"
    return requests.post(url, json=clients.v2_document({"x": X}), timeout=DEADLINE_S)


def answering(server: Server, model: str = "m") -> int:
    """The version that the route leads to, told by header and by answer alike."""
    answer = infer(server, model=model)
    assert answer.status_code == 200, answer.text
    factors = np.array(answer.json()["outputs"][0]["data"]) / X[0]
    assert set(factors) == {int(answer.headers["x-model-version"])}
    return int(factors[0])


def states(server: Server, model: str = "m") -> dict[str, str]:
    """TensorFlow Serving's states by version."""
    answer = requests.get(f"{server.url}/v1/models/{model}", timeout=DEADLINE_S)
    assert answer.status_code == 200, answer.text
    return {v["version"]: v["state"] for v in answer.json()["model_version_status"]}


def series(server: Server, model: str = "m") -> set[str]:
    """The versions of a model that Prometheus would find."""
    text = requests.get(f"{server.url}/metrics", timeout=DEADLINE_S).text
    labels = (dict(labels) for _name, labels in clients.samples(text))
    return {each["version"] for each in labels if each.get("model") == model}


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(POLL_S)


@contextmanager
def meanwhile(*calls: Callable[[], requests.Response]) -> Iterator[list[Future]]:
    """Calls in threads of their own."""
    with ThreadPoolExecutor(len(calls)) as pool:
        yield [pool.submit(call) for call in calls]


# What the calls do


def test_tritons_client_controls_models(server, repository, write_version):
    with tritonclient.http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        assert client.is_model_ready("m")
        client.unload_model("m")
        assert not client.is_model_ready("m")
        assert {
            "name": "m",
            "version": "1",
            "state": "UNAVAILABLE",
            "reason": "unloaded",
        } in client.get_model_repository_index()
        client.load_model("m")
        assert client.is_model_ready("m")
        result = client.infer("m", clients.triton_inputs({"x": X}))
        np.testing.assert_array_equal(result.as_numpy("y"), X)
        with pytest.raises(InferenceServerException, match="unknown model 'nobody'") as caught:
            client.load_model("nobody")
        assert caught.value.status() == "404"
        client.unload_model("nobody", unload_dependents=True)
        for overrides in ({"config": "{}"}, {"config": "{}", "files": {"file:1/model.onnx": b""}}):
            with pytest.raises(InferenceServerException, match="not supported") as caught:
                client.load_model("m", **overrides)
            assert caught.value.status() == "400"
        write_version(repository / "new", 3)
        client.load_model("new")
        assert client.is_model_ready("new", "3")


def test_an_unloaded_version_leaves_nothing_but_its_name(server):
    (worker_of_m,) = [pid for pid in server.workers() if pid == clients.worker_of(server, "m")]
    assert answering(server) == 1
    assert series(server) == {"1"}
    must(server, "unload")
    wait_gone(worker_of_m)
    for version in (None, 1):
        answer = infer(server, version)
        refusal(answer, 503)
        assert "Retry-After" in answer.headers
    assert "version 1 is unloaded" in refusal(infer(server, 1), 503)
    refusal(infer(server, 2), 404)
    assert states(server) == {"1": "END"}
    assert series(server) == set()  # nor do the refused requests bring it back
    assert requests.get(f"{server.url}/readyz", timeout=DEADLINE_S).status_code == 200
    assert answering(server, "other") == 1
    must(server, "unload")  # unloaded already
    must(server, "load")
    assert answering(server) == 1
    assert series(server) == {"1"}


def test_load_serves_the_new_version_and_ends_the_old(server, repository, write_version):
    worker = clients.worker_of(server, "m")
    must(server, "load")
    assert clients.worker_of(server, "m") == worker  # still chosen: left alone
    write_version(repository / "m", 2)
    must(server, "load")
    assert answering(server) == 2
    assert states(server) == {"2": "AVAILABLE", "1": "END"}
    assert series(server) == {"2"}
    assert "version 1 is unloaded" in refusal(infer(server, 1), 503)
    wait_gone(worker)


def test_the_settings_of_a_loaded_version_stay_until_it_is_unloaded(server, repository):
    def delay_us() -> int:
        config = requests.get(f"{server.url}/v2/models/m/config", timeout=DEADLINE_S).json()
        return config["dynamic_batching"]["max_queue_delay_microseconds"]

    configure(repository, "m", "max_queue_delay_us: 700\n")
    must(server, "load")
    assert delay_us() == 0
    must(server, "unload")
    must(server, "load")
    assert delay_us() == 700


def test_a_manual_route_stays_where_it_is(fresh_repository, write_version):
    configure(fresh_repository, "m", "promote: manual\n")
    with Server(fresh_repository, **CONTROL) as server:
        write_version(fresh_repository / "m", 2)
        must(server, "load")
        assert answering(server) == 1  # not chosen any more, but routed: moved by hand alone
        assert infer(server, 2).status_code == 200
        must(server, "unload")
        must(server, "load")
        assert answering(server) == 2  # where it begins anew
        assert states(server) == {"2": "AVAILABLE", "1": "END"}


def test_a_model_whose_files_are_gone_is_unknown_once_unloaded(server, repository):
    (repository / "m").rename(repository / ".away")
    assert "unknown model 'm'" in refusal(control(server, "load"), 404)
    assert answering(server) == 1
    must(server, "unload")
    refusal(infer(server), 404)
    refusal(requests.get(f"{server.url}/v1/models/m", timeout=DEADLINE_S), 404)


# What is refused


@pytest.mark.parametrize("name", ["..", "a%2Fb", "", "a" * 256, "%00", "a%20b"])
@pytest.mark.parametrize("action", ["load", "unload"])
def test_bad_names(module_server, action, name):
    answer = exchange(module_server.port, "POST", f"/v2/repository/models/{name}/{action}")
    assert "name must match" in error_of(answer, 400)


@pytest.mark.parametrize(
    ("action", "body"),
    [
        ("load", b"[]"),
        ("load", b'{"parameters": 1}'),
        ("load", b'{"parameters": {"x": 1}}'),
        ("unload", b'{"parameters": {"x": true}}'),
        ("unload", b'{"parameters": {"unload_dependents": "yes"}}'),
        ("unload", b"{"),
    ],
)
def test_bad_bodies(module_server, action, body):
    error_of(exchange(module_server.port, "POST", f"/v2/repository/models/m/{action}", body), 400)
    assert answering(module_server) == 1


@pytest.mark.parametrize("body", [b"", b"{}", b'{"parameters": {}}'])
def test_bodies_that_say_nothing(module_server, body):
    path = "/v2/repository/models/m/load"
    assert exchange(module_server.port, "POST", path, body)[0] == 200


@pytest.fixture(scope="module")
def module_server(tmp_path_factory, benchmark_models):
    folder = tmp_path_factory.mktemp("repository")
    g = benchmark_models.GraphWriter("one")
    g.node("Identity", g.input("x", TensorProto.FLOAT, [4]), out="y")
    g.output("y", TensorProto.FLOAT, [4])
    g.write(folder / "m" / "1" / "model.onnx")
    with Server(folder, **CONTROL) as running:
        yield running


def test_a_load_that_fails_keeps_what_serves(server, repository, write_version):
    path = write_version(repository / "m", 2)
    good = path.read_bytes()
    path.write_bytes(b"no model")

    async def ask_until(ended: asyncio.Event) -> list[int]:
        asked = []
        async with aiohttp.ClientSession() as session:
            while not ended.is_set():
                url = f"{server.url}{clients.v2_path('m')}/infer"
                async with session.post(url, json=clients.v2_document({"x": X})) as answer:
                    asked.append(answer.status)
        return asked

    async def load_beside_requests() -> tuple[requests.Response, list[int]]:
        ended = asyncio.Event()
        traffic = asyncio.create_task(ask_until(ended))
        answer = await asyncio.to_thread(control, server, "load")
        ended.set()
        return answer, await traffic

    answer, asked = asyncio.run(load_beside_requests())
    assert "model 'm' version 2 cannot be served: " in refusal(answer, 400)
    assert len(asked) > 1
    assert set(asked) == {200}
    assert answering(server) == 1
    assert states(server) == {"1": "AVAILABLE", "2": "END"}
    path.write_bytes(good)
    answer, asked = asyncio.run(load_beside_requests())  # what failed is tried anew
    assert answer.status_code == 200, answer.text
    assert set(asked) == {200}  # nor does the change of versions cost anybody an answer
    assert answering(server) == 2


def test_a_warm_up_that_fails_fails_the_load(server, repository, benchmark_models):
    g = benchmark_models.GraphWriter("out of bounds")
    whole = g.node("Cast", g.input("x", TensorProto.FLOAT), to=TensorProto.INT64)
    index = g.node("Add", whole, g.constant(99, np.int64))
    g.node("Gather", g.constant([1.0]), index, out="y")
    g.output("y", TensorProto.FLOAT)
    g.write(repository / "cold" / "1" / "model.onnx")
    configure(repository, "cold")
    text = refusal(control(server, "load", "cold"), 400)
    assert "model 'cold' version 1 cannot be served: " in text
    refusal(infer(server, 1, "cold"), 503)
    assert requests.get(f"{server.url}/readyz", timeout=DEADLINE_S).status_code == 200


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ("max_batch_sise: 3\n", "max_batch_sise"),
        ("version_policy: {specific: [7]}\n", "no usable version 7"),
    ],
)
def test_settings_that_are_wrong_are_said(server, repository, settings, text):
    configure(repository, "m", settings)
    assert text in refusal(control(server, "load"), 400)
    assert answering(server) == 1


TOO_LONG = "session_options:\n  config:\n" + "".join(
    f"    k{i}: '{'v' * 4000}'\n" for i in range(60)
)
"""Each entry is allowed; together they fit no message."""


def test_settings_that_fit_no_message_fail_their_version_alone(server, repository, write_version):
    write_version(repository / "long", 1)
    configure(repository, "long", TOO_LONG)
    assert "its settings are too long: a message of" in refusal(
        control(server, "load", "long"), 400
    )
    assert answering(server) == 1
    configure(repository, "long")
    must(server, "load", "long")
    assert answering(server, "long") == 1


def test_at_the_start_they_fail_their_version_alone_too(fresh_repository):
    configure(fresh_repository, "other", TOO_LONG)
    with Server(fresh_repository, "--no-exit-on-error") as server:
        assert answering(server) == 1
        assert states(server, "other") == {"1": "END"}
        assert any("its settings are too long" in line for line in server.lines)
    server = Server(fresh_repository)
    server.launch()
    assert server.process.wait(DEADLINE_S) == 1


def test_a_reason_of_any_length_arrives(server, repository, write_version):
    path = write_version(repository / "named", 1)
    model = onnx.load(path)
    model.graph.node[0].op_type = "Nope"
    model.graph.node[0].name = "N" * 300_000
    onnx.save(model, path)
    configure(repository, "named")
    assert "ONNX Runtime refused the model" in refusal(control(server, "load", "named"), 400)


def test_what_a_dead_worker_s_version_has_become_is_not_served(server, repository, write_version):
    outside = repository.parent / "outside"
    write_version(outside, 1, factor=7)
    shutil.rmtree(repository / "m" / "1")
    (repository / "m" / "1").symlink_to(outside / "1")
    os.kill(clients.worker_of(server, "m"), signal.SIGKILL)
    server.wait_for("version 1 cannot be served: the model file leads out of the model repository")
    refusal(infer(server), 503)
    assert answering(server, "other") == 1


def test_a_repository_that_is_away_for_a_while_costs_no_version(server, repository):
    away = repository.with_name("away")
    repository.rename(away)
    os.kill(clients.worker_of(server, "m"), signal.SIGKILL)
    server.wait_for("version 1: its file cannot be opened: No such file or directory; trying again")
    away.rename(repository)
    until(lambda: infer(server).status_code == 200)
    assert answering(server) == 1


def test_a_folder_without_versions_is_said(server, repository):
    (repository / "bare" / "01").mkdir(parents=True)
    text = refusal(control(server, "load", "bare"), 400)
    assert "model 'bare' has no usable version: version folder '01'" in text
    refusal(requests.get(f"{server.url}/v1/models/bare", timeout=DEADLINE_S), 404)


# Requests in flight


def test_unload_lets_requests_in_flight_finish(server):
    worker = clients.worker_of(server, "m")
    with stopped_until_gone(worker), meanwhile(lambda: infer(server)) as (asked,):
        until(lambda: depth(server) == 1)
        with meanwhile(lambda: control(server, "unload")) as (unloaded,):
            until(lambda: states(server) == {"1": "UNLOADING"})
            assert "is unloading" in refusal(infer(server, 1), 503)
            refusal(infer(server), 503)
            assert not unloaded.done()
            os.kill(worker, signal.SIGCONT)
            assert asked.result().status_code == 200, asked.result().text
            assert unloaded.result().status_code == 200
    assert states(server) == {"1": "END"}


def depth(server: Server) -> int:
    text = requests.get(f"{server.url}/metrics", timeout=DEADLINE_S).text
    labels = frozenset({"model": "m", "version": "1"}.items())
    return int(clients.samples(text)["gateway_queue_depth", labels])


def test_a_body_that_is_still_coming_in_is_in_flight(server, repository, write_version):
    body = json.dumps(clients.v2_document({"x": X})).encode()
    head = f"POST {clients.v2_path('m')}/infer HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", server.port), DEADLINE_S) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:9])
        for _ in range(3):  # by then the head has been read, and the version found
            requests.get(f"{server.url}/livez", timeout=DEADLINE_S)
        write_version(repository / "m", 2)
        with meanwhile(lambda: control(server, "load")) as (loaded,):
            until(lambda: states(server) == {"2": "AVAILABLE", "1": "UNLOADING"})
            connection.sendall(body[9:])
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 200"), answer
            assert loaded.result().status_code == 200
    assert states(server) == {"2": "AVAILABLE", "1": "END"}


def test_unload_ends_what_does_not_finish(fresh_repository):
    with Server(fresh_repository, GATEWAY_DRAIN_TIMEOUT_S="0.5", **CONTROL) as server:
        worker = clients.worker_of(server, "m")
        with stopped_until_gone(worker), meanwhile(lambda: infer(server)) as (asked,):
            until(lambda: depth(server) == 1)
            must(server, "unload")
            assert "version 1 is unload" in refusal(asked.result(), 503)
        must(server, "load")
        assert answering(server) == 1


@contextmanager
def stopped_until_gone(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    yield
    wait_gone(pid)


def test_a_worker_that_dies_while_its_version_ends_is_replaced(server):
    worker = clients.worker_of(server, "m")
    with stopped_until_gone(worker), meanwhile(lambda: infer(server)) as (asked,):
        until(lambda: depth(server) == 1)
        with meanwhile(lambda: control(server, "unload")) as (unloaded,):
            until(lambda: states(server) == {"1": "UNLOADING"})
            os.kill(worker, signal.SIGKILL)
            assert asked.result().status_code == 200, asked.result().text
            assert unloaded.result().status_code == 200


# Many at once, and processes that end


def test_many_clients_load_and_unload_one_model_at_once(server):
    async def one(session: aiohttp.ClientSession, action: str) -> tuple[str, int]:
        async with session.post(f"{server.url}/v2/repository/models/m/{action}") as answer:
            return action, answer.status

    async def everybody() -> list[tuple[str, int]]:
        async with clients.many_connections() as session:
            actions = ["load", "unload"] * 16
            return await asyncio.gather(*(one(session, action) for action in actions))

    assert set(asyncio.run(everybody())) == {("load", 200), ("unload", 200)}
    assert states(server) == {"1": "END"}  # in order: the last was an unload
    must(server, "load")
    assert answering(server) == 1
    assert len(server.workers()) == 2


def test_a_killed_front_end_stops_no_operation_and_the_next_knows_the_outcome(
    server, repository, write_version
):
    write_version(repository / "m", 2)
    (frontend,) = server.frontends()
    with ThreadPoolExecutor() as pool:
        with stopped(server.pid):
            asked = pool.submit(control, server, "load")
            for _ in range(3):  # by then it has passed the question on
                requests.get(f"{server.url}/livez", timeout=DEADLINE_S)
            os.kill(frontend, signal.SIGKILL)
        with pytest.raises(requests.ConnectionError):
            asked.result()
    server.wait_for("model 'm' is loaded, its route leads to version 2")
    assert answering(server) == 2
    assert states(server) == {"2": "AVAILABLE", "1": "END"}
    assert series(server) == {"2"}
    must(server, "unload")
    assert states(server) == {"2": "END", "1": "END"}


def test_without_a_supervisor_models_stay_as_they_are(fresh_server):
    with (
        meanwhile(lambda: control(fresh_server, "unload")) as (asked,),
        stopped_until_gone(fresh_server.pid),
    ):
        os.kill(fresh_server.pid, signal.SIGKILL)
        fresh_server.process.wait(10)
    answer = asked.result()
    assert answer.status_code in (200, 503)  # it may have been carried out first
    assert "supervisor" in refusal(control(fresh_server, "load", "other"), 503)
    assert answering(fresh_server, "other") == 1


def test_shutdown_answers_operations_that_wait(fresh_repository):
    with Server(fresh_repository, GATEWAY_DRAIN_TIMEOUT_S="0.5", **CONTROL) as server:
        worker = clients.worker_of(server, "m")
        with stopped_until_gone(worker), meanwhile(lambda: infer(server)) as (asked,):
            until(lambda: depth(server) == 1)
            with meanwhile(lambda: control(server, "unload")) as (unloaded,):
                until(lambda: states(server) == {"1": "UNLOADING"})
                assert server.stop() == 0
                assert "shutting down" in refusal(unloaded.result(), 503)
                refusal(asked.result(), 503)
    assert not any("Traceback" in line for line in server.lines)


# What is left behind


def test_loading_and_unloading_leaves_no_memory_or_descriptors_behind(fresh_server):
    (frontend,) = fresh_server.frontends()

    def cycle() -> None:
        must(fresh_server, "load")
        assert answering(fresh_server) == 1
        must(fresh_server, "unload")

    def held() -> dict[int, tuple[int, int]]:
        return {
            pid: (resident_bytes(pid), descriptors(pid)) for pid in (fresh_server.pid, frontend)
        }

    must(fresh_server, "unload", "other")
    for _ in range(3):
        cycle()
    before = held()
    for _ in range(10):
        cycle()
    for pid, (nbytes, fds) in before.items():
        until(
            lambda pid=pid, fds=fds: descriptors(pid) <= fds
        )  # our connection's end takes a moment
        assert resident_bytes(pid) - nbytes < 5 << 20
    assert "memfd:gateway" not in Path(f"/proc/{frontend}/maps").read_text()
    assert "memfd:gateway" not in Path(f"/proc/{fresh_server.pid}/maps").read_text()


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")
