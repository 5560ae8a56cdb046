"""``gateway models``, ``rollout`` and ``keys``: what they send, what they show, how they fail.

The server here answers what a test tells it to and remembers what it was asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sys
import threading
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from click.testing import CliRunner

from gateway import cli as command
from gateway.cli import admin_client, rollout_watch
from gateway.control.views import ModelView, VersionView, WorkerView
from gateway.errors import ConfigurationError, Conflict, GatewayError, NotFound, PreconditionFailed
from gateway.rollout.record import Pause, Rollout, RolloutState
from gateway.rollout.spec import RolloutSpec
from gateway.security.keys import key_digest, key_id, make_key
from gateway.store.records import EventRecord, KeyRecord
from gateway.store.store import Store
from tests.unit.fakeplane import AdminPort, FakePlane

CUT = object()
"""An answer that never comes: the connection ends instead."""


@dataclass
class Request:
    """What the server was asked."""

    method: str
    path: str
    query: dict[str, str]
    headers: Message
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


class FakeAdmin:
    """Answers by method and path: each answer once and in its order, the last one for good."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._answers = defaultdict(list)
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do(self) -> None:
                fake._answer(self)

            do_GET = do_POST = do_PUT = do_DELETE = do  # noqa: N815

            def log_message(self, *_) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def on(self, method: str, path: str, *answers, status: int = 200, etag: str = "") -> None:
        """Answers beneath ``/admin/v1``; one that is `CUT` is none."""
        self._answers[method, f"/admin/v1{path}"] += [(status, etag, answer) for answer in answers]

    def of(self, method: str) -> list[Request]:
        return [request for request in self.requests if request.method == method]

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        target = urlsplit(handler.path)
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        query = {name: values[0] for name, values in parse_qs(target.query).items()}
        self.requests.append(Request(handler.command, target.path, query, handler.headers, body))
        answers = self._answers[handler.command, target.path]
        missing = (404, "", {"error": "there is no such thing", "code": "not_found"})
        status, etag, answer = answers.pop(0) if len(answers) > 1 else (answers or [missing])[0]
        handler.close_connection = True
        if answer is CUT:
            return
        raw = b"" if answer is None else json.dumps(answer).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(raw)))
        if etag:
            handler.send_header("ETag", etag)
        handler.end_headers()
        handler.wfile.write(raw)


@pytest.fixture
def admin():
    fake = FakeAdmin()
    yield fake
    fake.close()


@pytest.fixture
def gateway(admin):
    """Runs the command on the fake server; errors of ours are raised."""

    def run(*words: str, on: str = admin.url, stdin: str | None = None):
        return CliRunner().invoke(
            command.cli,
            [*words, "--admin-url", on],
            input=stdin,
            env={"GATEWAY_API_KEY": None},
            catch_exceptions=False,
        )

    return run


def version(number: int, **fields) -> VersionView:
    tensor = {"name": "image", "datatype": "FP32", "shape": [None, 8, 8], "optional": False}
    given = {
        "state": "READY",
        "reason": "",
        "since_s": time.time() - 90,
        "digest": "0123456789abcdef" * 4,
        "nbytes": 41_000,
        "source": "repository",
        "registered_s": 0.0,
        "is_wanted": None,
        "memory_bytes": 12_500_000,
        "traffic_bp": 0,
        "labels": (),
        "signature": {"inputs": [tensor], "outputs": [tensor | {"name": "label"}]},
        "workers": (WorkerView(0, "cpu", 7, True, 0),),
    }
    return VersionView(number=number, **{**given, **fields})


def model(name: str = "digits", **fields) -> dict:
    versions = (
        version(1, traffic_bp=9500, labels=("stable",)),
        version(2, traffic_bp=500),
        version(3, state="FAILED", reason="the file is no model", signature=None, workers=()),
    )
    given = {
        "revision": 7,
        "route": None,
        "route_by": "rollout",
        "labels": {"stable": 1},
        "versions": versions,
        "rollout": None,
    }
    return asdict(ModelView(name=name, **{**given, **fields}))


def spec(**fields) -> RolloutSpec:
    steps = [
        {"weight_bp": 0, "mirror_percent": 100},
        {"weight_bp": 2500, "min_duration_s": 30, "pause": True},
    ]
    return RolloutSpec.model_validate({"canary": 2, "stable": 1, "steps": steps, **fields})


def rollout(state: RolloutState, **fields) -> dict:
    verdict = {"outcome": "fail", "text": "errors 3.1 % (2.4–4.0) against 1.0 % (0.9–1.2): worse"}
    given = {
        "id": "r1",
        "model": "digits",
        "spec": spec(),
        "salt": "x",
        "created_s": time.time() - 100,
        "changed_s": time.time() - 50,
        "step_started_s": time.time() - 50,
        "verdicts": {"errors": verdict},
    }
    return Rollout(state=state, **{**given, **fields}).to_document()


def event(number: int, text: str, actor: str = "gateway") -> dict:
    return asdict(EventRecord(time.time(), "rollout.step", "digits", actor, text, "r1", {}, number))


# What is shown


def test_models_are_listed_page_after_page(admin, gateway):
    admin.on("GET", "/models", {"models": [model("a")], "next": "a"})
    admin.on("GET", "/models", {"models": [model("b")], "next": None})
    done = gateway("models", "list", "--json")
    assert [view["name"] for view in json.loads(done.stdout)["models"]] == ["a", "b"]
    assert [request.query.get("after") for request in admin.requests] == [None, "a"]


def test_a_list_of_models_says_who_answers(admin, gateway):
    admin.on("GET", "/models", {"models": [model()], "next": None})
    (line,) = [line for line in gateway("models", "list").stdout.splitlines() if "digits" in line]
    assert "version 1 95 %, version 2 5 %" in line
    assert "1 READY, 2 READY, 3 FAILED" in line
    assert "stable → 1" in line


def test_a_model_is_shown_with_versions_reasons_and_tensors(admin, gateway):
    admin.on("GET", "/models/digits", model())
    shown = gateway("models", "show", "digits").stdout
    assert "digits: version 1 95 %, version 2 5 %, decided by rollout" in shown
    assert re.search(r"1 +READY +2 min +95 % +stable +1 of 1 +12.5 MB +0123456789ab", shown)
    assert "version 3: the file is no model" in shown
    assert "1, 2: image FP32 [?, 8, 8] → label FP32 [?, 8, 8]" in shown


def test_what_a_server_says_neither_steers_the_terminal_nor_is_markup(admin, gateway):
    hostile = version(1, state="FAILED", reason="\x1b[2J[red]x[/]\nno")
    admin.on("GET", "/models/digits", model(versions=(hostile,)))
    shown = gateway("models", "show", "digits").stdout
    assert "\\x1b[2J[red]x[/]\\nno" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("empty", ["models", "rollouts", "keys"])
def test_empty_lists_say_so(admin, gateway, empty):
    admin.on("GET", f"/{empty}", {empty: [], "next": None})
    words = ("rollout", "history") if empty == "rollouts" else (empty, "list")
    assert gateway(*words).stdout == f"no {empty}\n"


def test_a_rollout_is_shown_with_its_steps_and_figures(admin, gateway):
    paused = rollout(RolloutState.PAUSED, pause=Pause.NO_DATA, step=1, reason="no data of errors")
    admin.on("GET", "/models/digits", model(rollout="r1"))
    admin.on("GET", "/models/digits/rollouts/r1", paused)
    shown = gateway("rollout", "status", "digits").stdout
    assert "digits: rollout of version 1 → 2 PAUSED (no_data)" in shown
    assert "no data of errors" in shown
    assert re.search(r"✓ +1 +100 % +100 copies", shown)
    assert re.search(r"▶ +2 +25 % +100 requests, 30 s, somebody to", shown)
    assert "errors 3.1 % (2.4–4.0) against 1.0 % (0.9–1.2): worse" in shown


def test_without_an_active_rollout_the_newest_is_shown(admin, gateway):
    admin.on("GET", "/models/digits", model())
    admin.on("GET", "/models/digits/rollouts", {"rollouts": [rollout(RolloutState.ABORTED)]})
    done = gateway("rollout", "status", "digits", "--json")
    assert json.loads(done.stdout)["state"] == "ABORTED"
    assert admin.requests[-1].query == {"limit": "1"}


def test_a_model_that_had_no_rollout_is_not_found(admin, gateway):
    admin.on("GET", "/models/digits", model())
    admin.on("GET", "/models/digits/rollouts", {"rollouts": [], "next": None})
    with pytest.raises(NotFound, match="digits had no rollout yet"):
        gateway("rollout", "status", "digits")


def test_history_lists_rollouts(admin, gateway):
    admin.on("GET", "/rollouts", {"rollouts": [rollout(RolloutState.SUCCEEDED)], "next": None})
    shown = gateway("rollout", "history", "--limit", "3").stdout
    assert re.search(r"r1 +digits +1 → 2 +SUCCEEDED +1 of 2 +2 min ago", shown)
    assert admin.requests[0].query == {"limit": "3"}


# What is changed


def test_a_change_is_held_against_what_was_read(admin, gateway):
    admin.on("GET", "/models/digits", model(), etag='"7"')
    admin.on("PUT", "/models/digits/labels/canary", model())
    done = gateway("models", "label", "digits", "canary", "2")
    assert done.stdout == "digits: label canary leads to version 2\n"
    (put,) = admin.of("PUT")
    assert put.headers["If-Match"] == '"7"'
    assert put.json == {"version": 2}


def test_a_stale_change_is_told_in_words(admin, gateway):
    admin.on("GET", "/models/digits", model(), etag='"7"')
    stale = {"error": "there is revision 8 now", "code": "precondition_failed"}
    admin.on("POST", "/models/digits/versions/2:load", stale, status=412)
    with pytest.raises(PreconditionFailed, match=r"nothing was done; look at it and try again"):
        gateway("models", "load", "digits", "2")


def test_a_refusal_is_told_as_the_server_words_it(admin, gateway):
    admin.on("POST", "/models/digits/rollouts", {"error": "a rollout is active"}, status=409)
    with pytest.raises(Conflict, match=r"^a rollout is active$"):
        gateway("rollout", "start", "digits", "--canary", "2")


def test_a_model_that_the_server_does_not_know_yet_can_be_loaded(admin, gateway):
    admin.on("POST", "/models/new:load", model("new"))
    admin.on("GET", "/models/new", model("new"))
    assert "new: version 1 95 %" in gateway("models", "load", "new").stdout
    assert admin.requests[0].headers["If-Match"] == "*"


def test_a_file_is_uploaded_with_its_digest(admin, gateway, tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "model.onnx").write_bytes(content)
    admin.on("PUT", "/models/digits/versions/4", asdict(version(4, state="REGISTERED")), status=201)
    done = gateway("models", "register", "digits", "4", str(tmp_path / "model.onnx"))
    assert done.stdout == "digits version 4 is REGISTERED\n"
    (put,) = admin.requests
    assert put.body == content
    assert put.headers["Content-Type"] == "application/octet-stream"
    assert put.headers["x-content-sha256"] == hashlib.sha256(content).hexdigest()


def test_a_source_is_named_and_loaded(admin, gateway):
    admin.on("PUT", "/models/digits/versions/4", asdict(version(4, state="REGISTERED")))
    admin.on("GET", "/models/digits", model(), etag='"8"')
    admin.on("POST", "/models/digits/versions/4:load", asdict(version(4)))
    done = gateway("models", "register", "digits", "4", "--source", "/m/4.onnx", "--load")
    assert done.stdout == "digits version 4 is READY\n"
    assert admin.of("PUT")[0].json == {"source": "/m/4.onnx"}
    assert admin.of("POST")[0].headers["If-Match"] == '"8"'


@pytest.mark.parametrize("words", [(), ("{file}", "--source", "x")])
def test_a_version_is_registered_from_one_place(gateway, admin, tmp_path, words):
    file = tmp_path / "model.onnx"
    file.touch()
    named = [word.format(file=file) for word in words]
    done = gateway("models", "register", "digits", "4", *named)
    assert done.exit_code == 2
    assert "either FILE or --source is needed" in done.stderr
    assert not admin.requests


@pytest.mark.parametrize(
    ("words", "method", "path"),
    [
        (("models", "delete", "digits"), "DELETE", "/models/digits"),
        (("models", "delete", "digits", "3"), "DELETE", "/models/digits/versions/3"),
        (("models", "unload", "digits"), "POST", "/models/digits:unload"),
        (("keys", "revoke", "0123456789ab"), "DELETE", "/keys/0123456789ab"),
    ],
)
def test_what_destroys_asks_first(admin, gateway, words, method, path):
    admin.on("GET", "/models/digits", model(), etag='"7"')
    admin.on(method, path, asdict(version(3)))
    for stdin in ("n\n", ""):
        refused = gateway(*words, stdin=stdin)
        assert refused.exit_code == 1
        assert refused.stdout == ""
        assert not admin.of(method)
    assert gateway(*words, "--yes").exit_code == 0
    assert gateway(*words, stdin="y\n").exit_code == 0
    assert [request.path for request in admin.of(method)] == [f"/admin/v1{path}"] * 2
    assert all(request.headers["If-Match"] for request in admin.of(method))


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (("pause",), ":pause"),
        (("resume",), ":resume"),
        (("promote",), ":promote"),
        (("promote", "--full"), ":promote"),
        (("abort",), ":abort"),
        (("retry",), ":retry"),
    ],
)
def test_verbs_go_to_the_active_rollout(admin, gateway, words, path):
    told = rollout(RolloutState.ABORTING, reason="aborted by loopback")
    admin.on("GET", "/models/digits", model(rollout="r1"), etag='"9"')
    admin.on("GET", "/models/digits/rollouts/r1", rollout(RolloutState.STEPPING))
    admin.on("POST", f"/models/digits/rollouts/r1{path}", told)
    verb, *flags = words
    done = gateway("rollout", verb, "digits", *flags)
    assert done.stdout == "digits 1 → 2 is ABORTING: aborted by loopback\n"
    (post,) = admin.of("POST")
    assert post.headers["If-Match"] == '"9"'
    assert post.query == ({"full": "true"} if flags else {})


def test_a_lost_answer_to_a_post_is_asked_for_again_under_the_same_key(admin, gateway):
    admin.on("POST", "/models/digits/rollouts", CUT, rollout(RolloutState.PENDING), status=201)
    assert gateway("rollout", "start", "digits", "--canary", "2").exit_code == 0
    first, second = admin.requests
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"]
    assert first.body == second.body


def test_a_lost_answer_to_a_put_is_not_asked_for_again(admin, gateway):
    admin.on("GET", "/models/digits", model(), etag='"7"')
    admin.on("PUT", "/models/digits/labels/canary", CUT, model())
    with pytest.raises(admin_client.Unreachable, match="does not answer"):
        gateway("models", "label", "digits", "canary", "2")
    assert len(admin.of("PUT")) == 1


# Starting a rollout


def started(admin: FakeAdmin, gateway, *words: str) -> dict:
    """The specification that a command line sends; one that a server takes."""
    admin.on("POST", "/models/digits/rollouts", rollout(RolloutState.PENDING), status=201)
    assert gateway("rollout", "start", "digits", *words).exit_code == 0
    sent = admin.of("POST")[-1].json
    RolloutSpec.model_validate(sent)
    return sent


def test_a_plain_rollout_has_three_steps_and_the_servers_defaults(admin, gateway):
    steps = [{"weight_bp": 500}, {"weight_bp": 2500}, {"weight_bp": 5000}]
    assert started(admin, gateway, "--canary", "2") == {"canary": 2, "steps": steps}


def test_options_of_steps_go_to_each_of_them(admin, gateway):
    words = ("--steps", "0,0.5", "--min-requests", "7", "--min-duration", "1.5", "--mirror", "10")
    common = {"min_requests": 7, "min_duration_s": 1.5, "mirror_percent": 10.0}
    assert started(admin, gateway, "--canary", "2", *words)["steps"] == [
        {"weight_bp": 0, **common},
        {"weight_bp": 50, **common},
    ]


def test_agreement_joins_the_metrics_that_there_are(admin, gateway):
    words = ("--canary", "2", "--mirror", "100", "--agreement", "0.9")
    agreement = {"name": "agreement", "source": "agreement", "bound": 0.9}
    plain = started(admin, gateway, *words)
    parsed = RolloutSpec.model_validate(plain)
    defaults = RolloutSpec.model_validate({"canary": 2, "steps": plain["steps"]}).metrics
    assert parsed.metrics[:-1] == defaults
    assert plain["metrics"][-1] == agreement
    chosen = started(admin, gateway, *words, "--metric", "errors=0.02", "--metric", "latency")
    assert chosen["metrics"] == [
        {"name": "errors", "source": "errors", "margin": 0.02},
        {"name": "latency", "source": "latency"},
        agreement,
    ]


def test_options_override_a_file(admin, gateway, tmp_path):
    file = tmp_path / "spec.yaml"
    file.write_text(
        "canary: 2\nsticky: {key: ip}\nconfidence: 0.95\nsteps: [{weight_bp: 100, pause: true}]\n"
    )
    words = ("--canary", "3", "--sticky", "header:x-user", "--min-requests", "5")
    assert started(admin, gateway, "--file", str(file), *words) == {
        "canary": 3,
        "sticky": {"key": "header:x-user"},
        "confidence": 0.95,
        "steps": [{"weight_bp": 100, "pause": True, "min_requests": 5}],
    }


@pytest.mark.parametrize("wrong", ["steps", "metrics"])
@pytest.mark.parametrize("value", ["5", "[5]", "{}"])
def test_a_file_that_cannot_be_added_to_is_one_line(gateway, tmp_path, wrong, value):
    file = tmp_path / "spec.yaml"
    file.write_text(f"canary: 2\n{wrong}: {value}\n")
    with pytest.raises(ConfigurationError, match=f"{wrong}: expected a list of mappings"):
        gateway("rollout", "start", "digits", "--file", str(file), "--mirror=5", "--agreement=1")


def test_a_dry_run_prints_what_would_be_done(admin, gateway):
    admin.on("POST", "/models/digits/rollouts", {"steps": 3})
    done = gateway("rollout", "start", "digits", "--canary", "2", "--dry-run", "--watch")
    assert json.loads(done.stdout) == {"steps": 3}
    assert admin.requests[0].json["dry_run"] is True


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((), "--canary, or canary in --file, is needed"),
        (("--canary", "2", "--steps", "5,x"), "expected percents such as 5,25,50"),
        (("--canary", "2", "--steps", "101"), "expected percents such as 5,25,50"),
        (("--canary", "2", "--steps", "nan"), "expected percents such as 5,25,50"),
        (("--canary", "2", "--metric", "errors=x"), "expected a number after '='"),
        (("--canary", "0"), "not in the range"),
    ],
)
def test_options_that_make_no_sense_are_refused(admin, gateway, words, problem):
    done = gateway("rollout", "start", "digits", *words)
    assert done.exit_code == 2
    assert problem in done.stderr
    assert not admin.requests


# Watching


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(rollout_watch, "POLL_S", 0.0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("end", "status"), [("SUCCEEDED", 0), ("ABORTED", 1), ("FAILED", 1)])
def test_watching_prints_events_once_and_ends_with_the_rollout(admin, gateway, end, status):
    states = [rollout(RolloutState.STEPPING), CUT, CUT, rollout(RolloutState(end))]
    admin.on("POST", "/models/digits/rollouts", rollout(RolloutState.PENDING), status=201)
    admin.on("GET", "/models/digits/rollouts/r1", *states)
    pages = [[event(4, "step 1 of 2")], [], [event(9, "the end", "alice")], []]
    admin.on("GET", "/events", *({"events": page, "next": 0} for page in pages))
    done = gateway("rollout", "start", "digits", "--canary", "2", "--watch")
    assert [line[9:] for line in done.stdout.splitlines()] == ["step 1 of 2", "the end (by alice)"]
    assert done.exit_code == status
    asked = [request.query for request in admin.requests if request.path.endswith("/events")]
    assert [query["after"] for query in asked] == ["0", "4", "4", "9"]
    assert {(query["model"], query["rollout"]) for query in asked} == {("digits", "r1")}


@pytest.mark.usefixtures("impatient")
def test_watching_for_programs_prints_one_document(admin, gateway):
    admin.on("GET", "/models/digits/rollouts/r1", rollout(RolloutState.SUCCEEDED))
    admin.on("GET", "/events", {"events": [event(1, "x")], "next": 1}, {"events": [], "next": 1})
    done = gateway("rollout", "watch", "digits", "r1", "--json")
    assert json.loads(done.stdout)["state"] == "SUCCEEDED"
    assert done.exit_code == 0


@pytest.mark.usefixtures("impatient")
def test_watching_gives_up_on_a_server_that_stays_away(admin, gateway, monkeypatch):
    monkeypatch.setattr(rollout_watch, "PATIENCE_S", 0.0)
    admin.on("GET", "/models/digits/rollouts/r1", rollout(RolloutState.STEPPING), CUT)
    with pytest.raises(admin_client.Unreachable):
        gateway("rollout", "watch", "digits", "r1")


@pytest.mark.usefixtures("impatient")
def test_on_a_terminal_watching_is_a_view(admin, gateway, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    admin.on("GET", "/models/digits/rollouts/r1", rollout(RolloutState.SUCCEEDED))
    admin.on("GET", "/events", {"events": [event(1, "done")], "next": 1}, {"events": [], "next": 1})
    shown = gateway("rollout", "watch", "digits", "r1").stdout
    assert "\x1b[" in shown
    assert "errors 3.1 %" in shown
    assert "done" in shown


# Keys


def keys_of(url: str) -> list[KeyRecord]:
    store = Store(url)
    store.open()
    try:
        return store.keys()
    finally:
        store.close()


@pytest.fixture(params=["state", "model-repository"])
def on_store(request, tmp_path):
    """Options that lead to a database, and its URL."""
    if request.param == "state":
        url = f"sqlite:///{tmp_path}/state.db"
        return ("--state", url), url
    return ("--model-repository", str(tmp_path)), f"sqlite:///{tmp_path}/.gateway/state.db"


def test_a_first_key_is_made_without_a_server(gateway, on_store):
    options, url = on_store
    done = gateway("keys", "create", "boss", "--role", "admin", "--expires", "1h", *options)
    text = done.stdout.removesuffix("\n")
    assert key_id(text)
    assert "Key" in done.stderr
    assert text not in done.stderr
    (record,) = keys_of(url)
    assert (record.id, record.name, record.role, record.models) == (
        key_id(text),
        "boss",
        "admin",
        (),
    )
    assert record.expires_s == pytest.approx(time.time() + 3600, abs=60)
    folder = re.sub(r"^sqlite://", "", url).rpartition("/")[0]
    secret = bytes.fromhex(Path(folder, "secret").read_text())
    assert record.digest == key_digest(secret, text)


def test_stored_keys_are_listed_and_revoked(gateway, on_store):
    options, url = on_store
    made = json.loads(
        gateway(
            "keys", "create", "ci", "--role", "infer", "--model", "a", "--json", *options
        ).stdout
    )
    listed = gateway("keys", "list", *options).stdout
    assert re.search(rf"{made['id']} +ci +infer +a +0 s ago +valid", listed)
    assert made["key"] not in listed
    (shown,) = json.loads(gateway("keys", "list", "--json", *options).stdout)["keys"]
    assert made["key"] not in str(shown)
    assert "digest" not in shown
    done = gateway("keys", "revoke", made["id"], "--yes", *options)
    assert done.stdout == f"key {made['id']} is revoked\n"
    (record,) = keys_of(url)
    assert record.revoked_s is not None
    assert "revoked" in gateway("keys", "list", *options).stdout
    store = Store(url)
    store.open()
    assert [entry.action for entry in store.audit()] == ["key.create", "key.revoke"]
    assert made["key"] not in str(store.audit())
    store.close()


def test_a_stored_key_that_is_not_there_is_not_found(gateway, tmp_path):
    with pytest.raises(NotFound, match="no key with this id"):
        gateway("keys", "revoke", "nobody", "--yes", "--state", f"sqlite:///{tmp_path}/s.db")


def test_a_database_that_is_no_file_needs_the_repository(gateway):
    with pytest.raises(ConfigurationError, match="--model-repository is needed, too"):
        gateway("keys", "list", "--state", "postgresql://nobody@127.0.0.1:1/none")


def test_a_server_makes_keys(admin, gateway):
    text = make_key()[1]
    made = asdict(KeyRecord("ab", "ci", "infer", ("a",), "", 1.0)) | {"key": text}
    admin.on("POST", "/keys", made, status=201)
    done = gateway("keys", "create", "ci", "--role", "infer", "--model", "a")
    assert done.stdout == f"{text}\n"
    (post,) = admin.requests
    assert post.json == {"name": "ci", "role": "infer", "models": ["a"], "expires_s": None}


def test_a_key_whose_only_answer_was_lost_is_told_to_be_made_again(admin, gateway):
    made = asdict(KeyRecord("ab", "ci", "infer", (), "", 1.0)) | {"key": None}
    admin.on("POST", "/keys", CUT, made, status=201)
    with pytest.raises(GatewayError, match="got lost: revoke ab"):
        gateway("keys", "create", "ci", "--role", "infer")


# The way there


def test_a_key_travels_in_the_header_alone(admin, gateway):
    text = make_key()[1]
    admin.on("GET", "/models", {"models": [], "next": None})
    gateway("models", "list", "--key", text)
    (request,) = admin.requests
    assert request.headers["Authorization"] == f"Bearer {text}"
    assert text not in request.path


def test_address_and_key_may_come_from_the_environment(admin):
    text = make_key()[1]
    admin.on("GET", "/models", {"models": [], "next": None})
    environment = {"GATEWAY_ADMIN_URL": admin.url, "GATEWAY_API_KEY": text}
    done = CliRunner().invoke(command.cli, ["models", "list"], env=environment)
    assert done.exit_code == 0
    assert admin.requests[0].headers["Authorization"] == f"Bearer {text}"


def test_what_is_no_key_is_refused_and_not_repeated(gateway):
    with pytest.raises(ConfigurationError, match="expected a key that begins with igw_") as raised:
        gateway("models", "list", "--key", "secret\nx")
    assert "secret" not in raised.value.message


def test_a_server_that_wants_a_key_says_how_to_give_one(admin, gateway):
    admin.on("GET", "/models", {"error": "a key is needed"}, status=401)
    with pytest.raises(GatewayError, match=r"^a key is needed; give a key with --key or GATEWAY_"):
        gateway("models", "list")


def test_an_address_may_have_a_path(admin, gateway):
    with pytest.raises(NotFound, match="there is no such thing"):
        gateway("models", "list", on=f"{admin.url}/base/")
    assert admin.requests[0].path == "/base/admin/v1/models"


def test_an_address_that_is_none_is_one_line(gateway):
    with pytest.raises(ConfigurationError, match="--admin-url: expected host:port"):
        gateway("models", "list", on="ftp://x")


@pytest.mark.parametrize("name", ["../keys", "a/b", "", "é", "a" * 65, "a:unload"])
def test_names_lead_nowhere_else(admin, gateway, name):
    done = gateway("models", "show", name)
    assert done.exit_code == 2
    assert "expected letters, digits" in done.stderr
    assert not admin.requests


def test_something_that_is_no_admin_port_is_told(admin, gateway):
    admin.on("GET", "/models", [1])
    with pytest.raises(GatewayError, match="is it an admin port"):
        gateway("models", "list")


def test_an_error_is_one_line_and_status_1(admin, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gateway", "models", "list", "--admin-url", admin.url])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    assert capsys.readouterr() == ("", "gateway: there is no such thing\n")


# Against the admin port itself


async def test_every_command_fits_the_api(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"another model")
    rollout_words = (
        ("start", "m0", "--canary", "2", "--mirror", "5", "--agreement", "0.9", "--dry-run"),
        ("start", "m0", "--canary", "2", "--sticky", "ip"),
        ("status", "m0"),
        *((verb, "m0") for verb in ("pause", "resume", "promote")),
        ("promote", "m0", "--full"),
        ("abort", "m0"),
        ("history",),
        ("history", "m0"),
    )
    commands = [
        ("models", "list"),
        ("models", "show", "m0"),
        ("models", "register", "m0", "3", str(file), "--load"),
        ("models", "label", "m0", "next", "2"),
        ("models", "label", "m0", "next", "--delete"),
        ("models", "load", "m0"),
        ("models", "unload", "m0", "3"),
        ("models", "delete", "m0", "3", "--yes"),
        ("models", "unload", "m0", "--yes"),
        *(("rollout", *words) for words in rollout_words),
        ("models", "delete", "m0", "--yes"),
    ]
    plane = FakePlane(tmp_path)
    async with AdminPort(plane) as port:
        for words in commands:
            for more in ((), ("--json",)) if words[1] in ("list", "show", "status") else ((),):
                done = await asyncio.to_thread(
                    CliRunner().invoke, command.cli, [*words, *more, "--admin-url", port.url]
                )
                assert done.exit_code == 0, (words, done.output, done.exception)
                assert done.stdout
    assert [call[0] for call in plane.calls] == [
        "register", "load", "set_label", "delete_label", "load_model", "unload",
        "delete_version", "unload_model", "start_rollout", "pause", "resume", "promote",
        "promote_full", "abort", "delete_model",
    ]  # fmt: skip


async def test_keys_fit_the_api(tmp_path):
    plane = FakePlane(tmp_path)
    async with AdminPort(plane) as port:

        async def run(*words: str) -> str:
            done = await asyncio.to_thread(
                CliRunner().invoke, command.cli, ["keys", *words, "--admin-url", port.url]
            )
            assert done.exit_code == 0, done.output
            return done.stdout.strip()

        boss = await run("create", "boss", "--role", "admin", "--expires", "1h")
        assert plane.key_of(boss).name == "boss"
        other = json.loads(
            await run("create", "ci", "--role", "infer", "--model", "m0", "--json", "--key", boss)
        )
        assert plane.key_of(other["key"]).models == ("m0",)
        assert "boss" in await run("list", "--key", boss)
        await run("revoke", other["id"], "--yes", "--key", boss)
        assert plane.key_of(other["key"]) is None
