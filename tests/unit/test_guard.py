"""Keys of the data port: which paths need one, and which key will do."""

from __future__ import annotations

import pytest
from aiohttp import web

from gateway.errors import Forbidden, Unauthorized
from gateway.frontend import guard as guard_module
from gateway.frontend.guard import Guard, role_needed
from gateway.frontend.health import HealthHandlers
from gateway.frontend.tfserving import TensorFlowHandlers
from gateway.frontend.v2 import V2Handlers
from gateway.security.keys import Role, key_digest, make_key

SECRET = bytes(range(32))
NOW_S = 1_700_000_000.0


def known(**fields: object) -> tuple[str, dict[str, object]]:
    """A new key: its header, and what the supervisor says of it."""
    _, text = make_key()
    entry = {"digest": key_digest(SECRET, text), "name": "n", "role": "infer", "models": []}
    return f"Bearer {text}", {**entry, "expires_s": None, **fields}


def guard_of(*keys: dict[str, object]) -> Guard:
    made = Guard()
    made.update(required=True, secret=SECRET, keys=keys)
    return made


def test_what_a_key_may_do():
    header, key = known(models=["m"])
    guard = guard_of(key)
    for _ in range(2):  # anew, and remembered
        guard.check(header, Role.INFER, "m")
        guard.check(header, Role.INFER, None)
        with pytest.raises(Forbidden, match="other models"):
            guard.check(header, Role.INFER, "n")
        with pytest.raises(Forbidden, match="the role infer"):
            guard.check(header, Role.DEPLOYER, "m")


@pytest.mark.parametrize("role", Role)
def test_roles(role):
    header, key = known(role=role.value)
    guard = guard_of(key)
    for needed in (Role.INFER, Role.DEPLOYER):
        if role.covers(needed):
            guard.check(header, needed, "m")
        else:
            with pytest.raises(Forbidden):
                guard.check(header, needed, "m")


@pytest.mark.parametrize(
    "change",
    [
        lambda _: None,
        lambda _: "",
        lambda _: "Bearer ",
        lambda _: "Bearer \udcff",
        lambda header: header.removeprefix("Bearer "),
        lambda header: header.replace("Bearer", "Basic"),
        lambda header: header[:-1],
        lambda header: header + "x",
        lambda header: header.swapcase(),
        lambda _: known()[0],
    ],
)
def test_what_is_no_known_key(change):
    header, key = known()
    guard = guard_of(key)
    for _ in range(2):
        guard.check(header, Role.INFER, "m")
        with pytest.raises(Unauthorized, match="Authorization: Bearer"):
            guard.check(change(header), Role.INFER, "m")


def test_a_key_expires_while_it_is_remembered(monkeypatch):
    header, key = known(expires_s=NOW_S)
    guard = guard_of(key)
    monkeypatch.setattr(guard_module, "wall_ms", lambda: round(NOW_S * 1000) - 1)
    guard.check(header, Role.INFER, "m")
    monkeypatch.setattr(guard_module, "wall_ms", lambda: round(NOW_S * 1000))
    with pytest.raises(Unauthorized):
        guard.check(header, Role.INFER, "m")


def test_a_key_that_is_revoked_is_forgotten():
    header, key = known()
    guard = guard_of(key)
    guard.check(header, Role.INFER, "m")
    guard.update(required=True, secret=SECRET, keys=[])
    with pytest.raises(Unauthorized):
        guard.check(header, Role.INFER, "m")


def test_strangers_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(guard_module, "MAX_CACHED", 2)
    keys = [known() for _ in range(5)]
    guard = guard_of(*(key for _, key in keys))
    for header, _ in keys * 2:
        guard.check(header, Role.INFER, "m")
        assert len(guard._cached) <= 2
    before = dict(guard._cached)
    with pytest.raises(Unauthorized):
        guard.check(known()[0], Role.INFER, "m")
    assert guard._cached == before


def test_every_route_that_does_something_needs_a_role():
    app = web.Application()
    V2Handlers(None, None, None, 0).add_to(app)
    TensorFlowHandlers(None, None).add_to(app)
    HealthHandlers(None, None, False).add_to(app)
    names = {"model": "m%20", "version": "1", "label": "x"}
    needed: dict[object, set[str]] = {}
    for route in app.router.routes():
        path = route.resource.canonical.format(**names)
        is_post = route.method == "POST"
        needed.setdefault((is_post, role_needed(path)), set()).add(path)
    assert needed.keys() == {
        (False, None),
        (True, None),
        (True, Role.INFER),
        (True, Role.DEPLOYER),
    }
    assert needed[True, None] == {"/v2/repository/index"}
    assert len(needed[True, Role.DEPLOYER]) == 2
