"""What was measured, by case and round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from harness import FEWEST_ROUNDS, QUIET_CORES

BARE = "bare"
"""The subject that is no server: a loop of ONNX Runtime."""


@dataclass(frozen=True)
class Sample:
    """One turn of one server, or of a bare loop.

    Attributes:
        cpu_us: of all its processes, for each request that was answered well.
        rate: such answers a second.
        p50_ms, p99_ms: latency; a bare loop has no p99.
        errors: answers that were none: another status, a broken connection, too late.
        pss_mb: memory of all its processes at the end; a bare loop has none.
        others: cores that everybody else on the machine used meanwhile.
    """

    cpu_us: float
    rate: float
    p50_ms: float
    p99_ms: float | None
    errors: int
    pss_mb: float | None
    others: float


class Case(NamedTuple):
    """A workload, by its name, under a number of connections."""

    workload: str
    connections: int


class Key(NamedTuple):
    """What a row of the table is about."""

    case: Case
    subject: str


@dataclass
class Results:
    """All samples, and why some are missing.

    Attributes:
        titles: of subjects and of cases, for people.
        samples: by round; a round in which a server failed has none.
        notes: what happened beside, by case or server.
    """

    titles: dict[str | Case, str] = field(default_factory=dict)
    samples: dict[Key, dict[int, Sample]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def note(self, about: str, text: str) -> None:
        """Keep a remark, once."""
        texts = self.notes.setdefault(about, [])
        if text not in texts:
            texts.append(text)

    def add(self, key: Key, number: int, sample: Sample) -> None:
        """Keep the sample of a round."""
        self.samples.setdefault(key, {})[number] = sample

    def together(self, keys: Sequence[Key]) -> list[tuple[Sample, ...]]:
        """Samples of all keys, of each round that has all of them."""
        by_key = [self.samples.get(key, {}) for key in keys]
        rounds = sorted(set.intersection(*map(set, by_key)))
        return [tuple(samples[number] for samples in by_key) for number in rounds]

    def busiest(self) -> float:
        """The median of what others used, in cores, of all samples."""
        others = [s.others for by_round in self.samples.values() for s in by_round.values()]
        return statistics.median(others) if others else 0.0


def counted(rounds: Sequence[tuple[Sample, ...]]) -> tuple[list[tuple[Sample, ...]], bool]:
    """The rounds that count, and whether they were quiet.

    The noise alone decides, never the result: the quiet rounds, where there are `FEWEST_ROUNDS` of them
    or all are quiet, else all.
    """
    quiet = [samples for samples in rounds if all(s.others < QUIET_CORES for s in samples)]
    enough = len(quiet) >= min(FEWEST_ROUNDS, len(rounds))
    return (quiet, True) if enough else (list(rounds), False)
