"""What operators change and rollouts do to the same models, the processes behind them played by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import gateway.clock
from gateway.control import conductor, models
from gateway.control.catalogue import Catalogue
from gateway.control.conductor import Conductor
from gateway.control.counting import Counting
from gateway.control.journal import Journal
from gateway.control.models import ModelControl, ModelSupervision
from gateway.control.planning import MemoryBudget
from gateway.control.registry import Registry
from gateway.control.version import VersionObserver
from gateway.errors import Conflict, Forbidden, PreconditionFailed, TooLarge
from gateway.rollout.observation import Observation
from gateway.rollout.record import Rollout
from gateway.rollout.record import RolloutState as S
from gateway.rollout.spec import RolloutSpec
from gateway.serving.routes import VersionState
from gateway.settings import ServerSettings
from gateway.store.store import AsyncStore, Store

DEADLINE_S = 60
MAX_BYTES = 1024
BY = "ann"


class Version:
    """Stands for a VersionSupervision: it is loaded and unloaded at once."""

    is_loading = False
    reason, signature, memory_bytes, seats, since_s = "", {}, 0, (), 0.0

    def __init__(self, model, entry, *_: Any) -> None:
        self.model, self.number = model, entry.version
        self.state = VersionState.LOADING

    def start(self) -> None:
        self.state = VersionState.READY

    async def wait_loaded(self) -> None:
        pass

    async def unload(self) -> None:
        self.state = VersionState.UNLOADED

    def worker_starts(self) -> list[int]:
        return []


class Clock:
    """The machine's time, and its wall clock, which somebody may set."""

    CLOCK_BOOTTIME = 0

    def __init__(self) -> None:
        self.now_s = self.wall_s = 1e6

    def time(self) -> float:
        return self.wall_s

    def clock_gettime(self, _which: int) -> float:
        return self.now_s


class World:
    """A repository with the versions 1 and 2 of a model, and all that is between it and the admin port."""

    def __init__(self, folder: Path, store: AsyncStore) -> None:
        self.repository = folder / "models"
        for number in (1, 2):
            self.lay(number)
        self.store, self.looks = store, 0
        self.models: dict[str, ModelSupervision] = {}
        observer = VersionObserver(tuple, *[lambda *_: None] * 6)
        settings = ServerSettings(model_repository=self.repository, max_artifact_bytes=MAX_BYTES)
        control = ModelControl(settings, self.models, MemoryBudget(1 << 30), observer)
        journal = Journal(store)
        catalogue = Catalogue(journal)
        self.registry = Registry(
            settings,
            self.models,
            control,
            catalogue,
            journal,
            self.publish,
            lambda model: self.conductor.active(model),
        )
        self.conductor = Conductor(
            settings, self.models, control, journal, self.publish, self.registry.forbid
        )

    def lay(self, number: int) -> Path:
        folder = self.repository / "m" / str(number)
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(b"model %d" % number)
        (self.repository / "m" / "config.yaml").write_text("version_policy: all\npromote: manual\n")
        return folder

    async def publish(self) -> bool:
        return True

    def counted(self, *_: Any, **__: Any) -> Observation:
        self.looks += 1
        return Observation()

    async def load(self) -> None:
        await self.registry.load_model("m", BY)

    @property
    def revision(self) -> int:
        return self.models["m"].record.revision

    async def roll_out(self, **step: Any) -> Rollout:
        """A rollout in its only step."""
        spec = {"canary": 2, "steps": [{"weight_bp": 5000, "min_requests": 0, **step}]}
        made = await self.conductor.create(
            "m", RolloutSpec.model_validate({"metrics": [], **spec}), BY
        )
        await self.until(lambda: self.state(made) is not S.PENDING)
        return made

    def state(self, rollout: Rollout) -> S:
        found = self.conductor.find(rollout.id)
        assert found is not None
        return found.state

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not is_so():  # noqa: ASYNC110 - nothing tells when it is
                await asyncio.sleep(0.001)

    async def look_on(self) -> None:
        """Until the rollout was looked at a few times more."""
        begun = self.looks
        await self.until(lambda: self.looks >= begun + 3)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(gateway.clock, "time", made)
    monkeypatch.setattr(gateway.clock, "_BOOTED_S", 0.0)
    return made


@pytest.fixture
async def world(tmp_path, monkeypatch, clock):
    store = AsyncStore(Store(f"sqlite:///{tmp_path}/state.db"))
    await store.open()
    made = World(tmp_path, store)
    monkeypatch.setattr(models, "VersionSupervision", Version)
    monkeypatch.setattr(conductor, "LOOK_S", 0.001)
    monkeypatch.setattr(Counting, "since_last", made.counted)
    await made.load()
    yield made
    made.conductor.close()
    await store.close()


async def outcomes(*changes: Awaitable[Any]) -> list[str]:
    """What becomes of changes at once: the names of the errors, sorted; empty for one that is made."""
    done = await asyncio.gather(*changes, return_exceptions=True)
    return sorted(type(each).__name__ if isinstance(each, BaseException) else "" for each in done)


# Revisions


async def test_changes_at_once_that_name_no_revision_are_all_made(world):
    before = world.revision
    changes = [world.registry.load_model("m", BY) for _ in range(4)]
    changes += [world.registry.set_label("m", f"l{n}", 1, BY, None) for n in range(4)]
    assert await outcomes(*changes) == [""] * 8
    assert world.revision == before + 8
    assert set(world.models["m"].record.labels) == {"l0", "l1", "l2", "l3"}
    (stored,) = await world.store.call(Store.models)
    assert stored == world.models["m"].record


async def test_and_so_are_those_of_a_rollout_beside_them(world):
    rollout = await world.roll_out(pause=True)
    verbs = ("pause", "resume", "pause", "abort")
    changes = [world.conductor.command(rollout, verb, BY, None) for verb in verbs]
    changes += [world.registry.set_label("m", f"l{n}", 1, BY, None) for n in range(4)]
    assert await outcomes(*changes) == [""] * 8
    assert {"l0", "l1", "l2", "l3"} <= set(world.models["m"].record.labels)


async def test_of_changes_that_name_the_same_revision_one_is_made(world):
    rollout = await world.roll_out(min_duration_s=60)
    await world.until(lambda: world.state(rollout) is S.STEPPING)
    for verb in ("pause", "resume", "pause"):
        now = world.revision
        changes = [
            world.registry.set_label("m", "l", 1, BY, now),
            world.conductor.command(rollout, verb, BY, now),
            world.registry.set_label("m", "k", 1, BY, now),
        ]
        assert await outcomes(*changes) == ["", *["PreconditionFailed"] * 2]
        if world.state(rollout) is not (S.PAUSED if verb == "pause" else S.STEPPING):
            await world.conductor.command(rollout, verb, BY, None)


async def test_a_model_that_is_made_again_has_none_of_its_old_revisions(world, tmp_path):
    for label in ("a", "b", "c"):
        await world.registry.set_label("m", label, 1, BY, None)
    old = world.revision
    for _ in range(2):
        await world.registry.delete_model("m", BY, None)
        (tmp_path / "file").write_bytes(b"model")
        await world.registry.register("m", 1, tmp_path / "file", "upload", BY, False)
        assert world.revision > old
        with pytest.raises(PreconditionFailed):
            await world.registry.load("m", 1, BY, old)
        old = world.revision


# Versions


async def test_what_answers_is_not_unloaded_though_it_is_alone(world):
    await world.registry.unload("m", 2, BY, None)
    with pytest.raises(Conflict, match="route leads to version 1: move it first, or unload the"):
        await world.registry.unload("m", 1, BY, None)
    await world.registry.unload_model("m", BY)
    assert world.models["m"].versions[1].state is VersionState.UNLOADED
    await world.registry.delete_version("m", 1, BY, None)


async def test_a_source_is_held_to_what_the_key_is_for_and_to_the_largest_artifact(world, tmp_path):
    resolve = world.registry.resolve_source
    assert resolve("m/1", lambda model: model == "m") == world.repository / "m" / "1"
    with pytest.raises(Forbidden):
        resolve("m/1", lambda model: model != "m")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"x" * MAX_BYTES)
    (folder / "weights").write_bytes(b"x")
    (folder / "config.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    for work in (
        world.registry.register("m", 3, folder, "folder", BY, False),
        world.registry.take_settings("new", folder),
    ):
        with pytest.raises(TooLarge):
            await work
    await world.registry.register("m", 3, folder / "model.onnx", "folder", BY, False)


# The clock


@pytest.mark.parametrize("jump_s", [-1e5, 1e5])
async def test_a_wall_clock_that_is_set_neither_ends_nor_prolongs_a_step(world, clock, jump_s):
    rollout = await world.roll_out(min_duration_s=60)
    await world.until(lambda: world.state(rollout) is S.STEPPING)
    clock.wall_s += jump_s
    clock.now_s += 59
    await world.look_on()
    assert world.state(rollout) is S.STEPPING
    clock.now_s += 1
    await world.until(lambda: world.state(rollout) is S.SUCCEEDED)


@pytest.mark.parametrize("jump_s", [-1e5, 1e5])
async def test_nor_is_a_canary_kept_warm_for_another_time(world, clock, jump_s):
    rollout = await world.roll_out(pause=True)
    await world.conductor.command(rollout, "abort", BY, None)
    await world.until(lambda: world.state(rollout) is S.ABORTED)
    clock.wall_s += jump_s
    clock.now_s += rollout.spec.abort_keep_warm_s - 1
    await asyncio.sleep(0.05)
    assert world.models["m"].claimed == {1, 2}
    clock.now_s += 1
    await world.until(lambda: world.models["m"].claimed == frozenset())
