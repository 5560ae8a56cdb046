"""Hostile and broken models beside a good one: each fails with its reason, and the good one serves on."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import requests

from gateway.client import Client
from tests.system import clients
from tests.system.server import Server
from tests.zoo.building import MODEL_FILE
from tests.zoo.hostile import Hostile, all_hostile, write_hostile
from tests.zoo.hostile_files import good_model

GOOD = "good"

LOAD_TIMEOUT_S = 12
"""For what never ends; much longer than any other load here takes, which share the machine."""

AT_ONCE = 6
"""Models loaded at a time."""

AT_START = 12
"""Models that are there when a server starts."""

PAUSE_S = 0.002
"""Between two requests of the light traffic."""

HOSTILE = all_hostile()


class Traffic:
    """Requests to the good model, one after the other, until stopped; every answer is checked."""

    def __init__(self, url: str) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._address = url.removeprefix("http://")
        self._answered_one = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Traffic:
        self._thread.start()
        assert self._answered_one.wait(clients.DEADLINE_S), self.failures
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        (weight,) = good_model().graph.initializer
        x = np.arange(8, dtype=np.float32).reshape(2, 4)
        expected = x @ onnx.numpy_helper.to_array(weight)
        with Client(self._address, retries=0) as client:
            while not self._stop.wait(PAUSE_S):
                try:
                    answer = client.infer(GOOD, {"x": x})
                    np.testing.assert_allclose(answer.outputs["y"], expected, 1e-5, 1e-5)
                    self.answered += 1
                    self._answered_one.set()
                except Exception as error:
                    self.failures.append(repr(error))


def write_good(repository: Path) -> None:
    folder = repository / GOOD / "1"
    folder.mkdir(parents=True)
    onnx.save(good_model(), folder / MODEL_FILE)


@contextmanager
def serving(repository: Path, *flags: str) -> Iterator[tuple[Server, Traffic]]:
    """A server with the good model, and light traffic to it until the end."""
    write_good(repository)
    env = {"GATEWAY_LOAD_TIMEOUT_S": str(LOAD_TIMEOUT_S)}
    with (
        Server(repository, "--no-exit-on-error", *flags, **env) as server,
        Traffic(server.url) as traffic,
    ):
        yield server, traffic


def index(server: Server) -> dict[str, dict[str, str]]:
    """The repository's index by model."""
    answer = requests.post(f"{server.url}/v2/repository/index", timeout=clients.DEADLINE_S)
    assert answer.status_code == 200, answer.text
    return {entry["name"]: entry for entry in answer.json()}


def fault(model: Hostile, entry: dict[str, str]) -> str | None:
    """What is wrong with a hostile model's entry in the index; None for a failure well told."""
    reason = entry.get("reason", "")
    if entry["state"] != "UNAVAILABLE":
        return f"{model}: is {entry['state']}"
    if not re.search(model.reason, reason):
        return f"{model}: expected {model.reason!r}, got {reason!r}"
    if "/" in reason or not reason.isprintable():
        return f"{model}: shows what it must not: {reason!r}"
    return None


@dataclass(frozen=True)
class Outcome:
    """Of a load while others are served: what was answered, and the model's entry in the index."""

    status: int
    body: str
    entry: dict[str, str]


@dataclass(frozen=True)
class Loads:
    """All outcomes, the good model's entry at the end, and the traffic to it all along."""

    outcomes: dict[str, Outcome]
    good: dict[str, str]
    traffic: Traffic


@pytest.fixture(scope="module")
def loads(tmp_path_factory) -> Loads:
    """Every hostile model loaded beside the good one."""
    repository = tmp_path_factory.mktemp("hostile")
    with serving(repository, "--model-control") as (server, traffic):

        def load(model: Hostile) -> requests.Response:
            write_hostile(model, repository)
            return requests.post(
                f"{server.url}/v2/repository/models/{model}/load",
                timeout=clients.DEADLINE_S + LOAD_TIMEOUT_S,
            )

        with ThreadPoolExecutor(AT_ONCE) as pool:
            # The endless one first, so that the others pass by it.
            ordered = sorted(HOSTILE, key=lambda model: not model.is_endless)
            answers = list(pool.map(load, ordered))
        entries = index(server)
    outcomes = {
        model.name: Outcome(answer.status_code, answer.text, entries[model.name])
        for model, answer in zip(ordered, answers, strict=True)
    }
    return Loads(outcomes, entries[GOOD], traffic)


@pytest.mark.parametrize("model", HOSTILE, ids=str)
def test_a_load_fails_with_its_reason(loads: Loads, model: Hostile):
    outcome = loads.outcomes[model.name]
    assert fault(model, outcome.entry) is None
    assert 400 <= outcome.status < 500, outcome.body
    assert outcome.entry["reason"] in json.loads(outcome.body)["error"]


def test_the_good_model_answered_every_request_meanwhile(loads: Loads):
    assert loads.traffic.failures == []
    assert loads.traffic.answered > len(HOSTILE)
    assert loads.good["state"] == "READY"


def test_what_is_there_at_the_start_fails_alike(tmp_path: Path):
    models = HOSTILE[:: len(HOSTILE) // AT_START]
    for model in models:
        write_hostile(model, tmp_path)
    with serving(tmp_path) as (server, traffic):
        entries = index(server)
    faults = [fault(model, entries[model.name]) for model in models]
    assert [text for text in faults if text] == []
    assert entries[GOOD]["state"] == "READY"
    assert traffic.failures == []
