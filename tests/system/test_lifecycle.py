"""Start, end and misfortune: what is left behind (nothing), and what is said (one line)."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import onnx
import onnx.parser
import pytest
import requests

from tests.system.server import Server, command_line, run_time_ns, wait_gone, wait_run_time


def ask_echo(url: str, timeout_s: float = 10) -> list[float]:
    body = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1.0] * 16}],
        "outputs": [{"name": "y"}],
    }
    answer = requests.post(f"{url}/v2/models/echo/infer", json=body, timeout=timeout_s)
    assert answer.status_code == 200, answer.text
    return answer.json()["outputs"][0]["data"]


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def processes_of(server: Server) -> list[int]:
    return [server.pid, *server.frontends(), *server.workers()]


@pytest.fixture(scope="module")
def echo(make_repository) -> Path:
    return make_repository("echo")


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_every_process_and_leaves_nothing(echo, signal_number):
    before = shared_memory()
    with Server(echo) as server:
        ask_echo(server.url)
        pids = processes_of(server)
        assert len(pids) == 3
        assert server.stop(signal_number) == 0
        for pid in pids:
            assert command_line(pid) == ""
    assert shared_memory() == before
    assert not any("Traceback" in line for line in server.lines)


def test_sigterm_lets_requests_in_flight_finish(make_repository):
    with Server(make_repository("slow", slow="max_batch_size: 1\n")) as server:
        url = f"{server.url}/v2/models/slow/infer"
        body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":[1,2,3,4]}]}'
        head = f"POST {url} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.settimeout(30)
            client.sendall((head + body) * 5)  # pipelined: some are answered after the signal
            first = client.recv(65536)
            assert first.startswith(b"HTTP/1.1 200")
            assert server.stop() == 0


@pytest.mark.parametrize("pause_s", ["0", "0.5"])
def test_sigterm_lets_an_upload_finish(echo, pause_s):
    body = (
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,16],"data":[1' + b",1" * 15 + b"]}]}"
    )
    with (
        Server(echo, GATEWAY_DRAIN_TIMEOUT_S="600", GATEWAY_DRAIN_PAUSE_S=pause_s) as server,
        socket.create_connection(("127.0.0.1", server.port)) as client,
    ):
        begin_upload(server, client, body)
        server.process.send_signal(signal.SIGTERM)
        wait_refused(server.port)
        client.sendall(body[10:])
        answer = client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert b"connection: close" in answer.lower()
        assert server.process.wait(60) == 0  # long before drain_timeout_s


def test_sigterm_lets_an_answer_be_read_to_its_end(tmp_path):
    size = 32 << 20
    (tmp_path / "large" / "1").mkdir(parents=True)
    graph = "g (uint8[size] x) => (uint8[size] y) { y = Identity (x) }"
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]> {graph}')
    onnx.save(model, tmp_path / "large" / "1" / "model.onnx")
    (tmp_path / "large" / "config.yaml").write_text("max_batch_size: 0\n")
    head = (
        "POST /v2/models/large/infer HTTP/1.1\r\nHost: x\r\n"
        f"Inference-Header-Content-Length: 0\r\nContent-Length: {size}\r\n\r\n"
    )
    with (
        Server(tmp_path, GATEWAY_DRAIN_TIMEOUT_S="600") as server,
        socket.create_connection(("127.0.0.1", server.port)) as client,
    ):
        client.settimeout(30)
        client.sendall(head.encode() + bytes(range(256)) * (size // 256))
        received = bytearray(client.recv(4096))
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(2)  # it stays for the one who reads
        while piece := client.recv(1 << 20):
            received += piece
        assert received.startswith(b"HTTP/1.1 200")
        assert received.endswith(bytes(range(256)) * (size // 256))
        assert server.process.wait(60) == 0


def test_an_upload_that_never_ends_holds_up_an_end_no_longer_than_it_may(echo):
    with (
        Server(echo, GATEWAY_DRAIN_TIMEOUT_S="1") as server,
        socket.create_connection(("127.0.0.1", server.port)) as client,
    ):
        begin_upload(server, client, bytes(100))
        assert server.stop() == 0
        assert client.recv(65536) == b""
    assert not any("Traceback" in line or "kill" in line for line in server.lines)


def begin_upload(server: Server, client: socket.socket, body: bytes) -> None:
    """Send the head and 10 bytes of a body, and wait until the front end has read them."""
    client.settimeout(30)
    head = f"POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body[:10])
    requests.get(f"{server.url}/livez", timeout=10)  # taken up after what was sent before


@pytest.mark.parametrize("grace_s", ["0", "2"])
def test_children_of_a_killed_supervisor_serve_on_then_end(echo, grace_s):
    before = shared_memory()
    with Server(echo, GATEWAY_ORPHAN_GRACE_S=grace_s) as server:
        ask_echo(server.url)
        children = [*server.frontends(), *server.workers()]
        os.kill(server.pid, signal.SIGKILL)
        server.process.wait(10)
        if grace_s != "0":
            assert ask_echo(server.url) == [3.0] * 16  # nobody supervises, and it is served
        for pid in children:
            wait_gone(pid)
    assert shared_memory() == before


def test_a_stopped_supervisor_is_on_no_requests_path(echo):
    with Server(echo) as server:
        ask_echo(server.url)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            for _ in range(20):
                assert ask_echo(server.url) == [3.0] * 16
        finally:
            os.kill(server.pid, signal.SIGCONT)


def test_a_killed_front_end_is_replaced(echo):
    with Server(echo) as server:
        ask_echo(server.url)
        for _ in range(3):
            (frontend,) = server.frontends()
            (worker,) = server.workers()
            logged = len(server.lines)
            os.kill(frontend, signal.SIGKILL)
            server.wait_for("starting another", after=logged)
            assert ask_echo(server.url, timeout_s=30) == [3.0] * 16  # queued in the listener
            assert server.workers() == [worker]  # a front end's death costs no worker
            mappings = Path(f"/proc/{worker}/maps").read_text()
            assert mappings.count("gateway-inputs") == 1  # the dead one's lane is unmapped


def test_a_worker_that_hangs_is_killed_and_its_request_served(make_repository, benchmark_models):
    repository = make_repository("slow", slow="max_batch_size: 1\nexecution_timeout_ms: 6000\n")
    benchmark_models.slow(repository / "slow" / "1" / "model.onnx", steps=60_000)
    with Server(repository) as server:
        body = {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]
        }
        url = f"{server.url}/v2/models/slow/infer"
        (worker,) = server.workers()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            payload = requests.Request("POST", url, json=body).prepare().body
            head = f"POST {url} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n"
            client.settimeout(60)
            idle_ns = run_time_ns(worker)
            client.sendall(head.encode() + payload)
            wait_run_time(worker, idle_ns + 50_000_000)
            os.kill(worker, signal.SIGSTOP)  # in the middle of the run: it never publishes
            server.wait_for("took longer than execution_timeout_ms")
            answer = client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert worker not in server.workers()


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        (["--port", "70000"], {}, "port: must be between 0 and 65535, got 70000"),
        ([], {"GATEWAY_PROT": "8000"}, "GATEWAY_PROT"),
        (["--model-repository", "/nonexistent"], {}, "model_repository: '/nonexistent'"),
        (["--config", "/nonexistent.yaml"], {}, "settings file"),
    ],
)
def test_a_wrong_setting_is_one_line(echo, flags, environment, expected):
    assert_one_line(run_serve(echo, *flags, **environment), expected)


def test_a_wrong_key_of_a_model_is_one_line(make_repository):
    repository = make_repository("echo", echo="max_batchsize: 8\n")
    result = run_serve(repository)
    assert_one_line(result, "unknown key 'max_batchsize' (did you mean 'max_batch_size'?)")


def test_a_port_in_use_is_one_line(echo):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_serve(echo, "--port", str(port))
    assert_one_line(result, f"port: cannot listen on 127.0.0.1:{port}: Address already in use")


@pytest.mark.parametrize(
    "content", [b"", b"not a model", b"\x08\x07" * 500], ids=["empty", "text", "noise"]
)
def test_a_broken_model_is_one_line(make_repository, content):
    repository = make_repository("echo")
    (repository / "echo" / "1" / "model.onnx").write_bytes(content)
    result = run_serve(repository)
    assert result.returncode == 1
    assert_one_line(result, "model 'echo' version 1 cannot be served", log_lines=True)


def test_a_broken_model_beside_a_good_one_with_no_exit_on_error(make_repository):
    repository = make_repository("echo", "mlp16")
    (repository / "mlp16" / "1" / "model.onnx").write_bytes(b"broken")
    with Server(repository, "--no-exit-on-error") as server:
        ask_echo(server.url)
        assert requests.get(f"{server.url}/readyz", timeout=10).status_code == 200
        answer = requests.post(f"{server.url}/v2/models/mlp16/infer", json={}, timeout=10)
        assert answer.status_code == 503
        index = requests.post(f"{server.url}/v2/repository/index", timeout=10).json()
        states = {entry["name"]: (entry["state"], bool(entry.get("reason"))) for entry in index}
        assert states == {"echo": ("READY", False), "mlp16": ("UNAVAILABLE", True)}
        assert str(repository) not in str(index)  # the path is the log's alone


def test_a_missing_runtime_is_one_line(echo, tmp_path):
    """The base install has no ONNX Runtime: simulated by a finder that does not find it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'onnxruntime' else real(n, *a)\n"
    )
    result = run_serve(echo, PYTHONPATH=str(tmp_path))
    assert_one_line(result, "pip install 'inference-gateway[cpu]'")


def run_serve(
    repository: Path, *flags: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", "serve", "--model-repository", str(repository)]
    ports = ["--port", "0", "--metrics-port", "0", "--admin-port", "0"]
    return subprocess.run(
        [*command, *ports, *flags],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def assert_one_line(
    result: subprocess.CompletedProcess[str], expected: str, log_lines: bool = False
) -> None:
    lines = result.stderr.splitlines()
    assert result.returncode != 0
    assert result.stdout == ""
    assert lines[-1].startswith("gateway: ")
    assert expected in lines[-1]
    assert "Traceback" not in result.stderr
    if not log_lines:
        assert len(lines) == 1, result.stderr


def test_while_draining_new_connections_are_refused(make_repository):
    with Server(make_repository("slow", slow="max_batch_size: 1\n")) as server:
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)  # what is in flight stays in flight
        body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":[1,2,3,4]}]}'
        head = (
            f"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.settimeout(60)
            client.sendall(head.encode() + body)
            requests.get(f"{server.url}/livez", timeout=10)  # the front end has read it by now
            server.process.send_signal(signal.SIGTERM)
            wait_refused(server.port)
            os.kill(worker, signal.SIGCONT)
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
        assert server.process.wait(60) == 0


def wait_refused(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            return
        except ConnectionResetError:
            continue  # it lay in the backlog at the moment in which the listener closed
    raise AssertionError("connections are still accepted")


def test_a_manual_route_does_not_move_by_misfortune(make_repository):
    repository = make_repository("echo", echo="version_policy: all\npromote: manual\n")
    shutil.copytree(repository / "echo" / "1", repository / "echo" / "2")
    (repository / "echo" / "1" / "model.onnx").write_bytes(b"broken")
    with Server(repository, "--no-exit-on-error") as server:
        assert (
            requests.post(f"{server.url}/v2/models/echo/infer", json={}, timeout=10).status_code
            == 503
        )
        version = requests.get(f"{server.url}/v2/models/echo/versions/2", timeout=10)
        assert version.headers["x-model-version"] == "2"


def test_a_file_that_changes_under_a_version_fails_it(make_repository):
    """The front end must never read one model's outputs as another's."""
    repository = make_repository("echo", "mlp16")
    with Server(repository) as server:
        ask_echo(server.url)
        shutil.copy(
            repository / "mlp16" / "1" / "model.onnx", repository / "echo" / "1" / "model.onnx"
        )
        (victim,) = (pid for pid in server.workers() if "echo/1#0" in command_line(pid))
        os.kill(victim, signal.SIGKILL)
        server.wait_for("its file changed since it was loaded")
        answer = requests.post(f"{server.url}/v2/models/echo/infer", json={}, timeout=10)
        assert answer.status_code == 503


def test_a_respawned_worker_that_hangs_while_loading_is_replaced(echo):
    with Server(echo, GATEWAY_LOAD_TIMEOUT_S="3") as server:
        ask_echo(server.url)
        (first,) = server.workers()
        os.kill(first, signal.SIGKILL)
        while (second := server.workers()) in ([], [first]):
            pass
        os.kill(second[0], signal.SIGSTOP)  # a few ms into its start
        assert ask_echo(server.url, timeout_s=60) == [3.0] * 16
        assert second[0] not in server.workers()
        assert any("did not load within" in line for line in server.lines)


def test_workers_that_die_together_are_no_crash_loop(make_repository):
    config = "instances: [{device: cpu, count: 6}]\n"
    with Server(make_repository("echo", echo=config)) as server:
        ask_echo(server.url)
        for pid in server.workers():
            os.kill(pid, signal.SIGKILL)
        assert ask_echo(server.url, timeout_s=60) == [3.0] * 16
