"""The whole zoo over HTTP: every graph, through every encoding, against ONNX Runtime itself."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import requests

from gateway.client import AsyncClient, Client
from gateway.tensors import BY_ORT
from tests.system import clients
from tests.system.server import Server
from tests.zoo.building import Arrays, Graph
from tests.zoo.direct import DirectModel, NodeArg, assert_equal
from tests.zoo.graphs import all_graphs, write_version

GROUP = 16
"""Graphs a server: each has a worker process of its own."""

ROWS = (1, 2, 3, 5, 8, 16, 33, 64)

TOGETHER = (1, 2, 3, 5, 8, 16)
"""Rows of requests that run in one batch; in all no more than the default `max_batch_size`."""

SEED = 11

_GRAPHS = all_graphs()
_GROUPS = [_GRAPHS[start : start + GROUP] for start in range(0, len(_GRAPHS), GROUP)]


@dataclass(frozen=True)
class Zoo:
    """A group of graphs, and the server that serves them."""

    server: Server
    clients: dict[str, Client]

    def direct(self, graph: Graph) -> DirectModel:
        return DirectModel(self.server.repository / graph.name / "1")


class Zoos:
    """The group that was asked for last, being served; what fails to load is left to the tests to find.

    Pytest would make a parametrised fixture anew for each test of a group.
    """

    def __init__(self, make_folder: Callable[[str], Path]) -> None:
        self._make_folder = make_folder
        self._number: int | None = None
        self._zoo: Zoo
        self._running = ExitStack()

    def group(self, number: int) -> Zoo:
        """The zoo of a group, once the server of the one before has ended."""
        if number != self._number:
            self.close()
            self._zoo, self._number = self._start(number), number
        return self._zoo

    def close(self) -> None:
        self._number = None
        self._running.close()

    def _start(self, number: int) -> Zoo:
        repository = self._make_folder("zoo")
        for graph in _GROUPS[number]:
            write_version(graph, repository)
        server = self._running.enter_context(Server(repository, "--no-exit-on-error"))
        address = server.url.removeprefix("http://")
        made = {e: Client(address, encoding=e, retries=0) for e in ("binary", "msgpack", "json")}
        return Zoo(server, {e: self._running.enter_context(c) for e, c in made.items()})


@pytest.fixture(scope="module")
def zoos(tmp_path_factory) -> Iterator[Zoos]:
    zoos = Zoos(tmp_path_factory.mktemp)
    yield zoos
    zoos.close()


def tolerance(graph: Graph) -> float | None:
    return None if graph.exact else graph.rtol


def has_json_form(arrays: Arrays) -> bool:
    """Whether every datatype is one that JSON carries."""
    binary_only = (np.float16, ml_dtypes.bfloat16)
    return not any(array.dtype in binary_only for array in arrays.values())


# TensorFlow Serving's form, which has no dtypes and only nested lists


def _plain(array: np.ndarray, *, base64_text: bool) -> object:
    """Nested lists; BYTES as text or as objects."""

    def form(part: object) -> object:
        if isinstance(part, list):
            return [form(one) for one in part]
        if not isinstance(part, bytes):
            return part
        return {"b64": base64.b64encode(part).decode()} if base64_text else part.decode()

    return form(array.tolist())


def shows_its_shape(array: np.ndarray) -> bool:
    """Whether nested lists of these dims tell all of them: behind a zero they do not."""
    return 0 not in array.shape[:-1]


def _from_plain(data: object, expected: np.ndarray) -> np.ndarray:
    """An answer's nested lists as an array of the expected dtype; its shape is what it says itself."""
    if expected.dtype != np.object_:
        return np.array(data, expected.dtype)
    flat: list[bytes] = []

    def shape(part: object) -> tuple[int, ...]:
        if isinstance(part, list):
            inner = [shape(one) for one in part]
            assert len(set(inner)) <= 1
            return (len(part), *(inner[0] if inner else ()))
        flat.append(base64.b64decode(part["b64"]) if isinstance(part, dict) else part.encode())
        return ()

    array = np.empty(shape(data), np.object_)
    array.reshape(-1)[:] = flat
    return array


def ask_columns(url: str, graph: Graph, inputs: Arrays, expected: Arrays) -> Arrays:
    """The columnar form; a single output comes without its name."""
    columns = {name: _plain(array, base64_text=False) for name, array in inputs.items()}
    outputs = clients.predict(url, graph.name, {"inputs": columns})["outputs"]
    if len(expected) == 1:
        outputs = dict.fromkeys(expected, outputs)
    return {name: _from_plain(data, expected[name]) for name, data in outputs.items()}


def ask_rows(url: str, graph: Graph, inputs: Arrays, expected: Arrays) -> Arrays:
    """The row form; a single output comes without its name."""
    columns = {name: _plain(array, base64_text=True) for name, array in inputs.items()}
    instances = [
        dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
    ]
    predictions = clients.predict(url, graph.name, {"instances": instances})["predictions"]
    if len(expected) == 1:
        predictions = [dict.fromkeys(expected, row) for row in predictions]
    return {
        name: _from_plain([row[name] for row in predictions], array)
        for name, array in expected.items()
    }


# What is asked of each graph


def loaded_and_batched_exactly_where_rows_are_independent(zoo: Zoo, graph: Graph) -> None:
    url = zoo.server.url
    index = requests.post(f"{url}/v2/repository/index", timeout=clients.DEADLINE_S).json()
    (entry,) = [entry for entry in index if entry["name"] == graph.name]
    assert entry["state"] == "READY", entry
    path = f"{clients.v2_path(graph.name)}/config"
    config = requests.get(url + path, timeout=clients.DEADLINE_S).json()
    assert (config["max_batch_size"] > 0) == graph.batched, config["max_batch_size"]


def shown_with_its_tensors(zoo: Zoo, graph: Graph) -> None:
    session = zoo.direct(graph).session
    required, outputs = _datatypes(session.get_inputs()), _datatypes(session.get_outputs())
    optional = _datatypes(session.get_overridable_initializers())
    metadata = zoo.clients["binary"].metadata(graph.name)
    inputs = {entry["name"]: entry["datatype"] for entry in metadata["inputs"]}
    assert required.items() <= inputs.items() <= (required | optional).items()
    assert {entry["name"]: entry["datatype"] for entry in metadata["outputs"]} == outputs


def _datatypes(tensors: list[NodeArg]) -> dict[str, str]:
    """The protocol's datatypes by name."""
    return {tensor.name: BY_ORT[tensor.type].name for tensor in tensors}


def same_as_a_direct_run_in_every_encoding(zoo: Zoo, graph: Graph) -> None:
    model = zoo.direct(graph)
    rng = np.random.default_rng(SEED)
    for rows in ROWS:
        inputs = graph.sample(rng, rows)
        expected = model.run(inputs)
        in_json = has_json_form(inputs | expected)
        for encoding, client in zoo.clients.items():
            if in_json or encoding != "json":
                answer = client.infer(graph.name, inputs)
                assert_equal(answer.outputs, expected, tolerance(graph))
                assert answer.version == "1"


def same_as_a_direct_run_in_tensorflows_forms(zoo: Zoo, graph: Graph) -> None:
    model = zoo.direct(graph)
    rng = np.random.default_rng(SEED)
    optional = {value.name for value in model.session.get_overridable_initializers()}
    for rows in ROWS[:4]:
        inputs = graph.sample(rng, rows)
        expected = model.run(inputs)
        if not has_json_form(inputs | expected):
            _assert_refused(zoo.server.url, graph, inputs)
        elif all(shows_its_shape(array) for array in (*inputs.values(), *expected.values())):
            answers = [ask_columns(zoo.server.url, graph, inputs, expected)]
            if graph.batched and not optional & inputs.keys():
                answers.append(ask_rows(zoo.server.url, graph, inputs, expected))
            for answer in answers:
                assert_equal(answer, expected, tolerance(graph))


def _assert_refused(url: str, graph: Graph, inputs: Arrays) -> None:
    """What has no JSON form is the client's mistake."""
    columns = {name: np.zeros(array.shape).tolist() for name, array in inputs.items()}
    answer = requests.post(
        f"{url}{clients.v1_path(graph.name)}:predict",
        json={"inputs": columns},
        timeout=clients.DEADLINE_S,
    )
    assert answer.status_code == 400, answer.text
    assert "binary" in answer.json()["error"]


def own_answers_to_requests_that_run_together(zoo: Zoo, graph: Graph) -> None:
    asyncio.run(_run_together(zoo, graph))


async def _run_together(zoo: Zoo, graph: Graph) -> None:
    """First, of a batched graph, what shares batches: its worker waits for all of it; then a crowd."""
    model, url = zoo.direct(graph), zoo.server.url
    rng = np.random.default_rng(SEED)
    samples = [graph.sample(rng, rows) for rows in TOGETHER]
    crowd = [graph.sample(rng, int(rows)) for rows in rng.permutation(ROWS + ROWS)]
    async with AsyncClient(url, retries=0) as client, clients.many_connections() as session:
        before = clients.batches(await clients.statistics(session, url, graph.name))
        # A task group's end is the first failure's, too.
        async with asyncio.TaskGroup() as group:

            def ask(inputs: Arrays) -> asyncio.Task:
                return group.create_task(client.infer(graph.name, inputs))

            if graph.batched:
                with clients.stopped(clients.worker_of(zoo.server, graph.name)):
                    tasks = [ask(inputs) for inputs in samples]
                    await clients.until_queued(session, url, graph.name, len(tasks))
            else:
                tasks = [ask(inputs) for inputs in samples]
            tasks += [ask(inputs) for inputs in crowd]
        batches = clients.batches(await clients.statistics(session, url, graph.name))
    for inputs, task in zip(samples + crowd, tasks, strict=True):
        assert_equal(task.result().outputs, model.run(inputs), tolerance(graph))
    if graph.batched and not graph.config and _share_a_batch(samples):
        # Of how many rows a batch is depends on what its worker has learned of sizes by then.
        assert sum(batches.values()) - sum(before.values()) < len(tasks)


def _share_a_batch(samples: list[Arrays]) -> bool:
    """Whether requests agree in all dims but the first, and bring the same inputs.

    Those with strings may not: slots differ in the bytes that they have for them.
    """
    if any(array.dtype == np.object_ for array in samples[0].values()):
        return False
    return len({tuple((n, a.shape[1:]) for n, a in one.items()) for one in samples}) == 1


CHECKS = (
    loaded_and_batched_exactly_where_rows_are_independent,
    shown_with_its_tensors,
    same_as_a_direct_run_in_every_encoding,
    same_as_a_direct_run_in_tensorflows_forms,
    own_answers_to_requests_that_run_together,
)


@pytest.mark.parametrize("encoding", ["binary", "msgpack"])
def test_strings_of_any_bytes(zoos: Zoos, encoding: str):
    """What no direct run from Python takes: not UTF-8. The graph puts each row beside itself."""
    name = "twice_string"
    (number,) = [i for i, group in enumerate(_GROUPS) if name in map(str, group)]
    client = zoos.group(number).clients[encoding]
    x = np.array([[b"\xff\0", bytes(range(256)), b"text"], [b"", b"\xed\xa0\x80", b"\0"]], object)
    assert_equal(client.infer(name, {"x": x}).outputs, {"y": np.concatenate([x, x], 1)})


@pytest.mark.parametrize(
    ("number", "graph", "check"),
    [
        pytest.param(number, graph, check, id=f"{graph.name}-{check.__name__}")
        for number, group in enumerate(_GROUPS)
        for graph in group
        for check in CHECKS
    ],
)
def test_every_graph(zoos: Zoos, number: int, graph: Graph, check: Callable[[Zoo, Graph], None]):
    """In the order of the groups, whose servers run one at a time."""
    check(zoos.group(number), graph)
