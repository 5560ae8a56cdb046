"""A seat: one instance of a model version, the worker in it, and how often workers have died there."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass

from gateway.clock import NS_PER_S, monotonic_ns
from gateway.control.process import Child
from gateway.settings import Instance

BACKOFF_S = (0.0, 1.0, 2.0, 3.0, 5.0)
"""Pause before a worker is started anew, by deaths without a completed batch between them."""

CRASH_LOOP_DEATHS = 5
"""Deaths in one seat, without a completed batch of the version between them, that make it FAILED.

Counted by seat: many workers that die at once (the OOM killer, an operator) are not a loop."""

HEALTHY_S = 60.0
"""A worker that lived so long was no part of a crash loop, idle as it may have been."""


@dataclass(slots=True)
class Seat:
    """One instance: its settings, and the process that fills it at present."""

    index: int
    instance: Instance
    child: Child | None = None
    incarnation: int = 0
    is_loaded: bool = False
    timed_out: bool = False
    deaths: int = 0  # since the version completed a batch
    misses: int = 0  # in a row, when its model file could not be opened
    completed: int = 0  # batches of the version when this seat's last worker died
    started_ns: int = 0
    load_timer: asyncio.TimerHandle | None = None

    def count_death(self, completed: int) -> None:
        """Its worker died when the version had completed so many batches."""
        lived_s = (monotonic_ns() - self.started_ns) / NS_PER_S
        is_loop = completed == self.completed and lived_s < HEALTHY_S
        self.deaths = self.deaths + 1 if is_loop else 1
        self.completed = completed

    @property
    def is_crash_looping(self) -> bool:
        """Whether another worker would only die, too."""
        return self.deaths >= CRASH_LOOP_DEATHS

    @property
    def miss_pause_s(self) -> float:
        """How long to wait before the file that could not be opened is tried again."""
        return BACKOFF_S[min(self.misses, len(BACKOFF_S) - 1)]

    @property
    def pause_s(self) -> float:
        """How long to wait before the next worker is started."""
        return BACKOFF_S[min(self.deaths, len(BACKOFF_S)) - 1]


def describe_exit(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
