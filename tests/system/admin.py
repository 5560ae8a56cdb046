"""Asks the admin port of a real server, and the data port what came of it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import requests

from tests.system.server import Server

DEADLINE_S = 60
API = "/admin/v1"

IMAGE = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 8, 8], "data": [0.0] * 64}]}


class Admin:
    """Asks a server's admin port; ``key`` is sent where there is one."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url
        self.key = key

    def ask(self, method: str, path: str, match: str | None = None, **more) -> requests.Response:
        headers = dict(more.pop("headers", {}))
        if match is not None:
            headers["If-Match"] = match
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        url = self.url + (path if path.startswith("/v1") else API + path)
        return requests.request(method, url, headers=headers, timeout=DEADLINE_S, **more)

    def do(self, method: str, path: str, match: str | None = "*", **more) -> dict:
        """Ask for what must succeed; the document, empty where there is none."""
        answer = self.ask(method, path, match, **more)
        assert answer.ok, answer.text
        return answer.json() if answer.content else {}

    def etag(self, model: str) -> str:
        return self.ask("GET", f"/models/{model}").headers["ETag"]

    def upload(self, version: int, content: bytes) -> requests.Response:
        """Register a version of digits by its file."""
        headers = {
            "Content-Type": "application/octet-stream",
            "x-content-sha256": hashlib.sha256(content).hexdigest(),
        }
        path = f"/models/digits/versions/{version}"
        return self.ask("PUT", path, data=content, headers=headers)

    def state(self, version: int, model: str = "digits") -> str:
        return self.do("GET", f"/models/{model}/versions/{version}")["state"]


def copy_digits(source: Path, folder: Path, *versions: int) -> Path:
    """A folder of the model with some of its versions."""
    folder.mkdir(parents=True)
    shutil.copy(source / "digits" / "config.yaml", folder)
    for version in versions:
        shutil.copytree(source / "digits" / str(version), folder / str(version))
    return folder


def infer(
    server: Server, path: str = "/v2/models/digits", key: str | None = None, **headers: str
) -> requests.Response:
    """One inference."""
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    url = f"{server.url}{path}/infer"
    return requests.post(url, json=IMAGE, headers=headers, timeout=DEADLINE_S)


def answering(server: Server, path: str = "/v2/models/digits", **headers: str) -> str:
    """The version that answers an inference."""
    answer = infer(server, path, **headers)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-model-version"]


def until(something: Callable[[], bool]) -> None:
    """Ask again and again: what asks waits for its answers."""
    deadline_s = monotonic() + DEADLINE_S
    while not something():
        assert monotonic() < deadline_s, "it did not come about"
