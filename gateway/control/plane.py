"""The control plane: everything that the admin port shows and changes."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any, cast

from gateway.clock import wall_s
from gateway.control.catalogue import Catalogue
from gateway.control.conductor import Conductor, standby_of
from gateway.control.counting import sample
from gateway.control.journal import Journal
from gateway.control.keyring import Keyring
from gateway.control.leading import Leadership
from gateway.control.models import ModelControl, ModelSupervision
from gateway.control.registry import Registry
from gateway.control.version import VersionSupervision
from gateway.control.views import VersionSample
from gateway.errors import Conflict, NotFound
from gateway.rollout.machine import Verb
from gateway.rollout.record import Rollout
from gateway.rollout.spec import RolloutSpec
from gateway.security.keys import key_digest, make_key
from gateway.serving.routes import VersionState
from gateway.settings import ServerSettings
from gateway.store.changes import (
    AddAudit,
    PutKey,
    RevokeKey,
)
from gateway.store.records import AuditRecord, EventRecord, KeyRecord, ModelRecord
from gateway.store.store import AsyncStore, Store
from gateway.telemetry.metrics import Metrics, ShownVersion

log = logging.getLogger("gateway.control")


class ControlPlane:
    """Registry, rollouts, keys, events and counters of one server. Belongs to the event loop.

    Args:
        settings: the server's.
        store: open.
        database: its URL.
        secret: the server's own.
        models: by name, as the supervisor has them.
        control: loads and unloads.
        publish: tells front ends what has changed of routes; whether all have acknowledged it.
        tell_keys: tells front ends the keys of the data port.

    Attributes:
        registry: models, versions, labels and routes.
        conductor: rollouts.
        keyring: API keys.
    """

    def __init__(
        self,
        settings: ServerSettings,
        store: AsyncStore,
        database: str,
        secret: bytes,
        models: dict[str, ModelSupervision],
        control: ModelControl,
        publish: Callable[[], Awaitable[bool]],
        tell_keys: Callable[[], None],
    ) -> None:
        self.settings, self.store, self.session_secret = settings, store, secret
        self._models, self._tell_keys = models, tell_keys
        self.journal = Journal(store)
        self._leadership = Leadership(store, database)
        self._is_leading = False
        self.keyring = Keyring(secret)
        self.catalogue = Catalogue(self.journal)
        self.registry = Registry(
            settings,
            models,
            control,
            self.catalogue,
            self.journal,
            publish,
            lambda model: self.conductor.active(model),
        )
        self.conductor = Conductor(
            settings, models, control, self.journal, publish, self.registry.forbid
        )
        self._metrics = Metrics()
        self._shown: dict[tuple[str, int], ShownVersion] = {}
        self._revision = 0  # of the store, when it was last read

    # The life of the server

    async def read(self) -> dict[str, ModelRecord]:
        """Read everything that the store knows, before models are made: the records of models, by name."""
        await self.store.call(Store.forget_unanswered)
        self._revision = await self.store.call(Store.revision)
        await self.journal.look()
        self.keyring.replace(await self.store.call(Store.keys))
        self.catalogue.replace(await self.store.call(Store.versions))
        active = await self.store.call(Store.rollouts, None, True)
        self._active = [Rollout.from_document(record.document) for record in active]
        return {record.name: record for record in await self.store.call(Store.models)}

    def adopt(self, model: ModelSupervision, record: ModelRecord | None) -> None:
        """Give a model what was decided about it."""
        if record is not None:
            model.record = record
        model.wanted = {
            version.number: version.is_wanted
            for version in self.catalogue.of(model.name)
            if version.is_wanted is not None
        }
        active = [rollout for rollout in self._active if rollout.model == model.name]
        model.standby = next(map(standby_of, active), None)
        # Its canary is loaded when the rollout goes on: a bad one must not end the server's start.
        model.deferred = frozenset(rollout.canary for rollout in active)

    async def start(self) -> None:
        """Go on with what was active, if this gateway is the one to lead: front ends are there."""
        await self._leadership.renew()
        if self._leadership.is_held:
            self._lead()
        elif self._active:
            log.warning("another gateway leads the rollouts of this database")

    def _lead(self) -> None:
        self._is_leading = True
        self.conductor.resume(self._active)
        self.conductor.start()

    async def _follow_leadership(self) -> None:
        """Lead from the moment on that the lease is held, and no longer."""
        await self._leadership.renew()
        if self._leadership.is_held == self._is_leading:
            return
        self._is_leading = self._leadership.is_held
        if self._is_leading:
            active = await self.store.call(Store.rollouts, None, True)
            self._active = [Rollout.from_document(record.document) for record in active]
            self._lead()
        else:
            log.error("the lease of rollouts is lost: another gateway may lead them")
            self.conductor.close()

    async def refresh(self) -> None:
        """Look whether somebody else has written, as ``gateway keys`` does."""
        await self._follow_leadership()
        revision = await self.store.call(Store.revision)
        if revision == self._revision:
            return
        self._revision = revision
        if self.keyring.replace(await self.store.call(Store.keys)):
            self._tell_keys()
        await self.journal.look()

    async def close(self) -> None:
        """Write what is left. The store stays open."""
        self.conductor.close()
        self.catalogue.close()
        await self.journal.flush()
        await self._leadership.give_up()

    def on_state(self, version: VersionSupervision) -> None:
        """A version has come into another state."""
        key, text = (version.model, version.number), f"version {version.number}"
        match version.state:
            case VersionState.READY:
                self._shown[key] = self._metrics.show(*key, version.ledger, version.workers_up)
                self.catalogue.loaded(version)
                self.journal.note("version.ready", version.model, f"{text} is ready")
            case VersionState.FAILED:
                self.journal.note(
                    "version.failed", version.model, f"{text} has failed: {version.reason}"
                )
            case VersionState.UNLOADED:
                if key in self._shown:
                    self._shown.pop(key).remove()
                self.journal.note("version.retired", version.model, f"{text} is unloaded")

    # What there is

    def samples(self) -> list[VersionSample]:
        """Counters of every version that is READY."""
        return [
            sample(version)
            for model in self._models.values()
            for version in model.versions.values()
            if version.state is VersionState.READY
        ]

    def render_metrics(self) -> bytes:
        """The text that Prometheus scrapes."""
        return self._metrics.render()

    # Rollouts

    async def start_rollout(self, model: str, spec: RolloutSpec, by: str) -> Rollout:
        """Begin a rollout: see `Conductor.checked` for what it raises."""
        self._leadership.check()
        return await self.conductor.create(model, spec, by)

    async def plan(self, model: str, spec: RolloutSpec) -> dict[str, Any]:
        """What a rollout would do, checked as if it began. Raises as `start_rollout`."""
        spec = await self.conductor.checked(model, spec)
        return {"model": model, "dry_run": True, "spec": spec.model_dump(mode="json")}

    async def rollouts(
        self, models: Collection[str] | None, before: str | None, limit: int
    ) -> list[Rollout]:
        """Newest first, of these models or of all."""
        records = await self.store.call(Store.rollouts, models, False, before, limit)
        stored = (Rollout.from_document(record.document) for record in records)
        return [self.conductor.find(rollout.id) or rollout for rollout in stored]

    async def rollout(self, model: str, identity: str) -> Rollout:
        """One rollout. NotFound."""
        found = self.conductor.find(identity)
        if found is None:
            record = await self.store.call(Store.rollout, identity)
            found = None if record is None else Rollout.from_document(record.document)
        if found is None or found.model != model:
            raise NotFound(f"model '{model}' has no such rollout")
        return found

    async def command(
        self, model: str, identity: str, verb: str, by: str, revision: int | None
    ) -> Rollout:
        """Carry out ``pause``, ``resume``, ``promote``, ``promote_full``, ``abort`` or ``retry``."""
        self._leadership.check()
        rollout = await self.rollout(model, identity)
        return await self.conductor.command(rollout, cast("Verb", verb), by, revision)

    # Events, audit, keys

    async def events(
        self, after: int, model: str | None, rollout: str | None, limit: int
    ) -> list[EventRecord]:
        """Oldest first, from the one after an id."""
        return await self.store.call(Store.events, after, model, rollout, limit)

    async def newest_events(
        self, model: str | None, rollout: str | None, limit: int
    ) -> list[EventRecord]:
        """The last ones, oldest first."""
        return await self.store.call(Store.newest_events, model, rollout, limit)

    async def wait_events(self, after: int) -> None:
        """Until there may be an event with a greater id."""
        await self.journal.wait(after)

    async def audit(self, after: int, limit: int) -> list[AuditRecord]:
        """Oldest first, from the one after an id."""
        return await self.store.call(Store.audit, after, limit)

    def has_keys(self) -> bool:
        """Whether a key was ever made: from then on one is asked for."""
        return self.keyring.has_any

    def key_of(self, text: str) -> KeyRecord | None:
        """The valid key that this is."""
        return self.keyring.by_text(text)

    def key_by_id(self, identity: str) -> KeyRecord | None:
        """A valid key."""
        return self.keyring.by_id(identity)

    def keys(self) -> list[KeyRecord]:
        """Every key, revoked and expired ones too."""
        return self.keyring.all()

    async def create_key(
        self, name: str, role: str, models: tuple[str, ...], expires_s: float | None, by: str
    ) -> tuple[KeyRecord, str]:
        """Make a key; its text is nowhere but in what this gives."""
        if not self.keyring.has_admin and role != "admin":
            raise Conflict("make a key of role admin first: from the first key on, one is needed")
        identity, text = make_key()
        digest = key_digest(self.session_secret, text)
        record = KeyRecord(identity, name, role, tuple(models), digest, wall_s(), expires_s)
        after = {"name": name, "role": role, "models": list(models), "expires_s": expires_s}
        audit = AuditRecord(wall_s(), by, "key.create", f"keys/{identity}", None, after)
        await self.journal.write(PutKey(record), AddAudit(audit))
        await self.refresh()
        return record, text

    async def revoke_key(self, identity: str, by: str) -> KeyRecord:
        """End a key. NotFound."""
        audit = AuditRecord(
            wall_s(), by, "key.revoke", f"keys/{identity}", {"revoked": False}, {"revoked": True}
        )
        await self.journal.write(RevokeKey(identity, wall_s()), AddAudit(audit))
        await self.refresh()
        return next(key for key in self.keyring.all() if key.id == identity)
