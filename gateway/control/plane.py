"""The control plane: everything that the admin port shows and changes.

A change is checked, written with its event and its entry in the audit log in one transaction, and then
acted on. `revision` is the model's on which a change was decided; None: whatever it is now.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from gateway.clock import wall_s
from gateway.control import artifacts
from gateway.control.catalogue import Catalogue
from gateway.control.conductor import CANARY, STABLE, Conductor
from gateway.control.counting import sample
from gateway.control.journal import Journal, event
from gateway.control.keyring import Keyring
from gateway.control.leading import Leadership
from gateway.control.models import ModelControl, ModelSupervision
from gateway.control.version import VersionSupervision
from gateway.control.viewing import model_view, version_view
from gateway.control.views import ModelView, VersionSample, VersionView
from gateway.errors import Conflict, NotFound, PreconditionFailed, Unavailable
from gateway.rollout.machine import Verb
from gateway.rollout.record import Rollout
from gateway.rollout.spec import RolloutSpec
from gateway.security.keys import key_digest, make_key
from gateway.serving.routes import VersionState
from gateway.serving.routing import ModelRoute
from gateway.settings import ServerSettings
from gateway.store.changes import (
    AddAudit,
    Change,
    DropModel,
    DropVersion,
    PutKey,
    PutModel,
    PutVersion,
    RevokeKey,
)
from gateway.store.records import AuditRecord, EventRecord, KeyRecord, ModelRecord, VersionRecord
from gateway.store.store import AsyncStore, Store
from gateway.telemetry.metrics import Metrics, ShownVersion

log = logging.getLogger("gateway.control")


class ControlPlane:
    """Models, versions, routes, rollouts, keys and events of one server. Belongs to the event loop.

    Args:
        settings: the server's.
        store: open.
        database: its URL.
        secret: the server's own.
        models: by name, as the supervisor has them.
        control: loads and unloads.
        publish: tells front ends what has changed of routes; whether all have acknowledged it.
        tell_keys: tells front ends the keys of the data port.
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
        self._models, self._control = models, control
        self._publish, self._tell_keys = publish, tell_keys
        self.journal = Journal(store)
        self._leadership = Leadership(store, database)
        self._is_leading = False
        self.keyring = Keyring(secret)
        self.catalogue = Catalogue(self.journal)
        self.conductor = Conductor(settings, models, control, self.journal, publish, self._forbid)
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
        # Its canary is loaded when the rollout goes on: a bad one must not end the server's start.
        model.deferred = frozenset(
            rollout.canary for rollout in self._active if rollout.model == model.name
        )

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

    def models(self) -> list[ModelView]:
        """All that are known, by name."""
        return [self._view(self._models[name]) for name in sorted(self._models)]

    def model(self, name: str) -> ModelView:
        """One of them. NotFound."""
        return self._view(self._known(name))

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

    def _view(self, model: ModelSupervision) -> ModelView:
        rollout = self.conductor.active(model.name)
        return model_view(model, self.catalogue, rollout)

    def _known(self, name: str) -> ModelSupervision:
        found = self._models.get(name)
        if found is None:
            raise NotFound("unknown model")
        return found

    def _version_view(self, name: str, number: int) -> VersionView:
        return version_view(self._known(name), self.catalogue, number)

    # Versions

    def resolve_source(self, path: str) -> Path:
        """Where a path of a client leads: see `artifacts.resolve_source`."""
        roots = (self.settings.model_repository, *self.settings.model_roots)
        return artifacts.resolve_source(path, roots)

    def upload_folder(self) -> Path:
        """Where a body is written before it is registered. Unavailable: it cannot be."""
        try:
            return artifacts.drafts_folder(self.settings.model_repository)
        except OSError as error:
            raise Unavailable(f"no version can be stored: {error.strerror}") from None

    async def take_settings(self, model: str, folder: Path) -> None:
        """Have a model that is to be registered the settings of its folder. Unavailable."""
        async with self._control.operating(model):
            repository = self.settings.model_repository
            await asyncio.to_thread(artifacts.place_settings, repository, model, folder)

    async def register(
        self,
        model: str,
        version: int,
        file: Path,
        source: str,
        by: str,
        is_move: bool,
        is_wanted: bool | None = False,
    ) -> tuple[VersionView, bool]:
        """Make a version of a file or folder; it is not loaded by that. Whether it is new.

        Args:
            model: its name, which may be new.
            version: its number.
            file: a file or folder.
            source: where that came from, to be shown.
            by: who registers it.
            is_move: whether the file may be taken away.
            is_wanted: whether it is to be loaded; None: the model's settings say that.

        Raises:
            Conflict: the version is there with other content.
            InvalidRequest: there is no model file.
            Unavailable: it cannot be stored.
        """
        digest, nbytes = await asyncio.to_thread(
            lambda: artifacts.digest_of(artifacts.model_file(file))
        )
        async with self._control.operating(model) as held:
            known = self.catalogue.get(model, version) or await self._found(model, version)
            if known is not None:
                if known.digest != digest:
                    raise Conflict(
                        f"model '{model}' version {version} has other content (SHA-256 {known.digest}): "
                        "a version is immutable, register a new one"
                    )
                return self._version_view(model, version), False
            await asyncio.to_thread(
                artifacts.place,
                self.settings.model_repository,
                model,
                version,
                file,
                is_move=is_move,
            )
            record = VersionRecord(model, version, digest, nbytes, source, wall_s(), is_wanted)
            after = {"digest": digest, "nbytes": nbytes, "source": source}
            await self._write(
                held,
                by,
                "version.register",
                f"versions/{version}",
                None,
                after,
                None,
                PutVersion(record),
                text=f"version {version} is registered",
            )
            self.catalogue.keep(record)
            if is_wanted is not None:
                held.wanted[version] = is_wanted
            return self._version_view(model, version), True

    async def _found(self, model: str, version: int) -> VersionRecord | None:
        """The record of a version that lies in the repository and was never looked at."""
        path = self.settings.model_repository / model / str(version) / "model.onnx"
        if not await asyncio.to_thread(path.is_file):
            return None
        digest, nbytes = await asyncio.to_thread(artifacts.digest_of, path)
        record = VersionRecord(model, version, digest, nbytes, "repository", wall_s())
        await self.journal.write(PutVersion(record))
        self.catalogue.keep(record)
        return record

    async def load(self, model: str, version: int, by: str, revision: int | None) -> VersionView:
        """Serve a version. NotFound, InvalidRequest with the reason it cannot be, Unavailable."""
        async with self._control.operating(model) as held:
            self._check_revision(held, revision)
            entry = await self._control.scan(model)
            await held.load_version(entry, version)
            await self._want(held, version, True, by, "version.load")
            await self._publish()
        return self._version_view(model, version)

    async def unload(self, model: str, version: int, by: str, revision: int | None) -> VersionView:
        """End a version. Conflict while a route, a label or a rollout leads to it."""
        async with self._control.operating(self._known(model).name) as held:
            self._check_revision(held, revision)
            self._check_unneeded(held, version)
            await self._want(held, version, False, by, "version.unload")
            self._check_unneeded(held, version)  # a rollout may have begun while that was written
            await held.unload_version(version)
        return self._version_view(model, version)

    async def delete_version(self, model: str, version: int, by: str, revision: int | None) -> None:
        """Remove a version and its files. Conflict while it is loaded."""
        async with self._control.operating(self._known(model).name) as held:
            self._check_revision(held, revision)
            view = self._version_view(model, version)
            if view.state not in ("REGISTERED", "RETIRED", "FAILED"):
                raise Conflict(f"version {version} is {view.state}: unload it first")
            self._check_unneeded(held, version)
            await held.unload_version(version)
            await self._write(
                held,
                by,
                "version.delete",
                f"versions/{version}",
                {"digest": view.digest},
                None,
                None,
                DropVersion(model, version),
                text=f"version {version} is deleted",
            )
            self.catalogue.drop(model, version)
            held.wanted.pop(version, None)
            repository = self.settings.model_repository
            await asyncio.to_thread(artifacts.remove_version, repository, model, version)
            held.forget_absent([n for n in held.versions if n != version])

    async def delete_model(self, model: str, by: str, revision: int | None) -> None:
        """Unload a model and remove it with all its files. Conflict while a rollout is active."""
        async with self._control.operating(self._known(model).name) as held:
            self._check_revision(held, revision)
            self.check_idle(held)
            await held.unload()
            before = {"versions": [v.number for v in self._view(held).versions]}
            await self._write(
                held, by, "model.delete", "", before, None, None, DropModel(model), text="deleted"
            )
            self.catalogue.drop(model)
            held.record, held.wanted = ModelRecord(model), {}
            repository = self.settings.model_repository
            await asyncio.to_thread(artifacts.remove_model, repository, model)
            held.forget_absent([])
            await self._publish()

    async def load_model(self, model: str, by: str) -> ModelView:
        """Read a model from the repository anew and serve what its policy chooses."""
        await self._control.perform("load", model)
        held = self._known(model)
        await self._write(held, by, "model.load", "", None, {}, None, text="loaded")
        await self._publish()
        return self._view(held)

    async def unload_model(self, model: str, by: str) -> None:
        """End every version of a model. Conflict while a rollout is active."""
        held = self._known(model)
        await self._control.perform("unload", model, self.check_idle)
        await self._write(held, by, "model.unload", "", None, {}, None, text="unloaded")
        await self._publish()

    # Labels and routes

    async def set_label(
        self, model: str, label: str, version: int, by: str, revision: int | None
    ) -> ModelView:
        """Have a label lead to a version. Conflict unless that is READY."""
        async with self._control.operating(self._known(model).name) as held:
            self._check_label(held, label)
            self._check_ready(held, (version,))
            labels = {**held.record.labels, label: version}
            text = f"label {label} leads to version {version}"
            await self._put_labels(held, label, labels, by, revision, text)
            return self._view(held)

    async def delete_label(
        self, model: str, label: str, by: str, revision: int | None
    ) -> ModelView:
        """Remove a label. NotFound."""
        async with self._control.operating(self._known(model).name) as held:
            self._check_label(held, label)
            if label not in held.record.labels:
                raise NotFound(f"model '{model}' has no label '{label}'")
            labels = {name: n for name, n in held.record.labels.items() if name != label}
            await self._put_labels(held, label, labels, by, revision, f"label {label} is removed")
            return self._view(held)

    async def _put_labels(
        self,
        held: ModelSupervision,
        label: str,
        labels: dict[str, int],
        by: str,
        revision: int | None,
        text: str,
    ) -> None:
        before = {label: held.record.labels.get(label)}
        after = {label: labels.get(label)}
        await self._write(
            held,
            by,
            "label.set",
            f"labels/{label}",
            before,
            after,
            revision,
            text=text,
            labels=labels,
        )
        await self._publish()

    async def set_route(
        self, model: str, route: ModelRoute | None, by: str, revision: int | None
    ) -> ModelView:
        """Share out a model's requests by hand; None: as its settings say. Conflict: a version not READY."""
        async with self._control.operating(self._known(model).name) as held:
            self.check_idle(held)
            if route is not None:
                self._check_ready(held, route.versions())
            wire = None if route is None else route.to_wire()
            before, after = {"route": held.record.route}, {"route": wire}
            text = "the route follows the settings" if route is None else _shares_text(route)
            await self._write(
                held, by, "route.set", "route", before, after, revision, text=text, route=wire
            )
            await self._publish()
            return self._view(held)

    # Rollouts

    async def start_rollout(self, model: str, spec: RolloutSpec, by: str) -> Rollout:
        """Begin a rollout: see `Conductor.checked` for what it raises."""
        self._leadership.check()
        return await self.conductor.create(model, spec, by)

    async def plan(self, model: str, spec: RolloutSpec) -> dict[str, Any]:
        """What a rollout would do, checked as if it began. Raises as `start_rollout`."""
        spec = await self.conductor.checked(model, spec)
        return {"model": model, "dry_run": True, "spec": spec.model_dump(mode="json")}

    async def rollouts(self, model: str | None, before: str | None, limit: int) -> list[Rollout]:
        """Newest first."""
        records = await self.store.call(Store.rollouts, model, False, before, limit)
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

    # What changes have in common

    async def _forbid(self, name: str, number: int) -> None:
        """Have a version not loaded any more; whoever calls this is operating on its model."""
        known = self.catalogue.get(name, number) or await self._found(name, number)
        if known is not None:
            record = replace(known, is_wanted=False)
            await self.journal.write(PutVersion(record))
            self.catalogue.keep(record)
            self._models[name].wanted[number] = False

    async def _want(
        self, held: ModelSupervision, number: int, is_wanted: bool, by: str, action: str
    ) -> None:
        """Remember that a version is to be loaded, or not, whatever the policy says."""
        record = self.catalogue.get(held.name, number) or await self._found(held.name, number)
        if record is None:
            raise NotFound(f"model '{held.name}' has no version {number}")
        wanted = replace(record, is_wanted=is_wanted)
        before, after = {"is_wanted": record.is_wanted}, {"is_wanted": is_wanted}
        resource, text = f"versions/{number}", f"version {number} is wanted"
        if not is_wanted:
            text = f"version {number} is not wanted"
        await self._write(
            held, by, action, resource, before, after, None, PutVersion(wanted), text=text
        )
        self.catalogue.keep(wanted)
        held.wanted[number] = is_wanted

    async def _write(
        self,
        held: ModelSupervision,
        by: str,
        action: str,
        resource: str,
        before: Mapping[str, Any] | None,
        after: Mapping[str, Any] | None,
        revision: int | None,
        *changes: Change,
        text: str,
        **fields: Any,
    ) -> None:
        """Write a change of a model with all that goes with it."""
        self._check_revision(held, revision)
        record = replace(held.record, revision=held.record.revision + 1, **fields)
        path = f"models/{held.name}" + (f"/{resource}" if resource else "")
        await self.journal.write(
            PutModel(record, held.record.revision),
            *changes,
            event(action, held.name, text, actor=by, numbers=after),
            AddAudit(AuditRecord(wall_s(), by, action, path, before, after)),
        )
        held.record = record

    @staticmethod
    def _check_revision(held: ModelSupervision, revision: int | None) -> None:
        if revision is not None and revision != held.record.revision:
            raise PreconditionFailed("the model has changed since it was read: read it again")

    def check_idle(self, held: ModelSupervision) -> None:
        """Conflict while a rollout of a model is active."""
        if (rollout := self.conductor.active(held.name)) is not None:
            raise Conflict(f"rollout {rollout.id} of the model is active: end it first")

    def _check_label(self, held: ModelSupervision, label: str) -> None:
        if label in (STABLE, CANARY):
            self.check_idle(held)

    @staticmethod
    def _check_unneeded(held: ModelSupervision, number: int) -> None:
        route = held.route
        labels = [label for label, leads_to in held.record.labels.items() if leads_to == number]
        if labels:
            raise Conflict(f"label '{labels[0]}' leads to version {number}: move it first")
        if number in held.claimed:
            raise Conflict(f"a rollout needs version {number}")
        if route is not None and number in route.versions() and len(held.versions) > 1:
            raise Conflict(f"the route leads to version {number}: move it first")

    @staticmethod
    def _check_ready(held: ModelSupervision, numbers: Any) -> None:
        for number in numbers:
            found = held.versions.get(number)
            if found is None or found.state is not VersionState.READY:
                state = "not loaded" if found is None else found.state.value
                raise Conflict(f"version {number} is {state}: it must be READY")


def _shares_text(route: ModelRoute) -> str:
    shares = ", ".join(f"{s.weight_bp / 100:g} % to version {s.version}" for s in route.shares)
    return f"route: {shares}"
