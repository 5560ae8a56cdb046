"""gateway.client without a gateway: encodings, errors, which address is asked when, and aiohttp's edge."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
from collections import Counter
from contextlib import asynccontextmanager

import ml_dtypes
import msgpack
import numpy as np
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gateway import bytestrings
from gateway.client import (
    AsyncClient,
    BadAnswer,
    Client,
    ConnectionFailed,
    ConnectionLost,
)
from gateway.client import encoding as encoding_module
from gateway.client.addresses import MAX_ASIDE_NS, Addresses, parse_addresses
from gateway.client.encoding import ENCODINGS, HEADER_LENGTH, decode_infer, encode_infer
from gateway.client.errors import from_status
from gateway.client.failover import Failover, Reply, Request, Waiting
from gateway.clock import NS_PER_S
from gateway.errors import (
    DeadlineExceeded,
    Forbidden,
    GatewayError,
    InferenceFailed,
    InvalidRequest,
    NotFound,
    NotSupported,
    QueueFull,
    TooLarge,
    Unavailable,
    UnsupportedMediaType,
)
from gateway.protocols import messagepack, v2_infer
from gateway.protocols.call import InferCall, OutputTensor
from gateway.tensors import DATATYPES, Signature

# Encodings, held against the gateway's own

NAMES = {
    "bool": "BOOL", "float16": "FP16", "float32": "FP32", "float64": "FP64",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}  # fmt: skip

ARRAYS = st.sampled_from(sorted(NAMES)).flatmap(
    lambda name: hnp.arrays(np.dtype(name), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0))
)


def in_another_layout(array: np.ndarray, order: str, layout: str) -> np.ndarray:
    """The same values in memory otherwise."""
    array = array.astype(array.dtype.newbyteorder(order))
    if layout == "strided" and array.ndim:
        return np.repeat(array, 2, axis=0)[::2]
    return np.asarray(array, order="F" if layout == "columns" else "C")


def parse(encoding: str, body: bytes, headers: dict[str, str]) -> InferCall:
    """The body as the gateway reads it."""
    if encoding == "msgpack":
        assert headers == {"Content-Type": "application/msgpack"}
        return messagepack.parse_infer(body, Signature((), (), 1))
    return v2_infer.parse_infer(body, headers.get(HEADER_LENGTH), Signature((), (), 1))


def answer_of(encoding: str, call: InferCall, arrays: dict[str, np.ndarray]) -> tuple:
    """Body, content type and header length of the gateway's answer with these outputs."""
    outputs = []
    for name, array in arrays.items():
        if array.dtype == object:
            datatype, raw = "BYTES", bytestrings.serialise(array.ravel().tolist())
        else:
            datatype, raw = NAMES.get(array.dtype.name, "BF16"), array.tobytes()
        outputs.append(OutputTensor(name, DATATYPES[datatype], array.shape, memoryview(raw)))
    if encoding == "msgpack":
        return messagepack.encode_infer(call, "m", "3", outputs), "application/msgpack", None
    body, json_bytes = v2_infer.encode_infer(call, "m", "3", outputs)
    return body, "application/json", None if json_bytes is None else str(json_bytes)


@given(
    array=ARRAYS,
    encoding=st.sampled_from(ENCODINGS),
    order=st.sampled_from("<>"),
    layout=st.sampled_from(["rows", "columns", "strided"]),
)
def test_what_is_sent_is_what_the_gateway_reads_and_back(array, encoding, order, layout):
    if encoding == "json" and array.dtype == np.float16:
        return
    sent = {"x": in_another_layout(array, order, layout), "y": array}
    body, headers = encode_infer(encoding, sent, request_id="r")
    call = parse(encoding, body, headers)
    assert call.id == "r"
    for tensor in call.inputs:
        assert tensor.datatype.name == NAMES[array.dtype.name]
        assert tensor.shape == array.shape
        if encoding == "json":
            got = np.array(tensor.data, array.dtype)
        else:
            got = np.frombuffer(tensor.data, array.dtype)
        np.testing.assert_array_equal(got, array.ravel())

    answer = decode_infer(*answer_of(encoding, call, {"x": array}))
    assert (answer.model, answer.version, answer.request_id) == ("m", "3", "r")
    got = answer.outputs["x"]
    assert got.dtype == array.dtype
    assert got.shape == array.shape
    assert got.flags.writeable
    assert got.flags.aligned
    np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("encoding", ["binary", "msgpack"])
def test_bfloat16_travels_by_its_bits(encoding, monkeypatch):
    array = np.array([[1.5, -2.0]], ml_dtypes.bfloat16)
    call = parse(encoding, *encode_infer(encoding, {"x": array.T.copy().T}))
    assert call.inputs[0].datatype.name == "BF16"
    assert bytes(call.inputs[0].data) == array.tobytes()
    reply = answer_of(encoding, call, {"x": array})
    got = decode_infer(*reply).outputs["x"]
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)

    monkeypatch.setattr(encoding_module, "_bfloat16", lambda: np.dtype(np.uint16))
    got = decode_infer(*reply).outputs["x"]
    np.testing.assert_array_equal(got, array.view(np.uint16))


def objects(shape: tuple[int, ...], elements: list) -> np.ndarray:
    """An array of objects."""
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


@st.composite
def strings(draw, elements):
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    count = int(np.prod(shape))
    return objects(shape, draw(st.lists(elements, min_size=count, max_size=count)))


def check_strings(encoding: str, array: np.ndarray, raw: list[bytes]) -> None:
    """Send an array, look at what the gateway reads, have it answered, look at what comes back."""
    call = parse(encoding, *encode_infer(encoding, {"s": array}))
    (tensor,) = call.inputs
    assert (tensor.datatype.name, tensor.shape) == ("BYTES", array.shape)
    assert bytestrings.elements(tensor.data) == raw
    expected = objects(array.shape, raw)
    got = decode_infer(*answer_of(encoding, call, {"t": expected})).outputs["t"]
    assert got.dtype == object
    assert got.shape == array.shape
    assert got.ravel().tolist() == raw
    assert all(type(value) is bytes for value in got.ravel())


@given(array=strings(st.binary(max_size=6)), encoding=st.sampled_from(["binary", "msgpack"]))
def test_bytes_there_and_back(array, encoding):
    check_strings(encoding, array, array.ravel().tolist())


@given(array=strings(st.text(max_size=6)), encoding=st.sampled_from(ENCODINGS))
def test_text_there_and_back(array, encoding):
    check_strings(encoding, array, [text.encode() for text in array.ravel()])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_arrays_of_strings(encoding):
    for array, raw in (
        (np.array([["a", "é"], ["", "bcd"]]), [b"a", "é".encode(), b"", b"bcd"]),
        (np.array(["a", "é"], ">U4"), [b"a", "é".encode()]),
        (np.array([b"a", b"bc"]), [b"a", b"bc"]),
        (np.array("a"), [b"a"]),
        (np.array([["a", "b"], ["c", "d"]]).T, [b"a", b"c", b"b", b"d"]),
        (objects((2,), ["é", b"b"]), ["é".encode(), b"b"]),
        (objects((2,), [np.str_("é"), np.bytes_(b"b")]), ["é".encode(), b"b"]),
        (np.empty((0, 2), "U1"), []),
    ):
        check_strings(encoding, array, raw)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_strings_that_cannot_be_sent(encoding):
    for bad in (1, None, [b"a"], bytearray(b"a")):
        with pytest.raises(InvalidRequest, match=f"input 's'.*type {type(bad).__name__}"):
            encode_infer(encoding, {"s": objects((1,), [bad])})
    with pytest.raises(InvalidRequest, match=r"input 's'.*not Unicode"):
        encode_infer(encoding, {"s": np.array(["\ud800"])})
    not_utf8 = {"s": np.array([b"\xff"])}
    if encoding == "json":
        with pytest.raises(InvalidRequest, match=r"input 's'.*not UTF-8"):
            encode_infer(encoding, not_utf8)
    else:
        encode_infer(encoding, not_utf8)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_rest_of_a_request(encoding):
    body, headers = encode_infer(
        encoding, {"x": np.zeros(1, "f4")}, outputs=["b", "a"], queue_timeout_s=0.25, priority=1
    )
    call = parse(encoding, body, headers)
    assert (call.timeout_us, call.priority) == (250_000, 1)
    assert call.id is None
    assert [o.name for o in call.outputs] == ["b", "a"]
    assert all(o.binary == (encoding != "json") for o in call.outputs)


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.array([None]), "BYTES"),
        ([1.0], "must be a NumPy array, got list"),
        (np.array([1j]), "dtype complex128"),
        (np.array(["2020-01-01"], "datetime64[s]"), "dtype datetime64"),
    ],
    ids=["object", "list", "complex", "time"],
)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_cannot_be_sent_is_refused_by_name(encoding, array, text):
    with pytest.raises(InvalidRequest, match=f"input 'x'.*{text}"):
        encode_infer(encoding, {"x": array})


def test_more_refusals():
    with pytest.raises(InvalidRequest, match="FP16 cannot be sent in JSON"):
        encode_infer("json", {"x": np.zeros(1, "f2")})
    with pytest.raises(InvalidRequest, match="a sequence of names"):
        encode_infer("json", {}, outputs="label")
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InvalidRequest, match="queue_timeout_s"):
            encode_infer("json", {}, queue_timeout_s=bad)
    for bad in (-1, 1 << 64, 1.0, True, "1"):
        with pytest.raises(InvalidRequest, match="priority"):
            encode_infer("json", {}, priority=bad)


def json_answer(**output: object) -> bytes:
    return json.dumps({"model_name": "m", "outputs": [{"name": "x", **output}]}).encode()


@pytest.mark.parametrize(
    ("body", "content_type", "header_length"),
    [
        (b"", "application/json", None),
        (b"[]", "application/json", None),
        (b"[" * 200_000, "application/json", None),
        (b'{"outputs": []}', "application/json", None),
        (json_answer(datatype="FP31", shape=[1], data=[1]), "application/json", None),
        (json_answer(datatype="FP32", shape=[2], data=[1]), "application/json", None),
        (json_answer(datatype="FP32", shape=2, data=[1]), "application/json", None),
        (json_answer(datatype="UINT8", shape=[1], data=[999]), "application/json", None),
        (json_answer(datatype="FP32", shape=[1]), "application/json", None),
        (json_answer(datatype="FP32", shape=[-1], data=[1]), "application/json", None),
        (json_answer(datatype="BYTES", shape=[-1], data=["a"]), "application/json", None),
        (json_answer(datatype="BYTES", shape=[2], data=["a"]), "application/json", None),
        (json_answer(datatype="BYTES", shape=[1], data=[1]), "application/json", None),
        (json_answer(datatype="BYTES", shape=[1], data=[["a"]]), "application/json", None),
        (json_answer(datatype="BYTES", shape=[1], data="a"), "application/json", None),
        (json_answer(datatype="BYTES", shape=[1]), "application/json", None),
        (json_answer(datatype="FP32", shape=[1], data=[1]), "application/json", "x"),
        (json_answer(datatype="FP32", shape=[1], data=[1]), "application/json", "9999"),
        (b"\xc1", "application/msgpack", None),
        (msgpack.packb([1]), "application/msgpack", None),
    ],
)
def test_a_malformed_answer_is_told(body, content_type, header_length):
    with pytest.raises(BadAnswer):
        decode_infer(body, content_type, header_length)


@pytest.mark.parametrize("size", [3, 5])
def test_a_binary_answer_of_the_wrong_size_is_told(size):
    text = json_answer(datatype="FP32", shape=[1], parameters={"binary_data_size": 4})
    with pytest.raises(BadAnswer):
        decode_infer(text + bytes(size), "application/octet-stream", str(len(text)))


@pytest.mark.parametrize(
    ("size", "raw"), [(5, b"\2\0\0\0a"), (3, b"\0\0\0"), (8, bytes(8)), (9, bytes(4))]
)
def test_malformed_strings_in_a_binary_answer_are_told(size, raw):
    text = json_answer(datatype="BYTES", shape=[1], parameters={"binary_data_size": size})
    with pytest.raises(BadAnswer):
        decode_infer(text + raw, "application/octet-stream", str(len(text)))


# Errors


@pytest.mark.parametrize(
    "kind",
    [
        InvalidRequest, Forbidden, NotFound, TooLarge, UnsupportedMediaType, QueueFull, InferenceFailed,
        NotSupported, Unavailable, DeadlineExceeded,
    ],
)  # fmt: skip
def test_every_error_comes_back_as_itself(kind):
    for code in (kind.code, None):
        error = from_status(kind.status, "text", code)
        assert type(error) is kind
        assert error.message == "text"


def test_errors_without_a_class_of_their_own():
    assert type(from_status(500, "", "internal")) is GatewayError
    assert type(from_status(418, "")) is InvalidRequest
    assert type(from_status(302, "")) is GatewayError
    assert Reply(404, {}, b"<html>").error().message == "HTTP status 404"
    assert Reply(404, {}, b'{"error": "no"}').error().message == "no"


# Which address is asked, when, and how often


class World:
    """A clock that only sleep moves, and servers that behave as told.

    ``servers`` maps an address to what it does next, the last for good: a status, (status, Retry-After),
    an exception, or "late" (no answer). ``log`` has what was done.
    """

    def __init__(self, retries: int = 3, **servers: list) -> None:
        self.now_ns = 0
        self.servers = {f"http://{name}": list(does) for name, does in servers.items()}
        self.log: list[object] = []
        self.addresses = Addresses(parse_addresses(list(self.servers)))
        waiting = Waiting(lambda: self.now_ns, self.sleep, lambda: 0.0)
        self.failover = Failover(self.addresses, self, retries, waiting)

    async def sleep(self, seconds: float) -> None:
        self.log.append(seconds)
        self.now_ns += round(seconds * NS_PER_S)

    async def send(self, address, request, timeout_s: float) -> Reply:
        self.log.append(address.url.removeprefix("http://"))
        todo = self.servers[address.url]
        does = todo.pop(0) if len(todo) > 1 else todo[0]
        if does == "late":
            self.now_ns += round(timeout_s * NS_PER_S)
            raise TimeoutError
        if isinstance(does, Exception):
            raise does
        status, headers = (
            (does, {}) if isinstance(does, int) else (does[0], {"Retry-After": does[1]})
        )
        return Reply(status, headers, b"")

    async def call(self, timeout_s: float = 60.0) -> object:
        """One call: 200, or the class of its error; and what it did."""
        self.log.clear()
        try:
            return (await self.failover.send(Request("POST", "/"), timeout_s)).status
        except GatewayError as error:
            return type(error)


REFUSED = ConnectionFailed("refused")
LOST = ConnectionLost("lost")


async def test_addresses_are_asked_in_turn():
    world = World(a=[200], b=[200], c=[200])
    done = [(await world.call(), *world.log) for _ in range(6)]
    assert done == [(200, name) for name in "abcabc"]


@pytest.mark.parametrize(
    ("does", "slept"),
    [
        ([(429, "2"), 200], [2.0]),
        ([(503, "2"), 200], [2.0]),
        ([429, 429, 200], [0.5, 1.0]),
        ([503, 503, 200], [0.5, 1.0]),
        ([REFUSED, REFUSED, REFUSED, 200], [0.5, 1.0, 2.0]),
        ([LOST, 200], []),
        ([LOST, LOST, 200], [0.5]),
        ([(503, "soon"), 200], [0.5]),
        ([(429, "Thu, 01 Jan 1970 00:00:00 GMT"), 200], []),
    ],
)
async def test_what_may_be_sent_again_is_after_its_time(does, slept):
    world = World(a=does)
    assert await world.call() == 200
    assert [entry for entry in world.log if entry != "a"] == slept
    assert world.log.count("a") == len(does)


@pytest.mark.parametrize("status", [400, 403, 404, 413, 415, 500, 501, 504])
async def test_every_other_answer_is_final(status):
    world = World(a=[status], b=[200])
    assert await world.call() is type(from_status(status, ""))
    assert world.log == ["a"]


@pytest.mark.parametrize(
    ("does", "error"),
    [(429, QueueFull), (503, Unavailable), (REFUSED, ConnectionFailed), (LOST, ConnectionLost)],
)
async def test_retries_are_bounded(does, error):
    for retries in (0, 1, 3):
        world = World(retries, a=[does])
        assert await world.call() is error
        assert world.log.count("a") == 1 + retries


async def test_without_retries_only_what_was_not_sent_goes_elsewhere():
    assert await World(0, a=[REFUSED], b=[REFUSED], c=[200]).call() == 200
    for does, error in ((LOST, ConnectionLost), (503, Unavailable), (429, QueueFull)):
        world = World(0, a=[does], b=[200])
        assert await world.call() is error
        assert world.log == ["a"]


@pytest.mark.parametrize("does", [429, 503, (429, "9"), (503, "9"), REFUSED, LOST])
async def test_another_address_is_asked_at_once(does):
    world = World(a=[does], b=[200])
    assert await world.call() == 200
    assert world.log == ["a", "b"]


@pytest.mark.parametrize("does", [503, REFUSED])
async def test_an_address_that_failed_is_passed_over_for_a_growing_time(does):
    world = World(a=[does], b=[200])
    asked_at = []
    for _ in range(400):
        assert await world.call() == 200
        if "a" in world.log:
            asked_at.append(world.now_ns)
        world.now_ns += NS_PER_S // 10
    gaps = [(b - a) / NS_PER_S for a, b in itertools.pairwise(asked_at)]
    assert gaps[:4] == pytest.approx([0.5, 1, 2, 4], abs=0.2)
    assert max(gaps) == pytest.approx(MAX_ASIDE_NS / NS_PER_S, abs=0.2)

    world.servers["http://a"] = [200]
    world.now_ns += MAX_ASIDE_NS
    answered = Counter()
    for _ in range(10):
        assert await world.call() == 200
        answered.update(world.log)
    assert answered == {"a": 5, "b": 5}


def test_failures_that_happen_together_count_once_and_one_call_tries_again():
    addresses = Addresses(parse_addresses(["a", "b"]))
    a, b = addresses.all
    epochs = [addresses.asked(a, 0) for _ in range(100)]
    for epoch in epochs:
        until_ns = addresses.failed(a, epoch, 0)
    assert until_ns == NS_PER_S // 2
    addresses.answered(a, epochs[0])  # sent before it failed: says nothing
    assert [addresses.pick({}, 0)[0] for _ in range(2)] == [b, b]
    picked = []
    for _ in range(4):
        picked.append(addresses.pick({}, until_ns)[0])
        addresses.asked(picked[-1], until_ns)
    assert picked.count(a) == 1


async def test_all_addresses_aside_are_asked_all_the_same():
    world = World(a=[REFUSED] * 4 + [200], b=[REFUSED])
    assert await world.call() is ConnectionFailed
    assert await world.call() == 200


async def test_a_call_never_sleeps_past_its_deadline():
    world = World(a=[(429, "5")])
    assert await world.call(timeout_s=4) is QueueFull
    assert world.log == ["a"]  # at once: no wait that could not help
    world = World(a=[(503, "3")])
    assert await world.call(timeout_s=4) is Unavailable
    assert world.log == ["a", 3.0, "a"]


async def test_no_answer_in_time():
    world = World(a=["late"], b=[200])
    assert await world.call(timeout_s=2) is DeadlineExceeded
    assert world.log == ["a"]


async def test_the_error_that_says_most_is_shown():
    assert await World(a=[(503, "1")], b=[REFUSED]).call() is Unavailable


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("h:1", "http://h:1"),
        ("http://h:1/", "http://h:1"),
        ("https://h/base/", "https://h/base"),
        ("[::1]:80", "http://[::1]:80"),
    ],
)
def test_addresses_are_read(given, url):
    assert [a.url for a in parse_addresses(given)] == [url]


@pytest.mark.parametrize("bad", [[], "", "ftp://h", "h:port", "http://", "h:1?x=1"])
def test_bad_addresses_are_refused(bad):
    with pytest.raises(ValueError):  # noqa: PT011
        AsyncClient(bad)


@pytest.mark.parametrize(
    "bad", [{"encoding": "xml"}, {"connections": 0}, {"retries": -1}, {"timeout_s": 0}]
)
def test_bad_arguments_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AsyncClient("h:1", **bad)


# The edge: real sockets


@asynccontextmanager
async def serving(handler):
    """A server on loopback of which every request goes to one handler; its address."""
    server = web.Server(handler)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield "{}:{}".format(*runner.addresses[0][:2])
    finally:
        await runner.cleanup()


def unused_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


async def never(_seconds: float) -> None:
    raise AssertionError("a client slept")


NO_SLEEP = Waiting(sleep=never)

X = {"x": np.arange(3, dtype=np.float32)}

ECHO = json_answer(datatype="FP32", shape=[3], data=[0, 1, 2])


async def test_a_refused_connection_goes_to_the_next_address():
    async def answer(_request):
        return web.Response(body=ECHO, content_type="application/json")

    async with serving(answer) as good:
        async with AsyncClient([unused_address(), good], retries=0, waiting=NO_SLEEP) as client:
            got = await client.infer("m", X)
            np.testing.assert_array_equal(got.outputs["x"], X["x"])
            assert got.version == ""
            assert await client.live()
        async with AsyncClient(unused_address(), retries=0) as client:
            with pytest.raises(ConnectionFailed) as caught:
                await client.infer("m", X)
            assert type(caught.value) is ConnectionFailed
            assert not await client.live()


async def test_a_lost_connection_is_sent_again_unless_switched_off():
    seen = []

    async def answer(request):
        seen.append(await request.read())
        if len(seen) % 2:
            request.transport.abort()
        return web.Response(body=ECHO, content_type="application/json")

    async with serving(answer) as address:
        async with AsyncClient(address, waiting=NO_SLEEP) as client:
            await client.infer("m", X)
            assert seen[0] == seen[1]
        async with AsyncClient(address, retries=0) as client:
            with pytest.raises(ConnectionLost):
                await client.infer("m", X)


async def test_what_the_server_sees():
    requests = []

    async def answer(request):
        requests.append(
            (request.method, request.raw_path, request.headers, await request.content.read())
        )
        return web.Response(body=ECHO, content_type="application/json")

    large = {"x": np.zeros(1 << 20, np.float32)}
    async with (
        serving(answer) as address,
        AsyncClient(f"{address}/base", headers={"x-key": "k"}) as client,
    ):
        await client.infer("a/b", large, version=7, request_id="id-1", priority=2)
        await client.infer("m", X, request_id="not for a header")
        for bad in ("", ".", ".."):
            with pytest.raises(InvalidRequest):
                await client.infer(bad, X)
        with pytest.raises(InvalidRequest):
            await client.metadata("m", "../x")
    (method, path, headers, body), (_, _, plain, _) = requests
    assert (method, path) == ("POST", "/base/v2/models/a%2Fb/versions/7/infer")
    assert headers["x-key"] == "k"
    assert headers["x-request-id"] == "id-1"
    assert len(body) == large["x"].nbytes + int(headers[HEADER_LENGTH])
    assert json.loads(body[: int(headers[HEADER_LENGTH])])["parameters"]["priority"] == 2
    assert "x-request-id" not in plain


async def test_a_server_that_hangs_meets_the_deadline():
    async def answer(_request):
        await asyncio.Event().wait()

    async with serving(answer) as address, AsyncClient(address, timeout_s=0.05) as client:
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.05 s"):
            await client.infer("m", X)
        assert not await client.ready()


async def test_redirects_and_nonsense_are_not_followed():
    async def answer(request):
        if request.path.endswith("/infer"):
            return web.Response(status=302, headers={"Location": "/elsewhere"})
        return web.Response(body=b"[1]", content_type="application/json")

    async with serving(answer) as address, AsyncClient(address) as client:
        with pytest.raises(GatewayError, match="302"):
            await client.infer("m", X)
        with pytest.raises(BadAnswer):
            await client.metadata("m")


async def test_ready_is_the_first_address_that_says_so():
    async def hangs(_request):
        await asyncio.Event().wait()

    async def ready(_request):
        return web.Response()

    async def refuses(_request):
        return web.Response(status=503)

    async with serving(hangs) as one, serving(ready) as two, serving(refuses) as three:
        async with AsyncClient([one, three, two]) as client:
            assert await client.ready()
        async with AsyncClient(three, waiting=NO_SLEEP) as client:
            assert not await client.model_ready("m", 1)


async def test_a_client_works_only_while_it_is_open():
    client = AsyncClient(unused_address())
    with pytest.raises(RuntimeError, match="closed"):
        await client.ready()


def test_closing_the_synchronous_client_ends_its_thread_and_its_calls():
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, never answers
        client = Client("{}:{}".format(*listener.getsockname()))
        failures = []

        def call():
            try:
                client.infer("m", X, priority=1)
            except RuntimeError as error:
                failures.append(str(error))

        thread = threading.Thread(target=call)
        thread.start()
        connection, _ = listener.accept()
        with connection:
            client.close()
            client.close()
            thread.join()
        assert failures == ["the client was closed during the call"]
        assert not client._thread.is_alive()
        with pytest.raises(RuntimeError, match="the client is closed"):
            client.ready()


def test_importing_the_client_is_light(run_python):
    loaded = set(run_python("import sys, gateway.client; print(*sys.modules)").split())
    assert "aiohttp" in loaded
    assert loaded.isdisjoint({"onnxruntime", "pydantic", "gateway._kernels", "ml_dtypes"})
    assert loaded.isdisjoint({"gateway.protocols", "gateway.serving", "gateway.frontend"})


def test_every_datatype_is_tried():
    assert {*NAMES.values(), "BF16", "BYTES"} == set(DATATYPES)
