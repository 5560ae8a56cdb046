"""Who may do what on the admin port: keys, roles, sessions, repeats, and what a browser is kept from."""

from __future__ import annotations

import asyncio
import hashlib
import json

import jwt
import pytest

from gateway.admin.auth import (
    MAX_ADDRESSES,
    MAX_AUDITED,
    MAX_FAILURES,
    WINDOW_S,
    Attempts,
    Guard,
    Identity,
)
from gateway.admin.operations import PREFIX, Answer, Operation
from gateway.admin.replay import Replays
from gateway.errors import Conflict, Forbidden, InvalidRequest, Unavailable
from gateway.security.keys import Role, key_id
from gateway.security.origin import Site, check_origin, is_loopback
from gateway.security.sessions import SESSION_S, issue_session, session_key
from gateway.store.store import AsyncStore, Store
from tests.unit.fakeplane import SECRET, AdminPort, FakePlane, FakeStore

MODELS = f"{PREFIX}/models"


@pytest.fixture
def plane(tmp_path) -> FakePlane:
    return FakePlane(tmp_path, models=2)


@pytest.fixture
async def port(plane):
    async with AdminPort(plane) as port:
        yield port


# Roles

_NEEDED = {
    "viewer": {
        "GET /models", "GET /models/{model}", "GET /models/{model}/versions",
        "GET /models/{model}/versions/{version}", "GET /models/{model}/labels",
        "GET /models/{model}/route", "GET /models/{model}/rollouts",
        "GET /models/{model}/rollouts/{id}", "GET /rollouts", "GET /events", "GET /live",
        "GET /v1/models", "GET /v1/models/{model}",
    },
    "deployer": {
        "POST /models/{model}:load", "POST /models/{model}:unload",
        "PUT /models/{model}/versions/{version}", "POST /models/{model}/versions/{version}:load",
        "POST /models/{model}/versions/{version}:unload", "PUT /models/{model}/labels/{label}",
        "DELETE /models/{model}/labels/{label}", "PUT /models/{model}/route",
        "DELETE /models/{model}/route", "POST /models/{model}/rollouts",
        "POST /models/{model}/rollouts/{id}:pause", "POST /models/{model}/rollouts/{id}:resume",
        "POST /models/{model}/rollouts/{id}:promote", "POST /models/{model}/rollouts/{id}:abort",
        "POST /models/{model}/rollouts/{id}:retry",
        "POST /v1/models", "PUT /v1/models/{model}", "DELETE /v1/models/{model}",
    },
    "admin": {
        "DELETE /models/{model}", "DELETE /models/{model}/versions/{version}", "GET /audit",
        "GET /keys", "POST /keys", "DELETE /keys/{id}",
    },
    None: {"GET /session", "POST /session", "DELETE /session", "GET /openapi.json"},
}  # fmt: skip


def _operations(port: AdminPort) -> list[Operation]:
    return port.server.operations(Guard(port.plane, True))


async def test_every_operation_needs_the_role_that_it_should(port):
    found: dict[str | None, set[str]] = {}
    for operation in _operations(port):
        role = None if operation.role is None else operation.role.value
        path = operation.path.removeprefix(PREFIX)
        found.setdefault(role, set()).add(f"{operation.method} {path}")
    assert found == _NEEDED


async def test_every_route_refuses_the_roles_below_its_own(port, plane):
    keys = {role: plane.add_key(role) for role in ("infer", "viewer", "deployer", "admin")}
    for operation in _operations(port):
        if operation.role is None or operation.path.endswith("/live"):
            continue
        path = operation.path.format(model="m0", version=1, label="l", id=key_id(keys["infer"]))
        assert (await port.ask(operation.method, path)).status == 401
        for role, key in keys.items():
            answer = await port.ask(operation.method, path, key)
            refused = answer.status == 403
            assert refused is not Role(role).covers(operation.role), (operation, role)
    assert {call[-1] for call in plane.calls} == {"deployer", "admin"}


async def test_pages_and_health_are_open_and_metrics_are_not(port, plane):
    assert (await port.ask("GET", "/metrics")).status == 200
    key, narrow = plane.add_key("viewer"), plane.add_key("admin", "m0")
    assert (await port.ask("GET", "/livez")).status == 200
    assert (await port.ask("GET", "/metrics")).status == 401
    assert (await port.ask("GET", "/metrics", key)).body == b"# nothing\n"
    assert (await port.ask("GET", "/metrics", narrow)).status == 403


async def test_a_key_for_some_models_sees_and_touches_those_alone(port, plane):
    key = plane.add_key("admin", "m1")
    plane.add_event("m0")
    plane.add_event("m1")
    for operation in _operations(port):
        path = operation.path.format(model="m0", version=1, label="l", id="r0")
        if operation.is_global or "{model}" in operation.path:
            assert (await port.ask(operation.method, path, key)).status == 403, operation
    assert [m["name"] for m in (await port.ask("GET", MODELS, key)).body["models"]] == ["m1"]
    events = (await port.ask("GET", f"{PREFIX}/events", key)).body
    assert ([event["model"] for event in events["events"]], events["next"]) == (["m1"], 2)
    assert (await port.ask("GET", f"{PREFIX}/events?model=m0", key)).status == 403
    listed = (await port.ask("GET", "/v1/models", key)).body["models"]
    assert [entry["name"] for entry in listed] == ["m1"]
    body = {"name": "m0", "base_path": "x"}
    assert (await port.ask("POST", "/v1/models", key, json=body)).status == 403
    assert plane.calls == []


async def test_a_key_for_some_models_reads_no_files_of_others(port, plane, tmp_path):
    for model in ("m0", "m1"):
        folder = tmp_path / model / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(b"content")
    key = plane.add_key("deployer", "m1", "new")
    version = f"{MODELS}/m1/versions/7"
    for source in ("m0/1/model.onnx", "m0/1"):
        assert (await port.ask("PUT", version, key, json={"source": source})).status == 403
    body = {"name": "new", "base_path": "m0"}
    assert (await port.ask("POST", "/v1/models", key, json=body)).status == 403
    body = {"base_path": "m0"}
    assert (await port.ask("PUT", "/v1/models/m1", key, json=body)).status == 403
    assert (plane.calls, plane.settings_of) == ([], {})
    mine = {"source": "m1/1/model.onnx"}
    assert (await port.ask("PUT", version, key, json=mine)).status == 201


async def test_a_page_of_rollouts_is_of_the_models_that_the_key_is_for(port, plane):
    rollout = {"canary": 2, "steps": [{"weight_bp": 500}]}
    for model in ("m1", "m0"):
        await port.ask("POST", f"{MODELS}/{model}/rollouts", json=rollout)
    key = plane.add_key("viewer", "m1")
    page = (await port.ask("GET", f"{PREFIX}/rollouts?limit=1", key)).body
    assert ([each["model"] for each in page["rollouts"]], page["next"]) == (["m1"], None)


# Keys


async def test_a_key_is_made_told_once_and_revoked(port, plane):
    headers = {"Idempotency-Key": "one"}
    body = {"name": "ci", "role": "admin"}
    made = await port.ask("POST", f"{PREFIX}/keys", json=body, headers=headers)
    assert (made.status, made.body["name"], made.body["models"]) == (201, "ci", [])
    key = made.body["key"]
    assert key not in json.dumps([str(each) for each in plane.store.replays.values()])
    listed = (await port.ask("GET", f"{PREFIX}/keys", key)).body["keys"]
    assert listed == [{**made.body, "key": None}]
    path = f"{PREFIX}/keys/{made.body['id']}"
    assert (await port.ask("DELETE", path, key)).status == 428
    gone = await port.ask("DELETE", path, key, match=made.headers["ETag"])
    assert (gone.status, gone.body["revoked_s"]) == (200, 2.0)
    assert (await port.ask("GET", MODELS, key)).status == 401


async def test_a_key_that_has_ended_cannot_be_made(port):
    body = {"name": "ci", "role": "viewer", "expires_s": 5}
    answer = await port.ask("POST", f"{PREFIX}/keys", json=body)
    assert (answer.status, "expires_s" in answer.body["error"]) == (400, True)


async def test_keys_are_paged(port, plane):
    key = plane.add_key("admin")
    plane.add_key("viewer")
    first = (await port.ask("GET", f"{PREFIX}/keys?limit=1", key)).body
    rest = (await port.ask("GET", f"{PREFIX}/keys?after={first['next']}", key)).body
    assert [each["role"] for each in first["keys"] + rest["keys"]] == ["admin", "viewer"]
    assert (await port.ask("GET", f"{PREFIX}/keys?after=none", key)).status == 400


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer nonsense"},
        {"Authorization": "Basic YTpi"},
        {"Cookie": "gateway_session=nonsense"},
    ],
)
async def test_without_a_key_nothing_is_told(port, plane, headers):
    plane.add_key("viewer")
    answer = await port.ask("GET", MODELS, headers=headers)
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert answer.body["code"] == "unauthorized"


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "Via", "X-Real-IP"])
async def test_a_proxy_on_this_machine_is_not_its_owner(port, header):
    assert (await port.ask("GET", MODELS)).status == 200
    assert (await port.ask("GET", MODELS, headers={header: "x"})).status == 401


async def test_an_open_listener_needs_a_key_from_the_first(plane):
    guard = Guard(plane, is_local=False)
    assert guard._needs_no_key(None) is False


async def test_failed_attempts_are_counted_and_audited(port, plane):
    good = plane.add_key("viewer")
    for _ in range(MAX_FAILURES):
        assert (await port.ask("GET", MODELS, "bad")).status == 401
    limited = await port.ask("GET", MODELS, "bad")
    assert (limited.status, limited.headers["Retry-After"]) == (429, "60")
    assert (await port.ask("POST", f"{PREFIX}/session", json={"key": "bad"})).status == 429
    assert (await port.ask("GET", MODELS, good)).status == 200
    assert [entry.action for entry in plane.store.audit] == ["auth.fail"] * MAX_FAILURES
    assert plane.store.audit[0].resource == "127.0.0.1"


def test_attempts_end_with_their_window_and_keep_to_their_memory():
    now = [0.0]
    attempts = Attempts(lambda: now[0])
    assert [attempts.failed("a") for _ in range(MAX_FAILURES + 1)][-2:] == [False, True]
    assert attempts.failed("b") is False
    now[0] = WINDOW_S
    assert attempts.failed("a") is False
    for number in range(2 * MAX_ADDRESSES):
        attempts.failed(str(number))
    assert len(attempts._failures) == MAX_ADDRESSES
    assert sum(attempts.is_audited() for _ in range(2 * MAX_AUDITED)) == MAX_AUDITED


# Sessions


async def _login(port: AdminPort, key: str, **headers: str):
    body = {"key": key}
    return await port.ask("POST", f"{PREFIX}/session", json=body, headers=headers)


async def test_a_session_is_a_key_in_a_cookie(port, plane):
    key = plane.add_key("deployer")
    nobody = {"actor": None, "role": None, "needs_key": True}
    assert (await port.ask("GET", f"{PREFIX}/session")).body == nobody
    begun = await _login(port, key)
    somebody = {"actor": "deployer", "role": "deployer", "needs_key": False}
    assert (begun.status, begun.body) == (200, somebody)
    cookie = begun.headers["Set-Cookie"]
    assert "; HttpOnly; Max-Age=43200; Path=/; SameSite=Strict" in cookie
    assert "Secure" not in cookie
    assert key not in cookie
    headers = {"Cookie": cookie.partition(";")[0]}
    assert (await port.ask("GET", f"{PREFIX}/session", headers=headers)).body == somebody
    assert (await port.ask("GET", MODELS, headers=headers)).status == 200
    ended = await port.ask("DELETE", f"{PREFIX}/session", headers=headers)
    assert (ended.status, "Max-Age=0" in ended.headers["Set-Cookie"]) == (204, True)
    await plane.revoke_key(key_id(key), "somebody")
    plane.add_key("admin")
    assert (await port.ask("GET", MODELS, headers=headers)).status == 401


async def test_loopback_needs_no_session_while_there_is_no_key(port):
    answer = await port.ask("GET", f"{PREFIX}/session")
    assert answer.body == {"actor": "loopback", "role": "admin", "needs_key": False}


async def test_a_key_for_inference_begins_no_session(port, plane):
    assert (await _login(port, plane.add_key("infer"))).status == 403
    assert (await _login(port, "nonsense")).status == 401


async def test_a_cookie_is_for_tls_alone_where_the_browser_came_by_it(port, plane):
    key = plane.add_key("viewer")
    answer = await _login(port, key, Origin=f"https://127.0.0.1:{port.port}")
    assert "Secure" in answer.headers["Set-Cookie"]


async def test_a_change_by_a_session_must_come_from_our_page(port, plane):
    key = plane.add_key("deployer")
    cookie = (await _login(port, key)).headers["Set-Cookie"].partition(";")[0]

    async def change(**headers: str) -> int:
        headers = {"Cookie": cookie, "If-Match": "*", **headers}
        return (await port.ask("POST", f"{MODELS}/m0:load", headers=headers)).status

    assert await change() == 403
    assert await change(**{"X-Requested-With": "other"}) == 403
    assert await change(**{"X-Requested-With": "gateway"}) == 200
    assert await change(Origin=port.url) == 200
    assert await change(Origin="http://evil.test") == 403
    assert await change(Origin="null") == 403


def test_a_session_is_ours_and_ends():
    token = issue_session(SECRET, "abc", 1000.0)
    assert session_key(SECRET, token, 1000.0 + SESSION_S - 1) == "abc"
    assert session_key(SECRET, token, 1000.0 + SESSION_S) is None
    assert session_key(b"t" * 32, token, 1000.0) is None
    head, body, signature = token.split(".")
    assert session_key(SECRET, f"{head}.{body}.", 1000.0) is None
    assert session_key(SECRET, f"{head}.{body[:-2]}AA.{signature}", 1000.0) is None
    for claims in ({"sub": "abc"}, {"exp": 9999}, {"sub": 5, "exp": 9999}):
        assert session_key(SECRET, jwt.encode(claims, SECRET, "HS256"), 1000.0) is None
    unsigned = jwt.encode({"sub": "abc", "exp": 9999}, None, "none")
    assert session_key(SECRET, unsigned, 1000.0) is None


# Repeats


async def test_a_post_that_is_sent_again_does_nothing_more(port, plane):
    headers = {"Idempotency-Key": "k-1"}
    spec = {"canary": 2, "steps": [{"weight_bp": 500}]}
    path = f"{MODELS}/m0/rollouts"
    first = await port.ask("POST", path, json=spec, headers=headers, match='"3"')
    again = await port.ask("POST", path, json=spec, headers=headers, match='"3"')
    assert (again.status, again.body) == (first.status, first.body) == (201, first.body)
    assert again.headers["ETag"] == first.headers["ETag"]
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"
    assert len(plane.calls) == 1
    other = await port.ask("POST", path, json={**spec, "canary": 3}, headers=headers)
    assert (other.status, other.body["code"]) == (409, "conflict")


async def test_the_store_keeps_answers_and_failed_attempts(port, plane, tmp_path):
    plane.store = store = AsyncStore(Store(f"sqlite:///{tmp_path}/state/state.db"))
    await store.open()
    try:
        headers = {"Idempotency-Key": "k-1"}
        path = f"{MODELS}/m0:load"
        first = await port.ask("POST", path, headers=headers, match='"3"')
        again = await port.ask("POST", path, headers=headers, match='"3"')
        assert (again.status, again.body) == (200, first.body)
        assert again.headers["Idempotency-Replayed"] == "true"
        other = await port.ask("POST", f"{MODELS}/m1:load", headers=headers, match="*")
        assert other.status == 409
        plane.add_key("viewer")
        await port.ask("GET", MODELS, "bad")
        (entry,) = await store.call(Store.audit)
        assert (entry.actor, entry.action) == ("unknown", "auth.fail")
    finally:
        await store.close()


async def test_a_refused_post_may_be_sent_again(port, plane):
    headers = {"Idempotency-Key": "k-1"}
    path = f"{MODELS}/m0:unload"
    assert (await port.ask("POST", path, headers=headers, match='"2"')).status == 412
    assert (await port.ask("POST", path, headers=headers, match='"3"')).status == 200
    assert (await port.ask("POST", path, headers=headers, match='"3"')).status == 200
    assert len(plane.calls) == 1


async def test_the_keys_of_two_callers_are_two(port, plane):
    headers = {"Idempotency-Key": "same"}
    for key in (plane.add_key("admin"), plane.add_key("admin")):
        answer = await port.ask("POST", f"{MODELS}/m0:load", key, headers=headers, match="*")
        assert "Idempotency-Replayed" not in answer.headers
    assert len(plane.calls) == 2


@pytest.mark.parametrize("key", ["", "a b", "x" * 129, "é"])
async def test_an_idempotency_key_is_visible_ascii(port, plane, key):
    headers = {"Idempotency-Key": key}
    answer = await port.ask("POST", f"{MODELS}/m0:load", headers=headers, match="*")
    assert (answer.status, plane.calls) == (400, [])


async def test_what_failed_half_way_is_not_done_again(port, plane, caplog):
    async def fails(*_arguments):
        plane.calls.append("tried")
        raise RuntimeError("half way")

    plane.load_model = fails
    headers = {"Idempotency-Key": "k"}
    for _ in range(2):
        answer = await port.ask("POST", f"{MODELS}/m0:load", headers=headers, match="*")
        assert (answer.status, answer.body["code"]) == (500, "internal")
    assert plane.calls == ["tried"]
    assert caplog.records[-1].message == "a handler failed"


class Failing(FakeStore):
    """A store that gives no answer to some calls."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: set[str] = set()

    async def call(self, method, *args):
        if method.__name__ in self.fails:
            raise Unavailable("the state database gives no answer")
        return await super().call(method, *args)


@pytest.mark.parametrize(("match", "status"), [('"2"', 412), ('"3"', 200)])
async def test_a_key_is_not_stuck_because_the_store_failed(port, plane, match, status):
    plane.store = store = Failing()
    headers, path = {"Idempotency-Key": "k"}, f"{MODELS}/m0:unload"
    store.fails = {"forget", "answered"}
    first = await port.ask("POST", path, headers=headers, match=match)
    assert first.status == status
    assert (await port.ask("POST", path, headers=headers, match='"3"')).status == 503
    store.fails = set()
    again = await port.ask("POST", path, headers=headers, match='"3"')
    assert again.status == 200
    assert ("Idempotency-Replayed" in again.headers) == (status == 200)
    assert len(plane.calls) == 1


async def test_an_answer_is_kept_although_the_client_has_gone(plane):
    class Request:
        headers = _Headers({"Idempotency-Key": "k"})
        method, path_qs = "POST", "/x"

    begun, go, answered = asyncio.Event(), asyncio.Event(), asyncio.Event()
    keep = plane.store.answered
    plane.store.answered = lambda *arguments: (keep(*arguments), answered.set())

    async def act():
        begun.set()
        await go.wait()
        return Answer({"done": 1})

    caller, replays = Identity("a", Role.ADMIN), Replays(plane)
    task = asyncio.ensure_future(replays.once(Request, caller, b"", act))
    await begun.wait()
    with pytest.raises(Conflict):
        await replays.once(Request, caller, b"", act)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    digest = hashlib.sha256(b"POST /x\n").hexdigest()
    await answered.wait()
    kept = plane.store.replays["a", "k"]
    assert (kept.request, kept.status, kept.body["document"]) == (digest, 200, {"done": 1})


class _Headers(dict):
    def getall(self, name, default):
        return [self[name]] if name in self else default


# Browsers


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8081", "127.0.0.1", "localhost", "LOCALHOST:1", "[::1]:8081", "10.0.0.1", "here"],
)
def test_a_local_port_answers_to_addresses_and_its_own_name(host):
    Site("here", is_loopback=True).check_host([host])


@pytest.mark.parametrize("host", ["evil.test", "evil.test:8081", "127.0.0.1.evil.test", "a.b"])
def test_a_local_port_does_not_answer_to_other_names(host):
    with pytest.raises(Forbidden):
        Site("127.0.0.1", is_loopback=True).check_host([host])
    Site("0.0.0.0", is_loopback=False).check_host([host])  # keys are needed there


@pytest.mark.parametrize("hosts", [["a b"], ["u@a"], [""], ["a/x"], ["a", "a"], ["a:x"], ["[::1"]])
def test_a_host_that_is_none_is_refused(hosts):
    with pytest.raises(InvalidRequest):
        Site("127.0.0.1", is_loopback=False).check_host(hosts)


@pytest.mark.parametrize(
    ("method", "origin", "site", "mode", "is_refused"),
    [
        ("GET", None, None, None, False),
        ("POST", None, None, None, False),
        ("POST", "http://h:1", "same-origin", "cors", False),
        ("POST", "https://h:1", None, None, False),
        ("POST", "HTTP://h:1", None, None, True),  # browsers write it small
        ("POST", "http://h:2", None, None, True),
        ("POST", "http://h:1.evil.test", None, None, True),
        ("POST", "ftp://h:1", None, None, True),
        ("POST", "null", None, None, True),
        ("PUT", None, "cross-site", "cors", True),
        ("GET", None, "cross-site", "cors", True),
        ("GET", None, "cross-site", "navigate", False),
        ("POST", None, "cross-site", "navigate", True),
        ("GET", "http://evil.test", "same-site", "cors", False),
    ],
)
def test_what_other_sites_send_is_refused(method, origin, site, mode, is_refused):
    if is_refused:
        with pytest.raises(Forbidden):
            check_origin(method, "h:1", origin, site, mode)
    else:
        check_origin(method, "h:1", origin, site, mode)


@pytest.mark.parametrize(
    ("address", "is_ours"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:10.0.0.1", False),
        ("0.0.0.0", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("nonsense", False),
    ],
)
def test_loopback_is_this_machine_alone(address, is_ours):
    assert is_loopback(address) is is_ours


async def test_hostile_requests_reach_no_handler(port, plane):
    for headers in (
        {"Host": "evil.test"},
        {"Origin": "http://evil.test"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        answer = await port.ask("POST", f"{MODELS}/m0:load", headers=headers, match="*")
        assert (answer.status, answer.body["code"]) == (403, "forbidden")
    assert plane.calls == []


@pytest.mark.parametrize("path", ["/livez", MODELS, "/nothing", f"{PREFIX}/events?stream=true"])
async def test_every_answer_tells_browsers_what_it_may_do(port, path):
    async with port.session.get(path) as answer:
        headers = answer.headers
        assert headers["Content-Security-Policy"].startswith(
            "default-src 'none'; script-src 'self'"
        )
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Server"] == "inference-gateway"


async def test_what_cannot_be_read_is_refused_without_repeating_it(port):
    reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nsecret bytes\r\n\r\n")
    answer = await reader.read()
    writer.close()
    assert b" 400 Bad Request\r\n" in answer
    assert b"secret" not in answer
    assert answer.endswith(b'{"error":"Bad Request","code":"bad_request"}')
