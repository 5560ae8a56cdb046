"""A version's life in the supervisor: legal moves only, and nothing held once it is unloaded."""

import os

import pytest

from gateway.control.planning import MemoryBudget
from gateway.control.repository import VersionEntry
from gateway.control.seat import BACKOFF_S, CRASH_LOOP_DEATHS, HEALTHY_S, Seat, describe_exit
from gateway.control.version import VersionObserver, VersionSupervision
from gateway.serving.routes import VersionState
from gateway.settings import Instance, ModelSettings, ServerSettings


class Observer:
    """Records the states, and answers at once for a front end that holds nothing."""

    def __init__(self):
        self.states = []

    def on_state(self, version):
        self.states.append(version.state)
        version.drained()

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
            VersionObserver(observer.on_state, other, other, other, other, other),
        )

    return version


async def test_unloading_gives_everything_back(make):
    observer = Observer()
    version = make(observer)
    before = len(os.listdir("/proc/self/fd"))
    await version.unload()
    assert observer.states == [VersionState.UNLOADING, VersionState.UNLOADED]
    assert len(os.listdir("/proc/self/fd")) == before - 2  # its board, and the mapping's own
    await version.wait_loaded()  # nobody waits for ever
    version.kill_overdue()  # nor looks at a board that is gone
    with pytest.raises(RuntimeError, match="from UNLOADED to UNLOADING"):
        await version.unload()


async def test_only_what_is_unloaded_is_drained(make):
    version = make(Observer())
    version.drained()
    version.frontend_gone()
    assert not version.is_drained
    await version.unload()
    assert version.is_drained


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
