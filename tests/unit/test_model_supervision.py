"""What becomes of a model's versions and its route, the processes behind them played by hand."""

import asyncio
from pathlib import Path

import pytest

from gateway.control import models
from gateway.control.models import MAX_MODELS, ModelControl, ModelSupervision
from gateway.control.planning import MemoryBudget
from gateway.control.repository import ModelEntry, VersionEntry
from gateway.control.supervisor import Supervisor
from gateway.control.version import VersionObserver
from gateway.errors import ConfigurationError, InvalidRequest, NotFound, Unavailable
from gateway.serving.channel import MessageTooLarge
from gateway.serving.routes import VersionState
from gateway.serving.routing import ModelRoute
from gateway.settings import ModelSettings, ServerSettings
from gateway.store.records import ModelRecord
from gateway.store.store import AsyncStore, Store


class Version:
    """Stands for a VersionSupervision: loads in one turn of the loop, or fails if its number is bad."""

    bad: frozenset[int] = frozenset()
    no_memory: frozenset[int] = frozenset()

    def __init__(self, model, entry, settings, _server, _budget, _observer):
        if entry.version in self.no_memory:
            raise OSError("no descriptors")
        self.model, self.number, self.settings = model, entry.version, settings
        self.state = VersionState.LOADING
        self.reason = ""
        self.unloads = 0

    @property
    def is_loading(self):
        return self.state is VersionState.LOADING

    def start(self):
        pass

    async def wait_loaded(self):
        await asyncio.sleep(0)
        if self.is_loading:
            is_bad = self.number in self.bad
            self.state = VersionState.FAILED if is_bad else VersionState.READY
            self.reason = "it is bad" if is_bad else ""

    async def unload(self):
        assert self.state in (VersionState.READY, VersionState.FAILED)
        self.state = VersionState.UNLOADING
        await asyncio.sleep(0)
        self.state = VersionState.UNLOADED
        self.unloads += 1


@pytest.fixture(autouse=True)
def played(monkeypatch):
    monkeypatch.setattr(models, "VersionSupervision", Version)
    monkeypatch.setattr(Version, "bad", frozenset())
    monkeypatch.setattr(Version, "no_memory", frozenset())


class World:
    """One model, its route after every change of it, and what was forgotten."""

    def __init__(self):
        self.routes = []
        self.forgotten = []
        other = lambda *_: None  # noqa: E731
        self.observer = VersionObserver(
            tuple,
            other,
            other,
            other,
            other,
            self.on_routes,
            lambda v: self.forgotten.append(v.number),
        )
        self.server = ServerSettings(model_repository=Path("nowhere"))
        self.budget = MemoryBudget(1 << 30)
        self.model = ModelSupervision("m", self.server, self.budget, self.observer)

    def on_routes(self):
        if self.routes[-1:] != [self.route]:
            self.routes.append(self.route)

    @property
    def route(self):
        """The version that everything goes to."""
        return None if self.model.route is None else self.model.route.main

    @property
    def states(self):
        return {n: v.state.value for n, v in sorted(self.model.versions.items())}

    async def load(self, *versions, **settings):
        await self.model.load(entry(*versions, **settings))


def entry(*versions: int, **settings) -> ModelEntry:
    made = tuple(VersionEntry(number, Path(str(number))) for number in versions)
    return ModelEntry("m", ModelSettings.model_validate(settings), made, [])


@pytest.fixture
def world():
    return World()


async def test_new_before_old(world):
    await world.load(1)
    old = world.model.versions[1]
    await world.load(1, 2)
    assert world.states == {1: "UNLOADED", 2: "READY"}
    assert world.routes == [1, 2]  # at no moment nowhere
    assert old.unloads == 1


async def test_what_is_served_and_chosen_is_left_alone(world):
    await world.load(1, 2, version_policy="all")
    before = dict(world.model.versions)
    await world.load(1, 2, version_policy="all", max_batch_size=3)
    assert world.model.versions == before
    assert before[1].settings.max_batch_size is None


async def test_one_that_fails_keeps_what_serves_and_is_tried_anew(world):
    await world.load(1)
    Version.bad = frozenset({3})
    with pytest.raises(InvalidRequest, match="'m' version 3 cannot be served: it is bad"):
        await world.load(2, 3, version_policy="all")
    assert world.states == {1: "READY", 2: "READY", 3: "FAILED"}
    assert world.routes == [1, 2]
    failed = world.model.versions[3]
    Version.bad = frozenset()
    await world.load(2, 3, version_policy="all")
    assert failed.unloads == 1
    assert world.states == {2: "READY", 3: "READY"}
    assert world.routes == [1, 2, 3]
    assert world.forgotten == [1]  # its files are gone


async def test_the_route_moves_once_all_have_loaded(world):
    await world.load(1)
    await world.load(1, 2, 3, version_policy="all")
    assert world.routes == [1, 3]


async def test_no_memory_for_a_version(world):
    await world.load(1)
    Version.no_memory = frozenset({3})
    with pytest.raises(Unavailable, match="no memory or descriptors"):
        await world.load(2, 3, version_policy="all")
    assert world.route == 1
    Version.no_memory = frozenset()
    await world.load(2, 3, version_policy="all")  # 2 went on loading meanwhile
    assert world.states == {2: "READY", 3: "READY"}


async def test_a_manual_route_is_kept_with_its_version(world):
    await world.load(1, 2, promote="manual", version_policy="all")
    assert world.route == 1
    await world.load(1, 2, 3, promote="manual", version_policy={"latest": 1})
    assert world.route == 1
    assert world.states == {1: "READY", 2: "UNLOADED", 3: "READY"}
    await world.load(1, 2, 3)
    assert world.route == 3
    await world.load(1, 2, 3, promote="manual", version_policy="all")
    assert world.route == 3  # where it was when it became manual


async def test_a_manual_route_whose_version_fails_leads_nowhere(world):
    Version.bad = frozenset({1})
    with pytest.raises(InvalidRequest, match="version 1"):
        await world.load(1, 2, promote="manual", version_policy="all")
    assert world.route is None
    assert world.states == {1: "FAILED", 2: "READY"}
    await world.load(1, 2, promote="manual")  # 1 is not chosen any more
    assert world.route == 2
    assert world.states == {1: "UNLOADED", 2: "READY"}


async def test_the_version_that_is_to_be_replaced_answers_while_its_successor_cannot(world):
    Version.bad = frozenset({2})
    with pytest.raises(InvalidRequest):
        await world.load(1, 2, version_policy="all")
    world.model.record = ModelRecord("m", route=ModelRoute.to(2).to_wire())
    assert world.route is None  # by hand: it leads to no other
    world.model.standby = 1
    assert world.route == 1
    Version.bad = frozenset()
    await world.model.unload_version(2)
    await world.load(1, 2, version_policy="all")
    assert world.route == 2


async def test_unload_ends_all_and_leaves_the_failed_too(world):
    Version.bad = frozenset({2})
    with pytest.raises(InvalidRequest):
        await world.load(1, 2, version_policy="all")
    await world.model.unload()
    assert world.states == {1: "UNLOADED", 2: "UNLOADED"}
    assert world.routes == [1, None]
    await world.model.unload()
    Version.bad = frozenset()
    await world.load(1, 2, version_policy="all")
    assert world.routes == [1, None, 2]


@pytest.mark.parametrize(
    ("versions", "policy", "text"),
    [((), "all", "no usable version"), ((1,), {"specific": [9]}, "no usable version 9")],
)
async def test_nothing_to_serve(world, versions, policy, text):
    await world.load(1)
    with pytest.raises(InvalidRequest, match=text):
        await world.load(*versions, version_policy=policy)
    assert world.route == 1


async def test_operations_on_a_model_take_turns_and_unknown_names_leave_nothing(world, monkeypatch):
    on_disk = {"m": entry(1)}

    def scan(_repository, name):
        if name not in on_disk:
            raise NotFound(f"unknown model '{name}'")
        return on_disk[name]

    monkeypatch.setattr(models, "scan_model", scan)
    known = {}
    control = ModelControl(world.server, known, world.budget, world.observer)
    actions = ["load", "unload"] * 8
    await asyncio.gather(*(control.perform(action, "m") for action in actions))
    assert {n: v.state for n, v in known["m"].versions.items()} == {1: VersionState.UNLOADED}
    await control.perform("unload", "nobody")
    with pytest.raises(NotFound):
        await control.perform("load", "nobody")
    assert list(known) == ["m"]
    on_disk.clear()
    await control.perform("unload", "m")
    assert known == {}
    assert world.forgotten == [1]


async def test_there_is_an_end_to_models(world, monkeypatch):
    monkeypatch.setattr(models, "scan_model", lambda _repository, _name: entry(1))
    monkeypatch.setattr(models, "MAX_MODELS", 1)
    known = {}
    control = ModelControl(world.server, known, world.budget, world.observer)
    await control.perform("load", "m")
    with pytest.raises(Unavailable, match="1 models are known already"):
        await control.perform("load", "another")
    await control.perform("load", "m")
    await control.perform("unload", "another")
    assert list(known) == ["m"]


def supervisor_of(world, entries, data):
    class Socket:
        def getsockname(self):
            return "127.0.0.1", 1

    database = "sqlite:///unopened.db"
    store = AsyncStore(Store(database))
    return Supervisor(world.server, entries, data, None, Socket(), store, database, b"s" * 32)


async def test_too_many_models_are_no_start(world):
    supervisor = supervisor_of(world, [entry(1)] * (MAX_MODELS + 1), [])
    with pytest.raises(ConfigurationError, match=f"{MAX_MODELS + 1} models, of {MAX_MODELS}"):
        await supervisor.prepare()


async def test_a_version_that_front_ends_cannot_be_told_of_fails(world):
    class Process:
        def send(self, op, _fds, **fields):
            if "signature" in fields:
                raise MessageTooLarge("a message of 200000 bytes")

    class Told(Version):
        board_fd, seats, signature = -1, (), {}

        def fail(self, reason):
            self.reason = reason

    version = Told("m", VersionEntry(1, Path("1")), ModelSettings(), None, None, None)
    version.state = VersionState.READY
    supervisor = supervisor_of(world, [], [None, None])
    supervisor.plane.on_state = lambda _version: None
    supervisor._frontends[1].process = Process()
    supervisor._on_state(version)
    assert version.reason.startswith("its signature and settings are too long: a message of 200000")
