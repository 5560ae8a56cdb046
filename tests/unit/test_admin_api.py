"""The admin API's resources: what each operation asks of the control plane and answers."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.admin.auth import Guard
from gateway.admin.endpoint import MAX_BODY_BYTES
from gateway.admin.operations import PREFIX, Match
from gateway.serving.routing import ModelRoute, Pin, Share, Sticky
from tests.unit.fakeplane import AdminPort, FakePlane, version_view

SPEC = {"canary": 2, "steps": [{"weight_bp": 500}]}


@pytest.fixture
def plane(tmp_path) -> FakePlane:
    return FakePlane(tmp_path)


@pytest.fixture
async def port(plane):
    async with AdminPort(plane, max_artifact_bytes=4096) as port:
        yield port


# Reading


async def test_models_are_listed_page_by_page(port, plane):
    for name in ("a", "b", "c"):
        plane.add_model(name)
    found, after = [], None
    for _ in range(2):
        query = {"limit": 2} if after is None else {"limit": 2, "after": after}
        page = (await port.ask("GET", f"{PREFIX}/models", params=query)).body
        found += [model["name"] for model in page["models"]]
        after = page["next"]
    assert found == ["a", "b", "c", "m0"]
    assert after is None


async def test_a_model_has_its_revision_as_etag(port):
    answer = await port.ask("GET", f"{PREFIX}/models/m0")
    assert answer.status == 200
    assert answer.headers["ETag"] == '"3"'
    assert answer.body["revision"] == 3
    assert [version["number"] for version in answer.body["versions"]] == [1, 2]
    assert answer.body["versions"][0]["workers"][0]["device"] == "cpu"


async def test_versions_are_paged_by_number(port):
    path = f"{PREFIX}/models/m0/versions"
    first = (await port.ask("GET", path, params={"limit": 1})).body
    assert [v["number"] for v in first["versions"]] == [1]
    rest = (await port.ask("GET", path, params={"after": first["next"]})).body
    assert [v["number"] for v in rest["versions"]] == [2]
    assert rest["next"] is None
    assert (await port.ask("GET", f"{path}/2")).body["state"] == "READY"
    assert (await port.ask("GET", f"{path}/9")).status == 404


@pytest.mark.parametrize(
    "path",
    [
        "/models/-m0",
        "/models/%00",
        "/models/a%2Fb",
        "/models/m0/versions/0",
        "/models/m0/versions/01",
        "/models/m0/versions/x",
        "/models/m0/versions/9223372036854775808",
        "/models?limit=0",
        "/models?limit=1001",
        "/models?limit=1&limit=2",
        "/models?nothing=1",
        "/events?after=-1",
        "/events?model=-",
    ],
)
async def test_names_and_queries_are_held_to_their_grammar(port, path):
    answer = await port.ask("GET", PREFIX + path)
    assert (answer.status, answer.body["code"]) == (400, "invalid_request")


async def test_an_unknown_path_or_method_is_refused_in_json(port):
    assert (await port.ask("GET", f"{PREFIX}/nothing")).body == {
        "error": "Not Found",
        "code": "not_found",
    }
    answer = await port.ask("PATCH", f"{PREFIX}/models")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET")


# Versions


async def test_a_version_is_registered_by_path_once(port, plane, tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"one")
    path = f"{PREFIX}/models/new/versions/7"
    made = await port.ask("PUT", path, json={"source": "a.onnx"})
    assert (made.status, made.body["state"]) == (201, "REGISTERED")
    assert made.headers["ETag"] == '"4"'
    assert (await port.ask("PUT", path, json={"source": "a.onnx"})).status == 200
    (tmp_path / "b.onnx").write_bytes(b"two")
    assert (await port.ask("PUT", path, json={"source": "b.onnx"})).status == 409
    assert (await port.ask("PUT", path, json={"source": "../b.onnx"})).status == 403
    assert plane.calls[0] == ("register", "new", 7, "a.onnx", "loopback")


async def test_a_version_is_uploaded_with_its_digest(port, plane, tmp_path):
    path = f"{PREFIX}/models/new/versions/1"
    content = b"x" * 4096
    headers = {
        "Content-Type": "application/octet-stream",
        "x-content-sha256": hashlib.sha256(content).hexdigest(),
    }
    made = await port.ask("PUT", path, data=content, headers=headers)
    assert (made.status, made.body["digest"]) == (201, headers["x-content-sha256"])
    assert plane.files["new", 1] == content
    assert (await port.ask("PUT", path, data=content, headers=headers)).status == 200
    wrong = await port.ask("PUT", path, data=b"y", headers=headers)
    assert (wrong.status, list(tmp_path.iterdir())) == (400, [])


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"x" * 4097, {}, 413),
        (b"", {}, 400),
        (b"x", {"x-content-sha256": "abc"}, 400),
        (b"x", {"Content-Encoding": "gzip"}, 415),
        (b"x", {"If-Match": '"9"'}, 412),
    ],
)
async def test_an_upload_that_is_wrong_leaves_nothing(port, tmp_path, content, headers, status):
    headers = {"Content-Type": "application/octet-stream", **headers}

    async def pieces():
        yield content

    for data in (content, pieces()):  # with a length, and in chunks
        path = f"{PREFIX}/models/m0/versions/3"
        answer = await port.ask("PUT", path, data=data, headers=headers, skip_auto_headers=[])
        assert answer.status == status
    assert list(tmp_path.iterdir()) == []


async def test_an_upload_that_is_refused_is_not_asked_for(port):
    headers = {"Content-Type": "application/octet-stream"}
    answer = await port.ask(
        "PUT",
        f"{PREFIX}/models/m0/versions/3",
        data=b"x" * 5000,
        headers=headers,
        expect100=True,
    )
    assert answer.status == 413


# Changes, and what they are held against


CHANGES = [
    ("POST", "/models/m0:load", None, ("load_model", "m0", "loopback")),
    ("POST", "/models/m0:unload", None, ("unload_model", "m0", "loopback")),
    ("POST", "/models/m0/versions/2:load", None, ("load", "m0", 2, "loopback")),
    ("POST", "/models/m0/versions/2:unload", None, ("unload", "m0", 2, "loopback")),
    ("DELETE", "/models/m0/versions/2", None, ("delete_version", "m0", 2, "loopback")),
    ("PUT", "/models/m0/labels/l", {"version": 2}, ("set_label", "m0", "l", 2, "loopback")),
    ("DELETE", "/models/m0/labels/l", None, ("delete_label", "m0", "l", "loopback")),
    (
        "PUT",
        "/models/m0/route",
        {"shares": [{"version": 1, "weight_bp": 10_000}]},
        ("set_route", "m0", ModelRoute.to(1), "loopback"),
    ),
    ("DELETE", "/models/m0/route", None, ("set_route", "m0", None, "loopback")),
    ("DELETE", "/models/m0", None, ("delete_model", "m0", "loopback")),
]


@pytest.mark.parametrize(("method", "path", "body", "call"), CHANGES)
async def test_a_change_is_held_against_the_revision(port, plane, method, path, body, call):
    async def change(match):
        return await port.ask(method, PREFIX + path, json=body, match=match)

    missing = await change(None)
    assert (missing.status, missing.body["code"]) == (428, "precondition_required")
    stale = await change('"2"')
    assert (stale.status, stale.body["code"]) == (412, "precondition_failed")
    assert (await change("3")).status == 400
    assert (await change('"3", "4"')).status == 400
    assert (await change('W/"3"')).status == 400
    assert plane.calls == []
    done = await change('"3"')
    assert done.status in (200, 204)
    assert plane.calls == [call]


@pytest.mark.parametrize(("method", "path", "body", "call"), CHANGES)
async def test_any_revision_will_do_where_the_client_says_so(port, method, path, body, call):
    assert (await port.ask(method, PREFIX + path, json=body, match="*")).status in (200, 204)


@pytest.mark.parametrize(("method", "path", "body", "_call"), CHANGES)
async def test_an_unknown_model_is_not_found(port, method, path, body, _call):
    path = path.replace("m0", "unknown")
    expected = 200 if path == "/models/unknown:load" else 404  # it may be in the repository
    assert (await port.ask(method, PREFIX + path, json=body)).status == expected


async def test_answers_to_changes_have_the_new_revision(port):
    answer = await port.ask(
        "PUT", f"{PREFIX}/models/m0/labels/stable", json={"version": 1}, match='"3"'
    )
    assert (answer.headers["ETag"], answer.body["labels"]) == ('"4"', {"stable": 1})
    labels = await port.ask("GET", f"{PREFIX}/models/m0/labels")
    assert labels.body == {"labels": [{"label": "stable", "version": 1}], "next": None}


ROUTE = {
    "shares": [{"version": 2, "weight_bp": 500}, {"version": 1, "weight_bp": 9500}],
    "sticky": {"key": "header:X-User", "salt": "pepper"},
    "match": [{"header": "X-Canary", "value": "yes", "version": 2}],
}


async def test_a_route_is_put_and_read_in_the_same_form(port, plane):
    path = f"{PREFIX}/models/m0/route"
    assert (await port.ask("PUT", path, json=ROUTE, match="*")).status == 200
    assert plane.calls[0][2] == ModelRoute(
        shares=(Share(2, 500), Share(1, 9500)),
        salt="pepper",
        sticky=Sticky("header", "x-user"),
        pins=(Pin("x-canary", "yes", 2),),
    )
    read = (await port.ask("GET", path)).body
    assert read.pop("by") == "hand"
    assert read.pop("shadow") is None
    assert (await port.ask("PUT", path, json=read, match="*")).status == 200
    assert plane.calls[1][2] == plane.calls[0][2]


async def test_a_route_without_a_salt_keeps_the_one_that_there_is(port, plane):
    path = f"{PREFIX}/models/m0/route"
    await port.ask("PUT", path, json=ROUTE, match="*")
    await port.ask("PUT", path, json={**ROUTE, "sticky": {"key": "ip"}}, match="*")
    assert plane.calls[1][2].salt == "pepper"


# Bodies


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("/models/m0/labels/l", '{"version": 2, "weight": 1}', "unknown field 'weight'"),
        ("/models/m0/labels/l", '{"version": 2, "a b": 1}', "unknown field"),
        ("/models/m0/labels/l", "{}", "version: is required"),
        ("/models/m0/labels/l", '{"version": "2"}', "version: Input should be a valid integer"),
        ("/models/m0/labels/l", "[]", "must be a JSON object"),
        ("/models/m0/labels/l", "nonsense", "malformed JSON"),
        ("/models/m0/labels/l", '{"version": 2', "malformed JSON"),
        ("/models/m0/route", '{"shares": [{"version": 1, "weight_bp": 1}]}', "sum to 10000"),
        (
            "/models/m0/route",
            '{"shares": [{"version": 1, "weight_bp": 10000, "slice": 1}]}',
            "shares.0: unknown field 'slice'",
        ),
    ],
)
async def test_a_wrong_body_is_refused_by_field(port, plane, path, body, text):
    headers = {"Content-Type": "application/json"}
    answer = await port.ask("PUT", PREFIX + path, data=body, headers=headers, match="*")
    assert (answer.status, answer.body["code"]) == (400, "invalid_request")
    assert text in answer.body["error"]
    assert plane.calls == []


async def test_a_verb_takes_no_fields(port, plane):
    answer = await port.ask("POST", f"{PREFIX}/models/m0:load", json={"force": True}, match="*")
    assert (answer.status, answer.body["error"]) == (400, "unknown field 'force'")
    assert (await port.ask("POST", f"{PREFIX}/models/m0:load", json={}, match="*")).status == 200


async def test_a_body_is_json_and_not_too_long(port):
    path = f"{PREFIX}/models/m0/labels/l"
    assert (await port.ask("PUT", path, data=b"{}", match="*")).status == 415
    is_json = {"Content-Type": "application/json"}
    long = io.BytesIO(b'{"version":' + b" " * MAX_BODY_BYTES + b"2}")
    assert (await port.ask("PUT", path, data=long, headers=is_json, match="*")).status == 413
    packed = {**is_json, "Content-Encoding": "deflate"}
    assert (await port.ask("PUT", path, data=b"{}", headers=packed, match="*")).status == 415


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(["keys", "models/m0/rollouts", "models/m0/labels/l", "models/m0/route"]),
    st.binary(max_size=40)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
)
def test_no_refusal_repeats_what_came(tmp_path, path, junk):
    marker = "Zq7xWv"
    body = json.dumps({marker + " ": marker, "steps": marker, "shares": [marker], "name": marker})

    async def run() -> None:
        async with AdminPort(FakePlane(tmp_path)) as port:
            method = "PUT" if "/l" in path or path.endswith("route") else "POST"
            headers = {"Content-Type": "application/json", "If-Match": "*"}
            for sent in (junk, body.encode(), junk + marker.encode()):
                answer = await port.ask(method, f"{PREFIX}/{path}", data=sent, headers=headers)
                assert 400 <= answer.status < 500
                assert marker not in json.dumps(answer.body)

    asyncio.run(run())


# Rollouts and the rest


async def test_a_rollout_is_started_commanded_and_ended(port, plane):
    path = f"{PREFIX}/models/m0/rollouts"
    made = await port.ask("POST", path, json=SPEC)
    assert (made.status, made.body["state"], made.body["spec"]["stable"]) == (201, "PENDING", 1)
    assert (await port.ask("POST", path, json=SPEC)).status == 409
    one = f"{path}/{made.body['id']}"
    assert (await port.ask("GET", one)).body == made.body
    revision = made.headers["ETag"]
    for verb, did in [
        ("pause", "pause"),
        ("resume", "resume"),
        ("promote", "promote"),
        ("promote?full=true", "promote_full"),
        ("retry", "retry"),
        ("abort", "abort"),
    ]:
        assert (await port.ask("POST", f"{one}:{verb}")).status == 428
        done = await port.ask("POST", f"{one}:{verb}", match=revision)
        assert (done.status, plane.calls[-1][0]) == (200, did)
        revision = done.headers["ETag"]
    assert (await port.ask("POST", f"{one}:pause", match="*")).status == 409
    assert (await port.ask("POST", f"{one}:explode", match="*")).status == 404
    assert (await port.ask("POST", f"{one}:pause?full=true", match="*")).status == 400


async def test_a_dry_run_starts_nothing(port, plane):
    path = f"{PREFIX}/models/m0/rollouts"
    answer = await port.ask("POST", path, json={**SPEC, "dry_run": True})
    assert (answer.status, answer.body) == (200, {"would": "do", "canary": 2})
    assert plane.calls == []


async def test_rollouts_are_paged_newest_first(port, plane):
    for name in ("a", "b", "c"):
        plane.add_model(name)
        await port.ask("POST", f"{PREFIX}/models/{name}/rollouts", json=SPEC)
    first = (await port.ask("GET", f"{PREFIX}/rollouts?limit=2")).body
    assert [each["model"] for each in first["rollouts"]] == ["c", "b"]
    rest = (await port.ask("GET", f"{PREFIX}/rollouts?after={first['next']}")).body
    assert ([each["model"] for each in rest["rollouts"]], rest["next"]) == (["a"], None)
    assert (await port.ask("GET", f"{PREFIX}/models/unknown/rollouts")).status == 404


async def test_the_audit_log_is_paged(port):
    answer = await port.ask("GET", f"{PREFIX}/audit?after=1")
    assert [entry["id"] for entry in answer.body["audit"]] == [2]
    assert answer.body["next"] == 2


# The document


async def test_the_document_describes_every_operation(port):
    app = port.server.application()
    document = (await port.ask("GET", f"{PREFIX}/openapi.json")).body
    assert document["openapi"].startswith("3.1.")
    registered = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource.canonical.startswith(("/admin/v1/", "/v1/"))
        and route.resource.canonical != f"{PREFIX}/docs"
    }
    described = {
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    }
    assert registered == described


async def test_the_document_holds_together(port):
    document = (await port.ask("GET", f"{PREFIX}/openapi.json")).body
    schemas = document["components"]["schemas"]
    references = set(_references(document))
    assert references
    assert {name.rpartition("/")[2] for name in references} <= schemas.keys()
    identities = []
    for path, methods in document["paths"].items():
        for operation in methods.values():
            identities.append(operation["operationId"])
            named = [p["name"] for p in operation["parameters"] if p["in"] == "path"]
            assert all("{" + name + "}" in path for name in named)
            assert path.count("{") == len(named)
            assert operation["summary"]
            assert any(status.startswith("2") for status in operation["responses"])
    assert len(set(identities)) == len(identities)


async def test_a_rollout_is_described_as_it_is_answered(port):
    document = (await port.ask("GET", f"{PREFIX}/openapi.json")).body
    made = await port.ask("POST", f"{PREFIX}/models/m0/rollouts", json=SPEC)
    described = document["components"]["schemas"]["Rollout"]["properties"]
    assert described.keys() == made.body.keys()


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/", "text/html"),
        (f"{PREFIX}/docs", "text/html"),
        ("/static/app.js", "text/javascript"),
        ("/static/style.css", "text/css"),
    ],
)
async def test_the_pages_are_served_from_the_package(port, path, content_type):
    answer = await port.ask("GET", path)
    assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-cache")
    assert answer.headers["Content-Type"] == f"{content_type}; charset=utf-8"


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fserver.py", "__init__.py", ""])
async def test_nothing_else_is_served(port, name):
    assert (await port.ask("GET", f"/static/{name}")).status == 404


async def test_the_table_needs_if_match_wherever_something_is_changed(port, plane):
    exempt = {"/admin/v1/session", "/admin/v1/keys", "/admin/v1/models/{model}/rollouts"}
    for operation in port.server.operations(Guard(plane, True)):
        if not operation.is_change or not operation.path.startswith(PREFIX):
            continue
        is_new = operation.path in exempt or operation.is_upload
        needs = operation.match in (Match.ALWAYS, Match.IF_THERE)
        assert needs is not is_new, operation
        is_session = operation.path.endswith("/session")
        assert operation.replays is (operation.method == "POST" and not is_session)


def _references(node):
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


# The management calls


async def test_a_folder_is_registered_by_one_call(port, plane, tmp_path):
    for version in (1, 3):
        (tmp_path / "digits" / str(version)).mkdir(parents=True)
        (tmp_path / "digits" / str(version) / "model.onnx").write_bytes(b"m%d" % version)
    body = {"name": "digits", "base_path": "digits"}
    made = await port.ask("POST", "/v1/models", json=body)
    assert made.status == 201
    assert made.body["model_version_status"][0]["state"] == "START"
    assert [call[:3] for call in plane.calls] == [
        ("register", "digits", 1),
        ("register", "digits", 3),
        ("load_model", "digits", "loopback"),
    ]
    assert (await port.ask("POST", "/v1/models", json=body)).status == 409
    assert (await port.ask("GET", "/v1/models/digits")).status == 200
    again = await port.ask("PUT", "/v1/models/digits", json={})
    assert (again.status, plane.calls[-1][0]) == (200, "load_model")
    assert (await port.ask("DELETE", "/v1/models/digits")).status == 200
    assert plane.calls[-1][0] == "unload_model"


async def test_a_folder_without_versions_is_refused(port, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for base_path in ("empty", "file", "nowhere"):
        body = {"name": "x", "base_path": base_path}
        assert (await port.ask("POST", "/v1/models", json=body)).status == 400


async def test_states_are_told_in_tensorflow_words(port, plane):
    states = ["REGISTERED", "LOADING", "WARMING", "READY", "DRAINING", "RETIRED", "FAILED"]
    plane.add_model("s", *(version_view(n + 1, state) for n, state in enumerate(states)))
    found = (await port.ask("GET", "/v1/models/s")).body["model_version_status"]
    assert [entry["state"] for entry in found] == [
        "START", "LOADING", "LOADING", "AVAILABLE", "UNLOADING", "END", "END",
    ]  # fmt: skip
    assert found[-1]["status"] == {"error_code": "UNKNOWN", "error_message": "it does not load"}
    listed = (await port.ask("GET", "/v1/models")).body["models"]
    assert [entry["name"] for entry in listed] == ["m0", "s"]
