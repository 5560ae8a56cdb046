"""The models that are served: each one's versions and route, and what operators do to it at run time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager

from gateway.control.planning import MemoryBudget
from gateway.control.repository import (
    ModelEntry,
    VersionEntry,
    choose,
    routed_version,
    scan_model,
)
from gateway.control.version import VersionObserver, VersionSupervision
from gateway.errors import ConfigurationError, GatewayError, InvalidRequest, NotFound, Unavailable
from gateway.serving.routes import VersionState
from gateway.serving.routing import ModelRoute
from gateway.settings import ModelSettings, Promote, ServerSettings
from gateway.store.records import ModelRecord

log = logging.getLogger("gateway.supervisor")

_ENDING = frozenset({VersionState.UNLOADING, VersionState.UNLOADED})

MAX_MODELS = 1024
"""Models that are known at one time; bounds what a new front end is told."""


class ModelSupervision:
    """One model: its versions by number, unloaded ones among them while their files are there.

    Args:
        name: the model's.
        server: the server's settings.
        budget: the server's memory.
        observer: told about every change that front ends must know.
    """

    def __init__(
        self, name: str, server: ServerSettings, budget: MemoryBudget, observer: VersionObserver
    ) -> None:
        self.name = name
        self.versions: dict[int, VersionSupervision] = {}
        self.record = ModelRecord(name)
        """What was decided by hand, as it is in the store."""
        self.wanted: dict[int, bool] = {}
        """Versions that are loaded (True) or not (False) whatever the version policy says."""
        self.claimed: frozenset[int] = frozenset()
        """Versions that a rollout needs."""
        self.standby: int | None = None
        """The version that an active rollout is to replace: it answers while its successor cannot."""
        self.deferred: frozenset[int] = frozenset()
        """Versions that `prepare` leaves to somebody else."""
        self.lock = asyncio.Lock()
        """Held by an operation; the next one waits, in order."""
        self.writing = asyncio.Lock()
        """Held while `record` is replaced, so that each change is made of the one before it."""
        self.operations = 0
        """Those that hold the lock or wait for it."""
        self._server = server
        self._budget = budget
        self._observer = observer
        self._promote: Promote = "latest"
        self._pinned: int | None = None  # where the route stays with ``promote: manual``
        self._held_back: set[int] = set()  # versions that come or go: the route does not lead there

    @property
    def route(self) -> ModelRoute | None:
        """Who answers requests that name no version; None while nobody can.

        A route that was set by hand or by a rollout holds while its main version is READY; while a rollout's
        is not, as after a restart, the version that it replaces answers. Without a route ``promote: latest``
        leads to the newest version that is READY; ``manual`` to the one it stays on, and nowhere while that
        is not READY: no other gets traffic by its misfortune.
        """
        ready = {
            version.number
            for version in self.versions.values()
            if version.state is VersionState.READY and version.number not in self._held_back
        }
        if (decided := self.decided) is not None:
            if decided.main in ready:
                return decided
            return ModelRoute.to(self.standby) if self.standby in ready else None
        if self._promote == "manual":
            ready &= {self._pinned}
        return ModelRoute.to(routed_version(ready, self._promote)) if ready else None

    @property
    def decided(self) -> ModelRoute | None:
        """The route that was set by hand or by a rollout."""
        return None if self.record.route is None else ModelRoute.from_wire(dict(self.record.route))

    def is_needed(self, number: int) -> bool:
        """Whether a version is loaded whatever the policy says: somebody or something leads to it."""
        decided = self.decided
        return (
            self.wanted.get(number, False)
            or number in self.claimed
            or number in self.record.labels.values()
            or (decided is not None and number in decided.versions())
        )

    def is_chosen(self, entry: ModelEntry, number: int) -> bool:
        """Whether a version is one of those to serve."""
        try:
            return any(version.version == number for version in self._chosen(entry))
        except ConfigurationError:
            return True  # nobody can tell: it is left alone

    def prepare(self, entry: ModelEntry) -> None:
        """Make the versions that the policy chooses, for the server's start; nothing is started yet.

        Raises:
            ConfigurationError: the policy names a version that is not there.
            OSError: no memory or descriptors for them.
        """
        chosen = self._chosen(entry)
        for version in chosen:
            if version.version not in self.deferred:
                self._add(version, entry.settings)
        self._read_promote(entry.settings, chosen)

    async def load(self, entry: ModelEntry) -> None:
        """Serve the versions that the policy chooses, and no others: new before old.

        A version that is served already and still chosen is left alone: its content is immutable, and it
        keeps the settings that it was loaded with. To load it with others, unload the model first.
        ``version_policy`` and ``promote`` are the model's and hold from now on. With ``promote: manual``
        the version that is routed stays, chosen or not: the route is moved by hand alone.

        Raises:
            InvalidRequest: there is nothing to serve, or a chosen version cannot be loaded; with its
                reason. Whatever was served still is.
            Unavailable: no memory or descriptors for it now.
        """
        chosen = self._to_serve(entry)
        self._read_promote(entry.settings, chosen)
        await self._serve(chosen, entry.settings)
        kept = {version.version for version in chosen} | {self._pinned}
        await self._retire(number for number in self.versions if number not in kept)
        self.forget_absent([version.version for version in entry.versions])

    async def load_version(self, entry: ModelEntry, number: int) -> None:
        """Serve one version beside the others.

        Raises:
            NotFound: the repository has no such version.
            InvalidRequest: it cannot be loaded; with its reason.
            Unavailable: no memory or descriptors for it now.
        """
        version = version_entry(entry, number)
        self._read_promote(entry.settings, [version])
        await self._serve([version], entry.settings)

    async def begin(self, entry: ModelEntry, number: int) -> None:
        """Begin to load one version, if it is not served; how that ends is seen in its state.

        Raises:
            NotFound: the repository has no such version.
            Unavailable: no memory or descriptors for it now.
        """
        version = version_entry(entry, number)
        if not self._is_served(number):
            await self._start(version, entry.settings)
            self._held_back.discard(number)

    async def unload_version(self, number: int) -> None:
        """End one version, after the route has left it; nothing where it is not loaded."""
        version = self.versions.get(number)
        if version is not None and version.state not in _ENDING:
            await self._retire([number])

    async def unload(self) -> None:
        """End every version: no new requests, then those in flight, then the workers."""
        self._pinned = None
        await self._retire(self.versions)

    def forget_absent(self, present: Collection[int]) -> None:
        """Drop the unloaded versions whose files are gone: clients then hear that they are unknown."""
        for number, version in list(self.versions.items()):
            if version.state is VersionState.UNLOADED and number not in present:
                del self.versions[number]
                self._observer.on_forgotten(version)

    def _read_promote(self, settings: ModelSettings, chosen: Collection[VersionEntry]) -> None:
        """Follow ``promote``. With ``manual`` the route stays where it is, or begins at the lowest."""
        routed, numbers = self.route, {version.version for version in chosen}
        self._promote = settings.promote
        if self._promote == "latest":
            self._pinned = None
        elif routed is not None:
            self._pinned = routed.main
        elif self._pinned not in numbers:
            self._pinned = routed_version(numbers, self._promote) if numbers else None

    def _chosen(self, entry: ModelEntry) -> tuple[VersionEntry, ...]:
        """The versions to serve: what the policy chooses and nobody has forbidden, and what is needed."""
        chosen = {version.version for version in choose(entry)}
        return tuple(
            version
            for version in entry.versions
            if self.is_needed(version.version)
            or (version.version in chosen and self.wanted.get(version.version, True))
        )

    def _to_serve(self, entry: ModelEntry) -> tuple[VersionEntry, ...]:
        """The same. InvalidRequest if there are none."""
        try:
            chosen = self._chosen(entry)
        except ConfigurationError as error:
            raise InvalidRequest(error.message) from None
        if not chosen:
            reason = f": {entry.ignored[0]}" if entry.ignored else ""
            raise InvalidRequest(f"model '{entry.name}' has no usable version{reason}")
        return chosen

    async def _serve(self, entries: Collection[VersionEntry], settings: ModelSettings) -> None:
        """Start versions that are not served, wait for all, and then let the route lead to them."""
        try:
            for version in entries:
                if not self._is_served(version.version):
                    await self._start(version, settings)
            versions = [self.versions[version.version] for version in entries]
            for loading in versions:
                await loading.wait_loaded()
        finally:
            self._held_back.clear()
            self._observer.on_routes()
        for failed in versions:
            if failed.state is VersionState.FAILED:
                raise InvalidRequest(
                    f"model '{self.name}' version {failed.number} cannot be served: {failed.reason}"
                )

    def _is_served(self, number: int) -> bool:
        version = self.versions.get(number)
        return version is not None and (version.is_loading or version.state is VersionState.READY)

    async def _start(self, entry: VersionEntry, settings: ModelSettings) -> None:
        """Start a version that is new here, that failed or that was unloaded."""
        old = self.versions.get(entry.version)
        if old is not None and old.state is VersionState.FAILED:
            await old.unload()
        self._held_back.add(entry.version)
        try:
            version = self._add(entry, settings)
        except OSError as error:
            log.error("model '%s' version %d: %s", self.name, entry.version, error)
            raise Unavailable("no memory or descriptors for another version now") from None
        self._observer.on_state(version)
        version.start()

    def _add(self, entry: VersionEntry, settings: ModelSettings) -> VersionSupervision:
        version = VersionSupervision(
            self.name, entry, settings, self._server, self._budget, self._observer
        )
        self.versions[entry.version] = version
        return version

    async def _retire(self, numbers: Iterable[int]) -> None:
        """Unload versions, after the route has left them."""
        leaving = [
            self.versions[number]
            for number in numbers
            if self.versions[number].state not in _ENDING
        ]
        self._held_back = {version.number for version in leaving}
        self._observer.on_routes()
        await asyncio.gather(*(version.unload() for version in leaving))
        self._held_back.clear()


class ModelControl:
    """Loads and unloads models at run time; one operation at a time for each model, in order.

    Args:
        server: the server's settings.
        models: by name; kept up to date.
        budget: the server's memory.
        observer: told about every change that front ends must know.
    """

    def __init__(
        self,
        server: ServerSettings,
        models: dict[str, ModelSupervision],
        budget: MemoryBudget,
        observer: VersionObserver,
    ) -> None:
        self._server = server
        self._budget = budget
        self._models = models
        self._observer = observer

    async def perform(
        self, action: str, name: str, check: Callable[[ModelSupervision], None] | None = None
    ) -> None:
        """``load`` a model from the repository, as it is now, or ``unload`` it.

        Args:
            action: ``load`` or ``unload``.
            name: the model's.
            check: asked when it is the operation's turn; raises what is against it.

        Raises:
            NotFound: to load: the repository has no such model. One to unload need not exist.
            InvalidRequest: it cannot be served, with the reason; what was served still is.
            Unavailable: not now.
        """
        async with self.operating(name) as model:
            if check is not None:
                check(model)
            await (self._load(model) if action == "load" else self._unload(model))

    @asynccontextmanager
    async def operating(self, name: str) -> AsyncIterator[ModelSupervision]:
        """A model, made if it is not known, for somebody who changes which of its versions are loaded."""
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = ModelSupervision(
                name, self._server, self._budget, self._observer
            )
        model.operations += 1
        try:
            async with model.lock:
                yield model
        finally:
            model.operations -= 1
            if not model.operations and not model.versions and not model.record.revision:
                self._models.pop(name, None)

    async def _load(self, model: ModelSupervision) -> None:
        if len(self._models) > MAX_MODELS:
            raise Unavailable(f"{MAX_MODELS} models are known already: unload some")
        try:
            entry = await self.scan(model.name)
            await model.load(entry)
        except NotFound:
            model.forget_absent([])
            raise
        routed = None if model.route is None else model.route.main
        log.info("model '%s' is loaded, its route leads to version %s", model.name, routed)

    async def _unload(self, model: ModelSupervision) -> None:
        if not model.versions:
            return
        await model.unload()
        log.info("model '%s' is unloaded", model.name)
        try:
            entry = await self.scan(model.name)
            model.forget_absent([version.version for version in entry.versions])
        except NotFound:
            model.forget_absent([])
        except GatewayError:
            pass  # cannot be told now what is still there

    async def scan(self, name: str) -> ModelEntry:
        """The model as the repository has it now, read beside the event loop: disks may be slow."""
        try:
            return await asyncio.to_thread(scan_model, self._server.model_repository, name)
        except ConfigurationError as error:
            raise InvalidRequest(error.message) from None


def version_entry(entry: ModelEntry, number: int) -> VersionEntry:
    """One version of a model in the repository. NotFound without it."""
    for version in entry.versions:
        if version.version == number:
            return version
    raise NotFound(f"model '{entry.name}' has no usable version {number}")
