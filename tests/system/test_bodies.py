"""How a body is framed, compressed and bounded."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.system import clients
from tests.system.clients import Wire, chunked, error_of, exchange, message
from tests.system.server import LANES, Server

LIMIT = 256 << 10
"""The server's max_request_bytes in these tests."""

INFER = "/v2/models/echo/infer"

X = np.arange(16, dtype=np.float32).reshape(1, 16)
GOOD = json.dumps(clients.v2_document({"x": X})).encode()
EXPECTED = [float(2 * value + 1) for value in range(16)]

BINARY_HEADER = json.dumps(
    {
        "inputs": [
            {
                "name": "x",
                "datatype": "FP32",
                "shape": [1, 16],
                "parameters": {"binary_data_size": 64},
            }
        ],
        "outputs": [{"name": "y", "parameters": {"binary_data": False}}],
    }
).encode()


def raw_deflate(body: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(body) + compressor.flush()


FORMS = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),
    "zlib": ("deflate", zlib.compress),
    "raw deflate": ("deflate", raw_deflate),
    "upper case": ("GZIP", gzip.compress),
    "identity": ("identity", bytes),
}


@pytest.fixture(scope="module", params=LANES)
def server(make_repository, request):
    repository = make_repository("echo", "multi", "dynamic")
    setting = {"GATEWAY_MAX_REQUEST_BYTES": str(LIMIT)}
    with Server(repository, **setting, **LANES[request.param]) as running:
        yield running


@pytest.fixture(autouse=True)
def alive(server):
    """After whatever a test did, a good request on a new connection is served."""
    yield
    served(exchange(server.port, "POST", INFER, GOOD))


def served(answer: tuple[int, dict[str, str], bytes]) -> None:
    """The answer is the good request's."""
    status, _, body = answer
    assert status == 200, body
    outputs = {output["name"]: output["data"] for output in json.loads(body)["outputs"]}
    assert outputs["y"] == EXPECTED


# Inference-Header-Content-Length


def test_a_header_length_of_an_all_json_body(server):
    """Triton's C++ client always sends it."""
    length = str(len(GOOD))
    served(exchange(server.port, "POST", INFER, GOOD, inference_header_content_length=length))


def test_json_and_a_raw_tensor(server):
    length = str(len(BINARY_HEADER))
    body = BINARY_HEADER + X.tobytes()
    served(exchange(server.port, "POST", INFER, body, inference_header_content_length=length))


@pytest.mark.parametrize("length", ["99999999999", "9" * 400, "-1", "abc", "", "1.5", "+5", "0x10"])
def test_bad_header_length(server, length):
    answer = exchange(server.port, "POST", INFER, GOOD, inference_header_content_length=length)
    assert "Inference-Header-Content-Length" in error_of(answer, 400)


def test_a_header_length_beyond_the_body(server):
    length = str(len(GOOD) + 1)
    answer = exchange(server.port, "POST", INFER, GOOD, inference_header_content_length=length)
    assert str(len(GOOD)) in error_of(answer, 400)


@pytest.mark.parametrize(("sent", "counted"), [(0, "0"), (63, "63"), (65, "1"), (128, "64")])
def test_a_binary_part_of_the_wrong_size(server, sent, counted):
    body = BINARY_HEADER + bytes(sent)
    length = str(len(BINARY_HEADER))
    answer = exchange(server.port, "POST", INFER, body, inference_header_content_length=length)
    assert counted in error_of(answer, 400).split()


def test_a_body_that_is_one_raw_tensor(server):
    """The answer is binary, too."""
    status, headers, body = exchange(
        server.port, "POST", INFER, X.tobytes(), inference_header_content_length="0"
    )
    assert status == 200, body
    length = int(headers["inference-header-content-length"])
    assert headers["content-type"] == "application/octet-stream"
    names = [output["name"] for output in json.loads(body[:length])["outputs"]]
    assert names == ["y", "row_sum"]
    np.testing.assert_array_equal(
        np.frombuffer(body[length:], np.float32), np.float32([*EXPECTED, X.sum()])
    )


def test_a_raw_tensor_tells_its_one_variable_dim(server):
    status, headers, body = exchange(
        server.port,
        "POST",
        "/v2/models/dynamic/infer",
        np.float32([1, 2, 6]).tobytes(),
        inference_header_content_length="0",
    )
    assert status == 200, body
    length = int(headers["inference-header-content-length"])
    assert np.frombuffer(body[length:], np.float32).tolist() == [3, 6, 18, 3]


@pytest.mark.parametrize(
    ("model", "body"), [("multi", b"1234"), ("echo", b"123"), ("dynamic", b"1")]
)
def test_a_raw_tensor_that_the_model_does_not_take(server, model, body):
    path = f"/v2/models/{model}/infer"
    error_of(exchange(server.port, "POST", path, body, inference_header_content_length="0"), 400)


# Chunks


def test_a_chunked_body(server):
    for pieces in ([GOOD], [GOOD[:1], GOOD[1:7], GOOD[7:]], [bytes([b]) for b in GOOD]):
        body = chunked(*pieces)
        served(exchange(server.port, "POST", INFER, body, transfer_encoding="chunked"))


def test_a_client_that_waits_to_be_asked_for_its_body(server):
    """curl does for long ones."""
    head = message("POST", INFER, GOOD, expect="100-continue").removesuffix(GOOD)
    with Wire(server.port) as wire:
        for _ in range(clients.ASKED):
            assert wire.ask(head) == (100, {}, b"")
            served(wire.ask(GOOD))


# The limit


def test_a_body_of_exactly_the_limit_is_served(server):
    padded = GOOD + b" " * (LIMIT - len(GOOD))
    served(exchange(server.port, "POST", INFER, padded))
    served(exchange(server.port, "POST", INFER, chunked(padded), transfer_encoding="chunked"))
    served(exchange(server.port, "POST", INFER, gzip.compress(padded), content_encoding="gzip"))


TOO_LONG = GOOD + b" " * (LIMIT - len(GOOD) + 1)


def test_one_byte_over_the_limit(server):
    for answer in (
        exchange(server.port, "POST", INFER, TOO_LONG),
        exchange(server.port, "POST", INFER, chunked(TOO_LONG), transfer_encoding="chunked"),
        exchange(server.port, "POST", INFER, gzip.compress(TOO_LONG), content_encoding="gzip"),
        exchange(server.port, "POST", INFER, zlib.compress(TOO_LONG), content_encoding="deflate"),
        exchange(server.port, "POST", "/v1/models/echo:predict", TOO_LONG),
        exchange(server.port, "POST", "/v2/repository/index", TOO_LONG),
    ):
        text = error_of(answer, 413)
        assert "max_request_bytes" in text
        assert str(LIMIT) in text


async def test_a_refused_length_counts_as_a_request(server):
    async with clients.many_connections() as session:

        async def refused() -> float:
            return await clients.metric(
                session, server.url, "gateway_requests_total", model="echo", version="1", code="413"
            )

        exchange(server.port, "POST", INFER, TOO_LONG)
        before = await refused()
        exchange(server.port, "POST", INFER, TOO_LONG)
        exchange(server.port, "POST", INFER, chunked(TOO_LONG), transfer_encoding="chunked")
        assert await refused() == before + 2


def test_small_json_that_is_large_as_tensors(server):
    """Two bytes of text an element, four of FP32."""
    elements = LIMIT // 3
    for path, body in (
        (
            "/v2/models/dynamic/infer",
            b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, %d], "data": [%s]}]}'
            % (elements, b",".join([b"0"] * elements)),
        ),
        (
            "/v1/models/dynamic:predict",
            b'{"instances": [[%s]]}' % b",".join([b"0"] * elements),
        ),
    ):
        assert len(body) < LIMIT
        text = error_of(exchange(server.port, "POST", path, body), 413)
        assert "max_request_bytes" in text


# Compression


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("framing", ["whole", "chunked"])
def test_compressed_bodies(server, form, framing):
    encoding, compress = FORMS[form]
    headers = {"content_encoding": encoding}
    body = compress(GOOD)
    if framing == "chunked":
        headers["transfer_encoding"] = "chunked"
        body = chunked(body[:10], body[10:])
    served(exchange(server.port, "POST", INFER, body, **headers))


def test_a_compressed_body_with_a_binary_part(server):
    body = gzip.compress(BINARY_HEADER + X.tobytes())
    length = str(len(BINARY_HEADER))
    served(
        exchange(
            server.port,
            "POST",
            INFER,
            body,
            content_encoding="gzip",
            inference_header_content_length=length,
        )
    )


CORRUPT = {
    "not gzip": ("gzip", GOOD),
    "cut short": ("gzip", gzip.compress(GOOD)[:-20]),
    "cut in the checksum": ("gzip", gzip.compress(GOOD)[:-1]),
    "wrong checksum": ("gzip", gzip.compress(GOOD)[:-8] + bytes(8)),
    "followed by something": ("gzip", gzip.compress(GOOD) + b"more"),
    "only a header": ("gzip", gzip.compress(GOOD)[:10]),
    "zlib as gzip": ("gzip", zlib.compress(GOOD)),
    "not deflate": ("deflate", b"\x00" + GOOD),
    "deflate cut short": ("deflate", zlib.compress(GOOD)[:-20]),
    "deflate cut in the checksum": ("deflate", zlib.compress(GOOD)[:-1]),
    "deflate followed by something": ("deflate", zlib.compress(GOOD) + b"more"),
}


@pytest.mark.parametrize("name", CORRUPT)
@pytest.mark.parametrize("path", [INFER, "/v1/models/echo:predict", "/v2/repository/index"])
def test_corrupt_compressed_bodies(server, name, path):
    encoding, body = CORRUPT[name]
    answer = exchange(server.port, "POST", path, body, content_encoding=encoding)
    assert "Content-Encoding" in error_of(answer, 400)


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip", "nonsense"])
def test_encodings_that_are_not_read(server, encoding):
    answer = exchange(server.port, "POST", INFER, GOOD, content_encoding=encoding)
    assert "gzip" in error_of(answer, 415)


def test_bombs_are_refused_without_being_held_in_memory(server):
    bomb = gzip.compress(bytes(100 << 20))
    assert len(bomb) < LIMIT
    before = peak_memory_kb(server)
    for _ in range(20):
        answer = exchange(server.port, "POST", INFER, bomb, content_encoding="gzip")
        assert "max_request_bytes" in error_of(answer, 413)
    assert peak_memory_kb(server) - before < 30 << 10


def peak_memory_kb(server) -> int:
    """The most memory that the front end has had so far."""
    (pid,) = server.frontends()
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def test_bad_bodies_do_not_fill_the_log(server):
    for name, (encoding, body) in CORRUPT.items():
        exchange(server.port, "POST", INFER, body, content_encoding=encoding)
        assert not any("Traceback" in line or "ERROR" in line for line in server.lines), name
