"""What the store keeps, as plain values. Times are seconds of the wall clock, UTC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Document = Mapping[str, Any]
"""Plain values that JSON can hold."""


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """What was decided by hand about a model.

    Attributes:
        name: its name.
        revision: raised by each change of the model, its versions, labels, route or rollouts.
        route: `serving.routing.ModelRoute.to_wire` of a route that was set by hand or by a rollout;
            None: it follows the model's settings.
        labels: versions by label.
    """

    name: str
    revision: int = 0
    route: Document | None = None
    labels: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """A version that the registry knows.

    Attributes:
        model: its model's name.
        number: its own.
        digest: SHA-256 of the model file, in hex.
        nbytes: the model file's.
        source: where it came from, in words: ``upload``, ``repository`` or a path beneath a model root.
        registered_s: when it was registered, or seen first.
        is_wanted: True: loaded whatever the version policy says; False: not; None: as the policy says.
    """

    model: str
    number: int
    digest: str
    nbytes: int
    source: str
    registered_s: float
    is_wanted: bool | None = None


@dataclass(frozen=True, slots=True)
class RolloutRecord:
    """A rollout: `rollout.record.Rollout.to_document`, and what it is found by."""

    id: str
    model: str
    is_active: bool
    document: Document


@dataclass(frozen=True, slots=True)
class EventRecord:
    """Something that happened. ``id`` is given by the store, ascending; 0 before that.

    Attributes:
        at_s: when.
        kind: what, as dotted words: ``rollout.step``, ``version.ready``.
        model: whose.
        rollout: the id of a rollout; empty without one.
        actor: who caused it: the name of a key, ``gateway`` for the gateway itself, ``loopback`` for whoever
            needed no key.
        text: one line for people.
        numbers: what was measured, and whatever else machines want.
    """

    at_s: float
    kind: str
    model: str
    actor: str
    text: str
    rollout: str = ""
    numbers: Document = field(default_factory=dict)
    id: int = 0


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """A change that somebody made. ``before`` and ``after`` are None where there was or is nothing."""

    at_s: float
    actor: str
    action: str
    resource: str
    before: Document | None
    after: Document | None
    id: int = 0


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """An API key, of which only a keyed hash is kept.

    Attributes:
        id: public; the key's text begins with it.
        name: for people, and the actor of what it does.
        role: ``viewer``, ``deployer``, ``admin`` or ``infer``.
        models: that it is for; empty: all.
        digest: keyed hash of the key, in hex.
        created_s: when it was made.
        expires_s: when it ends; None: never.
        revoked_s: when it was revoked; None: it was not.
    """

    id: str
    name: str
    role: str
    models: tuple[str, ...]
    digest: str
    created_s: float
    expires_s: float | None = None
    revoked_s: float | None = None


@dataclass(frozen=True, slots=True)
class ReplayRecord:
    """The answer to a POST with an ``Idempotency-Key``: a repeated one gets it again.

    Attributes:
        actor, key: who asked, and the key that they chose.
        request: SHA-256 of method, path and body, in hex.
        status: of the answer; 0: the first is still being carried out.
        body: of the answer.
        at_s: when it was asked.
    """

    actor: str
    key: str
    request: str
    status: int
    body: Document
    at_s: float
