"""Both lanes give the same answers: status, headers and body, to the byte, also to a skeleton they know.

Every case is a body that can be written with other numbers, ids or payloads, and is sent several times to a
server with the fast lane and to one without it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import msgpack
import numpy as np
import onnx
import onnx.parser
import pytest

from tests.system import clients
from tests.system.clients import ASKED, Wire, message
from tests.system.server import LANES, Server
from tests.system.test_models import EVERY_DTYPE

OF_CONNECTIONS = {"connection", "keep-alive"}
"""Headers of one hop: aiohttp writes them where the fast lane has no need to."""

OTHERS = 3
"""Bodies with other numbers, sent once the first has been learned."""

GRAPHS = {
    "scalar": "(float x) => (float y) { y = Identity (x) }",
    "pair": "(float[n,2] a, float[n,2] b) => (float[n,2] c, float[n,2] d) "
    "{ c = Identity (a) d = Neg (b) }",
    "text": "(string[n,2] s) => (string[n,2] t) { t = Identity (s) }",
    "bytewise": "(uint8[n,4] x, bool[n,2] b) => (uint8[n,4] y, bool[n,2] c) "
    "{ y = Identity (x) c = Not (b) }",
    "half": "(float16[n,2] x) => (float16[n,2] y) { y = Neg (x) }",
}


@pytest.fixture(scope="module")
def servers(make_repository):
    """The two lanes' servers, of equal models."""
    with ExitStack() as stack:
        running = {}
        for lane, setting in LANES.items():
            repository = make_repository("echo", "multi", "dynamic", "gather")
            for name, graph in GRAPHS.items():
                header = '<ir_version: 9, opset_import: ["" : 17]>'
                file = repository / name / "1" / "model.onnx"
                file.parent.mkdir(parents=True)
                onnx.save(onnx.parser.parse_model(f"{header} {name} {graph}"), file)
            running[lane] = stack.enter_context(Server(repository, **setting))
        yield running


class Case(NamedTuple):
    """A request that is sent with several bodies, by number, and the status of the first one's answer."""

    status: int
    path: str
    body: Callable[[int], bytes]
    headers: dict[str, str]


CASES: dict[str, Case] = {}


def case(
    name: str,
    body: Callable[[int], object],
    status: int = 200,
    path: str = "/v2/models/echo/infer",
    **headers: str,
) -> None:
    """Add a case. The body is bytes, or what JSON or, by its Content-Type, msgpack is made of."""
    if name in CASES:
        raise ValueError(f"there are two cases called {name}")

    def encoded(number: int) -> bytes:
        made = body(number)
        if isinstance(made, bytes):
            return made
        if "msgpack" in headers.get("content_type", ""):
            return msgpack.packb(made)
        return json.dumps(made).encode()

    CASES[name] = Case(status, path, encoded, headers)


def values(number: int, count: int = 16) -> list[float]:
    """Numbers whose text is of another length each time."""
    return [round((number + 1) * (i - 5) / 7, number) for i in range(count)]


def array(number: int, rows: int = 1, width: int = 16) -> np.ndarray:
    return np.array(values(number, rows * width), np.float32).reshape(rows, width)


def document(number: int, rows: int = 1, **fields: object) -> dict:
    return clients.v2_document({"x": array(number, rows)}, **fields)


def with_data(text: bytes) -> bytes:
    """A body whose input has this text for its data."""
    return (
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,16],"data":%b}],"outputs":[{"name":"y"}]}'
        % text
    )


def entry(name: str, datatype: str, shape: list[int], **fields: object) -> dict:
    return {"name": name, "datatype": datatype, "shape": shape, **fields}


# JSON

case("all outputs", document)
case("a version", document, path="/v2/models/echo/versions/1/infer")
case("one output", lambda n: document(n, outputs=[{"name": "row_sum"}]))
case(
    "outputs in another order", lambda n: document(n, outputs=[{"name": "row_sum"}, {"name": "y"}])
)
case("an id", lambda n: document(n, id=f"request-{n * 1001}"))
case("an empty id", lambda n: document(n, id=""))
case(
    "an id beyond ASCII", lambda n: json.dumps(document(n, id=f"é{n}"), ensure_ascii=False).encode()
)
case("an id with escapes", lambda n: document(n, id=f'{n}"\n\0\\'))
case("an id of 300 bytes", lambda n: document(n, id=str(n) * 300))
case("an id that is no string", lambda n: document(n, id=n), 400)
case("an id twice", lambda n: b'{"id":"a%d",' % n + json.dumps(document(n, id="b")).encode()[1:])
case("an id after the data", lambda n: {**document(n), "id": f"late{n}"})
case("an id inside of an input", lambda n: {"inputs": [{**document(n)["inputs"][0], "id": "x"}]})
case("a priority", lambda n: document(n, parameters={"priority": 1}))
case("a time-out", lambda n: document(n, parameters={"timeout": 20_000_000}))
case("no time-out", lambda n: document(n, parameters={"timeout": 0}))
case("a negative priority", lambda n: document(n, parameters={"priority": -1}), 400)
case("a reserved parameter", lambda n: document(n, parameters={"triton_x": n}), 400)
case("a parameter that is an object", lambda n: document(n, parameters={"a": {"b": [n]}}), 400)
for rows in (2, 5, 32):
    case(f"{rows} rows", lambda n, rows=rows: document(n, rows))
case("33 rows", lambda n: document(n, 33), 400)
case("no rows", lambda n: {"inputs": [entry("x", "FP32", [0, 16], data=[])]}, 400)
case("nested data", lambda n: clients.v2_document({"x": array(n, 2)}, outputs=[{"name": "y"}]))
case(
    "oddly nested data",
    lambda n: {"inputs": [entry("x", "FP32", [1, 16], data=[[v] for v in values(n, 15)] + [[n]])]},
)
case("pretty", lambda n: json.dumps(document(n), indent=3).replace("\n", "\r\n").encode())
case("integers", lambda n: with_data(json.dumps([n * 17 + i for i in range(16)]).encode()))
for name, text in {
    "exponents": b"1e1, 1E+1, 1e-1, 2.5e0, 0e9, 1e-400",
    "zeros": b"0, -0, 0.0, -0.0, 0e1, -0e1",
    "long numbers": b"0.1000000000000000055511151231257827, 340282346638528859811704183484516925440",
    "rounding": b"16777217, 16777217.000000001, 1.00000005960464477539062, 7e-46, 1.1754943e-38",
}.items():
    filled = [*text.split(b", "), *([b"1"] * 16)][:16]
    case(name, lambda n, filled=filled: with_data(b"[%b]" % b",".join(filled[n:] + filled[:n])))
for name, token, status in (
    ("NaN", b"NaN", 200),
    ("Infinity", b"-Infinity", 200),
    ("too large a number", b"1e39", 400),
    ("far too large a number", b"1e400", 400),
    ("a null", b"null", 400),
    ("a boolean", b"true", 400),
    ("a string", b'"a"', 400),
    ("an object", b"{}", 400),
    ("a leading zero", b"01", 400),
    ("a leading plus", b"+1", 400),
    ("a point without digits", b"1.", 400),
    ("nothing between commas", b"", 400),
    ("hexadecimal", b"0x1", 400),
    ("two numbers without a comma", b"1 2", 400),
):
    case(
        f"{name} among numbers",
        lambda n, token=token: with_data(b"[%b]" % b",".join([*([b"%d" % n] * 15), token])),
        status,
    )
    case(f"nothing but {name}", lambda _, t=token: with_data(b"[%b]" % b",".join([t] * 16)), status)
case("a bracket too few", lambda n: with_data(b"[[%d]" % n), 400)
case("a number too few", lambda n: with_data(json.dumps(values(n, 15)).encode()), 400)
case("a number too many", lambda n: with_data(json.dumps(values(n, 17)).encode()), 400)
case("data that is one number", lambda n: with_data(b"%d" % n), 400)
case("another datatype", lambda n: {"inputs": [entry("x", "FP64", [1, 16], data=values(n))]}, 400)
case("another width", lambda n: {"inputs": [entry("x", "FP32", [1, 15], data=values(n, 15))]}, 400)
case("another name", lambda n: {"inputs": [entry("z", "FP32", [1, 16], data=values(n))]}, 400)
case("a negative dim", lambda n: {"inputs": [entry("x", "FP32", [-1, 16], data=values(n))]}, 400)
case(
    "a dim that is a float",
    lambda n: {"inputs": [entry("x", "FP32", [1.0, 16], data=values(n))]},
    400,
)
case("no inputs", lambda n: {"inputs": [], "n": [n]}, 400)
case("an unknown output", lambda n: document(n, outputs=[{"name": "z"}]), 400)
case("an output twice", lambda n: document(n, outputs=[{"name": "y"}, {"name": "y"}]), 400)
case("inputs twice", lambda n: b'{"inputs":[{"data":[9]}],' + json.dumps(document(n)).encode()[1:])
case(
    "data twice", lambda n: json.dumps(document(n)).replace('"data"', '"data":[7],"data"').encode()
)
case(
    "a shape twice",
    lambda n: json.dumps(document(n)).replace('"shape"', '"shape":[3],"shape"').encode(),
)
case("ignored numbers", lambda n: {"a": [n, n], **document(n), "z": [[n], 1.5]})
case("ignored fields", lambda n: {"a": {"data": [n], "id": "i"}, **document(n), "z": ["s", None]})
case("ignored numbers in an input", lambda n: {"inputs": [{**document(n)["inputs"][0], "w": [n]}]})
case(
    "a key with escapes",
    lambda n: json.dumps(document(n)).replace('"data"', '"d\\u0061ta"').encode(),
)
case("malformed", lambda n: json.dumps(document(n)).encode()[:-1], 400)
case("something behind", lambda n: json.dumps(document(n)).encode() + b"%d" % n, 400)
case("not UTF-8", lambda n: json.dumps(document(n, id="?")).encode().replace(b"?", b"\xff"), 400)
case("nothing", lambda _: b"", 400)
case("an array", lambda n: [n], 400)
case("50 levels", lambda n: {**document(n), "deep": json.loads("[" * 50 + "]" * 50)})
case("120 levels", lambda n: {**document(n), "deep": json.loads("[" * 120 + "]" * 120)}, 400)
case("120 levels of data", lambda n: with_data(b"[" * 120 + b"%d" % n + b"]" * 120), 400)
case(
    "no elements",
    lambda n: {"inputs": [entry("x", "FP32", [2, 0], data=[])], "id": str(n)},
    path="/v2/models/dynamic/infer",
)
case("rows of many lengths", lambda n: clients.v2_document({"x": array(1, 2, n + 1)}),
     path="/v2/models/dynamic/infer")  # fmt: skip
case(
    "booleans and bytes",
    lambda n: {
        "ignored": [0, n],
        "inputs": [
            entry("b", "BOOL", [1, 2], data=[True, True]),
            entry("x", "UINT8", [1, 4], data=[n, 255, 0, 1]),
        ],
    },
    path="/v2/models/bytewise/infer",
)
case(
    "a number beyond its type",
    lambda n: {
        "inputs": [
            entry("b", "BOOL", [1, 2], data=[True, False]),
            entry("x", "UINT8", [1, 4], data=[n, 256 if n else 255, 0, 1]),
        ],
    },
    path="/v2/models/bytewise/infer",
)
case(
    "strings",
    lambda n: {"inputs": [entry("s", "BYTES", [1, 2], data=["é\0", str(n)])]},
    path="/v2/models/text/infer",
)
case(
    "what JSON cannot carry",
    lambda n: {"inputs": [entry("x", "FP16", [1, 2], data=[n, n])]},
    400,
    path="/v2/models/half/infer",
)
case(
    "a run that fails",
    lambda n: {"inputs": [entry("index", "INT64", [1], data=[1000 + n])]},
    500,
    path="/v2/models/gather/infer",
)
case("no such model", document, 404, path="/v2/models/nobody/infer")
case("no such version", document, 404, path="/v2/models/echo/versions/2/infer")
case("gzip", lambda n: gzip.compress(json.dumps(document(n)).encode()), content_encoding="gzip")
for media, status in (("application/xml", 415), ("text/plain", 200), ("application/json", 200)):
    case(f"Content-Type: {media}", document, status, content_type=media)

# Raw tensors


def raw(number: int, rows: int = 1, **fields: object) -> bytes:
    """A body of JSON and a raw tensor."""
    x = array(number, rows)
    text = {"inputs": [entry("x", "FP32", [rows, 16], parameters={"binary_data_size": x.nbytes})]}
    return json.dumps({**text, **fields}).encode() + x.tobytes()


def raw_case(name: str, body: Callable[[int], bytes], status: int = 200, **fields: str) -> None:
    """Add a case of JSON of one length and raw tensors behind it."""
    length = str(body(0).rindex(b"}") + 1)
    case(name, body, status, inference_header_content_length=length, **fields)


raw_case("raw", raw)
raw_case("raw with an id", lambda n: raw(n, id=f"r{n}"))
raw_case("raw, 3 rows", lambda n: raw(n, 3))
raw_case("raw both ways", lambda n: raw(n, parameters={"binary_data_output": True}))
raw_case(
    "raw both ways with an id",
    lambda n: raw(n, parameters={"binary_data_output": True}, id=f"r{n}"),
)
raw_case("raw, too few bytes", lambda n: raw(n)[:-1], 400)
raw_case("raw, too many bytes", lambda n: raw(n) + b"\0", 400)
raw_case("a length of all JSON", lambda n: b'{"n":%d,' % n + json.dumps(document(0)).encode()[1:])
case(
    "JSON in, raw out",
    lambda n: document(n, outputs=[{"name": "y", "parameters": {"binary_data": True}}]),
)
case(
    "raw and JSON out",
    lambda n: document(
        n,
        id=f"i{n}",
        outputs=[{"name": "row_sum", "parameters": {"binary_data": True}}, {"name": "y"}],
    ),
)
case("one raw tensor", lambda n: array(n).tobytes(), inference_header_content_length="0")
case("a raw tensor of any length", lambda n: array(n, 1, n + 1).tobytes(),
     path="/v2/models/dynamic/infer", inference_header_content_length="0")  # fmt: skip
case(
    "one raw tensor of the wrong size",
    lambda n: bytes(n + 1),
    400,
    inference_header_content_length="0",
)
case("a length that is none", document, 400, inference_header_content_length="x")


def raw_and_json(number: int) -> bytes:
    """An input in each form; the numbers' text is as long each time."""
    a, b = array(number, 1, 2), [1.25 + number, 2.5]
    text = {
        "inputs": [
            entry("a", "FP32", [1, 2], parameters={"binary_data_size": 8}),
            entry("b", "FP32", [1, 2], data=b),
        ]
    }
    return json.dumps(text).encode() + a.tobytes()


raw_case("raw and JSON in", raw_and_json, path="/v2/models/pair/infer")


def every_dtype(number: int) -> clients.Arrays:
    return {name: np.roll(each, number, 0) for name, each in EVERY_DTYPE.items()}


def raw_dtypes(number: int) -> bytes:
    arrays = every_dtype(number)
    inputs = [
        {**clients.tensor(name, each, []), "parameters": {"binary_data_size": each.nbytes}}
        for name, each in arrays.items()
    ]
    for each in inputs:
        del each["data"]
    text = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    return json.dumps(text).encode() + b"".join(each.tobytes() for each in arrays.values())


case(
    "every dtype, raw",
    raw_dtypes,
    path="/v2/models/multi/infer",
    inference_header_content_length=str(raw_dtypes(0).rindex(b"true}}") + 6),
)

# msgpack


def packed_case(
    name: str, body: Callable[[int], object], status: int = 200, model: str = "pair"
) -> None:
    case(
        f"msgpack: {name}",
        body,
        status,
        f"/v2/models/{model}/infer",
        content_type="application/msgpack",
    )


def packed(number: int, b: object = None, **fields: object) -> dict:
    """A request to the model pair; ``b`` is the data of its second input."""
    second = array(number + 1, 1, 2).tobytes() if b is None else b
    return {
        "inputs": [
            entry("a", "FP32", [1, 2], data=array(number, 1, 2).tobytes()),
            entry("b", "FP32", [1, 2], data=second),
        ],
        **fields,
    }


packed_case("bin", packed)
packed_case("an id", lambda n: packed(n, id="i" * (n * 20)))
packed_case("an id of bytes", lambda n: packed(n, id=b"i%d" % n), 400)
packed_case("no id", lambda n: packed(n, id=None), 400)
packed_case("an array", lambda n: packed(n, [n, 2.5]))
packed_case("an array like a mark", lambda n: packed(n, [2, 2], z={"data": bytes([n, n])}))
packed_case("an ignored bin", lambda n: packed(n, z={"data": array(n, 1, 2).tobytes()}))
packed_case("ignored bins", lambda n: {"a": {"data": b"%d" % n}, **packed(n), "b": b"%d" % n})
packed_case("a wanted output", lambda n: packed(n, outputs=[{"name": "d"}]))
packed_case("too few bytes", lambda n: packed(n, b"1234567"), 400)
packed_case("text for bytes", lambda n: packed(n, "12345678"), 400)
packed_case("truncated", lambda n: msgpack.packb(packed(n))[:-1], 400)
packed_case("left over", lambda n: msgpack.packb(packed(n)) + b"\0", 400)
packed_case("an extension", lambda n: packed(n, msgpack.ExtType(5, b"12345678")), 400)
packed_case("an ignored timestamp", lambda n: packed(n, z=msgpack.Timestamp(n)), 400)
packed_case("a key that is a number", lambda n: {**packed(n), 5: n}, 400)
packed_case("a key twice", lambda n: b"\x82\xa1a" + bytes([n]) + b"\xa1a\x01", 400)
packed_case("longer headers than needed", lambda n: b"\xde\x00\x01" + msgpack.packb(packed(n))[1:])
packed_case(
    "a long header of a bin", lambda n: msgpack.packb(packed(n)).replace(b"\xc4\x08", b"\xc5\0\x08")
)
packed_case("nothing", lambda _: b"", 400)
packed_case("deep", lambda n: packed(n, z=json.loads("[" * 120 + "]" * 120)), 400)
packed_case("JSON", lambda n: json.dumps(document(n)).encode(), 400)
packed_case(
    "strings",
    lambda n: {"inputs": [entry("s", "BYTES", [1, 2], data=[b"\xff", b"%d" % n])]},
    model="text",
)
packed_case(
    "every dtype as bin",
    lambda n: {"inputs": [clients.tensor(k, v, v.tobytes()) for k, v in every_dtype(n).items()]},
    model="multi",
)
packed_case(
    "no elements",
    lambda n: {"inputs": [entry("x", "FP32", [2, 0], data=b"")], "id": str(n)},
    model="dynamic",
)
for media in ("application/x-msgpack", "application/vnd.msgpack"):
    case(media, packed, path="/v2/models/pair/infer", content_type=media)

# TensorFlow Serving


def predict_case(
    name: str, body: Callable[[int], object], status: int = 200, model: str = "dynamic"
) -> None:
    case(f"predict: {name}", body, status, f"/v1/models/{model}:predict")


predict_case("rows", lambda n: {"instances": array(n, 3, 4).tolist()})
predict_case("named rows", lambda n: {"instances": [{"x": row} for row in array(n, 2, 4).tolist()]})
predict_case("one named row", lambda n: {"instances": [{"x": values(n, 4)}]})
predict_case("wrapped rows", lambda n: {"instances": [{"inputs": {"x": values(n, 4)}}]})
predict_case("columns", lambda n: {"inputs": array(n, 3, 4).tolist()})
predict_case("named columns", lambda n: {"inputs": {"x": array(n, 3, 4).tolist()}})
predict_case(
    "a signature", lambda n: {"signature_name": "serving_default", "inputs": [values(n, 4)]}
)
predict_case("another signature", lambda n: {"signature_name": "s", "inputs": [values(n, 4)]}, 400)
predict_case("unequal rows", lambda n: {"instances": [[n, 1], [2]]}, 400)
predict_case("unequal columns", lambda n: {"inputs": {"x": [[n, 1], [2, [3]]]}}, 400)
predict_case("other nesting", lambda n: {"instances": [[[n, 1], [2, 3]]]}, 400)
predict_case("both keys", lambda n: {"instances": [[n]], "inputs": [[n]]}, 400)
predict_case("neither key", lambda n: {"outputs": [[n]]}, 400)
predict_case("instances twice", lambda n: b'{"instances":[[9]],"instances":[[%d,2]]}' % n)
predict_case("rows of integers", lambda n: {"instances": [n, 99 - n]}, model="gather")
predict_case("rows of floats", lambda n: {"instances": [n + 0.5]}, 400, model="gather")
predict_case("one number", lambda n: {"inputs": n}, model="scalar")
predict_case("one number, ignored ones", lambda n: {"inputs": 1, "z": [n + 7]}, model="scalar")
predict_case("two inputs", lambda n: {"inputs": {"a": [values(n, 2)], "b": [[n, 1]]}}, model="pair")
predict_case(
    "inputs in another order",
    lambda n: {"inputs": {"b": [values(n, 2)], "a": [[n, 1]]}},
    model="pair",
)
predict_case("b64", lambda n: {"instances": [[{"b64": "/w=="}, str(n)]]}, model="text")
predict_case("NaN", lambda n: b'{"instances": [[NaN, %d]]}' % n)


@pytest.mark.parametrize("name", CASES)
def test_both_lanes_give_the_same_answer_each_time(servers, name):
    wanted, path, body, headers = CASES[name]
    sent = [
        message("POST", path, body(n), **headers) for n in (*([0] * ASKED), *range(1, 1 + OTHERS))
    ]
    with ExitStack() as stack:
        fast, other = (stack.enter_context(Wire(servers[lane].port)) for lane in LANES)
        for number, request in enumerate(sent):
            answers = [within_a_connection(wire.ask(request)) for wire in (fast, other)]
            assert answers[0] == answers[1]
            assert number >= ASKED or answers[0][0] == wanted, answers[0]


def within_a_connection(answer: clients.Answer) -> clients.Answer:
    """What of an answer is not of the moment, nor of the connection."""
    status, headers, body = clients.comparable(answer)
    return status, {k: v for k, v in headers.items() if k not in OF_CONNECTIONS}, body


def test_nothing_of_this_was_an_error_of_ours(servers):
    for server in servers.values():
        assert not [line for line in server.lines if "ERROR" in line or "Traceback" in line]
