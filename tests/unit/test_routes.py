"""The front end's table: what is refused with which words, and when the server is ready."""

import pytest

from gateway.errors import InvalidRequest, NotFound, Unavailable
from gateway.serving.routes import RouteTable, Target, Version, VersionState, checked_name
from gateway.serving.routing import ModelRoute, Pin, Shadow, Share
from gateway.telemetry.metrics import Metrics


class Dispatcher:
    """The one thing that readiness asks of it."""

    has_workers = True


def table(started: bool = True, **states: str) -> RouteTable:
    """Models by name, with the states of their versions from 1 on; the last READY one is routed."""
    made = RouteTable()
    made.is_started = started
    for model, words in states.items():
        made.models[model] = {}
        for number, word in enumerate(words.split(), start=1):
            version = Version(model, number, Metrics().version(model, number), VersionState(word))
            version.dispatcher = Dispatcher() if word == "READY" else None
            made.models[model][number] = version
            if word == "READY":
                made.routes[model] = ModelRoute.to(number)
    return made


@pytest.mark.parametrize(
    ("states", "while_starting", "started"),
    [
        ("READY", True, True),
        ("READY FAILED", True, True),
        ("LOADING", False, True),
        ("WARMING", False, True),
        ("FAILED LOADING", False, True),
        ("FAILED", True, True),
        ("UNLOADING", False, True),
        ("UNLOADED", False, True),
        ("READY LOADING", True, True),
    ],
)
def test_readiness_by_a_models_states(states, while_starting, started):
    assert table(started=False, m=states, other="READY").is_ready(strict=False) is while_starting
    assert table(started=True, m=states, other="READY").is_ready(strict=False) is started
    lost = "FAILED" in states and "READY" not in states
    assert table(started=True, m=states).is_ready(strict=True) is not lost


def test_a_route_that_stays_on_a_failed_version_is_missed():
    routes = table(m="FAILED READY")
    del routes.routes["m"]
    assert not routes.is_ready(strict=False)
    routes.models["m"][1].state = VersionState.UNLOADED
    assert routes.is_ready(strict=True)  # the moment between READY and the route


def test_a_routed_version_without_a_worker_is_missed():
    routes = table(m="READY")
    routes.models["m"][1].dispatcher = None
    assert not routes.is_ready(strict=False)


@pytest.mark.parametrize("state", [s for s in VersionState if s is not VersionState.READY])
def test_a_version_that_is_not_ready_says_what_it_is(state):
    routes = table(m=state.value)
    with pytest.raises(Unavailable, match=f"version 1 is {state.value.lower()}"):
        routes.resolve("m", "1").ready()
    with pytest.raises(Unavailable, match="no version of model 'm'"):
        routes.resolve("m")


def test_what_is_forgotten_is_unknown():
    routes = table(m="UNLOADED READY")
    routes.forget("m", 1)
    with pytest.raises(NotFound, match="no version 1"):
        routes.resolve("m", "1")
    routes.forget("m", 2)
    with pytest.raises(NotFound, match="unknown model"):
        routes.model("m")
    routes.forget("m", 2)


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "a" * 65, "a\n"])
def test_names_outside_the_grammar(name):
    with pytest.raises(InvalidRequest, match="name must match"):
        checked_name(name)


class Nobody:
    """A caller without headers."""

    def header(self, _name: str) -> None:
        return None

    def address(self) -> str:
        return ""


class Pinned(Nobody):
    """A caller whose every header is this."""

    def __init__(self, value: str) -> None:
        self._value = value

    def header(self, _name: str) -> str:
        return self._value


CANARY = ModelRoute(
    (Share(2, 9_999), Share(1, 1)),
    pins=(Pin("x", "one", 1), Pin("x", "three", 3)),
    shadow=Shadow(3, 10_000, "top1"),
)


def chosen(routes: RouteTable, caller: object) -> tuple[int, bool]:
    """The version that answers, and whether anybody gets a copy."""
    choice = routes.choose("m", None, None, caller)
    return choice.version.number, choice.shadow is not None


def test_the_route_chooses_where_no_version_is_named():
    routes = table(m="READY READY READY")
    routes.direct("m", CANARY, {"best": 3})
    assert routes.resolve("m").number == 1  # the stable one stands for the model
    assert chosen(routes, Pinned("one")) == (1, True)
    assert chosen(routes, Pinned("three")) == (3, False)  # no copy of what it answers itself
    choice = routes.choose("m", None, None, Pinned("one"))
    assert choice.shadow == Target(routes.models["m"][3], CANARY.shadow)
    for version, label, number in (("2", None, 2), (None, "best", 3)):
        choice = routes.choose("m", version, label, Pinned("one"))
        assert (choice.version.number, choice.shadow) == (number, None)


@pytest.mark.parametrize("lost", ["state", "dispatcher", "forgotten"])
def test_a_canary_that_cannot_answer_is_stood_in_for(lost):
    routes = table(m="READY READY READY")
    routes.direct("m", ModelRoute((Share(2, 9_999, is_slice=True), Share(1, 1))), {})
    draws = [routes.choose("m", None, None, Nobody()) for _ in range(20)]
    assert 2 in {choice.version.number for choice in draws}
    match lost:
        case "state":
            routes.models["m"][2].state = VersionState.FAILED
        case "dispatcher":
            routes.models["m"][2].dispatcher = None
        case "forgotten":
            routes.forget("m", 2)
    for _ in range(20):
        choice = routes.choose("m", None, None, Nobody())
        assert (choice.version.number, choice.is_slice) == (1, False)
    assert routes.is_ready(strict=False)


def test_a_main_version_that_is_gone_is_missed():
    routes = table(m="READY READY")
    routes.direct("m", ModelRoute((Share(2, 9_999), Share(1, 1))), {})
    routes.forget("m", 1)
    assert not routes.is_ready(strict=False)
    with pytest.raises(Unavailable, match="no version of model 'm'"):
        routes.resolve("m")


def test_labels():
    routes = table(m="READY READY")
    routes.direct("m", ModelRoute.to(2), {"old": 1, "lost": 9})
    assert routes.resolve("m", label="old").number == 1
    with pytest.raises(NotFound, match="no version 9"):
        routes.resolve("m", label="lost")
    with pytest.raises(NotFound, match="no label 'new'"):
        routes.resolve("m", label="new")
    with pytest.raises(InvalidRequest, match="a label must match"):
        routes.resolve("m", label="a b")
    with pytest.raises(InvalidRequest, match="not both"):
        routes.choose("m", "1", "old", Nobody())
    routes.direct("m", None, {})
    assert (routes.routes, routes.labels) == ({}, {})
    with pytest.raises(Unavailable):
        routes.choose("m", None, None, Nobody())
    with pytest.raises(NotFound, match="unknown model"):
        routes.choose("n", None, None, Nobody())
