"""``gateway models``, ``rollout`` and ``keys`` against a real server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.system.server import Server

DEADLINE_S = 90

IMAGE = {
    "inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 8, 8], "data": [0.0] * 64}],
    "outputs": [{"name": "label"}],
}


def gateway(*words: str, key: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command, as somebody without a terminal runs it."""
    environment = {name: v for name, v in os.environ.items() if name != "GATEWAY_API_KEY"}
    if key is not None:
        environment["GATEWAY_API_KEY"] = key
    return subprocess.run(
        [sys.executable, "-m", "gateway", *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=DEADLINE_S,
        env=environment | {"PYTHONIOENCODING": "utf-8"},
    )


@pytest.fixture
def repository(digits_repository, tmp_path) -> Path:
    return Path(shutil.copytree(digits_repository, tmp_path / "models"))


@contextmanager
def served(repository: Path):
    """A server, and the flag that leads to its admin port."""
    with Server(repository, "--admin-port", "0") as server:
        address = server.wait_for(r"admin on ([^\s,]+)")[1]
        yield server, f"--admin-url={address}"


@contextmanager
def traffic(server: Server):
    """Requests one after the other until the context is left; all of them must be answered."""
    is_over = threading.Event()
    statuses = set[int]()

    def send() -> None:
        with requests.Session() as session:
            while not is_over.is_set():
                url = f"{server.url}/v2/models/digits/infer"
                statuses.add(session.post(url, json=IMAGE).status_code)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    assert statuses == {200}


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def routed(server: Server) -> str:
    answer = requests.post(f"{server.url}/v2/models/digits/infer", json=IMAGE, timeout=10)
    return answer.headers["x-model-version"]


def test_a_version_is_registered_loaded_labelled_and_removed(repository):
    with served(repository) as (_server, at):
        assert "version 1 100 %" in ok(gateway("models", "list", at))
        file = repository / "digits/2/model.onnx"
        line = ok(gateway("models", "register", "digits", "4", str(file), "--load", at))
        assert line == "digits version 4 is READY\n"
        ok(gateway("models", "label", "digits", "next", "4", at))
        shown = json.loads(ok(gateway("models", "show", "digits", "--json", at)))
        assert shown["labels"] == {"next": 4}
        assert [version["number"] for version in shown["versions"]] == [1, 2, 3, 4]

        held = gateway("models", "unload", "digits", "4", at)
        assert held.returncode == 1
        assert held.stderr.count("\n") == 1

        ok(gateway("models", "label", "digits", "next", "--delete", at))
        ok(gateway("models", "unload", "digits", "4", at))
        ok(gateway("models", "delete", "digits", "4", "--yes", at))
        left = json.loads(ok(gateway("models", "show", "digits", "--json", at)))
        assert [version["number"] for version in left["versions"]] == [1, 2, 3]


def test_other_content_for_a_version_is_refused(repository):
    with served(repository) as (_server, at):
        other = repository / "digits/3/model.onnx"
        done = gateway("models", "register", "digits", "2", str(other), at)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("gateway: ")
        assert done.stderr.count("\n") == 1


def test_a_rollout_is_steered_to_its_end(repository):
    slow = ("--steps", "1,50", "--min-duration", "3600")
    with served(repository) as (server, at), traffic(server):
        plan = gateway("rollout", "start", "digits", "--canary", "2", *slow, "--dry-run", at)
        assert json.loads(ok(plan))
        ok(gateway("rollout", "start", "digits", "--canary", "2", *slow, at))
        second = gateway("rollout", "start", "digits", "--canary", "3", at)
        assert second.returncode == 1
        assert second.stderr.count("\n") == 1

        watcher = subprocess.Popen(
            [sys.executable, "-m", "gateway", "rollout", "watch", "digits", at],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with watcher:
            assert watcher.stdout.readline()
            ok(gateway("rollout", "pause", "digits", at))
            paused = json.loads(ok(gateway("rollout", "status", "digits", "--json", at)))
            assert (paused["state"], paused["pause"]) == ("PAUSED", "manual")
            ok(gateway("rollout", "resume", "digits", at))
            ok(gateway("rollout", "promote", "digits", "--full", at))
            lines, _ = watcher.communicate(timeout=DEADLINE_S)
        assert watcher.returncode == 0, lines
        assert routed(server) == "2"
        (past,) = json.loads(ok(gateway("rollout", "history", "digits", "--json", at)))["rollouts"]
        assert past["state"] == "SUCCEEDED"


def test_a_rollout_that_is_aborted_can_be_begun_again(repository):
    with served(repository) as (server, at):
        ok(gateway("rollout", "start", "digits", "--canary", "2", "--min-duration", "3600", at))
        ok(gateway("rollout", "abort", "digits", at))
        watched = gateway("rollout", "watch", "digits", at)
        assert watched.returncode == 1
        assert routed(server) == "1"
        ok(gateway("rollout", "retry", "digits", at))
        again = json.loads(ok(gateway("rollout", "status", "digits", "--json", at)))
        assert again["attempt"] == 2
        ok(gateway("rollout", "abort", "digits", at))


def test_a_key_that_was_made_before_the_server_opens_it(repository):
    where = f"--model-repository={repository}"
    made = gateway("keys", "create", "boss", "--role", "admin", where)
    assert made.returncode == 0
    key = made.stdout.strip()
    with served(repository) as (_server, at):
        refused = gateway("models", "list", at)
        assert refused.returncode == 1
        assert "GATEWAY_API_KEY" in refused.stderr
        assert "digits" in ok(gateway("models", "list", at, key=key))
        reader = gateway("keys", "create", "eye", "--role", "viewer", at, key=key)
        listed = json.loads(ok(gateway("keys", "list", "--json", where)))["keys"]
        assert [entry["name"] for entry in listed] == ["boss", "eye"]
        forbidden = gateway("models", "unload", "digits", "3", at, key=reader.stdout.strip())
        assert forbidden.returncode == 1
        ok(gateway("keys", "revoke", listed[1]["id"], "--yes", at, key=key))
        assert gateway("models", "list", at, key=reader.stdout.strip()).returncode == 1
