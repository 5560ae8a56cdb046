"""The models that are served: each one's versions and route, and what operators do to it at run time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable

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
from gateway.settings import ModelSettings, Promote, ServerSettings

log = logging.getLogger("gateway.supervisor")

MAX_MODELS = 1024
"""Models that are known at one time; bounds the message with all routes (76 bytes each at most)."""


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
        self.lock = asyncio.Lock()
        """Held by an operation; the next one waits, in order."""
        self.operations = 0
        """Those that hold the lock or wait for it."""
        self._server = server
        self._budget = budget
        self._observer = observer
        self._promote: Promote = "latest"
        self._pinned: int | None = None  # where the route stays with ``promote: manual``
        self._held_back: set[int] = set()  # versions that come or go: the route does not lead there

    @property
    def route(self) -> int | None:
        """The version that answers requests which name none; None while none does.

        ``promote: latest`` leads to the newest version that is READY; ``manual`` to the one it stays on,
        and nowhere while that is not READY: no other gets traffic by its misfortune.
        """
        ready = {
            version.number
            for version in self.versions.values()
            if version.state is VersionState.READY and version.number not in self._held_back
        }
        if self._promote == "manual":
            return self._pinned if self._pinned in ready else None
        return routed_version(ready, self._promote) if ready else None

    def prepare(self, entry: ModelEntry) -> None:
        """Make the versions that the policy chooses, for the server's start; nothing is started yet.

        Raises:
            ConfigurationError: the policy names a version that is not there.
            OSError: no memory or descriptors for them.
        """
        chosen = choose(entry)
        for version in chosen:
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
        chosen = _chosen(entry)
        self._read_promote(entry.settings, chosen)
        try:
            for version in chosen:
                if not self._is_served(version.version):
                    await self._start(version, entry.settings)
            versions = [self.versions[version.version] for version in chosen]
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
        kept = {version.version for version in chosen} | {self._pinned}
        await self._retire(number for number in self.versions if number not in kept)
        self.forget_absent([version.version for version in entry.versions])

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
            self._pinned = routed
        elif self._pinned not in numbers:
            self._pinned = routed_version(numbers, self._promote) if numbers else None

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
            if self.versions[number].state is not VersionState.UNLOADED
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

    async def perform(self, action: str, name: str) -> None:
        """``load`` a model from the repository, as it is now, or ``unload`` it.

        Raises:
            NotFound: to load: the repository has no such model. One to unload need not exist.
            InvalidRequest: it cannot be served, with the reason; what was served still is.
            Unavailable: not now.
        """
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = ModelSupervision(
                name, self._server, self._budget, self._observer
            )
        model.operations += 1
        try:
            async with model.lock:
                await (self._load(model) if action == "load" else self._unload(model))
        finally:
            model.operations -= 1
            if not model.operations and not model.versions:
                del self._models[name]

    async def _load(self, model: ModelSupervision) -> None:
        if len(self._models) > MAX_MODELS:
            raise Unavailable(f"{MAX_MODELS} models are known already: unload some")
        try:
            entry = await self._scan(model.name)
            await model.load(entry)
        except NotFound:
            model.forget_absent([])
            raise
        log.info("model '%s' is loaded, its route leads to version %s", model.name, model.route)

    async def _unload(self, model: ModelSupervision) -> None:
        if not model.versions:
            return
        await model.unload()
        log.info("model '%s' is unloaded", model.name)
        try:
            entry = await self._scan(model.name)
            model.forget_absent([version.version for version in entry.versions])
        except NotFound:
            model.forget_absent([])
        except GatewayError:
            pass  # cannot be told now what is still there

    async def _scan(self, name: str) -> ModelEntry:
        """The model as the repository has it now, read beside the event loop: disks may be slow."""
        try:
            return await asyncio.to_thread(scan_model, self._server.model_repository, name)
        except ConfigurationError as error:
            raise InvalidRequest(error.message) from None


def _chosen(entry: ModelEntry) -> tuple[VersionEntry, ...]:
    """The versions to serve. InvalidRequest if there are none."""
    try:
        chosen = choose(entry)
    except ConfigurationError as error:
        raise InvalidRequest(error.message) from None
    if not chosen:
        reason = f": {entry.ignored[0]}" if entry.ignored else ""
        raise InvalidRequest(f"model '{entry.name}' has no usable version{reason}")
    return chosen
