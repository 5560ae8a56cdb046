"""The admin port of a real server: versions come and go while clients are served, and who may say so."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.system.admin import API, DEADLINE_S, Admin, answering, copy_digits
from tests.system.server import Server


@pytest.fixture
def repository(tmp_path, digits_repository) -> Path:
    """Version 1 of digits, in a folder that may be written."""
    return copy_digits(digits_repository, tmp_path / "models" / "digits", 1).parent


@pytest.fixture
def server(repository) -> Iterator[Server]:
    with Server(repository) as server:
        yield server


@pytest.fixture
def admin(server) -> Admin:
    return Admin(server.admin_url)


@pytest.fixture
def second(digits_repository) -> bytes:
    """The file of version 2."""
    return (digits_repository / "digits" / "2" / "model.onnx").read_bytes()


def test_a_version_is_uploaded_loaded_routed_and_removed(server, admin, second):
    made = admin.upload(2, second)
    assert made.status_code == 201, made.text
    assert made.json()["digest"] == hashlib.sha256(second).hexdigest()
    assert admin.upload(2, second).status_code == 200
    assert admin.upload(2, second + b"\0").status_code == 409
    path = "/models/digits/versions/2"
    assert admin.ask("POST", f"{path}:load").status_code == 428
    loaded = admin.ask("POST", f"{path}:load", admin.etag("digits"))
    assert (loaded.status_code, loaded.json()["state"]) == (200, "READY")
    assert answering(server) == "1"
    label = admin.ask(
        "PUT", "/models/digits/labels/next", loaded.headers["ETag"], json={"version": 2}
    )
    assert label.status_code == 200
    route = {"shares": [{"version": 2, "weight_bp": 10_000}]}
    stale = admin.ask("PUT", "/models/digits/route", loaded.headers["ETag"], json=route)
    assert stale.status_code == 412
    routed = admin.ask("PUT", "/models/digits/route", label.headers["ETag"], json=route)
    assert routed.json()["route_by"] == "hand"
    assert answering(server) == "2"
    assert admin.ask("POST", f"{path}:unload", "*").status_code == 409  # it answers
    assert admin.ask("DELETE", "/models/digits/labels/next", "*").status_code == 200
    assert admin.ask("DELETE", "/models/digits/route", "*").status_code == 200
    assert answering(server) == "1"
    assert admin.ask("POST", f"{path}:unload", "*").status_code == 200
    assert admin.ask("DELETE", path, "*").status_code == 204
    assert admin.ask("GET", path).status_code == 404


def test_a_version_that_does_not_load_changes_nothing(server, admin, repository, second):
    assert admin.upload(5, b"no model at all").status_code == 201
    failed = admin.ask("POST", "/models/digits/versions/5:load", "*")
    assert (failed.status_code, failed.json()["code"]) == (400, "invalid_request")
    shown = admin.do("GET", "/models/digits/versions/5")
    assert shown["state"] == "FAILED"
    assert shown["reason"] in failed.json()["error"]
    assert str(repository) not in failed.json()["error"]
    assert answering(server) == "1"
    kinds = [event["kind"] for event in admin.do("GET", "/events?model=digits&last=2")["events"]]
    assert "version.failed" in kinds
    # Its content cannot be mended, but another may take its number once it is gone.
    assert admin.upload(5, second).status_code == 409
    admin.do("DELETE", "/models/digits/versions/5")
    assert admin.upload(5, second).status_code == 201
    assert admin.do("POST", "/models/digits/versions/5:load")["state"] == "READY"


def test_a_repeated_post_is_answered_again(admin, second):
    admin.upload(2, second)
    headers = {"Idempotency-Key": "load-2"}
    path = "/models/digits/versions/2:load"
    first = admin.ask("POST", path, "*", headers=headers)
    again = admin.ask("POST", path, "*", headers=headers)
    assert (again.status_code, again.json()) == (200, first.json())
    assert again.headers["Idempotency-Replayed"] == "true"


def test_events_are_told_as_they_happen_and_from_where_one_left(admin, second):
    with requests.get(
        f"{admin.url}{API}/events?stream=true", stream=True, timeout=DEADLINE_S
    ) as stream:
        admin.upload(2, second)
        data = (line for line in stream.iter_lines() if line.startswith(b"data: "))
        found = json.loads(next(data).removeprefix(b"data: "))
        while found["model"] != "digits":
            found = json.loads(next(data).removeprefix(b"data: "))
    page = admin.ask("GET", f"/events?after={found['id'] - 1}&limit=1").json()
    assert page["events"] == [found]


def test_the_live_page_tells_what_answers(server, admin):
    answering(server)
    with requests.get(f"{admin.url}{API}/live", stream=True, timeout=DEADLINE_S) as stream:
        line = next(line for line in stream.iter_lines() if line.startswith(b"data: "))
    document = json.loads(line.removeprefix(b"data: "))
    assert [model["name"] for model in document["models"]] == ["digits"]
    assert document["samples"][0]["requests"] >= 1


def test_with_the_first_key_the_door_is_shut(admin):
    made = admin.ask("POST", "/keys", json={"name": "boss", "role": "admin"})
    assert made.status_code == 201
    assert admin.ask("GET", "/models").status_code == 401
    assert requests.get(f"{admin.url}/metrics", timeout=DEADLINE_S).status_code == 401
    assert requests.get(f"{admin.url}/livez", timeout=DEADLINE_S).status_code == 200
    admin.key = made.json()["key"]
    assert admin.ask("GET", "/models").status_code == 200
    session = requests.Session()
    begun = session.post(f"{admin.url}{API}/session", json={"key": admin.key}, timeout=DEADLINE_S)
    assert begun.json() == {"actor": "boss", "role": "admin", "needs_key": False}
    assert session.get(f"{admin.url}{API}/models", timeout=DEADLINE_S).status_code == 200
    audited = admin.ask("GET", "/audit").json()["audit"]
    assert any(made.json()["id"] in json.dumps(entry) for entry in audited)
    assert all(admin.key not in json.dumps(entry) for entry in audited)
    gone = admin.ask("DELETE", f"/keys/{made.json()['id']}", made.headers["ETag"])
    assert gone.status_code == 200


def test_a_folder_is_served_by_one_management_call(server, admin, tmp_path, digits_repository):
    assert admin.ask("GET", "/v1/models/digits").json()["model_version_status"] == [
        {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    ]
    outside = {"name": "other", "base_path": str(digits_repository / "digits")}
    assert admin.ask("POST", "/v1/models", json=outside).status_code == 403
    same = {"name": "digits", "base_path": "digits"}
    assert admin.ask("POST", "/v1/models", json=same).status_code == 409


def test_other_hosts_and_origins_are_refused(admin):
    for headers in ({"Host": "evil.test"}, {"Origin": "http://evil.test"}):
        refused = admin.ask("POST", "/models/digits:unload", "*", headers=headers)
        assert refused.status_code == 403, headers


def test_a_body_that_does_not_end_is_given_back(admin, repository):
    host, port = admin.url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as sock:
        sock.sendall(
            f"PUT {API}/models/digits/versions/9 HTTP/1.1\r\nHost: localhost\r\n"
            "Content-Type: application/octet-stream\r\nContent-Length: 1000\r\n\r\nabc".encode()
        )
        sock.shutdown(socket.SHUT_WR)
        assert b" 201 " not in sock.recv(1000)
    assert admin.ask("GET", "/models/digits/versions/9").status_code == 404
