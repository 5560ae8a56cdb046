"""The front end's table: what is refused with which words, and when the server is ready."""

import pytest

from gateway.errors import InvalidRequest, NotFound, Unavailable
from gateway.serving.routes import RouteTable, Version, VersionState, checked_name
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
                made.routes[model] = number
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
