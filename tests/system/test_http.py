"""Routes, names, refusals, headers and metrics of a server with small models."""

from __future__ import annotations

import json

import pytest
import requests

from tests.system import clients
from tests.system.clients import error_of, exchange
from tests.system.server import LANES, Server

GOOD = json.dumps(
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": list(range(16))}]}
).encode()

INFER = "/v2/models/echo/infer"


@pytest.fixture(scope="module", params=LANES)
def server(make_repository, request):
    with Server(make_repository("echo", "multi"), **LANES[request.param]) as running:
        yield running


@pytest.fixture(autouse=True)
def alive(server):
    """After whatever a test did, a good request on a new connection is served."""
    yield
    status, _, body = exchange(server.port, "POST", INFER, GOOD)
    assert status == 200, body


def get(server, path: str) -> requests.Response:
    return requests.get(server.url + path, timeout=clients.DEADLINE_S)


# Documents


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/livez", "/readyz"])
def test_health(server, path):
    assert get(server, path).status_code == 200


def test_server_metadata(server):
    document = get(server, "/v2").json()
    assert document["name"] == "inference-gateway"
    assert document["version"]
    # perf_analyzer shows no server-side times without "statistics".
    assert {"binary_tensor_data", "model_configuration", "statistics"} <= {*document["extensions"]}


@pytest.mark.parametrize("path", ["/v2/models/echo", "/v2/models/echo/versions/1"])
def test_model_metadata(server, path):
    assert get(server, path).json() == {
        "name": "echo",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}],
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [-1, 16]},
            {"name": "row_sum", "datatype": "FP32", "shape": [-1]},
        ],
    }


@pytest.mark.parametrize("path", ["/v2/models/echo/ready", "/v2/models/echo/versions/1/ready"])
def test_model_ready(server, path):
    assert get(server, path).status_code == 200


@pytest.mark.parametrize("path", ["/v2/models/echo/config", "/v2/models/echo/versions/1/config"])
def test_model_config(server, path):
    document = get(server, path).json()
    assert document["name"] == "echo"
    assert document["backend"] == "onnxruntime"
    assert document["max_batch_size"] == 32
    assert document["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [16]}]
    assert [(o["name"], o["dims"]) for o in document["output"]] == [("y", [16]), ("row_sum", [])]
    assert document["dynamic_batching"]["max_queue_delay_microseconds"] == 0
    assert document["version_policy"] == {"latest": {"num_versions": 1}}
    assert [group["count"] for group in document["instance_group"]] == [1]


@pytest.mark.parametrize(
    "path",
    ["/v2/models/multi/stats", "/v2/models/multi/versions/1/stats", "/v2/models/stats"],
)
def test_statistics_have_every_field(server, path):
    entries = {entry["name"]: entry for entry in get(server, path).json()["model_stats"]}
    assert entries.keys() == ({"echo", "multi"} if path == "/v2/models/stats" else {"multi"})
    entry = entries["multi"]
    assert entry["version"] == "1"
    assert (entry["inference_count"], entry["execution_count"]) == (0, 0)
    assert (entry["last_inference"], entry["batch_stats"]) == (0, [])
    assert entry["inference_stats"].keys() == {
        "success", "fail", "queue", "compute_input", "compute_infer", "compute_output",
        "cache_hit", "cache_miss",
    }  # fmt: skip
    assert all(s == {"count": 0, "ns": 0} for s in entry["inference_stats"].values())


def test_statistics_count_rows_batches_and_failures(server):
    (before,) = get(server, "/v2/models/echo/stats").json()["model_stats"]
    document = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [3, 16], "data": [0.5] * 48}]}
    assert requests.post(server.url + INFER, json=document, timeout=30).status_code == 200
    document["inputs"][0]["shape"] = [3, 15]
    assert requests.post(server.url + INFER, json=document, timeout=30).status_code == 400
    (after,) = get(server, "/v2/models/echo/stats").json()["model_stats"]
    assert after["inference_count"] == before["inference_count"] + 3
    assert after["execution_count"] == before["execution_count"] + 1
    for name, more in (("success", 1), ("fail", 1), ("queue", 1), ("compute_infer", 1)):
        counts = [entry["inference_stats"][name]["count"] for entry in (before, after)]
        assert counts[1] - counts[0] == more, name
        times = [entry["inference_stats"][name]["ns"] for entry in (before, after)]
        assert times[1] > times[0], name
    assert after["last_inference"] >= before["last_inference"]
    assert {b["batch_size"] for b in after["batch_stats"]} >= {3}


@pytest.mark.parametrize("body", [b"", b"{}", b'{"ready": true}', b'{"ready": false}'])
def test_repository_index(server, body):
    answer = requests.post(server.url + "/v2/repository/index", data=body, timeout=30)
    assert answer.json() == [
        {"name": "echo", "version": "1", "state": "READY"},
        {"name": "multi", "version": "1", "state": "READY"},
    ]


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"ready": 1}'])
def test_malformed_repository_index(server, body):
    error_of(exchange(server.port, "POST", "/v2/repository/index", body), 400)


@pytest.mark.parametrize("path", ["", "/versions/1"])
def test_tensorflow_status_and_metadata(server, path):
    assert get(server, f"/v1/models/echo{path}").json() == {
        "model_version_status": [
            {
                "version": "1",
                "state": "AVAILABLE",
                "status": {"error_code": "OK", "error_message": ""},
            }
        ]
    }
    document = get(server, f"/v1/models/echo{path}/metadata").json()
    assert document["model_spec"] == {"name": "echo", "signature_name": "", "version": "1"}
    definition = document["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert definition["method_name"] == "tensorflow/serving/predict"
    assert definition["inputs"]["x"] == {
        "dtype": "DT_FLOAT",
        "tensor_shape": {
            "dim": [{"size": "-1", "name": ""}, {"size": "16", "name": ""}],
            "unknown_rank": False,
        },
        "name": "x",
    }
    assert definition["outputs"].keys() == {"y", "row_sum"}


# What is not there


@pytest.mark.parametrize(
    ("verb", "path"),
    [
        ("GET", "/"),
        ("GET", "/v2/"),
        ("GET", "/v3"),
        ("GET", "/v2/models"),
        ("GET", "/v2/models/echo/nothing"),
        ("POST", "/v2/models/echo/versions/1/infer/more"),
        ("POST", "/v1/models/echo:explain"),
        ("GET", "/favicon.ico"),
    ],
)
def test_unknown_path(server, verb, path):
    assert error_of(exchange(server.port, verb, path), 404) == "Not Found"


@pytest.mark.parametrize(
    ("verb", "path", "allowed"),
    [
        ("GET", INFER, "POST"),
        ("PUT", INFER, "POST"),
        ("GET", "/v2/models/echo/versions/1/infer", "POST"),
        ("POST", "/v2/models/echo", "GET"),
        ("POST", "/v2/health/live", "GET"),
        ("DELETE", "/v2", "GET"),
        ("GET", "/v2/repository/index", "POST"),
        ("GET", "/v1/models/echo:predict", "POST"),
        ("POST", "/v1/models/echo/metadata", "GET"),
        ("POST", "/metrics", "GET"),
    ],
)
def test_wrong_verb(server, verb, path, allowed):
    answer = exchange(server.port, verb, path)
    assert error_of(answer, 405) == "Method Not Allowed"
    assert allowed in answer[1]["allow"].split(",")


OF_A_MODEL = [
    ("POST", "/v2/models/{}/infer"),
    ("POST", "/v2/models/{}/versions/1/infer"),
    ("GET", "/v2/models/{}"),
    ("GET", "/v2/models/{}/ready"),
    ("GET", "/v2/models/{}/config"),
    ("GET", "/v2/models/{}/stats"),
    ("POST", "/v1/models/{}:predict"),
    ("GET", "/v1/models/{}"),
    ("GET", "/v1/models/{}/metadata"),
]


@pytest.mark.parametrize(("verb", "path"), OF_A_MODEL)
def test_unknown_model(server, verb, path):
    assert "'nobody'" in error_of(exchange(server.port, verb, path.format("nobody"), GOOD), 404)


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "%2e%2e",
        "a%2Fb",
        "a%5Cb",
        "%20",
        "",
        "x" * 65,
        "x" * 256,
        "%00",
        "%ff",
        "-a",
        "e%C3%A9",
    ],
)
@pytest.mark.parametrize(("verb", "path"), OF_A_MODEL)
def test_bad_model_name(server, verb, path, name):
    assert "name" in error_of(exchange(server.port, verb, path.format(name), GOOD), 400)


OF_A_VERSION = [
    ("POST", "/v2/models/echo/versions/{}/infer"),
    ("GET", "/v2/models/echo/versions/{}"),
    ("GET", "/v2/models/echo/versions/{}/stats"),
    ("POST", "/v1/models/echo/versions/{}:predict"),
    ("GET", "/v1/models/echo/versions/{}"),
]


@pytest.mark.parametrize(("verb", "path"), OF_A_VERSION)
def test_unknown_version(server, verb, path):
    for version in ("7", str(2**63 - 1)):
        answer = exchange(server.port, verb, path.format(version), GOOD)
        text = error_of(answer, 404)
        assert "'echo'" in text
        assert version in text
        assert "x-model-version" not in answer[1]


@pytest.mark.parametrize("version", [str(2**63), "9" * 5000, "-1", "1.0", "one", "%20", "1%2F2"])
@pytest.mark.parametrize(("verb", "path"), OF_A_VERSION)
def test_bad_version(server, verb, path, version):
    error_of(exchange(server.port, verb, path.format(version), GOOD), 400)


def test_labels(server):
    for verb, path in (
        ("POST", "/v1/models/echo/labels/canary:predict"),
        ("GET", "/v1/models/echo/labels/canary"),
    ):
        assert "'canary'" in error_of(exchange(server.port, verb, path, b"{}"), 404)
    both = "/v1/models/echo/versions/1/labels/canary"
    for verb, path in (
        ("POST", f"{both}:predict"),
        ("POST", f"{both}:classify"),
        ("GET", both),
        ("GET", f"{both}/metadata"),
    ):
        assert "not both" in error_of(exchange(server.port, verb, path, b"{}"), 400)
    error_of(exchange(server.port, "GET", "/v1/models/echo/labels/a%2Fb"), 400)


@pytest.mark.parametrize("verb", ["classify", "regress"])
def test_signatures_that_onnx_models_do_not_have(server, verb):
    answer = exchange(server.port, "POST", f"/v1/models/echo:{verb}", b"{}")
    assert ":predict" in error_of(answer, 501)
    assert answer[1]["x-model-version"] == "1"


@pytest.mark.parametrize("what", ["load", "unload"])
def test_models_are_not_controlled_through_the_data_port(server, what):
    error_of(exchange(server.port, "POST", f"/v2/repository/models/echo/{what}", b"{}"), 403)


# Malformed requests


@pytest.mark.parametrize(
    ("body", "offset"),
    [(b"", 0), (b"{", 1), (b'{"inputs": [secret]}', 12), (b"\xff", 0), (GOOD[:-1], None)],
)
def test_malformed_json(server, body, offset):
    for path in (INFER, "/v1/models/echo:predict"):
        answer = exchange(server.port, "POST", path, body)
        text = error_of(answer, 400)
        assert "malformed JSON at byte" in text
        assert offset is None or text.endswith(f" {offset}")
        assert "secret" not in text
        assert answer[1]["x-model-version"] == "1"


@pytest.mark.parametrize(("depth", "status"), [(50, 200), (120, 400), (250_000, 400)])
def test_nesting(server, depth, status):
    nested = b"[" * depth + b"]" * depth
    body = GOOD[:-1] + b', "ignored": ' + nested + b"}"
    assert exchange(server.port, "POST", INFER, body)[0] == status


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("application/octet-stream", 200),
        ("application/x-www-form-urlencoded", 200),
        (None, 200),
        ("application/xml", 415),
        ("image/png", 415),
        ("multipart/form-data; boundary=x", 415),
    ],
)
def test_content_type(server, content_type, status):
    headers = {"content_type": content_type} if content_type else {}
    answer = exchange(server.port, "POST", INFER, GOOD, **headers)
    assert answer[0] == status
    if status == 415:
        assert "application/json" in error_of(answer, 415)


def test_msgpack_is_not_json(server):
    for kind in ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack"):
        answer = exchange(server.port, "POST", INFER, GOOD, content_type=kind)
        assert "msgpack" in error_of(answer, 400)
        packed = clients.msgpack.packb(json.loads(GOOD))
        status, headers, body = exchange(server.port, "POST", INFER, packed, content_type=kind)
        assert (status, headers["content-type"]) == (200, kind)
        assert clients.msgpack.unpackb(body)["model_name"] == "echo"


# Headers of every answer


@pytest.mark.parametrize(
    ("verb", "path"), [("GET", "/v2"), ("POST", INFER), ("GET", "/nothing"), ("PUT", "/v2")]
)
def test_request_id(server, verb, path):
    given = "0af7651916cd43dd8448eb211c80319c:1/a=b@c"
    answer = exchange(server.port, verb, path, GOOD, x_request_id=given)
    assert answer[1]["x-request-id"] == given
    made = {exchange(server.port, verb, path, GOOD)[1]["x-request-id"] for _ in range(3)}
    assert len(made) == 3


@pytest.mark.parametrize("given", ["a b", "<script>", "x" * 129, '"', "é"])
def test_a_request_id_that_is_not_safe_to_repeat_is_replaced(server, given):
    answer = exchange(server.port, "GET", "/v2", x_request_id=given)
    assert answer[0] == 200
    assert answer[1]["x-request-id"] not in (given, "")


def test_a_connection_outlives_a_refusal(server):
    with requests.Session() as session:
        for path in (INFER, "/v2/models/nobody/infer", INFER):
            answer = session.post(server.url + path, data=GOOD, timeout=clients.DEADLINE_S)
            assert answer.status_code == (404 if "nobody" in path else 200)


def test_pipelined_requests_are_answered_in_their_order(server):
    sent = b""
    for number in range(5):
        path, last = (INFER, number == 4) if number != 2 else ("/v2/models/nobody/infer", False)
        sent += (
            f"POST {path} HTTP/1.1\r\nHost: test\r\nx-request-id: {number}\r\n"
            f"Connection: {'close' if last else 'keep-alive'}\r\n"
            f"Content-Length: {len(GOOD)}\r\n\r\n"
        ).encode() + GOOD
    answers = clients.send_all(server.port, sent).split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"200", b"200", b"404", b"200", b"200"]
    for number, answer in enumerate(answers):
        assert b"x-request-id: %d\r\n" % number in answer


# Metrics

FAMILIES = {
    "gateway_requests_total": {"model", "version", "code"},
    "gateway_request_duration_seconds_bucket": {"model", "version", "le"},
    "gateway_queue_duration_seconds_bucket": {"model", "version", "le"},
    "gateway_compute_duration_seconds_bucket": {"model", "version", "le"},
    "gateway_batch_size_bucket": {"model", "version", "le"},
    "gateway_queue_depth": {"model", "version"},
    "gateway_worker_up": {"model", "version", "instance"},
    "gateway_worker_restarts_total": {"model", "version", "instance"},
}


@pytest.mark.parametrize("port", ["data", "metrics"])
def test_metrics(server, port):
    assert requests.post(server.url + INFER, data=GOOD, timeout=30).status_code == 200
    assert requests.post(server.url + INFER, data=b"{", timeout=30).status_code == 400
    url = server.metrics_url if port == "metrics" else server.url + "/metrics"
    answer = requests.get(url, timeout=30)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain")
    values = clients.samples(answer.text)
    for name, labels in FAMILIES.items():
        of_echo = [
            dict(found)
            for (sample, found) in values
            if sample == name and dict(found).get("model") == "echo"
        ]
        assert of_echo, name
        assert all(found.keys() == labels for found in of_echo), name

    def value(name: str, **labels: str) -> float:
        return values[name, frozenset({"model": "echo", "version": "1", **labels}.items())]

    assert value("gateway_requests_total", code="200") >= 1
    assert value("gateway_requests_total", code="400") >= 1
    assert value("gateway_worker_up", instance="0") == 1
    assert value("gateway_worker_restarts_total", instance="0") == 0
    assert value("gateway_queue_depth") == 0
    answered = value("gateway_queue_duration_seconds_count")
    assert answered == value("gateway_requests_total", code="200")
    assert value("gateway_batch_size_sum") >= answered


def test_the_metrics_port_serves_nothing_else(server):
    port = int(server.metrics_url.split(":")[2].partition("/")[0])
    for verb, path in (("GET", "/v2"), ("POST", INFER), ("GET", "/livez")):
        assert error_of(exchange(port, verb, path), 404) == "Not Found"


def test_nothing_of_this_was_an_error_of_ours(server):
    assert not [line for line in server.lines if "ERROR" in line or "Traceback" in line]
