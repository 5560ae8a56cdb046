"""The batch ring's model, ring.pml, under the model checker spin: exhaustively, and with each part missing.

Each check translates the model, compiles the checker that comes out and lets it visit every state that the
macros of the check allow. Two run at a time, ahead of the tests that ask for them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

MODEL = Path(__file__).with_name("ring.pml")

pytestmark = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")),
    reason="spin or gcc is not installed: apt-get install spin gcc",
)

MAX_DEPTH = 20_000
"""Steps of one run; the longest has some hundred."""

MEMORY_MB = 1500
DEADLINE_S = 100

HOLDS = {
    "everything with one worker": "WORKERS=1 ROWS=3 OTHER_SHAPE=2 CANCELS=1 DEATHS=1 TIMEOUTS=1",
    "two deaths of one worker": "WORKERS=1 CANCELS=1 DEATHS=2 TIMEOUTS=1",
    "two workers": "ROWS=3 OTHER_SHAPE=2",
    "two workers and a cancel": "CANCELS=1 TIMEOUTS=1",
    "two workers and a death": "CAPACITY=1 DEATHS=1 MORTALS=1",
    "two workers, a death and a cancel": "ROWS=1 CANCELS=1 DEATHS=1",
    "a run without end": "ROWS=3 CAPACITY=1 HANGS=1",
    "a run without end, one wake-up a burst, x86": "CAPACITY=1 HANGS=1 TIMEOUTS=1 BURST TSO",
    "batches held back": "ROWS=3 OTHER_SHAPE=2 HOLD",
    "a batch held back and a cancel": "WORKERS=1 CANCELS=1 HOLD",
    "a supervisor that stops after a death": "ROWS=1 DEATHS=1 MORTALS=1 STALL",
}

ENDS = {
    "one worker": "WORKERS=1 CANCELS=1 DEATHS=1 TIMEOUTS=1",
    "two workers": "ROWS=2",
}

STUCK = "invalid end state"
BROKEN = "assertion violated"

# Each in a configuration of its own, as small as shows it: all it allows is allowed in one of HOLDS too.
MUTATIONS = {
    "NO_FENCE_APPEND": ("WORKERS=1", STUCK),
    "NO_FENCE_ANNOUNCE": ("WORKERS=1", STUCK),
    "NO_FENCE_PUBLISH": ("WORKERS=1", STUCK),
    "NO_FENCE_ARM": ("WORKERS=1", STUCK),
    "NO_SECOND_LOOK": ("WORKERS=1", STUCK),
    "NO_LOOK_AFTER_ARM": ("WORKERS=1", STUCK),
    "NO_FUTEX_VALUE": ("WORKERS=1", STUCK),
    "NO_WAKE_AFTER_EDIT": ("WORKERS=1 CANCELS=1", STUCK),
    "NO_WAKE_AFTER_COMPLETE": ("WORKERS=1 ROWS=1 HOLD", STUCK),
    "COMPLETE_PART": ("WORKERS=1 CANCELS=1 HOLD", STUCK),
    "NO_WAKE_ALL": ("ROWS=1 DEATHS=1 MORTALS=1", STUCK),
    "SEEN_UNMET": ("ROWS=1 DEATHS=1 MORTALS=1 STALL", STUCK),
    "WAKE_ONLY_WAITING": ("CAPACITY=1 DEATHS=1 MORTALS=1 DEPTH=1 TSO", STUCK),
    "NO_PASS_ON": ("CAPACITY=1 HANGS=1", STUCK),
    "NO_REARM": ("WORKERS=1 DEATHS=1", STUCK),
    "NO_DONE_OF_DEAD": ("WORKERS=1 DEATHS=1", STUCK),
    "NO_GENERATION": ("OTHER_SHAPE=1", BROKEN),
    "BLIND_SEAL": ("ROWS=1", BROKEN),
    "BLIND_EDIT": ("WORKERS=1 CANCELS=1", BROKEN),
    "LATE_CLEAR": ("ROWS=3 CAPACITY=1", STUCK),
    "EARLY_REPORT": ("WORKERS=1", STUCK),
    "UNCONFIRMED_DEATH": ("WORKERS=1 DEATHS=1", BROKEN),
    "SAME_INCARNATION": ("WORKERS=1 DEATHS=1", BROKEN),
}


class Check(NamedTuple):
    """One exhaustive search.

    Attributes:
        macros: the model's.
        for_cycles: instead of for bad states.
        is_short: better compiled fast than running fast.
    """

    macros: str
    for_cycles: bool = False
    is_short: bool = False

    def run(self, folder: Path) -> str:
        """What the checker printed."""
        macros = [f"-D{macro}" for macro in self.macros.split()]
        options = [
            "-O0" if self.is_short else "-Og",  # -O2 takes three times as long and is no faster
            "-DNP" if self.for_cycles else "-DSAFETY",
            f"-DMEMLIM={MEMORY_MB}",
        ]
        call(folder, "spin", "-a", *macros, str(MODEL))
        call(folder, "gcc", "-w", "-DNOFAIR", *options, "pan.c")
        flags = ["-l"] if self.for_cycles else []
        return call(folder, "./a.out", f"-m{MAX_DEPTH}", *flags)


def call(folder: Path, *command: str) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def searched(request, tmp_path_factory) -> Iterator[Callable[[Check], str]]:
    """Gives the output of a check; starts those of all selected tests at its first use."""
    futures: dict[Check, Future[str]] = {}
    with ThreadPoolExecutor(2) as pool:
        for item in request.session.items:
            if item.module is request.module and hasattr(item, "callspec"):
                for value in item.callspec.params.values():
                    if isinstance(value, Check) and value not in futures:
                        folder = tmp_path_factory.mktemp("search")
                        futures[value] = pool.submit(value.run, folder)
        yield lambda check: futures[check].result()
        pool.shutdown(cancel_futures=True)


def assert_exhausted(output: str) -> None:
    """No error, and nothing left unvisited."""
    assert "errors: 0" in output, output
    for sign in ("not completed", "truncated", "max search depth", "MEMLIM"):
        assert sign not in output, output


@pytest.mark.parametrize(
    "check", [pytest.param(Check(macros), id=name) for name, macros in HOLDS.items()]
)
def test_the_ring_holds(searched, check):
    assert_exhausted(searched(check))


@pytest.mark.parametrize(
    "check",
    [pytest.param(Check(macros, for_cycles=True), id=name) for name, macros in ENDS.items()],
)
def test_nothing_goes_round_for_ever(searched, check):
    """So every run ends, and ends well: that is why absence of bad ends means that all is answered."""
    output = searched(check)
    assert "non-progress cycles" in output
    assert_exhausted(output)


@pytest.mark.parametrize(
    ("check", "sign"),
    [
        pytest.param(Check(f"{macros} {mutation}", is_short=True), sign, id=mutation)
        for mutation, (macros, sign) in MUTATIONS.items()
    ],
)
def test_the_ring_fails_without(searched, check, sign):
    output = searched(check)
    assert "errors: 1" in output, output
    assert re.search(rf"^pan:1: {sign}", output, re.MULTILINE), output


def test_every_mutation_is_tried():
    head = MODEL.read_text().partition("==== Mutations ====")[2].partition("*/")[0]
    assert re.findall(r"^ \* ([A-Z_]+)  ", head, re.MULTILINE) == [*MUTATIONS]
