"""What is changed by hand of models, versions, labels and routes.

A change is checked, written with its event and its entry in the audit log in one transaction, and then
acted on. `revision` is the model's on which a change was decided; None: whatever it is now.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gateway.clock import wall_s
from gateway.control import artifacts
from gateway.control.catalogue import REPOSITORY, Catalogue
from gateway.control.conductor import CANARY, STABLE
from gateway.control.journal import Journal, event
from gateway.control.models import ModelControl, ModelSupervision
from gateway.control.repository import MODEL_FILE
from gateway.control.viewing import model_view, version_view
from gateway.control.views import ModelView, VersionView
from gateway.errors import Conflict, NotFound, PreconditionFailed, Unavailable
from gateway.rollout.record import Rollout
from gateway.serving.routes import VersionState
from gateway.serving.routing import ModelRoute
from gateway.settings import ServerSettings
from gateway.store.changes import AddAudit, Change, DropModel, DropVersion, PutModel, PutVersion
from gateway.store.records import AuditRecord, ModelRecord, VersionRecord


class Registry:
    """Models with their versions, labels and routes. Belongs to the event loop.

    Args:
        settings: the server's.
        models: by name, as the supervisor has them.
        control: loads and unloads.
        catalogue: what is known of versions.
        journal: where changes are written.
        publish: tells front ends what has changed of routes; whether all have acknowledged it.
        active: the rollout of a model that has not ended.
    """

    def __init__(
        self,
        settings: ServerSettings,
        models: dict[str, ModelSupervision],
        control: ModelControl,
        catalogue: Catalogue,
        journal: Journal,
        publish: Callable[[], Awaitable[bool]],
        active: Callable[[str], Rollout | None],
    ) -> None:
        self._settings = settings
        self._models, self._control = models, control
        self._catalogue, self._journal = catalogue, journal
        self._publish, self._active = publish, active

    def models(self) -> list[ModelView]:
        """All that are known, by name."""
        return [self._view(self._models[name]) for name in sorted(self._models)]

    def model(self, name: str) -> ModelView:
        """One of them. NotFound."""
        return self._view(self._known(name))

    def _view(self, model: ModelSupervision) -> ModelView:
        return model_view(model, self._catalogue, self._active(model.name))

    def _known(self, name: str) -> ModelSupervision:
        found = self._models.get(name)
        if found is None:
            raise NotFound("unknown model")
        return found

    def _version_view(self, name: str, number: int) -> VersionView:
        return version_view(self._known(name), self._catalogue, number)

    # Versions

    def resolve_source(self, path: str, may_see: Callable[[str], bool]) -> Path:
        """Where a path of a client leads: see `artifacts.resolve_source`."""
        settings = self._settings
        return artifacts.resolve_source(
            path, settings.model_repository, settings.model_roots, may_see
        )

    def upload_folder(self) -> Path:
        """Where a body is written before it is registered. Unavailable: it cannot be."""
        try:
            return artifacts.drafts_folder(self._settings.model_repository)
        except OSError as error:
            raise Unavailable(f"no version can be stored: {error.strerror}") from None

    async def take_settings(self, model: str, folder: Path) -> None:
        """Have a model that is to be registered the settings of its folder. TooLarge, Unavailable."""
        async with self._control.operating(model):
            repository = self._settings.model_repository
            await asyncio.to_thread(
                artifacts.place_settings, repository, model, folder, self._allowance()
            )

    def _allowance(self) -> artifacts.Allowance:
        return artifacts.Allowance(self._settings.max_artifact_bytes)

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
            TooLarge: it is larger than max_artifact_bytes, with all that lies in its folder.
            Unavailable: it cannot be stored.
        """
        digest, nbytes = await asyncio.to_thread(
            lambda: artifacts.digest_of(artifacts.model_file(file), self._allowance())
        )
        async with self._control.operating(model) as held:
            known = await self._recorded(model, version)
            if known is not None:
                if known.digest != digest:
                    raise Conflict(
                        f"model '{model}' version {version} has other content (SHA-256 {known.digest}): "
                        "a version is immutable, register a new one"
                    )
                return self._version_view(model, version), False
            await asyncio.to_thread(
                artifacts.place,
                self._settings.model_repository,
                model,
                version,
                file,
                self._allowance(),
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
            self._catalogue.keep(record)
            if is_wanted is not None:
                held.wanted[version] = is_wanted
            return self._version_view(model, version), True

    async def _recorded(self, model: str, version: int) -> VersionRecord | None:
        """The record of a version, made where it lies in the repository and was never looked at."""
        if (known := self._catalogue.get(model, version)) is not None:
            return known
        path = self._settings.model_repository / model / str(version) / MODEL_FILE
        if not await asyncio.to_thread(path.is_file):
            return None
        digest, nbytes = await asyncio.to_thread(artifacts.digest_of, path)
        record = VersionRecord(model, version, digest, nbytes, REPOSITORY, wall_s())
        await self._journal.write(PutVersion(record))
        self._catalogue.keep(record)
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
            self._catalogue.drop(model, version)
            held.wanted.pop(version, None)
            repository = self._settings.model_repository
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
            self._catalogue.drop(model)
            held.record, held.wanted = ModelRecord(model), {}
            repository = self._settings.model_repository
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

    # What changes have in common

    async def forbid(self, name: str, number: int) -> None:
        """Have a version not loaded any more; whoever calls this is operating on its model."""
        known = await self._recorded(name, number)
        if known is not None:
            record = replace(known, is_wanted=False)
            await self._journal.write(PutVersion(record))
            self._catalogue.keep(record)
            self._models[name].wanted[number] = False

    async def _want(
        self, held: ModelSupervision, number: int, is_wanted: bool, by: str, action: str
    ) -> None:
        """Remember that a version is to be loaded, or not, whatever the policy says."""
        record = await self._recorded(held.name, number)
        if record is None:
            raise NotFound(f"model '{held.name}' has no version {number}")
        wanted = replace(record, is_wanted=is_wanted)
        before, after = {"is_wanted": record.is_wanted}, {"is_wanted": is_wanted}
        resource = f"versions/{number}"
        text = f"version {number} is {'wanted' if is_wanted else 'not wanted'}"
        await self._write(
            held, by, action, resource, before, after, None, PutVersion(wanted), text=text
        )
        self._catalogue.keep(wanted)
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
        path = f"models/{held.name}" + (f"/{resource}" if resource else "")
        async with held.writing:
            self._check_revision(held, revision)
            number = await self._journal.next_revision(held.record)
            record = replace(held.record, revision=number, **fields)
            await self._journal.write(
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
        if (rollout := self._active(held.name)) is not None:
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
        if route is not None and number in route.versions():
            raise Conflict(
                f"the route leads to version {number}: move it first, or unload the model"
            )

    @staticmethod
    def _check_ready(held: ModelSupervision, numbers: Iterable[int]) -> None:
        for number in numbers:
            found = held.versions.get(number)
            if found is None or found.state is not VersionState.READY:
                state = "not loaded" if found is None else found.state.value
                raise Conflict(f"version {number} is {state}: it must be READY")


def _shares_text(route: ModelRoute) -> str:
    shares = ", ".join(f"{s.weight_bp / 100:g} % to version {s.version}" for s in route.shares)
    return f"route: {shares}"
