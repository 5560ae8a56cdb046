"""A version's life in the supervisor: legal moves only, and nothing held once it is unloaded."""

import asyncio
import os

import pytest

from gateway._kernels import ring
from gateway.control import seat as seats
from gateway.control import version as versions
from gateway.control.modelfile import ModelFile
from gateway.control.planning import MemoryBudget
from gateway.control.process import Child
from gateway.control.repository import VersionEntry
from gateway.control.seat import BACKOFF_S, CRASH_LOOP_DEATHS, HEALTHY_S, Seat, describe_exit
from gateway.control.version import VersionObserver, VersionSupervision
from gateway.errors import LoadError
from gateway.serving.channel import MAX_MESSAGE_BYTES, MessageTooLarge
from gateway.serving.plan import Understanding
from gateway.serving.routes import VersionState
from gateway.settings import Instance, ModelSettings, ServerSettings


class Observer:
    """Records the states, and answers at once for front ends that hold nothing."""

    def __init__(self, *frontends: int):
        self.states = []
        self.frontends = lambda: frontends

    def on_state(self, version):
        self.states.append(version.state)
        for frontend in self.frontends():
            version.drained(frontend)

    def on_other(self, *_arguments):
        raise AssertionError("no worker was started")


@pytest.fixture
def make(tmp_path):
    def version(observer: Observer) -> VersionSupervision:
        other = observer.on_other
        return VersionSupervision(
            "m",
            VersionEntry(1, tmp_path / "model.onnx"),
            ModelSettings(),
            ServerSettings(model_repository=tmp_path, drain_timeout_s=0),
            MemoryBudget(1 << 30),
            VersionObserver(
                observer.frontends, observer.on_state, other, other, other, other, other
            ),
        )

    return version


@pytest.mark.parametrize("frontends", [(), (0,), (0, 1, 2)])
async def test_unloading_gives_everything_back(make, frontends):
    observer = Observer(*frontends)
    version = make(observer)
    before = len(os.listdir("/proc/self/fd"))
    await version.unload()
    assert observer.states == [VersionState.UNLOADING, VersionState.UNLOADED]
    assert (
        len(os.listdir("/proc/self/fd")) == before - 3
    )  # its board, and those of its two mappings
    await version.wait_loaded()  # nobody waits for ever
    version.kill_overdue()  # nor looks at a board that is gone
    with pytest.raises(RuntimeError, match="from UNLOADED to UNLOADING"):
        await version.unload()


def test_a_seat_that_dies_again_and_again_without_work_is_in_a_loop():
    seat = Seat(0, Instance())
    pauses = []
    while not seat.is_crash_looping:
        seat.started_ns = 1 << 62  # younger than now
        seat.count_death(completed=0)
        pauses.append(seat.pause_s)
    assert len(pauses) == CRASH_LOOP_DEATHS
    assert pauses == list(BACKOFF_S)


@pytest.mark.parametrize("healed", ["by work", "by time"])
def test_a_seat_that_was_well_in_between_is_in_no_loop(healed):
    seat = Seat(0, Instance())
    for deaths in range(2 * CRASH_LOOP_DEATHS):
        lived_long = healed == "by time"
        seat.started_ns = -int((HEALTHY_S + 1) * 1e9) if lived_long else 1 << 62
        seat.count_death(completed=0 if lived_long else deaths + 1)
        assert seat.deaths == 1
        assert seat.pause_s == BACKOFF_S[0]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "exited with status 0"),
        (-9, "was killed by SIGKILL"),
        (-63, "was killed by signal 63"),
    ],
)
def test_exits_in_words(status, words):
    assert describe_exit(status) == words


# Workers that are started, played by hand


class Played:
    """Stands for a Child: records what it is sent."""

    made: list["Played"]

    def __init__(self, _module, _arguments, _on_message, _on_exit):
        self.made.append(self)
        self.sent = []

    def send(self, op, _fds=(), **fields):
        self.sent.append((op, fields))

    def kill(self):
        pass


TOTAL_BYTES = 1000


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A version with one worker that has loaded; its file is there."""
    path = tmp_path / "repository" / "m" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"a model")
    monkeypatch.setattr(versions, "Child", Played)
    monkeypatch.setattr(Played, "made", [], raising=False)
    monkeypatch.setattr(seats, "BACKOFF_S", (0.0,) * CRASH_LOOP_DEATHS)
    made = []

    def make(taken_bytes: int = 10, frontends: tuple[int, ...] = ()) -> VersionSupervision:
        nothing = lambda *_: None  # noqa: E731
        version = VersionSupervision(
            "m",
            VersionEntry(1, path),
            ModelSettings(),
            ServerSettings(model_repository=tmp_path / "repository"),
            MemoryBudget(TOTAL_BYTES),
            VersionObserver(
                lambda: frontends, nothing, nothing, nothing, nothing, nothing, nothing
            ),
        )
        made.append(version)
        version.start()
        load_worker(version, taken_bytes)
        return version

    yield make
    for version in made:
        version.kill()
        for seat in version.seats:
            version._stop_load_timer(seat)


def load_worker(version: VersionSupervision, taken_bytes: int = 10) -> None:
    understanding = Understanding("", "", (), taken_bytes).to_wire()
    message = {"op": "loaded", "signature": {"a": 1}, "understanding": understanding}
    version._on_message(version.seats[0], message)


async def turns(holds) -> None:
    """Turns of the loop until it holds, many at most."""
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0)
    assert holds()


def file_of(version: VersionSupervision):
    return version._file.path


async def test_a_worker_that_dies_is_replaced_while_its_file_is_the_same(served):
    version = served()
    version._on_exit(version.seats[0], -9)
    await turns(lambda: len(Played.made) == 2)
    load_worker(version)
    assert version.state is VersionState.READY


async def test_a_workers_number_waits_for_every_front_end_that_was_told(served, monkeypatch):
    monkeypatch.setattr(ring, "MAX_INCARNATION", 2)  # the numbers come round again at once
    version = served(frontends=(0, 1, 2))
    (seat,) = version.seats
    version._on_exit(seat, -9)
    await turns(lambda: len(Played.made) == 2)
    load_worker(version)
    assert seat.incarnation == 2
    version.reclaimed(1, 2)
    version.frontend_gone(0)
    version.reclaimed(1, 1)
    version._on_exit(seat, -9)
    await turns(lambda: len(Played.made) == 3)
    assert seat.incarnation == 1
    version._on_exit(seat, -9)  # before it has loaded: no front end knew it
    version.fail("enough")


async def test_a_file_that_cannot_be_opened_for_a_while_is_no_death(served, caplog):
    version = served()
    path = file_of(version)
    path.rename(path.with_name("away"))
    version._on_exit(version.seats[0], -9)
    await turns(lambda: len(caplog.messages) > 3 * CRASH_LOOP_DEATHS)
    assert "its file cannot be opened: No such file or directory; trying again" in caplog.text
    assert (version.state, len(Played.made)) == (VersionState.READY, 1)
    path.with_name("away").rename(path)
    await turns(lambda: len(Played.made) == 2)
    load_worker(version)
    assert version.seats[0].deaths == 1
    assert version.seats[0].misses == 0


def lead_out(path):
    path.rename(path.parents[3] / "elsewhere")
    path.symlink_to(path.parents[3] / "elsewhere")


def replace_folder(path):
    path.parent.rename(path.parents[3] / "elsewhere")
    path.parent.symlink_to(path.parents[3] / "elsewhere")


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


def link_to_itself(path):
    path.unlink()
    path.symlink_to(path)


def touch(path):
    os.utime(path, ns=(1, 1))


def rewrite(path):
    stamp = path.stat().st_mtime_ns
    path.with_name("new").write_bytes(b"A model")
    path.with_name("new").rename(path)
    os.utime(path, ns=(stamp, stamp))


CHANGES = [
    (lead_out, "leads out of the model repository"),
    (replace_folder, "leads out of the model repository"),
    (make_pipe, "is not a regular file"),
    (link_to_itself, "symbolic links in a circle"),
    (touch, "its file changed since it was loaded"),
    (rewrite, "its file changed since it was loaded"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES)
async def test_what_the_file_has_become_is_not_loaded(served, change, reason):
    version = served()
    change(file_of(version))
    version._on_exit(version.seats[0], -9)
    await turns(lambda: version.state is VersionState.FAILED)
    assert reason in version.reason
    assert len(Played.made) == 1


async def test_a_file_that_is_not_there_at_the_first_load_fails_the_version(make):
    version = make(Observer())
    version.start()
    assert version.state is VersionState.FAILED
    assert version.reason == "the model file cannot be opened"


async def test_a_link_within_the_repository_is_followed(tmp_path):
    folder = tmp_path / "m" / "1"
    folder.mkdir(parents=True)
    (tmp_path / "store").write_bytes(b"12345")
    (folder / "model.onnx").symlink_to(tmp_path / "store")
    file = ModelFile(folder / "model.onnx")
    assert (file.check(), file.check()) == (5, 5)
    (tmp_path / "store").write_bytes(b"123456")
    with pytest.raises(LoadError, match="changed"):
        file.check()


async def test_settings_that_fit_no_message_fail_the_version(served, monkeypatch):
    def refuse(_self, _op, _fds=(), **_fields):
        raise MessageTooLarge("a message of 240000 bytes")

    monkeypatch.setattr(Played, "send", refuse)
    monkeypatch.setattr("tests.unit.test_version.load_worker", lambda *_: None)
    version = served()
    assert version.state is VersionState.FAILED
    assert version.reason == "its settings are too long: a message of 240000 bytes"


async def test_workers_that_load_together_share_what_there_is(served):
    version = served(taken_bytes=TOTAL_BYTES + 1)
    assert version.state is VersionState.FAILED
    assert version.reason.startswith("it takes 1001 bytes of memory and the server has 1000 left")


async def test_a_message_that_will_never_fit_is_refused_behind_others_too():
    ended = asyncio.Event()
    child = Child("gateway.serving.worker", [], lambda _message: None, lambda _status: ended.set())
    try:
        while not child._unsent:
            child.send("load", data=bytes(MAX_MESSAGE_BYTES // 2))
        with pytest.raises(MessageTooLarge):
            child.send("load", data=bytes(MAX_MESSAGE_BYTES))
    finally:
        child.kill()
        await ended.wait()
