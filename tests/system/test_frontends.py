"""Several front ends on one port: one server to its clients, whichever of them answers, lives or dies."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import requests

from tests.system.server import Server, wait_gone
from tests.system.test_lifecycle import assert_one_line, run_serve

DEADLINE_S = 60


class Connection:
    """One kept alive, so that one front end answers all that is asked on it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S)
        self._file = self._socket.makefile("rb")

    def send(self, path: str, document: dict | None = None) -> None:
        body = b"" if document is None else json.dumps(document).encode()
        method = "GET" if document is None else "POST"
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self._socket.sendall(head.encode() + body)

    def receive(self) -> tuple[int, bytes]:
        """Status and body. ConnectionError when the other end is gone."""
        status, *headers = iter(self._line, b"")
        (nbytes,) = (
            int(line.partition(b":")[2])
            for line in headers
            if line.lower().startswith(b"content-length:")
        )
        return int(status.split()[1]), self._file.read(nbytes)

    def _line(self) -> bytes:
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError("the server closed the connection")
        return line.rstrip(b"\r\n")

    def ask(self, path: str, document: dict | None = None) -> tuple[int, bytes]:
        self.send(path, document)
        return self.receive()

    @property
    def is_answered(self) -> bool:
        """Whether there is something to receive."""
        return bool(select.select([self._socket], [], [], 0)[0])

    @property
    def frontend(self) -> int:
        """The process that holds the other end, which has answered here before."""
        ours = self._socket.getsockname()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, *_rest, inode = line.split()[:10]
            if (port_of(local), port_of(remote)) == (self.server.port, ours):
                break
        for pid in self.server.frontends():
            if f"socket:[{inode}]" in open_files(pid):
                return pid
        raise AssertionError("no front end holds the connection")

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def open_files(pid: int) -> list[str]:
    folder = Path(f"/proc/{pid}/fd")
    found = []
    for number in os.listdir(folder):
        try:
            found.append(os.readlink(folder / number))
        except FileNotFoundError:
            continue  # closed meanwhile
    return found


MODELS = {"echo": (16, 2, 1), "slow": (4, 1, 1), "m": (4, 1, 0)}
"""Columns of x, and the a and b of y = a x + b."""


def infer(value: float, model: str = "echo", rows: int = 1) -> tuple[str, dict]:
    """Path and body of a request for rows of one value."""
    width = MODELS[model][0]
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, width]}
    document = {"inputs": [{**tensor, "data": [value] * (rows * width)}]}
    return f"/v2/models/{model}/infer", document


def assert_right(
    answer: tuple[int, bytes], value: float, model: str = "echo", rows: int = 1
) -> None:
    width, a, b = MODELS[model]
    assert output(answer) == [a * value + b] * (rows * width)


def output(answer: tuple[int, bytes]) -> list[float]:
    status, body = answer
    assert status == 200, body
    return json.loads(body)["outputs"][0]["data"]


@contextmanager
def spread(
    server: Server, frontends: int, per_frontend: int = 1
) -> Iterator[dict[int, list[Connection]]]:
    """So many connections to each of so many front ends, by the front end's process."""
    held: dict[int, list[Connection]] = {}
    with ExitStack() as stack:
        for _ in range(1000):
            connection = stack.enter_context(closing(Connection(server)))
            assert connection.ask("/livez")[0] == 200
            mine = held.setdefault(connection.frontend, [])
            if len(mine) < per_frontend:
                mine.append(connection)
            if [len(each) for each in held.values()] == [per_frontend] * frontends:
                break
        else:
            raise AssertionError(f"the connections are not spread: {held}")
        yield held


class Load:
    """Threads that ask, one on each connection, and check what they hear, until the end of the block.

    ``answers`` and ``failures`` count by the front end that had the connection at first; a connection's
    first failure is its last.
    """

    def __init__(
        self, connections: dict[int, list[Connection]], model: str = "echo", rows: int = 1
    ) -> None:
        self._model, self._rows = model, rows
        self._stop = False
        self._changed = threading.Condition()
        self.answers: Counter[int] = Counter()
        self.failures: Counter[int] = Counter()
        self._threads = [
            threading.Thread(target=self._ask, args=(pid, connection), daemon=True)
            for pid, held in connections.items()
            for connection in held
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join(DEADLINE_S)

    def _ask(self, pid: int, connection: Connection) -> None:
        value, counter = 0, self.answers
        while not self._stop and counter is self.answers:
            value = (value + 1) % 1000
            try:
                answer = connection.ask(*infer(value, self._model, self._rows))
                assert_right(answer, value, self._model, self._rows)
            except (OSError, AssertionError):
                counter = self.failures
            with self._changed:
                counter[pid] += 1
                self._changed.notify_all()

    def more(self, pids: Iterable[int], each: int) -> None:
        """Wait until each of these front ends has given so many more answers."""
        with self._changed:
            targets = {pid: self.answers[pid] + each for pid in pids}
            assert self._changed.wait_for(
                lambda: all(self.answers[pid] >= n for pid, n in targets.items()), DEADLINE_S
            ), (self.answers, self.failures)


def wait_read(held: dict[int, list[Connection]]) -> None:
    """Until each front end has taken up what was sent to it before."""
    for first, *_ in held.values():
        assert first.ask("/livez")[0] == 200


@pytest.fixture(scope="module")
def echo(make_repository) -> Path:
    return make_repository("echo")


@pytest.mark.parametrize("frontends", [2, 3])
def test_each_front_end_has_its_share_of_the_connections_and_says_the_same(echo, frontends):
    with Server(echo, "--frontends", str(frontends)) as server, spread(server, frontends) as held:
        for path in ("/readyz", "/v2/health/ready", "/v2", "/v2/models/echo", "/v1/models/echo"):
            answers = {connection.ask(path) for (connection,) in held.values()}
            assert len(answers) == 1, path
            assert answers.pop()[0] == 200
        for value, (connection,) in enumerate(held.values()):
            assert_right(connection.ask(*infer(value)), value)
        assert requests.get(server.metrics_url, timeout=DEADLINE_S).status_code == 200
        assert server.stop() == 0


def test_a_port_that_another_server_shares_among_its_front_ends_is_in_use(echo):
    with Server(echo, "--frontends", "2") as server:
        for frontends in ("1", "2"):
            result = run_serve(echo, "--port", str(server.port), "--frontends", frontends)
            expected = f"port: cannot listen on 127.0.0.1:{server.port}: Address already in use"
            assert_one_line(result, expected)


def test_a_killed_front_end_costs_only_its_own_connections(echo):
    with (
        Server(echo, "--frontends", "3") as server,
        spread(server, 3, 3) as held,
        ExitStack() as stack,
    ):
        victim, *others = held
        with Load(held) as load:
            load.more(held, 20)
            os.kill(victim, signal.SIGKILL)
            wait_gone(victim)
            # None of these is refused: a third of them waits in the socket of the one that died.
            late = [stack.enter_context(closing(Connection(server))) for _ in range(60)]
            for connection in late:
                connection.send(*infer(5))
            for connection in late:
                assert_right(connection.receive(), 5)
            assert {connection.frontend for connection in late} == set(server.frontends())
            load.more(others, 20)
        assert load.failures == {victim: 3}
        server.wait_for(r"front end [012] was killed by SIGKILL; starting another")
        assert len(set(server.frontends()) - set(others)) == 1


def test_worker_kills_under_load_of_two_front_ends_lose_no_request(echo):
    with Server(echo, "--frontends", "2") as server, spread(server, 2, 6) as held:
        with Load(held) as load:
            for _ in range(8):
                (worker,) = server.workers()
                load.more(held, 20)
                os.kill(worker, signal.SIGKILL)
                load.more(held, 20)  # another one came up, for both
        assert not load.failures
        mappings = Path(f"/proc/{server.workers()[0]}/maps").read_text()
        assert mappings.count("gateway-inputs") == 2  # a lane of each front end


def test_a_front_end_with_little_to_do_does_not_wait_for_one_with_much(make_repository):
    """One always has full batches waiting; the other now and then a single row."""
    repository = make_repository("slow")
    with Server(repository, "--frontends", "2") as server, spread(server, 2, 6) as held:
        (busy, many), (_, (lonely, *_rest)) = held.items()
        with Load({busy: many}, "slow", rows=8) as load:
            load.more([busy], 6)
            for value in range(3):
                lonely.send(*infer(value, "slow"))
                load.more([busy], 2 * len(many))  # those that were there before it, and as many
                assert lonely.is_answered
                assert_right(lonely.receive(), value, "slow")
        assert not load.failures


@pytest.fixture
def write_version(benchmark_models):
    """Writes a version that multiplies by its number."""

    def write(folder: Path, version: int) -> None:
        g = benchmark_models.GraphWriter("numbered")
        x = g.input("x", benchmark_models.TensorProto.FLOAT, [4])
        g.node("Mul", x, g.constant(version), out="y")
        g.output("y", benchmark_models.TensorProto.FLOAT, [4])
        g.write(folder / str(version) / "model.onnx")
        (folder / "config.yaml").write_text("max_batch_size: 8\n")

    return write


def test_models_come_and_go_for_all_front_ends_at_once(make_repository, write_version):
    """Whoever asked, every connection sees what an operation did as soon as that is answered."""
    repository = make_repository("echo")
    flags = ("--frontends", "2", "--model-control")
    with Server(repository, *flags) as server, spread(server, 2, 4) as held:
        ends = [connections[0] for connections in held.values()]

        def control(end: int, action: str) -> None:
            path = f"/v2/repository/models/m/{action}"
            assert ends[end].ask(path, {}) == (200, b"")

        def statuses() -> list[int]:
            return [end.ask(*infer(1, "m"))[0] for end in ends]

        def factors() -> list[float]:
            return [output(end.ask(*infer(1, "m")))[0] for end in ends]

        with Load({pid: connections[1:] for pid, connections in held.items()}) as load:
            for version in range(1, 6):
                write_version(repository / "m", version)
                control(version % 2, "load")
                assert factors() == [version, version]
                control(version % 2, "unload")
                assert statuses() == [503, 503]
                control(1 - version % 2, "load")
                assert factors() == [version, version]
            shutil.rmtree(repository / "m")
            control(0, "unload")
            assert statuses() == [404, 404]
            load.more(held, 20)
        assert not load.failures


def test_an_unload_lets_requests_in_flight_at_all_front_ends_finish(make_repository):
    repository = make_repository("slow", slow="max_batch_size: 1\n")
    flags = ("--frontends", "2", "--model-control")
    with Server(repository, *flags) as server, spread(server, 2, 4) as held:
        busy = [connection for _, *others in held.values() for connection in others]
        for connection in busy:
            connection.send(*infer(3, "slow"))
        wait_read(held)
        (operator, *_), _ = held.values()
        assert operator.ask("/v2/repository/models/slow/unload", {}) == (200, b"")
        assert server.workers() == []
        for connection in busy:
            assert_right(connection.receive(), 3, "slow")


def test_an_unload_does_not_wait_for_a_front_end_that_dies(make_repository):
    repository = make_repository("slow")
    flags = ("--frontends", "2", "--model-control")
    with (
        Server(repository, *flags, GATEWAY_DRAIN_TIMEOUT_S="600") as server,
        spread(server, 2, 2) as held,
    ):
        (doomed, (_, victim)), (_, (operator, witness)) = held.items()
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)  # what is in flight stays in flight
        victim.send(*infer(3, "slow"))
        wait_read(held)
        operator.send("/v2/repository/models/slow/unload", {})
        deadline = time.monotonic() + DEADLINE_S
        while witness.ask("/v2/models/slow/ready")[0] == 200:
            assert time.monotonic() < deadline
        os.kill(doomed, signal.SIGKILL)
        os.kill(worker, signal.SIGCONT)
        assert operator.receive() == (200, b"")
        assert server.workers() == []


def test_a_front_end_that_hangs_holds_up_an_operation_only_so_long_and_catches_up(
    make_repository, write_version
):
    repository = make_repository("echo")
    write_version(repository / "m", 1)
    flags = ("--frontends", "2", "--model-control")
    with (
        Server(repository, *flags, GATEWAY_DRAIN_TIMEOUT_S="0") as server,
        spread(server, 2) as held,
    ):
        (hung, (late,)), (_, (operator,)) = held.items()
        assert_right(late.ask(*infer(3, "m")), 3, "m")
        os.kill(hung, signal.SIGSTOP)
        for action in ("unload", "load"):
            logged = len(server.lines)
            assert operator.ask(f"/v2/repository/models/m/{action}", {}) == (200, b"")
            server.wait_for("a front end does not react", after=logged)
        assert_right(operator.ask(*infer(4, "m")), 4, "m")
        late.send(*infer(5, "m"))
        os.kill(hung, signal.SIGCONT)
        late.receive()  # of the version that it had, or refused: it has not heard of its end yet
        wait_read(held)
        assert_right(late.ask(*infer(6, "m")), 6, "m")


def test_sigterm_lets_requests_in_flight_at_all_front_ends_finish(make_repository):
    repository = make_repository("slow", slow="max_batch_size: 1\n")
    with Server(repository, "--frontends", "2") as server, spread(server, 2, 4) as held:
        busy = [connection for _, *others in held.values() for connection in others]
        children = [*held, *server.workers()]
        for connection in busy:
            connection.send(*infer(6, "slow"))
        wait_read(held)
        assert server.stop() == 0
        for connection in busy:
            assert_right(connection.receive(), 6, "slow")
        for pid in children:
            wait_gone(pid)
    assert not any("Traceback" in line or "kill" in line for line in server.lines)


def test_twenty_front_ends_that_die_leave_nothing_behind(echo):
    with Server(echo, "--frontends", "2") as server:
        (worker,) = server.workers()

        def held() -> tuple[int, int, int]:
            with spread(server, 2) as connections:
                for (connection,) in connections.values():
                    assert_right(connection.ask(*infer(1)), 1)
                lanes = Path(f"/proc/{worker}/maps").read_text().count("gateway-inputs")
                return len(open_files(server.pid)), len(open_files(worker)), lanes

        before = held()
        for kill in range(20):
            held()  # both are up, with lanes
            logged = len(server.lines)
            os.kill(server.frontends()[kill % 2], signal.SIGKILL)
            server.wait_for("starting another", after=logged)
        assert held() == before
        assert server.workers() == [worker]
