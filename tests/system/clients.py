"""What the system tests' clients share: every encoding, plain sockets, and what to poll.

Each ``ask_…`` sends one inference in one encoding, to a version or (None) the model's route, and returns
the outputs by name. It is sent several times on one connection, as what the fast lane has learned from the
first ones must not show. An answer other than 200 is an AssertionError that shows it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported, hence the order

import aiohttp
import msgpack
import numpy as np
import onnxruntime
import requests
import tritonclient.http
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from tests.system.server import Server, command_line

Arrays = dict[str, np.ndarray]

DEADLINE_S = 30
"""After this long a test counts what it waits for as never coming."""

BINARY_ONLY = "FP16"
"""The datatype among our models' that JSON cannot carry."""


# Direct runs, which every answer is compared with


def direct_run(model_file: Path, inputs: Arrays) -> Arrays:
    """The outputs of a run by ONNX Runtime itself."""
    return direct_runs(model_file, [inputs])[0]


def direct_runs(model_file: Path, requests_inputs: Iterable[Arrays]) -> list[Arrays]:
    """The outputs of one run for each request."""
    session = onnxruntime.InferenceSession(str(model_file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(names, one), strict=True)) for one in requests_inputs]


def assert_same(answers: Arrays, expected: Arrays) -> None:
    """The same outputs with the same dtypes, shapes and values, NaN equal to itself."""
    assert answers.keys() == expected.keys()
    for name, array in expected.items():
        assert answers[name].dtype == array.dtype, name
        np.testing.assert_array_equal(answers[name], array, err_msg=name)


# Requests in every encoding


def v2_path(model: str, version: int | None = None) -> str:
    """``/v2/models/{model}[/versions/{version}]``."""
    return f"/v2/models/{model}" + (f"/versions/{version}" if version else "")


def v1_path(model: str, version: int | None = None) -> str:
    """``/v1/models/{model}[/versions/{version}]``."""
    return f"/v1/models/{model}" + (f"/versions/{version}" if version else "")


def tensor(name: str, array: np.ndarray, data: object = None) -> dict:
    """One input of a v2 request, its data flat unless given in another form."""
    return {
        "name": name,
        "datatype": np_to_triton_dtype(array.dtype),
        "shape": list(array.shape),
        "data": array.ravel().tolist() if data is None else data,
    }


def v2_document(inputs: Arrays, **fields: object) -> dict:
    """A v2 request as plain values."""
    return {"inputs": [tensor(name, array) for name, array in inputs.items()], **fields}


def ask_json(url: str, model: str, inputs: Arrays, version: int | None = None) -> Arrays:
    """v2 in JSON alone."""
    text = json.dumps(v2_document(inputs))  # requests' own JSON has no NaN
    answer = post(f"{url}{v2_path(model, version)}/infer", text)
    return {
        o["name"]: np.array(o["data"], triton_to_np_dtype(o["datatype"])).reshape(o["shape"])
        for o in answer.json()["outputs"]
    }


def triton_inputs(inputs: Arrays, binary: bool = True) -> list[tritonclient.http.InferInput]:
    """Inputs as tritonclient takes them; what JSON cannot carry is binary in any case."""
    made = []
    for name, array in inputs.items():
        datatype = np_to_triton_dtype(array.dtype)
        made.append(tritonclient.http.InferInput(name, list(array.shape), datatype))
        made[-1].set_data_from_numpy(array, binary_data=binary or datatype == BINARY_ONLY)
    return made


def ask_binary(url: str, model: str, inputs: Arrays, version: int | None = None) -> Arrays:
    """v2 with binary tensors, by Triton's own client."""
    with tritonclient.http.InferenceServerClient(url.removeprefix("http://")) as client:
        asked = [triton_inputs(inputs) for _ in range(ASKED)]
        answers = [outputs_of(client.infer(model, each, str(version or ""))) for each in asked]
    for other in answers[1:]:
        assert_same(other, answers[0])
    return answers[0]


def outputs_of(result: tritonclient.http.InferResult) -> Arrays:
    """The outputs of an answer to Triton's client."""
    return {o["name"]: result.as_numpy(o["name"]) for o in result.get_response()["outputs"]}


def ask_msgpack(
    url: str, model: str, inputs: Arrays, version: int | None = None, *, arrays: bool = False
) -> Arrays:
    """msgpack, the tensors as ``bin`` or (except what has no such form) as arrays."""
    document = {
        "inputs": [
            tensor(name, array, None if arrays and array.dtype != np.float16 else array.tobytes())
            for name, array in inputs.items()
        ]
    }
    answer = post(
        f"{url}{v2_path(model, version)}/infer",
        msgpack.packb(document),
        **{"Content-Type": "application/msgpack"},
    )
    assert answer.headers["Content-Type"] == "application/msgpack"
    return {
        o["name"]: np.frombuffer(o["data"], triton_to_np_dtype(o["datatype"])).reshape(o["shape"])
        for o in msgpack.unpackb(answer.content)["outputs"]
    }


def ask_rows(url: str, model: str, inputs: Arrays, version: int | None = None) -> Arrays:
    """TensorFlow Serving's ``instances``. The answer does not tell dtypes: they are NumPy's own."""
    instances = [
        {name: array[row].tolist() for name, array in inputs.items()}
        for row in range(len(next(iter(inputs.values()))))
    ]
    predictions = predict(url, model, {"instances": instances}, version)["predictions"]
    return {name: np.array([row[name] for row in predictions]) for name in predictions[0]}


def ask_columns(url: str, model: str, inputs: Arrays, version: int | None = None) -> Arrays:
    """TensorFlow Serving's ``inputs``. The answer does not tell dtypes: they are NumPy's own."""
    columns = {name: array.tolist() for name, array in inputs.items()}
    outputs = predict(url, model, {"inputs": columns}, version)["outputs"]
    return {name: np.array(data) for name, data in outputs.items()}


def predict(url: str, model: str, document: dict, version: int | None = None) -> dict:
    """The answer's document of a ``:predict``."""
    return post(f"{url}{v1_path(model, version)}:predict", json.dumps(document)).json()


# Requests that no library would send


def send_all(port: int, data: bytes) -> bytes:
    """Send bytes on a connection of their own; all that comes back until the server closes it."""
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


Answer = tuple[int, dict[str, str], bytes]
"""Status, headers (names in lower case) and body."""

ASKED = 3
"""Times that an inference is sent: the fast lane parses the first two and knows the third by its skeleton."""

OF_THE_MOMENT = {"date", "x-request-id"}
"""Headers in which answers to equal requests differ."""


class Wire:
    """A kept-alive connection on which exactly the given bytes are sent."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> Answer:
        """The next answer, an interim one as well. ConnectionResetError where none comes."""
        status, *lines = iter(self._line, b"")
        headers = dict(line.decode("latin-1").split(": ", 1) for line in lines)
        fields = {name.lower(): value for name, value in headers.items()}
        nbytes = int(fields.get("content-length", 0))
        body = self._file.read(nbytes)
        if len(body) != nbytes:
            raise ConnectionResetError("the server closed the connection within an answer")
        return int(status.split()[1]), fields, body

    def ask(self, data: bytes) -> Answer:
        self.send(data)
        return self.receive()

    def is_at_end(self) -> bool:
        """Whether the server closes the connection, and sends nothing more before it does."""
        return self._file.read(1) == b""

    def _line(self) -> bytes:
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionResetError("the server closed the connection")
        return line[:-2]

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def message(verb: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """The bytes of a request.

    The path is not normalised. Underscores in the names of headers stand for dashes; Content-Length is
    added unless Transfer-Encoding is given.
    """
    lines = [f"{verb} {path} HTTP/1.1", "Host: test"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if "transfer_encoding" not in headers:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def comparable(answer: Answer) -> Answer:
    """What answers to equal requests have in common."""
    status, headers, body = answer
    return status, {k: v for k, v in headers.items() if k not in OF_THE_MOMENT}, body


def exchange(port: int, verb: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    """The answer to a `message` on a connection of its own.

    An inference that succeeds is sent several times, and must have the same answer each time.
    """
    sent = message(verb, path, body, **headers)
    with Wire(port) as wire:
        answer = wire.ask(sent)
        if answer[0] == 200 and path.endswith(("/infer", ":predict")):
            for _ in range(1, ASKED):
                assert comparable(wire.ask(sent)) == comparable(answer)
        return answer


def post(url: str, body: str | bytes, **headers: str) -> requests.Response:
    """The answer to an inference, as by `exchange`, from a library that people use."""
    with requests.Session() as session:
        answers = [
            session.post(url, data=body, headers=headers, timeout=DEADLINE_S) for _ in range(ASKED)
        ]
    first, *others = answers
    assert first.status_code == 200, first.text
    for other in others:
        assert (other.status_code, other.content) == (200, first.content)
        assert other.headers.keys() == first.headers.keys()
    return first


def error_of(answer: Answer, status: int) -> str:
    """The text of an `exchange` that must have failed with this status, in the one form for failures."""
    got, headers, body = answer
    assert got == status, body
    assert headers["content-type"] == "application/json"
    document = json.loads(body)
    assert list(document) == ["error"]
    return document["error"]


def chunked(*pieces: bytes) -> bytes:
    """A body in the chunked transfer encoding."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


# What can be observed, and polled


def many_connections() -> aiohttp.ClientSession:
    """A session that opens as many connections as there are requests at a time."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Values of a Prometheus text by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def metric(session: aiohttp.ClientSession, url: str, name: str, **labels: str) -> float:
    """The present value of one metric; KeyError if it is not there."""
    async with session.get(f"{url}/metrics") as answer:
        text = await answer.text()
    lines = [line for line in text.splitlines() if line.startswith(name)]  # parsing all is slow
    return samples("\n".join(lines) + "\n")[name, frozenset(labels.items())]


async def queue_depth(session: aiohttp.ClientSession, url: str, model: str) -> float:
    """Requests of version 1 of a model that no worker has taken."""
    return await metric(session, url, "gateway_queue_depth", model=model, version="1")


async def until_queued(
    session: aiohttp.ClientSession, url: str, model: str, requests_waiting: int
) -> None:
    """Wait until exactly so many requests of a model wait for a worker."""
    async with asyncio.timeout(DEADLINE_S):
        while await queue_depth(session, url, model) != requests_waiting:
            pass


async def statistics(session: aiohttp.ClientSession, url: str, model: str) -> dict:
    """``/stats`` of a model with one version."""
    async with session.get(f"{url}{v2_path(model)}/stats") as answer:
        (entry,) = (await answer.json())["model_stats"]
        return entry


def batches(entry: dict) -> dict[int, int]:
    """How many batches of which number of rows a model's statistics count."""
    return {b["batch_size"]: b["compute_infer"]["count"] for b in entry["batch_stats"]}


def worker_of(server: Server, model: str) -> int:
    """The process id of the only worker of version 1 of a model."""
    (pid,) = [pid for pid in server.workers() if f" {model}/1#0 " in f" {command_line(pid)} "]
    return pid


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process stands still: what is sent to a worker meanwhile waits."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
