"""What is learned of one request holds for every other one of its skeleton.

Requests are drawn with their fields in any order, given twice, or known to nobody, with arrays, raw bytes
and ids where they belong and where they do not. Each is sent with one filling until it is known, and then
with another: the answer must be the one of a front end that has learned nothing.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple
from unittest.mock import patch

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.tensors import DATATYPES, Signature, TensorSpec
from tests.unit.test_dispatcher import Bench
from tests.unit.test_fastlane import PAIR, Client, Front, Turns, post

FP32, INT64, UINT8 = (DATATYPES[name] for name in ("FP32", "INT64", "UINT8"))

SINGLE = Signature(
    (TensorSpec("x", FP32, ()), TensorSpec("w", INT64, (2,)), TensorSpec("v", UINT8, (2,))),
    (TensorSpec("y", FP32, ()), TensorSpec("z", INT64, (2,)), TensorSpec("u", UINT8, (2,))),
    max_batch_size=0,
)
"""One request at a time, one of its inputs a number without dims."""

MODELS = {
    "pair": (PAIR, lambda arrays: [arrays["x"], arrays["w"]]),
    "single": (SINGLE, lambda arrays: [arrays["x"], arrays["w"], arrays["v"]]),
}

MOMENT = ("date", "x-request-id")
"""Headers in which equal answers differ."""


class Span(NamedTuple):
    """A place that is filled anew in each body: numbers, nested in one way, or raw bytes."""

    count: int
    nesting: int = 0  # 0: flat; otherwise so many to a list
    is_raw: bool = False


class Id(NamedTuple):
    """The place of an id."""


Part = str | Span | Id


class Shaped(NamedTuple):
    """A request but for what fills it."""

    path: str
    parts: list[Part]  # of JSON; or of nothing
    document: object = None  # of msgpack, with Span and Id among the values
    tail: int = -1  # raw bytes behind the text; -1: no such header


# Filling

NUMBERS = (
    "0",
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "7",
    "200",
    "-1",
    "0.5",
    "1e2",
    "-2.5E-1",
    "16777217",
    "-0",
)


class Filling:
    """Numbers, bytes and ids by chance, small ones often: learning marks places with such."""

    def __init__(self, seed: int, *, whole: bool) -> None:
        self._random = random.Random(seed)
        self._numbers = NUMBERS[:9] if whole else NUMBERS

    def numbers(self, span: Span) -> str:
        """The text of an array."""
        pad = self._random.choice(("", " "))
        texts = [self._random.choice(self._numbers) + pad for _ in range(span.count)]
        if span.nesting:
            texts = [
                f"[{','.join(texts[at : at + span.nesting])}]"
                for at in range(0, span.count, span.nesting)
            ]
        return f"[{','.join(texts)}]"

    def raw(self, count: int) -> bytes:
        return bytes(self._random.choice((0, 1, 2, 3, 64, 191)) for _ in range(count))

    def id(self) -> str:
        return "i" * self._random.randint(1, 40)

    def text(self, parts: list[Part]) -> str:
        """JSON."""
        return "".join(
            part
            if isinstance(part, str)
            else self.numbers(part)
            if isinstance(part, Span)
            else self.id()
            for part in parts
        )

    def value(self, shaped: object) -> object:
        """What msgpack is made of."""
        if isinstance(shaped, Span):
            return self.raw(shaped.count)
        if isinstance(shaped, Id):
            return self.id()
        if isinstance(shaped, dict):
            return {key: self.value(value) for key, value in shaped.items()}
        if isinstance(shaped, list):
            return [self.value(value) for value in shaped]
        return shaped


def request_of(shaped: Shaped, seed: int, *, whole: bool) -> bytes:
    """A request, filled."""
    filling = Filling(seed, whole=whole)
    if shaped.document is not None:
        body = msgpack.packb(filling.value(shaped.document))
        return post(body, shaped.path, content_type="application/msgpack")
    text = filling.text(shaped.parts).encode()
    if shaped.tail < 0:
        return post(text, shaped.path)
    headers = {"inference_header_content_length": str(len(text))}
    return post(text + filling.raw(shaped.tail), shaped.path, **headers)


# Shapes of JSON

INFER, PREDICT = "/v2/models/m/infer", "/v1/models/m:predict"

COUNTS = {"x": 2, "w": 2, "v": 2}

junk = st.recursive(
    st.one_of(
        st.builds(Span, st.integers(1, 3), st.sampled_from((0, 1, 2))),
        st.sampled_from(("1", "true", "null", '"s"', "[]", "{}", '"data"', "[1,true]")),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2).map(lambda items: ["[", *joined(items), "]"]),
        st.tuples(st.sampled_from(("data", "id", "q", "inputs", "shape")), inner).map(
            lambda pair: ["{", f'"{pair[0]}":', *flat(pair[1]), "}"]
        ),
    ),
    max_leaves=4,
).map(lambda part: flat(part))
"""A value that nobody reads, as parts."""


def flat(part: Part | list) -> list[Part]:
    return part if isinstance(part, list) else [part]


def joined(items: list) -> list[Part]:
    """Parts with commas between the items."""
    found: list[Part] = []
    for item in items:
        found += [*([","] if found else []), *flat(item)]
    return found


@st.composite
def objects(draw, fields: list[tuple[str, list[Part]]], *, may_repeat: bool = True) -> list[Part]:
    """A JSON object of these fields in any order, some given twice, beside some that nobody reads."""
    every = list(fields)
    if may_repeat and draw(st.integers(0, 9)) == 9:
        every.append(draw(st.sampled_from(fields)))
    for _ in range(draw(st.sampled_from((0, 0, 0, 0, 1, 2)))):
        every.append((draw(st.sampled_from(("a", "extra", "z"))), draw(junk)))
    ordered = draw(st.permutations(every))
    space = draw(st.sampled_from(("", " ", "\n\t")))
    return ["{", *joined([[f'"{key}":{space}', *value] for key, value in ordered]), "}"]


@st.composite
def v2_requests(draw, model: str) -> tuple[list[Part], int]:
    """The parts of a request's text, and the raw bytes behind it."""
    names = ["x", "w"] if model == "pair" else ["x", "w", "v"]
    rows = draw(st.integers(1, 2)) if model == "pair" else 1
    entries, tail = [], 0
    for name in draw(st.permutations(names)):
        spec = next(spec for spec in MODELS[model][0].inputs if spec.name == name)
        shape = [rows, 2] if model == "pair" else list(spec.shape)
        count = int(np.prod(shape))
        fields: list[tuple[str, list[Part]]] = [
            ("name", [f'"{name}"']),
            ("datatype", [f'"{spec.datatype.name}"']),
            ("shape", [json.dumps(shape)]),
        ]
        if draw(st.integers(0, 2)) == 0:
            nbytes = count * spec.datatype.itemsize
            fields.append(("parameters", [f'{{"binary_data_size":{nbytes}}}']))
            tail += nbytes
            repeats = False
        else:
            nesting = draw(st.sampled_from((0, 0, 1, 2)))
            wrong = draw(st.sampled_from((0,) * 19 + (1,)))
            fields.append(("data", [Span(count + wrong, nesting)]))
            repeats = True
        entries.append(draw(objects(fields, may_repeat=repeats)))
    fields = [("inputs", ["[", *joined(entries), "]"])]
    if draw(st.booleans()):
        fields.append(("id", ['"', Id(), '"']))
    if draw(st.booleans()):
        fields.append(
            ("parameters", [f'{{"binary_data_output":{draw(st.sampled_from(("true", "false")))}}}'])
        )
    if draw(st.booleans()):
        wanted = draw(st.permutations([spec.name for spec in MODELS[model][0].outputs]))[
            : 1 + draw(st.integers(0, 1))
        ]
        outputs = [
            {"name": name, **draw(st.sampled_from(({}, {"parameters": {"binary_data": True}})))}
            for name in wanted
        ]
        fields.append(("outputs", [json.dumps(outputs)]))
    has_header = tail > 0 or draw(st.booleans())
    text = draw(objects(fields, may_repeat=tail == 0))
    return text, tail if has_header else -1


@st.composite
def predict_requests(draw, model: str) -> list[Part]:
    """The parts of a TensorFlow Serving request."""
    names = ["x", "w"] if model == "pair" else ["x", "w", "v"]
    rows = draw(st.integers(1, 2))
    columns = []
    for name in draw(st.permutations(names)):
        if model == "pair":
            value: list[Part] = [Span(2 * rows, 2)]
        elif name == "x":
            value = [draw(st.sampled_from(NUMBERS[:6]))]
        else:
            value = [Span(2)]
        columns.append((name, value))
    if model == "pair" and draw(st.booleans()):
        instances = [
            draw(objects([(name, [Span(2)]) for name in names], may_repeat=False))
            for _ in range(rows)
        ]
        fields = [("instances", ["[", *joined(instances), "]"])]
    else:
        inputs = ["{", *joined([[f'"{name}":', *value] for name, value in columns]), "}"]
        fields = [("inputs", inputs)]
    return draw(objects(fields))


# Shapes of msgpack

packed_junk = st.recursive(
    st.one_of(
        st.builds(Span, st.sampled_from((1, 2, 4, 8, 16)), is_raw=st.just(True)),
        st.sampled_from((1, True, None, "s", [1, 2])),
    ),
    lambda inner: st.dictionaries(st.sampled_from(("data", "id", "q")), inner, max_size=2),
    max_leaves=3,
)


@st.composite
def packed_requests(draw, model: str) -> dict:
    """A msgpack request."""
    entries = []
    for spec in draw(st.permutations(MODELS[model][0].inputs)):
        shape = [1, 2] if model == "pair" else list(spec.shape)
        count = int(np.prod(shape))
        data: object = Span(count * spec.datatype.itemsize, is_raw=True)
        if draw(st.integers(0, 3)) == 3:  # in the skeleton: the same in both fillings
            data = [draw(st.integers(0, 5))] * count
        fields = [
            ("name", spec.name),
            ("datatype", spec.datatype.name),
            ("shape", shape),
            ("data", data),
        ]
        if draw(st.integers(0, 3)) == 3:
            fields.append((draw(st.sampled_from(("q", "id"))), draw(packed_junk)))
        entries.append(dict(draw(st.permutations(fields))))
    top: list[tuple[str, object]] = [("inputs", entries)]
    if draw(st.booleans()):
        top.append(("id", Id()))
    for key in draw(st.sampled_from(((), (), ("a",), ("data",), ("z", "a")))):
        top.append((key, draw(packed_junk)))
    return dict(draw(st.permutations(top)))


@st.composite
def shaped_requests(draw, model: str) -> Shaped:
    """A request of any form."""
    match draw(st.sampled_from(("v2", "v2", "predict", "msgpack"))):
        case "v2":
            parts, tail = draw(v2_requests(model))
            return Shaped(INFER, parts, tail=tail)
        case "predict":
            return Shaped(PREDICT, draw(predict_requests(model)))
        case _:
            return Shaped(INFER, [], draw(packed_requests(model)))


# Both ways to an answer


class Pair:
    """A front that learns, and one that does not, of one model."""

    def __init__(self, stack: ExitStack, model: str) -> None:
        signature, run = MODELS[model]
        loop = Turns()
        with patch.object(asyncio, "get_running_loop", lambda: loop):
            fronts = []
            for _ in range(2):
                bench = Bench(signature=signature, model=run)
                stack.callback(bench.close)
                fronts.append(Front(bench, stack, loop))
        self.learning, self.other = fronts
        self.other.door._is_worth_learning = lambda _split: False
        self.known = 0

    def answer(self, front: Front, client: Client, request: bytes) -> tuple:
        """What is the same in every answer to a request like this."""
        client.send(request)
        front.loop.turn()
        worker = front.bench.workers[0]
        while (taken := worker.seal()) is not None:
            worker.publish(taken)
            front.bench.deliver()
        front.loop.turn()
        status, headers, body = client.answer()
        return status, {k: v for k, v in headers.items() if k not in MOMENT}, body

    def check(self, requests: list[bytes]) -> None:
        """The same answers to the same requests, one after the other on one connection."""
        clients = [front.connect() for front in (self.learning, self.other)]
        for request in requests:
            served = self.learning.door.served
            fast = self.answer(self.learning, clients[0], request)
            self.known += self.learning.door.served == served
            assert fast == self.answer(self.other, clients[1], request)
        for client in clients:
            client.leave()
            client.close()


@pytest.fixture(scope="module")
def pairs():
    with ExitStack() as stack:
        yield {model: Pair(stack, model) for model in MODELS}


@pytest.mark.parametrize("model", MODELS)
def test_what_is_learned_of_one_request_holds_for_all_like_it(pairs, model):
    pair, whole = pairs[model], model == "single"
    seeds = st.tuples(st.integers(0, 99), st.integers(100, 199), st.integers(200, 299))

    @settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(shaped_requests(model), seeds)
    def holds(shaped: Shaped, seeds: tuple[int, ...]) -> None:
        first, *others = (request_of(shaped, seed, whole=whole) for seed in seeds)
        pair.check([first, first, *others, first])

    before = pair.known
    holds()
    assert pair.known - before > 100  # otherwise it would hold because nothing is ever learned


# By hand: what has been mistaken for something else


def v2_text(data: str, ignored: str = "[1, 2]") -> bytes:
    entries = [
        f'{{"name":"x","datatype":"FP32","shape":[1,2],"data":{data}}}',
        '{"name":"w","datatype":"FP32","shape":[1,2],"data":[1,2]}',
    ]
    return post(f'{{"q":{ignored},"inputs":[{",".join(entries)}]}}'.encode())


@pytest.mark.parametrize(
    "data", ["[null,null]", "[true,true]", '["a","b"]', "[{},{}]", "[[],[]]", "[]", "2", '"a"']
)
def test_data_that_are_no_numbers_teach_nothing(pairs, data):
    pairs["pair"].check([v2_text(data)] * 3 + [v2_text(data, "[7, 7]")])


def test_a_number_in_the_skeleton_is_not_taken_for_an_ignored_array(pairs):
    def request(ignored: int) -> bytes:
        text = f'{{"inputs":{{"x":1,"w":[3,4],"v":[5,6]}},"q":[{ignored}]}}'
        return post(text.encode(), PREDICT)

    pairs["single"].check([request(7)] * 3 + [request(8), request(1)])
    text = '{"q":[%d],"inputs":{"x":1,"w":[3,4],"v":[5,6]}}'
    pairs["single"].check([post((text % n).encode(), PREDICT) for n in (7, 7, 7, 8, 1)])


def test_an_array_in_the_skeleton_is_not_taken_for_an_ignored_bin(pairs):
    def request(ignored: bytes) -> bytes:
        data = np.float32([5, 6]).tobytes()
        entries = [
            {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": data},
            {"name": "w", "datatype": "FP32", "shape": [1, 2], "data": [2, 2]},
        ]
        body = msgpack.packb({"inputs": entries, "q": {"data": ignored}})
        return post(body, content_type="application/msgpack")

    for filler in (bytes, bytearray):
        pairs["pair"].check([request(filler(b"\x07\x07"))] * 3 + [request(b"\x01\x01")])
    pairs["pair"].check([request(bytes(8))] * 3 + [request(b"\x02" * 8)])


def test_a_request_may_have_a_text_of_another_length_each_time(pairs):
    def request(number: float) -> bytes:
        text = json.dumps(
            {
                "inputs": [
                    {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [number, 0.5]},
                    {
                        "name": "w",
                        "datatype": "FP32",
                        "shape": [1, 2],
                        "parameters": {"binary_data_size": 8},
                    },
                ]
            }
        ).encode()
        return post(text + bytes(8), inference_header_content_length=str(len(text)))

    pairs["pair"].check([request(n) for n in (10.25, 10.25, 10.25, 1, 123456.75)])


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body + b" ",
        lambda body: body[:-1],
        lambda body: body + body,
        lambda body: body.replace(b"[1,2]}]", b"[1,2]]"),
        lambda body: body.replace(b'"shape":[1,2]', b'"shape":[2,2]'),
        lambda body: body.replace(b'"shape":[1,2]', b'"shape":[2,1]'),
        lambda body: body.replace(b"FP32", b"FP64"),
        lambda body: body.replace(b"[1,2]}", b"[1,2,3]}"),
    ],
)
def test_a_request_that_is_nearly_like_a_known_one_is_another(
    pairs, change: Callable[[bytes], bytes]
):
    known = v2_text("[3,4]")
    body = known.partition(b"\r\n\r\n")[2]
    pairs["pair"].check([known] * 3 + [post(change(body)), known])
