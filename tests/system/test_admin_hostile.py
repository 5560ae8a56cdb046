"""The admin port in the hands of attackers and of unlucky operators: races, tricks, full disks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.system.admin import DEADLINE_S, Admin, answering, copy_digits, infer, until
from tests.system.server import Server

CLIENTS = 32

ROLLOUTS = "/models/digits/rollouts"

BY_HAND = {
    "canary": 2,
    "steps": [{"weight_bp": 10_000, "pause": True, "min_requests": 0}],
    "metrics": [],
    "abort_keep_warm_s": 0,
}
"""Everything goes to the canary, until somebody says otherwise."""


def make_repository(source: Path, folder: Path) -> Path:
    """Digits: version 1, and version 2, which is not loaded."""
    copy_digits(source, folder / "digits", 1, 2)
    (folder / "digits" / "config.yaml").write_text("version_policy: {specific: [1]}\n")
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory, digits_repository) -> Iterator[Server]:
    """A server that every test leaves as it was: version 1 answers, and no rollout is active."""
    folder = tmp_path_factory.mktemp("hostile") / "models"
    with Server(make_repository(digits_repository, folder)) as server:
        yield server


@pytest.fixture
def server(shared) -> Iterator[Server]:
    yield shared
    admin = Admin(shared.admin_url)
    for rollout in admin.do("GET", ROLLOUTS)["rollouts"]:
        if rollout["state"] not in ("SUCCEEDED", "ABORTED", "FAILED"):
            admin.do("POST", f"{ROLLOUTS}/{rollout['id']}:abort")
    until(lambda: admin.do("GET", "/models/digits")["rollout"] is None)
    assert answering(shared) == "1"


@pytest.fixture
def admin(server) -> Admin:
    return Admin(server.admin_url)


def at_once(ask: Callable[[int], requests.Response]) -> list[int]:
    """The statuses of what `CLIENTS` get who ask in the same moment."""
    with ThreadPoolExecutor(CLIENTS) as clients:
        return [answer.status_code for answer in clients.map(ask, range(CLIENTS))]


def start(admin: Admin) -> str:
    """A rollout that has come to its step."""
    identity = admin.do("POST", ROLLOUTS, json=BY_HAND)["id"]
    until(lambda: admin.do("GET", f"{ROLLOUTS}/{identity}")["state"] == "PAUSED")
    return identity


def ended(admin: Admin, identity: str) -> bool:
    return admin.do("GET", f"{ROLLOUTS}/{identity}")["state"] == "ABORTED"


# Races


def test_of_many_starts_one_succeeds_also_when_another_has_just_ended(admin):
    for _ in range(3):
        statuses = at_once(lambda _: admin.ask("POST", ROLLOUTS, json=BY_HAND))
        assert sorted(statuses) == [201] + [409] * (CLIENTS - 1)
        active = admin.do("GET", "/models/digits")["rollout"]
        admin.do("POST", f"{ROLLOUTS}/{active}:abort")
        until(lambda active=active: ended(admin, active))


def test_a_retry_while_the_canary_is_being_unloaded_goes_on(server, admin):
    identity = start(admin)
    for _ in range(3):
        admin.do("POST", f"{ROLLOUTS}/{identity}:abort")
        until(lambda: ended(admin, identity))
        admin.do("POST", f"{ROLLOUTS}/{identity}:retry")
        until(lambda: admin.do("GET", f"{ROLLOUTS}/{identity}")["state"] == "PAUSED")
        assert answering(server) == "2"


def test_of_many_retries_one_counts(admin):
    identity = start(admin)
    admin.do("POST", f"{ROLLOUTS}/{identity}:abort")
    until(lambda: ended(admin, identity))
    statuses = at_once(lambda _: admin.ask("POST", f"{ROLLOUTS}/{identity}:retry", "*"))
    assert sorted(statuses) == [200] + [409] * (CLIENTS - 1)
    assert admin.do("GET", f"{ROLLOUTS}/{identity}")["attempt"] == 2


def test_of_many_changes_of_one_revision_one_succeeds(admin):
    tag = admin.etag("digits")
    path = "/models/digits/labels/mine"
    statuses = at_once(lambda _: admin.ask("PUT", path, tag, json={"version": 1}))
    assert sorted(statuses) == [200] + [412] * (CLIENTS - 1)
    admin.do("DELETE", path)


def test_commands_in_a_hurry_leave_a_rollout_that_can_be_ended(server, admin):
    identity = start(admin)
    verbs = ("pause", "resume", "promote", "abort")
    statuses = at_once(
        lambda i: admin.ask("POST", f"{ROLLOUTS}/{identity}:{verbs[i % len(verbs)]}", "*")
    )
    assert set(statuses) <= {200, 409}
    until(lambda: admin.do("GET", "/models/digits")["rollout"] is None)
    if admin.do("GET", f"{ROLLOUTS}/{identity}")["state"] == "SUCCEEDED":
        admin.do("DELETE", "/models/digits/route")
        admin.do("POST", "/models/digits/versions/1:load")
        admin.do(
            "PUT", "/models/digits/route", json={"shares": [{"version": 1, "weight_bp": 10_000}]}
        )
    until(lambda: answering(server) == "1")


def test_nothing_that_a_rollout_needs_is_taken_from_it(server, admin):
    start(admin)
    for method, path in (
        ("POST", "/models/digits/versions/1:unload"),
        ("POST", "/models/digits/versions/2:unload"),
        ("DELETE", "/models/digits/versions/2"),
        ("POST", "/models/digits:unload"),
        ("DELETE", "/models/digits"),
        ("PUT", "/models/digits/route"),
    ):
        body = {"shares": [{"version": 1, "weight_bp": 10_000}]} if method == "PUT" else None
        assert admin.ask(method, path, "*", json=body).status_code == 409, (method, path)
    assert answering(server) == "2"


def test_a_rollout_survives_kills_of_what_serves(server, admin):
    start(admin)
    for pid in server.workers():
        os.kill(pid, signal.SIGKILL)
    for pid in server.frontends():
        os.kill(pid, signal.SIGKILL)
    until(lambda: _answers(server))
    assert answering(server) == "2"


def _answers(server: Server) -> bool:
    try:
        return infer(server).ok
    except requests.ConnectionError:  # between two front ends
        return False


def test_an_old_rollout_is_not_taken_up_against_what_answers_now(admin):
    identity = start(admin)
    admin.do("POST", f"{ROLLOUTS}/{identity}:abort")
    until(lambda: ended(admin, identity))
    admin.do("POST", "/models/digits/versions/2:load")
    admin.do("PUT", "/models/digits/route", json={"shares": [{"version": 2, "weight_bp": 10_000}]})
    assert admin.ask("POST", f"{ROLLOUTS}/{identity}:retry", "*").status_code == 409
    spec = BY_HAND | {"stable": 1, "canary": 2}
    assert admin.ask("POST", ROLLOUTS, json=spec).status_code == 409
    admin.do("PUT", "/models/digits/route", json={"shares": [{"version": 1, "weight_bp": 10_000}]})
    until(lambda: admin.ask("POST", "/models/digits/versions/2:unload", "*").ok)


# Tricks


def test_no_source_leads_out_of_the_repository_or_to_what_is_secret(server, admin, tmp_path):
    repository = server.repository
    outside = tmp_path / "model.onnx"
    outside.write_bytes(b"private")
    link = repository / "digits" / "link"
    link.symlink_to(outside)
    secrets = [str(p.relative_to(repository)) for p in (repository / ".gateway").rglob("*")]
    assert secrets
    refused = {
        "/etc/passwd": 403,
        "../../../../../../etc/passwd": 403,
        str(outside): 403,
        "digits/link": 403,
        "digits/1/../../.gateway/state.db": 403,
        "digits": 400,
        "digits/nothing": 400,
        "\0": 400,
        "a" * 5000: 400,
        "": 400,
        **dict.fromkeys(secrets, 403),
        str(repository / ".gateway" / "state.db"): 403,
    }
    found = {
        source: admin.ask("PUT", "/models/digits/versions/9", json={"source": source}).status_code
        for source in refused
    }
    link.unlink()
    assert found == refused


@pytest.mark.parametrize(
    "path",
    [
        "/models/%00", "/models/..%2f..%2fetc", "/models/.gateway", "/models/" + "a" * 65,
        "/models/digits/versions/0", "/models/digits/versions/-1", "/models/digits/versions/1e3",
        "/models/digits/versions/" + "9" * 400, "/models/digits/versions/%D9%A1",
    ],
)  # fmt: skip
def test_names_are_held_to_their_grammar(admin, path):
    assert admin.ask("GET", path).status_code in (400, 404)
    assert admin.ask("DELETE", path, "*").status_code in (400, 404, 405)


@pytest.mark.parametrize("match", ["", "1", '"', '"1", "2"', 'W/"1"', "**", '"' + "9" * 5000 + '"'])
def test_a_revision_that_is_none_changes_nothing(admin, match):
    before = admin.do("GET", "/models/digits")
    answer = admin.ask("PUT", "/models/digits/labels/mine", match, json={"version": 1})
    assert answer.status_code in (400, 412, 428)
    assert admin.do("GET", "/models/digits") == before


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[" * 100_000, b'{"canary": 1e999, "steps": []}', b"\xff", b"null", b"[]",
        b'{"canary": 2, "steps": [{"weight_bp": NaN}]}', b'{"canary": 2, "canary": 2}',
        b'{"canary": ' + b"9" * 10_000 + b', "steps": [{"weight_bp": 1}]}',
    ],
)  # fmt: skip
def test_a_body_that_makes_no_sense_is_refused(admin, body):
    headers = {"Content-Type": "application/json"}
    assert admin.ask("POST", ROLLOUTS, data=body, headers=headers).status_code == 400


def test_a_body_that_is_too_long_is_not_read(admin):
    host, _, port = admin.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as sock:
        sock.sendall(
            f"POST /admin/v1{ROLLOUTS} HTTP/1.1\r\nHost: localhost\r\n"
            "Content-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n".encode()
        )
        assert sock.recv(1000).startswith(b"HTTP/1.1 413 ")


# Misfortune


def test_a_rollout_whose_files_are_gone_at_the_next_start_ends(tmp_path, digits_repository):
    repository = make_repository(digits_repository, tmp_path / "models")
    with Server(repository) as server:
        identity = start(Admin(server.admin_url))
        for pid in (server.pid, *server.frontends(), *server.workers()):
            os.kill(pid, signal.SIGKILL)
        server.process.wait()
    (repository / "digits").rename(
        repository / "other"
    )  # a server without any model does not start
    with Server(repository) as server:
        admin = Admin(server.admin_url)
        until(lambda: ended(admin, identity))
        admin.do("DELETE", "/models/digits")
        assert admin.ask("GET", "/models/digits").status_code == 404


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of a megabyte."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a disk of our own needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(file: Path) -> None:
    """Take all the room that there is left."""
    with file.open("wb", buffering=0) as writer:
        try:
            while True:
                writer.write(bytes(4096))
        except OSError:
            return


def test_a_full_disk_stops_no_roll_back(tmp_path, digits_repository):
    repository = make_repository(digits_repository, tmp_path / "models")
    with (
        small_disk(tmp_path / "disk") as disk,
        Server(repository, GATEWAY_STATE=f"sqlite:///{disk}/state.db") as server,
    ):
        admin = Admin(server.admin_url)
        identity = start(admin)
        assert answering(server) == "2"
        fill(disk / "ballast")
        refused = admin.ask("POST", f"{ROLLOUTS}/{identity}:abort", "*")
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
        assert answering(server) == "1"
        assert not ended(admin, identity)  # it is not written
        (disk / "ballast").unlink()
        until(lambda: ended(admin, identity))
        kinds = [
            event["kind"] for event in admin.do("GET", f"/events?rollout={identity}")["events"]
        ]
        assert kinds[-2:] == ["rollout.aborting", "rollout.aborted"]
        assert answering(server) == "1"
