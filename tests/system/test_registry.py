"""What a server is told stays: over restarts, in either database; and from where versions come to it."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import sys
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway.cli import cli
from tests.system.admin import Admin, answering, copy_digits, infer, until
from tests.system.postgres import postgres_server, postgres_url  # noqa: F401 - fixtures
from tests.system.server import Server

ROUTE = "/models/digits/route"


@pytest.fixture
def repository(tmp_path, digits_repository) -> Path:
    """Version 1 of digits, in a folder that may be written."""
    return copy_digits(digits_repository, tmp_path / "models" / "digits", 1).parent


@pytest.fixture
def incoming(tmp_path, digits_repository) -> Path:
    """A folder of versions 2 and 3, beside the repository."""
    return copy_digits(digits_repository, tmp_path / "incoming" / "digits", 2, 3)


@pytest.fixture
def flags(tmp_path, incoming) -> list[str]:
    """Of a server that may register what is in `incoming`."""
    file = tmp_path / "server.yaml"
    file.write_text(f"model_roots: [{incoming.parent}]\n")
    return ["--config", str(file)]


def keys(*words: str) -> str:
    """What ``gateway keys`` prints; it works on the database of a repository."""
    done = CliRunner().invoke(cli, ["keys", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def refused(*arguments) -> str:
    """What a server that does not start says last."""
    server = Server(*arguments)
    server.launch()
    assert server.process.wait(60) == 1
    return server.wait_for("^gateway: ").string


def test_versions_from_another_folder_share_traffic_as_they_are_told(repository, incoming, flags):
    with Server(repository, *flags) as server:
        admin = Admin(server.admin_url)
        source = {"source": str(incoming / "2")}
        path = "/models/digits/versions/2"
        assert admin.ask("PUT", path, json=source).status_code == 201
        assert admin.ask("PUT", path, json=source).status_code == 200
        other = {"source": "digits/3/model.onnx"}  # found beneath a root
        assert admin.ask("PUT", path, json=other).status_code == 409
        for outside in ("/etc", "../models", "digits/../../server.yaml"):
            assert admin.ask("PUT", path, json={"source": outside}).status_code == 403, outside
        early = {"shares": [{"version": 2, "weight_bp": 10_000}]}
        assert admin.ask("PUT", ROUTE, "*", json=early).status_code == 409  # it is not READY
        admin.do("POST", f"{path}:load")
        shares = [{"version": 1, "weight_bp": 3000}, {"version": 2, "weight_bp": 7000}]
        admin.do("PUT", ROUTE, json={"shares": shares})
        seen = Counter(answering(server) for _ in range(300))
        assert seen.keys() == {"1", "2"}
        assert 170 < seen["2"] < 250  # 210, and five deviations
        sticky = {"shares": shares, "sticky": {"key": "header:user"}}
        admin.do("PUT", ROUTE, json=sticky)
        by_user = [{answering(server, user=f"u{n}") for _ in range(3)} for n in range(20)]
        assert all(len(versions) == 1 for versions in by_user)
        assert len(set.union(*by_user)) == 2


def test_what_was_decided_holds_after_a_restart(repository, digits_repository):
    second = (digits_repository / "digits/2/model.onnx").read_bytes()
    third = (digits_repository / "digits/3/model.onnx").read_bytes()
    label = "/v2/models/digits"
    with Server(repository) as server:
        admin = Admin(server.admin_url)
        admin.upload(2, second)
        admin.upload(3, third)
        admin.do("POST", "/models/digits/versions/2:load")
        admin.do("PUT", "/models/digits/labels/next", json={"version": 2})
        admin.do("PUT", ROUTE, json={"shares": [{"version": 2, "weight_bp": 10_000}]})
        admin.do("POST", "/models/digits/versions/1:unload")
        revision = admin.etag("digits")
        newest = admin.do("GET", "/events?last=1")["next"]
        admin.key = admin.do("POST", "/keys", json={"name": "boss", "role": "admin"})["key"]
    with Server(repository) as server:
        again = Admin(server.admin_url)
        assert again.ask("GET", "/models").status_code == 401
        again.key = admin.key
        assert [again.state(number) for number in (1, 2, 3)] == [
            "REGISTERED",
            "READY",
            "REGISTERED",
        ]
        assert again.etag("digits") == revision
        assert again.do("GET", "/models/digits")["labels"] == {"next": 2}
        assert again.do("GET", ROUTE)["by"] == "hand"
        assert answering(server, label) == "2"
        assert again.upload(3, third).status_code == 200
        assert again.upload(3, second).status_code == 409
        again.do("DELETE", ROUTE)
        (event,) = again.do("GET", "/events?last=1")["events"]
        assert (event["kind"], event["actor"]) == ("route.set", "boss")
        assert event["id"] > newest


def test_a_model_comes_and_goes_by_management_calls(repository, incoming, flags, digits_repository):
    (incoming / "config.yaml").write_text("version_policy: {specific: [2]}\n")
    with Server(repository, *flags) as server:
        admin = Admin(server.admin_url)
        body = {"name": "other", "base_path": str(incoming)}
        made = admin.do("POST", "/v1/models", None, json=body)
        assert _states(made) == {"2": "AVAILABLE", "3": "START"}  # as the folder's settings say
        assert answering(server, "/v2/models/other") == "2"
        shutil.copytree(digits_repository / "digits" / "1", incoming / "4")
        again = admin.do("PUT", "/v1/models/other", None, json={"base_path": str(incoming)})
        assert _states(again) == {"2": "AVAILABLE", "3": "START", "4": "START"}
        assert [one["name"] for one in admin.do("GET", "/v1/models")["models"]] == [
            "digits",
            "other",
        ]
        admin.do("DELETE", "/v1/models/other", None)
        ended = admin.do("GET", "/v1/models/other")
        assert _states(ended) == {"2": "END", "3": "START", "4": "START"}
        assert infer(server, "/v2/models/other").status_code == 503
        admin.do("DELETE", "/models/other")
        assert admin.ask("GET", "/v1/models/other").status_code == 404
        assert infer(server, "/v2/models/other").status_code == 404
        assert not (repository / "other").exists()
        assert answering(server) == "1"


def _states(status: dict) -> dict[str, str]:
    return {version["version"]: version["state"] for version in status["model_version_status"]}


def test_what_is_moved_into_a_watched_repository_is_served(repository, incoming, tmp_path):
    with Server(repository, "--watch-repository") as server:
        admin = Admin(server.admin_url)
        (incoming / "2").rename(repository / "digits" / "2")
        server.wait_for("model 'digits' is loaded")
        assert admin.state(2) == "READY"
        assert answering(server) == "1"  # its settings say so
        (incoming / "config.yaml").unlink()
        incoming.rename(repository / "other")
        server.wait_for("model 'other' is loaded")
        assert answering(server, "/v2/models/other") == "3"


def test_keys_of_the_data_port_are_made_and_revoked_while_it_serves(repository):
    where = f"--model-repository={repository}"
    assert "gateway keys create" in refused(repository, "--data-keys")
    assert "gateway keys create" in refused(repository, "--admin-host", "0.0.0.0")
    keys("create", "boss", "--role=admin", where)
    everything = keys("create", "all", "--role=infer", where)
    with Server(repository, "--data-keys") as server:
        assert infer(server).status_code == 401
        assert infer(server, key="igw_" + "0" * 48).status_code == 401
        assert infer(server, key=everything).status_code == 200
        own = keys("create", "own", "--role=infer", "--model=digits", where)
        until(lambda: infer(server, key=own).status_code == 200)
        foreign = keys("create", "foreign", "--role=infer", "--model=other", where)
        until(lambda: infer(server, key=foreign).status_code == 403)
        admin = Admin(server.admin_url, everything)
        assert admin.ask("GET", "/models").status_code == 403
        keys("revoke", own.split("_")[1], "--yes", where)
        until(lambda: infer(server, key=own).status_code == 401)
        assert infer(server, key=everything).status_code == 200


def test_the_state_may_be_in_postgresql(repository, digits_repository, postgres_url):  # noqa: F811
    flags = "--state", postgres_url
    with Server(repository, *flags) as server:
        admin = Admin(server.admin_url)
        admin.upload(2, (digits_repository / "digits/2/model.onnx").read_bytes())
        steps = [{"weight_bp": 5000, "pause": True, "min_requests": 0}]
        spec = {"canary": 2, "steps": steps, "metrics": [], "abort_keep_warm_s": 0}
        path = "/models/digits/rollouts"
        rollout = admin.do("POST", path, None, json=spec)["id"]
        until(lambda: admin.do("GET", f"{path}/{rollout}")["state"] == "PAUSED")
        server.process.kill()
        server.process.wait()
    with Server(repository, *flags) as server:
        admin = Admin(server.admin_url)
        shown = admin.do("GET", f"{path}/{rollout}")
        assert (shown["state"], shown["step"]) == ("PAUSED", 0)
        until(lambda: answering(server) == "2")
        admin.do("POST", f"{path}/{rollout}:promote")
        until(lambda: admin.do("GET", f"{path}/{rollout}")["state"] == "SUCCEEDED")
        assert {answering(server) for _ in range(20)} == {"2"}
        assert admin.do("GET", "/models/digits")["labels"] == {"stable": 2}
    assert not list(repository.glob(".gateway/state.db"))


@pytest.fixture
def read_only(tmp_path, digits_repository):
    """A repository that nobody may write to."""
    folder = copy_digits(digits_repository, tmp_path / "models" / "digits", 1).parent
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


def test_a_repository_that_cannot_be_written_to_is_served(read_only, tmp_path, digits_repository):
    python = sys.executable
    if os.geteuid() == 0:  # who may write everywhere
        wrapper = tmp_path / "python"
        less = "--bounding-set=-dac_override,-dac_read_search"
        wrapper.write_text(f'#!/bin/sh\nexec setpriv {less} {sys.executable} "$@"\n')
        wrapper.chmod(0o755)
        python = str(wrapper)
    with Server(read_only, python=python) as server:
        server.wait_for("the model repository cannot be written to")
        admin = Admin(server.admin_url)
        assert answering(server) == "1"
        admin.do("PUT", "/models/digits/labels/best", json={"version": 1})
        content = (digits_repository / "digits/2/model.onnx").read_bytes()
        assert admin.upload(2, content).status_code == 503
        source = {"source": "digits/1"}
        assert admin.ask("PUT", "/models/digits/versions/2", json=source).status_code == 503
        assert answering(server) == "1"
        assert server.stop(signal.SIGTERM) == 0
    assert {path.name for path in read_only.iterdir()} == {"digits"}
