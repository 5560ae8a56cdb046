"""Who answers a plain request: the same caller the same version, in both lanes, in the parts asked for."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

from aiohttp.http_parser import HttpRequestParser
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gateway._kernels.fastlane import Door
from gateway.frontend.caller import HttpCaller
from gateway.serving.routing import BASIS_POINTS, ModelRoute, Pin, Shadow, Share, Sticky
from tests.unit.test_fastlane import Client, Turns

CANARY, STABLE = 2, 1

keys = st.binary(max_size=40).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
"""What a header may hold, decoded as aiohttp does it."""

weights = st.integers(0, BASIS_POINTS)


class Caller:
    """A caller with these headers."""

    def __init__(self, **headers: str) -> None:
        self._headers = headers

    def header(self, name: str) -> str | None:
        return self._headers.get(name)

    def address(self) -> str:
        return self._headers["ip"]


def never() -> float:
    raise AssertionError("a request with a key was drawn for")


def split(weight_bp: int, salt: str = "s", slice_bp: int = 0, **fields) -> ModelRoute:
    """A canary with its part, by the caller's header ``user``; a slice of the stable version behind it."""
    shares = [
        Share(CANARY, weight_bp),
        Share(STABLE, slice_bp, is_slice=True),
        Share(STABLE, BASIS_POINTS - weight_bp - slice_bp),
    ]
    return ModelRoute(tuple(shares), salt, Sticky("header", "user"), **fields)


@given(keys, weights, weights)
@example("", 0, BASIS_POINTS)
def test_who_is_on_the_canary_stays_there_as_it_grows(key, one, other):
    less, more = sorted((one, other))
    before, after = (
        split(weight).choose(Caller(user=key), never).version for weight in (less, more)
    )
    assert before == STABLE or after == CANARY
    assert split(0).choose(Caller(user=key), never).version == STABLE
    assert split(BASIS_POINTS).choose(Caller(user=key), never).version == CANARY


@given(keys, st.integers(1, BASIS_POINTS // 2))
def test_the_slice_is_nobody_who_is_on_the_canary(key, weight):
    share = split(weight, slice_bp=weight).choose(Caller(user=key), never)
    bucket = split(weight).bucket(key)
    assert share.is_slice == (weight <= bucket < 2 * weight)
    assert (share.version == CANARY) == (bucket < weight)


def test_keys_are_spread_as_the_weights_say():
    count, weight = 40_000, 2_500
    for salt in ("a", "b"):
        route = split(weight, salt, slice_bp=weight)
        shares = [route.choose(Caller(user=f"user-{i}"), never) for i in range(count)]
        expected = count * weight / BASIS_POINTS
        four_sd = 4 * (expected * (1 - weight / BASIS_POINTS)) ** 0.5
        for of_interest in (lambda s: s.version == CANARY, lambda s: s.is_slice):
            assert abs(sum(map(of_interest, shares)) - expected) < four_sd


def test_another_salt_chooses_others():
    users = [Caller(user=str(i)) for i in range(1000)]
    on = [{i for i, u in enumerate(users) if split(5000, s).choose(u).version == 2} for s in "ab"]
    assert 200 < len(on[0] & on[1]) < 300  # half of half of them


def test_who_has_no_key_is_spread_at_random():
    draw = random.Random(7).random
    count = 40_000
    canary = sum(split(1_000).choose(Caller(), draw).version == CANARY for _ in range(count))
    assert abs(canary - 4_000) < 4 * (4_000 * 0.9) ** 0.5


@given(keys, weights)
def test_a_pin_beats_the_key_and_the_first_pin_the_others(key, weight):
    pins = (Pin("x-go", "canary", CANARY), Pin("x-go", "canary", 9), Pin("x-go", "old", 7))
    route = split(weight, pins=pins)
    assert route.choose(Caller(user=key, **{"x-go": "canary"}), never) == Share(CANARY, 0)
    assert route.choose(Caller(user=key, **{"x-go": "old"}), never) == Share(7, 0)
    other = route.choose(Caller(user=key, **{"x-go": "Canary"}), never)
    assert other == split(weight).choose(Caller(user=key), never)


@given(weights, st.floats(0, 1, exclude_max=True))
def test_copies_are_drawn_by_their_share_and_never_of_the_shadows_own(share_bp, drawn):
    route = split(5000, shadow=Shadow(CANARY, share_bp))
    assert route.is_copied(Share(STABLE, 1), lambda: drawn) == (drawn * BASIS_POINTS < share_bp)
    assert not route.is_copied(Share(CANARY, 1), lambda: 0.0)
    assert not split(5000).is_copied(Share(STABLE, 1), lambda: 0.0)


def test_a_route_survives_its_way_between_processes():
    route = split(1, pins=(Pin("h", "v", 3),), shadow=Shadow(2, 5, "cosine", 0.5))
    assert ModelRoute.from_wire(json.loads(json.dumps(route.to_wire()))) == route
    assert ModelRoute.to(4).is_plain
    assert not route.is_plain
    assert set(route.versions()) == {1, 2, 3}


# Both lanes


class Probe(Door):
    """A door whose every target is a fork, which notes what it learns of the caller and answers nobody."""

    def __init__(self, routes: list[ModelRoute], names: list[str]) -> None:
        super().__init__(Turns(), 1 << 20, 1 << 13, bytes(16))
        self._routes, self._names = routes, names
        self.told: object = None

    def resolve(self, _target: bytes) -> Probe:
        return self

    def choose(self, connection) -> None:
        self.told = what_is_told(connection, self._routes, self._names)

    def step_aside(self, _connection) -> SimpleNamespace:
        return SimpleNamespace(begin=lambda: None, feed=lambda _data: b"")

    def opened(self, _connection) -> None:
        """Nothing is counted here."""


def what_is_told(caller, routes: list[ModelRoute], names: list[str]) -> object:
    """What a caller says of itself, and where that leads."""
    return (
        [caller.header(name) for name in names],
        caller.address(),
        [route.choose(caller, lambda: 0.25) for route in routes],
    )


class Nothing:
    """Of aiohttp's protocol what its parser touches."""

    def pause_reading(self) -> None:
        """No body is long."""

    resume_reading = pause_reading


NAMES = ["x-user", "cookie", "x_user", "x-use", "^", "x-missing", "content-length"]

spellings = st.sampled_from(
    [
        "X-User",
        "x-user",
        "X-USER",
        "x-uSeR",
        "X_User",
        "x\x7fuser",
        "X-Use",
        "x-userx",
        "^",
        "~",
        "Cookie",
    ]
)
values = st.one_of(
    st.sampled_from(
        ["", " ", "\t", "a", "A", " a", "a \t", "one two", "b\x1f", "id=7; user=u%1", "user"]
    ),
    st.sampled_from(['user="q u"', "user=a; user=b", "user", "=", "user==", ";user=x", 'user="']),
    st.text('ab=;:" \t~é€', max_size=12),
)

ROUTES = [
    ModelRoute(split(5000).shares, "s", Sticky("header", "x-user")),
    ModelRoute(split(5000).shares, "s", Sticky("cookie", "user")),
    ModelRoute(split(5000).shares, "s", Sticky("ip")),
    ModelRoute(split(5000).shares, "s", Sticky("header", "x_user"), (Pin("x-user", "a", 9),)),
]


def read_by_aiohttp(head: bytes) -> HttpCaller:
    """The caller of aiohttp's lane."""
    parser = HttpRequestParser(Nothing(), None, 1 << 16, auto_decompress=False)
    ((message, _payload),), _, _ = parser.feed_data(head)
    return HttpCaller(SimpleNamespace(headers=message.headers, remote="10.1.2.3"))


def test_both_lanes_choose_alike():
    plain = set()

    @settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.tuples(spellings, values), max_size=5))
    @example([("X-User", "a"), ("x-user", "b")])
    @example([("cookie", "other=1"), ("Cookie", "user=2")])
    @example([("x-user", "")])
    @example([("x-user", " \t a b \t ")])
    def alike(headers: list[tuple[str, str]]) -> None:
        lines = ["POST /v2/models/m/infer HTTP/1.1", "Host: h", "Content-Length: 0"]
        lines += [f"{name}:{value}" for name, value in headers]
        head = "\r\n".join([*lines, "", ""]).encode()
        probe = Probe(ROUTES, NAMES)
        client = Client(SimpleNamespace(door=probe))
        client.transport.peer = ("10.1.2.3", 4711)
        client.send(head)
        client.close()
        if probe.told is not None:  # otherwise aiohttp reads it anyway
            assert probe.told == what_is_told(read_by_aiohttp(head), ROUTES, NAMES)
            plain.add(head)

    alike()
    assert len(plain) > 100  # otherwise it would hold because nothing is plain
