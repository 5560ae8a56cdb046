"""The batch ring between processes that yield at every atomic step, and die at any.

The ring's promises that no single process can show: no wake-up is lost (workers sleep without a deadline,
so a lost one hangs the run and fails it), no row is lost, run twice without a death, or answered twice, and
a row that was cancelled in time never runs. The processes check the rows (ring_processes.py); at the end
every worker has to turn up at once, which finds one that was left asleep while others did its work.
"""

from __future__ import annotations

import random

import pytest

from tests.kernels.builds import load
from tests.kernels.ring_fleet import Fleet, Scenario


def serve(build: str, scenario: Scenario) -> tuple[dict[str, int], int]:
    """Sums of the front ends' counts, and how many workers died."""
    with Fleet(load(build, "ring"), scenario) as fleet:
        counts = fleet.run()
    return {name: sum(count[name] for count in counts) for name in counts[0]}, fleet.killed


@pytest.mark.parametrize("seed", range(6))
def test_deaths_and_cancellations(seed: int) -> None:
    """Two busy lanes, three workers, eight deaths on each seat at random steps."""
    source = random.Random(seed)
    deaths = [[source.randrange(500) for _ in range(8)] for _ in range(3)]
    counts, killed = serve("debug", Scenario(seed, rows=3000, cancel_chance=0.5, deaths=deaths))
    assert killed == 24
    for name in ("cancelled", "retried", "lost_appends", "lost_edits"):
        assert counts[name] > 0, f"the scenario never met: {name}"


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_death_at_every_step(lanes: int) -> None:
    """One seat's incarnations die at steps 0, 1, 2 ... while another worker, asleep till then, lives.

    The seat is the first, to which wake-ups go, and a burst of slots comes with one wake-up for all:
    so each worker wakes the other, and some die between taking its seat back and waking it.
    """
    steps = [*range(60), *range(60)]
    scenario = Scenario(
        7,
        lanes=lanes,
        workers=2,
        capacity=1,
        window=1,
        burst=(2, 2),
        wake_each_chance=0,
        cancel_chance=0,
        full_house=True,
        deaths=[steps],
    )
    _, killed = serve("debug", scenario)
    assert killed == len(steps)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_no_wake_up_is_lost(seed: int, workers: int) -> None:
    """One lane that sends nothing more until all is answered: nothing hides a lost wake-up."""
    scenario = Scenario(seed, lanes=1, workers=workers, rows=5000, window=1, burst=(1, 1))
    serve("debug", scenario)


@pytest.mark.parametrize("seed", range(2))
def test_full_speed(seed: int) -> None:
    scenario = Scenario(
        seed, slots=64, capacity=32, rows=50_000, window=512, burst=(1, 24), cancel_chance=0.02
    )
    counts, _ = serve("release", scenario)
    assert counts["rows"] >= 100_000
