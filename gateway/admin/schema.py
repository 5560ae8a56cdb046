"""Bodies, queries and answers of the admin API. Unknown fields are refused by name.

Answers that are views or records already (`gateway.control.views`, `rollout.record.Rollout`) have no
second form here: they are written as they are, and described as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from gateway.control.views import ModelView, VersionView
from gateway.names import MAX_VERSION
from gateway.rollout.record import Rollout
from gateway.rollout.spec import Part, StickySpec
from gateway.security.keys import Role
from gateway.serving.routing import BASIS_POINTS
from gateway.store.records import AuditRecord, EventRecord, KeyRecord

MAX_PAGE = 1000
"""Entries of a page of a list."""

PAGE = 100
"""Entries of a page where the caller does not say."""

MAX_SHARES = 16
MAX_PINS = 16
MAX_KEY_MODELS = 256
"""Entries of the lists in a body."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
"""`names.NAME` as a pattern of JSON Schema."""

_Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
_Version = Annotated[int, Field(ge=1, le=MAX_VERSION)]
_Limit = Annotated[int, Field(ge=1, le=MAX_PAGE)]
_Id = Annotated[int, Field(ge=0, le=MAX_VERSION)]
_Path = Annotated[str, StringConstraints(min_length=1, max_length=4096)]


class Nothing(Part):
    """No fields at all. The body may be left out."""


class SourceBody(Part):
    """Where a version's file is."""

    source: _Path
    """Path of the .onnx file, beneath the model repository or one of model_roots."""


class LabelBody(Part):
    """Where a label leads."""

    version: _Version
    """A version that is READY."""


class ShareBody(Part):
    """A version's part of the traffic."""

    version: _Version
    """Which one."""
    weight_bp: Annotated[int, Field(ge=0, le=BASIS_POINTS)]
    """Its part, in hundredths of a percent."""


class PinBody(Part):
    """Requests with this header go to this version, whatever the weights say."""

    header: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}$")]
    """The header's name, in any case."""
    value: Annotated[str, StringConstraints(pattern=r"^[ -~]{1,256}$")]
    """Its value, exactly."""
    version: _Version
    """Who answers."""


class RouteBody(Part):
    """A route that is set by hand."""

    shares: Annotated[tuple[ShareBody, ...], Field(min_length=1, max_length=MAX_SHARES)]
    """The canary's first, the stable version's last; weights sum to 10,000."""
    sticky: StickySpec | None = None
    """Null: each request is drawn by lot. Without a salt the route keeps the one that it has."""
    match: Annotated[tuple[PinBody, ...], Field(max_length=MAX_PINS)] = ()
    """Requests that choose for themselves; the first that fits wins."""

    @model_validator(mode="after")
    def _holds_together(self) -> RouteBody:
        if sum(share.weight_bp for share in self.shares) != BASIS_POINTS:
            raise ValueError(f"shares: weights must sum to {BASIS_POINTS}")
        if len({share.version for share in self.shares}) != len(self.shares):
            raise ValueError("shares: a version stands there twice")
        return self


class KeyBody(Part):
    """A key that is to be made."""

    name: _Name
    """For people, and the actor of what it does."""
    role: Literal["viewer", "deployer", "admin", "infer"]
    """What it may do."""
    models: Annotated[tuple[_Name, ...], Field(max_length=MAX_KEY_MODELS)] = ()
    """Models that it is for; an empty list: all."""
    expires_s: Annotated[float, Field(gt=0, le=1e11, allow_inf_nan=False)] | None = None
    """When it ends, in seconds of the wall clock; null: never."""


class SessionBody(Part):
    """A key for a session."""

    key: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    """The whole key."""


class FolderBody(Part):
    """A model for the management call that registers it."""

    name: _Name
    """The model."""
    base_path: _Path
    """Its folder, with a folder <version>/model.onnx for each version, beneath one of model_roots."""


class ReloadBody(Part):
    """The management call that reads a model again."""

    base_path: _Path | None = None
    """A folder to register versions from first; null: none."""


class PageQuery(Part):
    """A page of a list."""

    limit: _Limit = PAGE
    """Entries at most."""
    after: Annotated[str, StringConstraints(max_length=64)] | None = None
    """What the page before says as next."""


class NumberPageQuery(Part):
    """A page of a list whose entries have ascending numbers."""

    limit: _Limit = PAGE
    """Entries at most."""
    after: _Id = 0
    """Number of the last entry that is known."""


class EventsQuery(NumberPageQuery):
    """Which events."""

    model: _Name | None = None
    """Of this model only."""
    rollout: _Name | None = None
    """Of this rollout only."""
    last: _Limit | None = None
    """So many of the newest, whatever after and limit say; null: those after the number."""
    stream: bool = False
    """Whether they go on as server-sent events; so does Accept: text/event-stream."""


class PromoteQuery(Part):
    """How a rollout is promoted."""

    full: bool = False
    """Whether everything goes to the canary at once, not only the next step."""


@dataclass(frozen=True, slots=True)
class ModelPage:
    """Models by name."""

    models: list[ModelView]
    next: str | None


@dataclass(frozen=True, slots=True)
class VersionPage:
    """A model's versions, ascending. ``next`` is the number of the last one, where there are more."""

    versions: list[VersionView]
    next: int | None


@dataclass(frozen=True, slots=True)
class LabelView:
    """A label of a model and the version that it leads to."""

    label: str
    version: int


@dataclass(frozen=True, slots=True)
class LabelPage:
    """Labels by name."""

    labels: list[LabelView]
    next: str | None


@dataclass(frozen=True, slots=True)
class RouteView:
    """A model's route. ``by`` says who decided it: ``policy``, ``hand`` or ``rollout``.

    ``shares``, ``sticky`` and ``match`` have the form in which a route is put; ``shadow`` gets copies.
    """

    by: str
    shares: list[dict[str, Any]]
    sticky: dict[str, Any] | None
    match: list[dict[str, Any]]
    shadow: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class RolloutPage:
    """Rollouts, newest first."""

    rollouts: list[Rollout]
    next: str | None


@dataclass(frozen=True, slots=True)
class EventPage:
    """Events, oldest first. ``next`` is what to ask for those ``after``."""

    events: list[EventRecord]
    next: int


@dataclass(frozen=True, slots=True)
class AuditPage:
    """Entries of the audit log, oldest first. ``next`` is what to ask for those ``after``."""

    audit: list[AuditRecord]
    next: int


@dataclass(frozen=True, slots=True)
class KeyView:
    """A key, without what is kept of its secret. ``key`` is its text, told once, when it is made."""

    id: str
    name: str
    role: Role
    models: tuple[str, ...]
    created_s: float
    expires_s: float | None
    revoked_s: float | None
    key: str | None = None

    @classmethod
    def of(cls, record: KeyRecord, text: str | None = None) -> KeyView:
        """What may be shown of a record."""
        return cls(
            record.id,
            record.name,
            Role(record.role),
            record.models,
            record.created_s,
            record.expires_s,
            record.revoked_s,
            text,
        )


@dataclass(frozen=True, slots=True)
class KeyPage:
    """Keys, oldest first."""

    keys: list[KeyView]
    next: str | None


@dataclass(frozen=True, slots=True)
class SessionView:
    """Who the caller is; null where it is nobody. ``needs_key``: nothing can be done without a key."""

    actor: str | None
    role: Role | None
    needs_key: bool


@dataclass(frozen=True, slots=True)
class ErrorView:
    """Every refusal and failure."""

    error: str
    code: str
