"""What front ends and workers are told when they start: the settings that concern them, as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FrontendOptions:
    """See `gateway.settings.ServerSettings` for what each one bounds.

    Attributes:
        index: the front end's own, from 0; its successor has it too.
        frontends: how many there are.
    """

    index: int
    frontends: int
    strict_readiness: bool
    model_control: bool
    orphan_grace_s: float
    drain_pause_s: float
    drain_timeout_s: float
    max_request_bytes: int
    max_header_bytes: int
    keepalive_timeout_s: float
    fast_lane: bool
    lane_bytes: int
    log_level: str
    log_format: str

    def to_wire(self) -> dict[str, Any]:
        """Plain values for a message between processes."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> FrontendOptions:
        """The inverse of `to_wire`."""
        return cls(**wire)


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What a worker is told besides what to load; see `gateway.settings` for what each one bounds.

    Attributes:
        seats: of the version's board.
        seat: the worker's own.
        incarnation: by which front ends know it.
        cpus: a list such as ``0-3,8`` to run on; None: any.
    """

    seats: int
    seat: int
    incarnation: int
    cpus: str | None
    max_queue_delay_us: int
    orphan_grace_s: float
    log_level: str
    log_format: str

    def to_wire(self) -> dict[str, Any]:
        """Plain values for a message between processes."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> WorkerOptions:
        """The inverse of `to_wire`."""
        return cls(**wire)
